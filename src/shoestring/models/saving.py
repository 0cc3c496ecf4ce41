"""A model written to a folder that is either whole or absent."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.core.files import atomic_folder
from shoestring.models.folder import read_json
from shoestring.models.load import load_tokenizer, quiet
from shoestring.models.seal import seal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_MORE_TEMPLATES = "additional_chat_templates"  # those with names, as transformers saves them


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    *,
    card: str = "",
    overwrite: bool = False,
) -> Path:
    """Write model, tokenizer and model card as safetensors and JSON; returns the folder. A packed model is sealed.

    Args:
        card: text of README.md; none is written when empty.
        overwrite: replace what the folder holds; without it only an absent or empty folder is written to.

    Raises:
        UsageError: the folder holds something.
        ShoestringError: the disk is full or the place cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    with atomic_folder(folder, overwrite=overwrite) as temp, quiet():
        model.save_pretrained(temp)
        if formats_of(model):
            from shoestring.models.packed import ROOM

            seal(temp, ROOM)
        if tokenizer is not None:
            tokenizer.save_pretrained(temp)
        # peft writes a card of its own, full of blanks to fill in.
        (temp / "README.md").unlink(missing_ok=True)
        if card:
            (temp / "README.md").write_text(card, encoding="utf-8")
        for file in temp.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & temp.stat().st_mode)
    return folder


def copy_tokenizer(source: Path, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Put the tokenizer of the model folder `source`, if it has one, into `folder`.

    One that tokenizer.json says in full is copied; others are read and saved.

    Raises:
        UsageError: it is damaged.
    """
    whole, config = source / "tokenizer.json", source / "tokenizer_config.json"
    if whole.is_file() and not (config.is_file() and read_json(config).get("auto_map")):
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / _MORE_TEMPLATES).is_dir():
            shutil.copytree(source / _MORE_TEMPLATES, folder / _MORE_TEMPLATES, dirs_exist_ok=True)
        return
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if tokenizer is not None:
        with quiet():
            tokenizer.save_pretrained(folder)


def formats_of(model: Any) -> dict[str, int]:
    """Format -> how many modules of the model are packed in it."""
    from shoestring.models.packed import packed_modules

    return dict(Counter(str(module.format) for _, module in packed_modules(model)))

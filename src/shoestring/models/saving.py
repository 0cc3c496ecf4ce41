"""A model written to a folder that is either whole or absent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.core.files import atomic_folder
from shoestring.models.load import quiet
from shoestring.models.seal import seal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def formats_of(model: Any) -> dict[str, int]:
    """Format -> how many modules of the model are packed in it."""
    from shoestring.models.packed import packed_modules

    return dict(Counter(str(module.format) for _, module in packed_modules(model)))

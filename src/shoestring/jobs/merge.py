"""Adapter and base into one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoestring.core.errors import UsageError
from shoestring.core.files import refuse_occupied
from shoestring.jobs._doors import open_doors, open_model


def merge(
    adapter_folder: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the model that base and adapter are together; it loads without peft and without shoestring.

    The sum is made in float32 and its logits on a probe are held against those of base with adapter. An adapter that
    ends in packed weights gives a packed folder, which is read after an import of ours.

    Args:
        dtype: of the written weights; None keeps that of the base.
        base: in place of the base that the adapter names.
        trust_remote_code: run Python code that the base's folder brings.

    Returns:
        {"folder", "dtype", "difference", "formats"}: the largest difference of a logit, relative to the largest logit;
        format -> number of packed modules, empty in a model of floats.

    Raises:
        UsageError: no adapter, a packed base, an adapter that cannot be merged, or an occupied folder.
        ShoestringError: the merged model answers differently.
    """
    from shoestring.models import resolve, save
    from shoestring.models.folder import ADAPTER_CONFIG, check_adapter, check_folder
    from shoestring.models.load import choose_dtype
    from shoestring.models.merging import merge_into, stored_dtype
    from shoestring.models.saving import formats_of

    path = resolve(adapter_folder)
    if not (path / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{path} is not an adapter", f"it has no {ADAPTER_CONFIG}", "Give the folder of an adapter")
    if not overwrite:
        refuse_occupied(out)
    config = check_adapter(path)
    base = base or config.get("base_model_name_or_path") or ""
    base_folder = check_folder(resolve(base), trust_remote_code=trust_remote_code)
    if base_folder.config.get("quantization_config"):
        raise UsageError(
            f"The adapter cannot be merged into {base}",
            "its weights are packed integers, which have no room for the adapter's small changes",
            "Merge with the model it was packed from (--base), then compress the result",
        )
    open_doors(path)
    loaded = open_model(base, dtype="float32", trust_remote_code=trust_remote_code)
    stored = choose_dtype(dtype, base_folder, "cpu") if dtype else stored_dtype(base_folder)
    model, difference = merge_into(loaded, path)
    model = model.to(stored)
    name = str(stored).removeprefix("torch.")
    formats = formats_of(model)
    card = f"# {path.name}, merged\n\nThe weights of `{base}` with the adapter `{path.name}` added, in {name}"
    card += "".join(f", {count} matrices as {form}" for form, count in formats.items()) + ".\n"
    card += "\nWrite `import shoestring.methods.quantizers` before `from_pretrained`.\n" if formats else ""
    tokenizer = _tokenizer(path) or loaded.tokenizer
    save(model, tokenizer, out, card=card, overwrite=overwrite)
    return {"folder": str(out), "dtype": name, "difference": difference, "formats": formats}


def _tokenizer(path: Path) -> Any:
    """The adapter's own tokenizer, None when it brings none."""
    from transformers import AutoTokenizer

    return (
        AutoTokenizer.from_pretrained(path, local_files_only=True)
        if (path / "tokenizer_config.json").is_file()
        else None
    )

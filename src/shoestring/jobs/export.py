"""A finished model in a format that other programs read."""

from __future__ import annotations

from pathlib import Path

from shoestring.core.errors import UsageError, nearest
from shoestring.core.files import refuse_occupied
from shoestring.jobs._doors import open_model

FORMATS = ("safetensors", "gguf")


def export(
    folder: str | Path,
    out: str | Path,
    format: str = "safetensors",
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write the model in `folder` to `out`; returns where it stands.

    Args:
        format: "safetensors" writes plain weights in `dtype`, unpacking packed ones, that any transformers reads;
            "gguf" one file with the weights as they are, where GGUF has types that carry them exactly.
        trust_remote_code: run Python code that the folder brings.

    Raises:
        UsageError: an unknown format, an adapter (merge it first), an occupied place, or what GGUF does not carry.
    """
    from shoestring.models import resolve, save
    from shoestring.models.folder import ADAPTER_CONFIG

    if format not in FORMATS:
        raise UsageError(f"unknown format {format}", remedy=nearest(format, FORMATS))
    path = resolve(folder)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        raise UsageError(
            f"{path} is an adapter, not a model", remedy="Merge it with its base first: `shoestring merge`"
        )
    if format == "gguf":
        from shoestring.models.gguf_writing import write_gguf

        if Path(out).exists() and not overwrite:
            raise UsageError(f"{out} exists already", remedy="Name another file, or add --overwrite")
        return write_gguf(path, Path(out), trust_remote_code=trust_remote_code)
    if not overwrite:
        refuse_occupied(out)
    loaded = open_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    model = loaded.model
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize()
    return save(model, loaded.tokenizer, out, overwrite=overwrite)

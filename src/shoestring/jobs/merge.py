"""Adapter and base into one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import refuse_occupied
from shoestring.jobs._doors import open_doors, open_model

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1e-3  # of the largest logit, in float32


def merge(
    adapter_folder: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the model that base and adapter are together; it loads without peft and without shoestring.

    The sum is made in float32 and its logits on a probe are held against those of base with adapter.

    Args:
        dtype: of the written weights; None keeps that of the base.
        base: in place of the base that the adapter names.

    Returns:
        {"folder", "dtype", "difference"}: the largest difference of a logit, relative to the largest logit.

    Raises:
        UsageError: no adapter, a packed base, an adapter that cannot be merged, or an occupied folder.
        ShoestringError: the merged model answers differently.
    """
    from peft import PeftModel

    from shoestring.models import resolve, save
    from shoestring.models.folder import ADAPTER_CONFIG, check_adapter, check_folder
    from shoestring.models.load import choose_dtype, quiet

    path = resolve(adapter_folder)
    if not (path / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{path} is not an adapter", f"it has no {ADAPTER_CONFIG}", "Give the folder of an adapter")
    if not overwrite:
        refuse_occupied(out)
    config = check_adapter(path)
    base = base or config.get("base_model_name_or_path") or ""
    base_folder = check_folder(resolve(base))
    if base_folder.config.get("quantization_config"):
        raise UsageError(
            f"The adapter cannot be merged into {base}",
            "its weights are packed integers, which have no room for the adapter's small changes",
            "Merge with the model it was packed from (--base), then compress the result",
        )
    open_doors(path)
    loaded = open_model(base, dtype="float32")
    stored = choose_dtype(dtype, base_folder, "cpu") if dtype else _stored(base_folder)
    try:
        with quiet():
            joined = PeftModel.from_pretrained(loaded.model, str(path), local_files_only=True).eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UsageError(f"The adapter {path} does not fit {base}", str(error).strip()[:400]) from error
    if not hasattr(joined.base_model, "merge_and_unload"):
        raise UsageError(
            f"A {config.get('peft_type')} adapter cannot be merged", "it changes no weight", "Keep it beside its base"
        )
    before = _probe(joined)
    _untie_what_is_changed(joined)
    try:
        model = joined.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise ShoestringError(f"The adapter {path} cannot be merged", str(error)) from error
    _note_untied(model)
    largest = float(before.abs().max())
    if not 0 < largest < float("inf"):
        raise ShoestringError(
            f"The adapter {path} gives no usable answers",
            "its logits are zero or not finite",
            "Train it again at a lower learning rate",
        )
    difference = float((_probe(model) - before).abs().max()) / largest
    if not difference <= _TOLERANCE:
        raise ShoestringError(
            f"Merging {path} changes the model's answers", f"logits differ by {difference:.2g} of the largest one"
        )
    model = model.to(stored)
    name = str(stored).removeprefix("torch.")
    card = f"# {path.name}, merged\n\nThe weights of `{base}` with the adapter `{path.name}` added, in {name}.\n"
    tokenizer = _tokenizer(path) or loaded.tokenizer
    save(model, tokenizer, out, card=card, overwrite=overwrite)
    return {"folder": str(out), "dtype": name, "difference": difference}


def _tokenizer(path: Path) -> Any:
    """The adapter's own tokenizer, None when it brings none."""
    from transformers import AutoTokenizer

    return (
        AutoTokenizer.from_pretrained(path, local_files_only=True)
        if (path / "tokenizer_config.json").is_file()
        else None
    )


def _stored(folder: Any) -> torch.dtype:
    """The dtype that most bytes of the folder's weights have."""
    import torch

    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    sizes = {name: sum(t.size for t in folder.tensors.values() if t.dtype == name) for name in names}
    return names[max(sizes, key=lambda name: sizes[name])]


def _probe(model: Any) -> torch.Tensor:
    import torch

    count = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(count, (2, 16), generator=torch.Generator().manual_seed(0))
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits.float()


def _untie_what_is_changed(joined: Any) -> None:
    """An adapter on a tied head, or on its table, changes one of them: merging must not change the other with it."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    head: Any = joined.get_output_embeddings()
    table = joined.get_input_embeddings()
    if isinstance(head, BaseTunerLayer) or isinstance(table, BaseTunerLayer):
        inner: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)


def _note_untied(model: Any) -> None:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings and head.weight.data_ptr() != table.weight.data_ptr():
        model.config.tie_word_embeddings = False
        if getattr(model, "all_tied_weights_keys", None):
            model.all_tied_weights_keys = {}

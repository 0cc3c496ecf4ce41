"""Adapter and base as one model, held against the two side by side; and the cache of such models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import locked
from shoestring.models.cache import cache_dir
from shoestring.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, WEIGHTS, check_adapter, check_folder
from shoestring.models.load import Loaded, load, quiet, refuse_strays, resolve
from shoestring.models.saving import save

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1e-3  # of the largest logit, in float32
_FORMAT = 1  # raise it when a merged model changes, so that older ones are made again


def merge_into(base: Loaded, adapter: Path) -> tuple[Any, float]:
    """The base with the adapter in its weights, and the largest difference of a logit, relative to the largest logit.

    An adapter may end in packed weights. The logits compared are then those of the numbers that these stand for: that
    products with them also round their activations is the format's doing, not the merging's.

    Args:
        base: in float32; it is used up.
        adapter: a folder whose type peft knows.

    Raises:
        UsageError: the adapter does not fit the base, or changes no weight.
        ShoestringError: peft refuses to merge it, or the merged model answers differently.
    """
    from peft import PeftModel

    kind = check_adapter(adapter).get("peft_type")
    try:
        with quiet():
            joined = PeftModel.from_pretrained(base.model, str(adapter), local_files_only=True).eval()
            refuse_strays(joined, adapter)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UsageError(f"The adapter {adapter} does not fit {base.ref}", str(error).strip()[:400]) from error
    if not hasattr(joined.base_model, "merge_and_unload"):
        raise UsageError(f"A {kind} adapter cannot be merged", "it changes no weight", "Keep it beside its base")
    before = _probe(joined)
    _untie_what_is_changed(joined)
    try:
        model = joined.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise ShoestringError(f"The adapter {adapter} cannot be merged", str(error)) from error
    _note_untied(model)
    largest = float(before.abs().max())
    if not 0 < largest < float("inf"):
        raise ShoestringError(
            f"The adapter {adapter} gives no usable answers",
            "its logits are zero or not finite",
            "Train it again at a lower learning rate",
        )
    with plain_products(model):
        difference = float((_probe(model) - before).abs().max()) / largest
    if not difference <= _TOLERANCE:
        raise ShoestringError(
            f"Merging {adapter} changes the model's answers", f"logits differ by {difference:.2g} of the largest one"
        )
    return model, difference


def merged_once(adapter: Path, *, offline: bool | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of the adapter's base with the adapter merged, in the base's own dtype; made once for each content.

    Raises:
        UsageError, ShoestringError: as `merge_into`; a base that is packed has no room for small changes.
    """
    base = resolve(str(check_adapter(adapter).get("base_model_name_or_path") or ""), offline=offline)
    folder = check_folder(base, trust_remote_code=trust_remote_code)
    if folder.config.get("quantization_config"):
        raise UsageError(f"{adapter} cannot be merged into {base}", "its weights are packed integers")
    merged = cache_dir() / "merged"
    merged.mkdir(parents=True, exist_ok=True)
    made = merged / _digest(adapter, base)
    if not made.is_dir():
        with locked(merged / f".{made.name}.lock"):
            if not made.is_dir():
                loaded = load(base, dtype="float32", offline=offline, trust_remote_code=trust_remote_code)
                model, _ = merge_into(loaded, adapter)
                save(model.to(stored_dtype(folder)), loaded.tokenizer, made, overwrite=True)
    return made


@contextmanager
def plain_products(model: Any) -> Iterator[None]:
    """Within it, packed linear layers of `model` multiply by the weights that they stand for, activations unrounded."""
    from torch.nn import functional

    from shoestring.models.packed import PackedLinear, packed_modules

    def product(layer: Any, given: Any, _: Any) -> torch.Tensor:
        return functional.linear(given[0], layer.unpacked().to(given[0].dtype), layer.bias)

    layers = [module for _, module in packed_modules(model) if isinstance(module, PackedLinear)]
    hooks = [layer.register_forward_hook(product) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stored_dtype(folder: Any) -> torch.dtype:
    """The dtype that most bytes of a checked folder's weights have."""
    import torch

    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    sizes = {name: sum(t.size for t in folder.tensors.values() if t.dtype == name) for name in names}
    return names[max(sizes, key=lambda name: sizes[name])]


def _digest(adapter: Path, base: Path) -> str:
    """A name for this adapter on this base. The adapter counts by content, the base by place, sizes and times."""
    told = hashlib.sha256(json.dumps([_FORMAT, str(base.resolve())]).encode())
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        with (adapter / name).open("rb") as file:
            told.update(hashlib.file_digest(file, "sha256").digest())
    for name in ("config.json", WEIGHTS, INDEX):
        if (base / name).is_file():
            stat = (base / name).stat()
            told.update(json.dumps([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]).encode())
    return told.hexdigest()[:24]


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

"""A model packed from folder to folder, weight by weight: what stands in memory at any time is one of them."""

from __future__ import annotations

import copy
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.quantizers.auto import AutoHfQuantizer

from shoestring.core.errors import UsageError
from shoestring.models.folder import WEIGHTS, Folder, check_folder
from shoestring.models.load import (
    UNREADABLE,
    auto_class,
    cannot_load,
    choose_dtype,
    kind_of,
    know_architecture,
    quiet,
)
from shoestring.models.packed import PARTS, PackedConfig, PackedExperts, PackedQuantizer, packed_modules
from shoestring.models.tensors import Stored, Tensors, aligned

# In the order of the safetensors package, whose files begin with the last of them.
_TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_STORED = {name: dtype for dtype, name in _TYPES.items()}


def pack_folder(
    source: Path, folder: Path, config: PackedConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel | None:
    """Write the model folder `source`, packed as `config` says, to the existing `folder`, without tokenizer and seal.

    What is written is what `save_pretrained` writes of a model that was loaded with `quantization_config=config`, but
    that weights are rounded from the numbers that are stored, whatever type the model would compute in.

    Returns:
        the packed model without its weights; None, with nothing written, for a model that transformers has to read
        whole: its weights have other names or shapes in files, or a format's length depends on its content.

    Raises:
        UsageError: as `check_folder`, and weights that cannot be packed.
    """
    found = check_folder(source, trust_remote_code=trust_remote_code)
    if found.config.get("quantization_config") or found.config.get("auto_map"):
        return None
    know_architecture(found)
    dtype = choose_dtype("auto", found, "cpu")
    model = _without_weights(found, dtype)
    if not _stored_as_named(model, found) or model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return None
    quantizer: Any = AutoHfQuantizer.from_config(copy.deepcopy(config), pre_quantized=False)
    if not isinstance(quantizer, PackedQuantizer):
        return None
    quantizer._process_model_before_weight_loading(model, dtype=dtype)
    if any(packed.format.layout.says_its_size for _, packed in packed_modules(model)):
        return None
    pack, tensors = quantizer.get_quantize_ops(), Tensors(found.tensors)
    with _writer(folder / WEIGHTS, _own(model, packed=True)) as write:
        for name in found.tensors:
            value = _tensor(tensors[name])
            if quantizer.param_needs_quantization(model, name):
                made = pack.convert({name: value}, full_layer_name=name, model=model, missing_keys=set())
                if quantizer.refusals:
                    raise UsageError(quantizer.refusals[0])
            else:
                made = {name: value.to(model.get_parameter_or_buffer(name).dtype)}  # type: ignore[union-attr]
            for part, tensor in made.items():
                write(part, tensor)
            tensors.release(name)
    quantizer._process_model_after_weight_loading(model)
    model.config.quantization_config = quantizer.quantization_config
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    return model


def _without_weights(found: Folder, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder on the meta device."""
    try:
        with quiet(), torch.device("meta"), no_init_weights():
            config = AutoConfig.from_pretrained(found.path, local_files_only=True)
            model: PreTrainedModel = auto_class(kind_of(found.config)).from_config(config, dtype=dtype)
            if (found.path / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(found.path, local_files_only=True)
    except UNREADABLE as error:
        raise cannot_load(found.path, error) from error
    return model.eval()


def _stored_as_named(model: PreTrainedModel, found: Folder) -> bool:
    """Whether each stored tensor is a tensor of the model under its own name, and none is lacking."""
    own = {name: tuple(tensor.shape) for name, tensor in _own(model).items()}
    if own != {name: tensor.dims for name, tensor in found.tensors.items()}:
        return False
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return all(rename_source_key(name, renamings, converters) == (name, None) for name in own)


def _own(model: PreTrainedModel, packed: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a model that files hold: without those that share the weight of others.

    Args:
        packed: without those, too, that experts only have until what stands for them is read.
    """
    experts = (name for name, module in model.named_modules() if isinstance(module, PackedExperts)) if packed else ()
    without = {*model.all_tied_weights_keys, *(f"{name}.{tensor}" for name in experts for tensor in PARTS)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in without}


def _tensor(stored: Stored) -> torch.Tensor:
    """A stored tensor as torch has it, over the memory of its file."""
    dtype = _STORED[stored.dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file cannot be written to, which nobody does
        return torch.from_numpy(aligned(stored.data, dtype.itemsize)).view(dtype).view(stored.dims)


@contextmanager
def _writer(path: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """Write a safetensors file of `tensors`, which have no values yet: those come one by one, in any order.

    The file is the one that the safetensors package writes of them.

    Raises:
        RuntimeError: at the end, tensors did not come.
    """
    places: dict[str, tuple[int, int]] = {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, order = 0, list(_TYPES)
    for name in sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name)):
        begin, end = end, end + tensors[name].nbytes
        places[name] = begin, end
        header[name] = {
            "dtype": _TYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()

        def write(name: str, tensor: torch.Tensor) -> None:
            begin, end = places.pop(name)
            left = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            if len(left) != end - begin or tensor.dtype != tensors[name].dtype:
                raise RuntimeError(f"{name} has {len(left)} bytes of {tensor.dtype} and not what was announced")
            while left:
                count = os.pwrite(file.fileno(), left, data + begin)
                begin, left = begin + count, left[count:]

        yield write
    if places:
        raise RuntimeError(f"no values came for {', '.join(sorted(places)[:3])}")

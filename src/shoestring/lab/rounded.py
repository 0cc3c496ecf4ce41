"""Plain rounding of a model's blocks, in place: the baseline of methods that train through a quantizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shoestring.kernels.formats import Format, Tensors
from shoestring.models import anatomy, packed, surgery

Pack = Callable[[Tensor], tuple[Format, Tensors]]


def matrices(model: nn.Module, blocks: range | None = None) -> dict[str, nn.Linear]:
    """Name -> linear layer of the model's blocks, or of those that `blocks` counts."""
    found = {}
    for block in anatomy.inspect(model).blocks:
        if blocks is None or block.index in blocks:
            for name in block.projections.values():
                layer = surgery.get_module(model, name)
                if isinstance(layer, nn.Linear):
                    found[name] = layer
    return found


@torch.no_grad()
def round_off(model: nn.Module, pack: Pack, blocks: range | None = None) -> None:
    """Give the matrices of the blocks the values that they have once packed; they stay floats."""
    for layer in matrices(model, blocks).values():
        fmt, tensors = pack(layer.weight)
        layer.weight.copy_(fmt.unpack(tensors, layer.in_features))


@torch.no_grad()
def pack_up(model: nn.Module, pack: Pack, blocks: range | None = None) -> None:
    """Pack the matrices of the blocks for good."""
    for name, layer in matrices(model, blocks).items():
        fmt, tensors = pack(layer.weight)
        made = packed.linear(fmt, tensors, layer.in_features, bias=layer.bias, dtype=layer.weight.dtype)
        surgery.replace_module(model, name, made)


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all packed tensors of a model."""
    modules = (module for _, module in packed.packed_modules(model))
    return sum(t.numel() * t.element_size() for module in modules for t in module.tensors().values())

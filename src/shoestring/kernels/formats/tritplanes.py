"""tritplanes: the sum of two ternary matrices in groups with a float16 scale each.

The format
    weight = scale_0 * t_0 + scale_1 * t_1. Both planes are stored as the format `ternary` stores its one, and for each
    block of 64 columns (32 in groups of 32) the codes of plane 0 come before those of plane 1, so that one pass over
    memory has both: 4 + 32 / group bits per weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.kernels.formats import _bits
from shoestring.kernels.formats._format import Format, Tensors
from shoestring.kernels.formats.ternary import half


class Tritplanes(Format):
    """`tritplanes/64`."""

    def encode(self, first: Tensor, second: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The tensors of two planes (integers -1, 0, 1 [rows, cols]) and their groups' scales [rows, groups, 2].

        Raises:
            UsageError: a number that is no trit, or a scale that float16 cannot hold.
        """
        planes = [self._blocks(_bits.pack_trits(plane, self.layout.group)) for plane in (first, second)]
        return {"weight": torch.stack(planes, 2).flatten(1), "scales": half(scales)}

    def trits(self, tensors: Tensors, cols: int) -> tuple[Tensor, Tensor]:
        """Both planes: -1, 0 and 1, int8 [rows, cols].

        Raises:
            UsageError: the code 3.
        """
        first, second = self._planes(tensors)
        return first[:, :cols], second[:, :cols]

    def unpack(self, tensors: Tensors, cols: int) -> Tensor:
        first, second = (plane.unflatten(1, (-1, self.layout.group)) for plane in self._planes(tensors))
        scales = tensors["scales"].float()
        return (first * scales[..., :1] + second * scales[..., 1:]).flatten(1)[:, :cols]

    def _planes(self, tensors: Tensors) -> list[Tensor]:
        cut = self._blocks(tensors["weight"]).unflatten(1, (-1, 2))
        return [_bits.unpack_trits(cut[:, :, plane].flatten(1), self.layout.group) for plane in (0, 1)]

    def _blocks(self, packed: Tensor) -> Tensor:
        return packed.unflatten(1, (-1, _bits.block(self.layout.group) // 4))


FORMAT = Tritplanes

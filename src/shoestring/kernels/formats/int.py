"""int4 and int8: codes in groups that share a bfloat16 scale. `shoestring.kernels.reference` has the arithmetic."""

from __future__ import annotations

from torch import Tensor

from shoestring.kernels import ops
from shoestring.kernels.formats._format import Format, Tensors


class Int(Format):
    """`int4/64`: weight = scale * code. `ops` has products of its own for it, which need no second layout."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scales = ops.quantize(weight, self.layout.planes, self.layout.group)
        dims = self.layout.tensors(*weight.shape)["weight"][1]
        return {"weight": codes.view(dims), "scales": scales}

    def unpack(self, tensors: Tensors, cols: int) -> Tensor:
        codes = tensors["weight"].flatten(1)
        return ops.dequantize(codes, tensors["scales"], self.layout.planes, self.layout.group, cols)

    def bound(self, tensors: Tensors, cols: int) -> Tensor:
        # Half a step, but for the end of a 4-bit range that is cut; scales are stored with 8 significant bits.
        return 1.02 * tensors["scales"].float().abs().repeat_interleave(self.layout.group, 1)[:, :cols]


FORMAT = Int

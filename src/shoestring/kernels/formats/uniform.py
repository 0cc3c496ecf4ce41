"""uniform2 to uniform6: evenly spaced levels in groups with a float16 scale and a float16 offset.

The format
    weight = scale * (code - 2^(bits - 1)) + offset, code in 0..2^bits - 1. A row's groups are filled up with the code
    2^(bits - 1). 4-bit codes lie as those of int4: in a group of g columns byte j holds column j (low) and j + g/2.
    2-bit codes lie as `_bits.pack_pairs` says, in blocks of 64 columns (32 in groups of 32). 3-bit codes have their
    two low bits so, and after those of a block the third bits, one to a bit as `_bits.pack_bits` says. 5-bit and 6-bit
    codes have their four low bits as 4-bit codes lie, and after those of a group the fifth bits, one to a bit, or the
    two upper bits in blocks as 2-bit codes.
Plain rounding
    The levels of a group reach from its smallest to its largest number, both forced to include zero, which is itself a
    level, so that zeros stay zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.kernels import reference
from shoestring.kernels.formats import _bits
from shoestring.kernels.formats._format import Format, Tensors


class Uniform(Format):
    """`uniform3/64`."""

    @property
    def bits(self) -> int:
        return self.layout.planes

    def encode(self, codes: Tensor, scales: Tensor, offsets: Tensor) -> dict[str, Tensor]:
        """The tensors of codes (integers [rows, cols] in 0..2^bits - 1) and their groups' numbers [rows, groups].

        Raises:
            UsageError: a code out of range, or a scale or offset that float16 cannot hold.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << self.bits:
            raise UsageError(
                f"Codes {int(codes.min())}..{int(codes.max())} do not fit {self.bits} bits",
                remedy=f"Codes go from 0 to {(1 << self.bits) - 1}",
            )
        numbers = torch.stack((scales, offsets), -1).to(torch.float16)
        if not torch.isfinite(numbers).all():
            raise UsageError("A group's scale or offset is beyond float16", remedy="Use a format with bfloat16 scales")
        missing = self.layout.groups(codes.shape[1]) * self.layout.group - codes.shape[1]
        whole = F.pad(codes.to(torch.uint8), (0, missing), value=1 << self.bits - 1)
        return {"weight": self._pack(whole), "scales": numbers}

    def codes(self, tensors: Tensors, cols: int) -> Tensor:
        """The codes, uint8 [rows, cols]."""
        return self._unpack(tensors["weight"])[:, :cols]

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        reference.check_matrix(weight)
        rows, cols = weight.shape
        group, half, top = self.layout.group, 1 << self.bits - 1, (1 << self.bits) - 1
        parts = []
        step = max(1, reference.BLOCK // cols)
        for start in range(0, rows, step):
            part = weight.detach()[start : start + step].float()
            reference.refuse_not_finite(part)
            cut = F.pad(part, (0, -cols % group)).unflatten(1, (-1, group))
            low, high = cut.amin(-1).clamp(max=0), cut.amax(-1).clamp(min=0)
            scale = ((high - low) / top).half().float()
            steps = torch.where(scale == 0, 1, scale)
            zero = (-low / steps).round().clamp(0, top)  # the code of zero
            # Against the offset as it is stored, so that its rounding adds next to nothing.
            offset = ((half - zero) * scale).half()
            codes = ((cut - offset.float().unsqueeze(-1)) / steps.unsqueeze(-1)).round() + half
            parts.append(self.encode(codes.clamp(0, top).flatten(1)[:, :cols], scale, offset))
        return {name: torch.cat([part[name] for part in parts]) for name in ("weight", "scales")}

    def unpack(self, tensors: Tensors, cols: int) -> Tensor:
        scale, offset = tensors["scales"].float().unbind(-1)
        codes = self._unpack(tensors["weight"]).unflatten(1, (-1, self.layout.group)).float() - (1 << self.bits - 1)
        return (codes * scale.unsqueeze(-1) + offset.unsqueeze(-1)).flatten(1)[:, :cols]

    def bound(self, tensors: Tensors, cols: int) -> Tensor:
        # Half a step, up to one at the ends of the range, where the code of zero was rounded; float16 has 11 digits.
        scale = tensors["scales"][..., 0].float()
        return (1.05 * scale).repeat_interleave(self.layout.group, 1)[:, :cols]

    def _pack(self, codes: Tensor) -> Tensor:
        group, block = self.layout.group, _bits.block(self.layout.group)
        if self.bits < 4:
            low = _bits.pack_pairs(codes & 3, block)
            return low if self.bits == 2 else _after(low, block // 4, _bits.pack_bits(codes >> 2), block // 8)
        even, odd = (codes & 15).unflatten(1, (-1, 2, group // 2)).unbind(2)
        low = (even | odd << 4).flatten(1)
        if self.bits == 4:
            return low
        high = _bits.pack_bits(codes >> 4) if self.bits == 5 else _bits.pack_pairs(codes >> 4, block)
        return _after(low, group // 2, high, group * (self.bits - 4) // 8)

    def _unpack(self, packed: Tensor) -> Tensor:
        group, block = self.layout.group, _bits.block(self.layout.group)
        if self.bits == 2:
            return _bits.unpack_pairs(packed, block)
        if self.bits == 3:
            low, high = packed.unflatten(1, (-1, block * 3 // 8)).split((block // 4, block // 8), 2)
            return _bits.unpack_pairs(low.flatten(1), block) | _bits.unpack_bits(high.flatten(1)) << 2
        low, high = packed.unflatten(1, (-1, group * self.bits // 8)).split(
            (group // 2, group * (self.bits - 4) // 8), 2
        )
        codes = torch.cat((low & 15, low >> 4), 2).flatten(1)
        if self.bits == 4:
            return codes
        upper = high.flatten(1)
        return codes | (_bits.unpack_bits(upper) if self.bits == 5 else _bits.unpack_pairs(upper, block)) << 4


def _after(first: Tensor, size: int, second: Tensor, other: int) -> Tensor:
    """Bytes [rows, ...] in pieces of `size` of the one and `other` of the other, by turns."""
    return torch.cat((first.unflatten(1, (-1, size)), second.unflatten(1, (-1, other))), 2).flatten(1)


FORMAT = Uniform

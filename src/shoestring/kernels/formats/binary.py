"""binary2, binary3, binary4: sums of planes of signs, each plane with a scale of its own in every group.

The format
    weight = offset + sum_i scale_i * sign_i, with float16 scales and, where the name has an `o`, a float16 offset; else
    the offset is 0. Bit j of byte t of a plane is column 8t + j, set for +. What fills up a row's last group is -.
Uniform codes
    Evenly spaced levels are such sums: a code c with step s and zero point p, s * (c - p), has the scales s * 2^(i - 1)
    for the bits i = 0, 1, ... of c, and the offset s * (2^(bits - 1) - 1/2 - p).
Plain rounding
    With an offset: the levels of a group reach from its smallest to its largest number, both forced to include zero,
    which is itself a level. The step is rounded up to so few digits that scales and offset are exact in float16, so
    zeros stay zeros. Without one: levels at odd multiples of half a step, out to the largest magnitude.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.kernels import reference
from shoestring.kernels.formats import _bits
from shoestring.kernels.formats._format import Format, Tensors
from shoestring.kernels.formats.uniform import Uniform

_DIGITS = 11  # of a float16
_LEAST = 2.0**-24  # the smallest float16


class Binary(Format):
    """`binary3/64`, and with offsets `binary3o/64`."""

    @property
    def planes(self) -> int:
        return self.layout.planes

    def encode(self, bits: Tensor, scales: Tensor, offsets: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors of signs and their groups' numbers.

        Args:
            bits: zeros (for -) and ones [rows, planes, cols].
            scales: [rows, groups, planes].
            offsets: [rows, groups], of a format that has them.

        Raises:
            UsageError: a number that float16 cannot hold, or offsets where the format has none.
        """
        if (offsets is not None) != self.layout.offset:
            raise UsageError(f"{self} has {'an' if self.layout.offset else 'no'} offset beside its scales")
        numbers = scales if offsets is None else torch.cat((scales, offsets.unsqueeze(-1)), -1)
        numbers = numbers.to(torch.float16)
        if not torch.isfinite(numbers).all():
            raise UsageError("A group's scale or offset is beyond float16", remedy="Use a format with bfloat16 scales")
        missing = self.layout.groups(bits.shape[-1]) * self.layout.group - bits.shape[-1]
        return {"weight": _bits.pack_bits(F.pad(bits.to(torch.uint8), (0, missing))), "scales": numbers}

    def from_codes(self, codes: Tensor, step: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """The tensors of the numbers step * (code - zero); exact where float16 holds scales and offset.

        Args:
            codes: integers [rows, cols] in 0..2^planes - 1.
            step, zero: [rows, groups]; of a format without an offset, `zero` lies midway between all codes.
        """
        shifts = torch.arange(self.planes, device=codes.device)
        bits = codes.to(torch.uint8).unsqueeze(1) >> shifts.to(torch.uint8).view(-1, 1) & 1
        scales = step.unsqueeze(-1) * 2.0 ** (shifts - 1)
        middle = ((1 << self.planes) - 1) / 2
        return self.encode(bits, scales, (middle - zero) * step if self.layout.offset else None)

    def from_uniform(self, format: Uniform, tensors: Tensors, cols: int) -> dict[str, Tensor]:
        """The tensors of a matrix in a uniform format of as many bits and the same groups.

        Scales are exact; an offset is rounded to float16 once more, which is off by 2^-11 of it at most.
        """
        if format.bits != self.planes or format.layout.group != self.layout.group or not self.layout.offset:
            raise UsageError(
                f"{format} does not become {self}",
                remedy=f"Use binary{format.bits}o/{format.layout.group}",
            )
        step, offset = tensors["scales"].float().unbind(-1)
        zero = (1 << self.planes - 1) - torch.where(step == 0, 0, offset / torch.where(step == 0, 1, step))
        made = self.from_codes(format.codes(tensors, cols), step, zero)
        # Straight from the offset as it is stored, also where the step is 0.
        made["scales"][..., -1] = (offset - step / 2).half()
        return made

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        reference.check_matrix(weight)
        rows, cols = weight.shape
        group, top = self.layout.group, (1 << self.planes) - 1
        parts = []
        each = max(1, reference.BLOCK // cols)
        for start in range(0, rows, each):
            part = weight.detach()[start : start + each].float()
            reference.refuse_not_finite(part)
            cut = F.pad(part, (0, -cols % group)).unflatten(1, (-1, group))
            if self.layout.offset:
                low, high = cut.amin(-1).clamp(max=0), cut.amax(-1).clamp(min=0)
                step = _rounded_up((high - low) / top, _DIGITS - self.planes)
                units = cut / torch.where(step == 0, 1, step).unsqueeze(-1)
                zero = (-low / torch.where(step == 0, 1, step)).round().clamp(0, top)
                codes = units.round() + zero.unsqueeze(-1)
            else:
                step = _rounded_up(cut.abs().amax(-1) * 2 / top, _DIGITS)
                units = cut / torch.where(step == 0, 1, step).unsqueeze(-1)
                zero = torch.full_like(step, top / 2)
                codes = (units + (top + 1) / 2).floor()
            parts.append(self.from_codes(codes.clamp(0, top).flatten(1)[:, :cols], step, zero))
        return {name: torch.cat([part[name] for part in parts]) for name in ("weight", "scales")}

    def unpack(self, tensors: Tensors, cols: int) -> Tensor:
        scales = tensors["scales"].float()
        signs = _bits.unpack_bits(tensors["weight"]).float().mul_(2).sub_(1)
        signs = signs.unflatten(-1, (-1, self.layout.group))  # [rows, planes, groups, group]
        values = signs[:, 0] * scales[..., :1]
        for plane in range(1, self.planes):
            values += signs[:, plane] * scales[..., plane : plane + 1]
        if self.layout.offset:
            values += scales[..., -1:]
        return values.flatten(1)[:, :cols]

    def bound(self, tensors: Tensors, cols: int) -> Tensor:
        # The least scale is half a step. With an offset up to a whole one, at ends where the code of zero was rounded.
        least = tensors["scales"][..., : self.planes].float().amin(-1)
        return ((2.1 if self.layout.offset else 1.05) * least).repeat_interleave(self.layout.group, 1)[:, :cols]


def _rounded_up(step: Tensor, digits: int) -> Tensor:
    """The next number of so many binary digits, twice the smallest float16 or a multiple of it."""
    exponent = torch.frexp(step).exponent
    unit = torch.ldexp(torch.ones_like(step), exponent - digits).clamp(min=2 * _LEAST)
    return (step / unit).ceil() * unit


FORMAT = Binary

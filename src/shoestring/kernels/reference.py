"""Group-wise int8 and int4 in plain torch: the oracle of the native kernels, and what computes where they are absent.

The format
    A weight [out, in] is cut along `in` into groups of 32, 64 or 128, the last one filled with zeros. Each group has
    one bfloat16 scale s and integer codes q; the weight is s * q, rounded to the nearest code, half to even.

    int8: s = absmax / 127, q in -127..127, stored as int8 [out, groups * group].
    int4: s = m / -8 where m is the element of largest magnitude with its sign, q in -8..7, so that all sixteen levels
          are used and m itself is met exactly; against s = absmax / 7 the error is an eighth lower. Stored as q + 8 in
          uint8 [out, groups * group / 2]: inside a group byte j holds element j in its low nibble and element
          j + group / 2 in its high nibble, so that unpacking leaves both halves in order.

    A group of zeros has scale 0. Codes are chosen against the scale as stored, so that its rounding adds next to
    nothing to the error (int8: 0.5 % of it; float16 scales would save that, and overflow or lose digits far from 1).

The product
    Activations are rounded too, to int8 with one scale per token and group (absmax / 127), and the sums inside a group
    are exact integers. The native kernels differ from this file only in the order of the float32 sums over groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.core.errors import UsageError

BITS = (4, 8)
GROUPS = (32, 64, 128)
# Largest number of weights that are plain numbers at one time: 16 MB in float32.
BLOCK = 1 << 22
# Weights that are rounded together: few enough to stay in a processor's cache.
TOGETHER = 1 << 17
# Below this 127 / absmax is no float32: the group counts as zero.
TINY = 2.0**-120


def check_format(bits: int, group: int) -> None:
    """Raises UsageError unless the format has kernels."""
    if bits not in BITS:
        raise UsageError(f"{bits}-bit weights are not supported", remedy="Use 4 or 8 bits")
    if group not in GROUPS:
        raise UsageError(f"A group of {group} weights is not supported", remedy="Use a group of 32, 64 or 128")


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Round a matrix [out, in] to packed codes and bfloat16 scales [out, groups].

    Raises:
        UsageError: an unknown format, not a matrix, or not all numbers finite.
    """
    packed, scales = empty(weight, bits, group)
    (rows, features), groups = weight.shape, scales.shape[1]
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    step = max(1, TOGETHER // (groups * group))
    for start in range(0, rows, step):
        block = weight.detach()[start : start + step].float()
        cut = F.pad(block, (0, groups * group - features)).view(len(block), groups, group)
        scale = _scale(cut, bits)
        if not torch.isfinite(scale).all():  # a group with a number that is not finite has no other scale
            refuse_not_finite(weight)
        stored = scale.float()
        codes = (cut / stored.masked_fill(stored == 0, torch.inf)).round_().clamp_(low, high)
        packed[start : start + step] = pack(codes.to(torch.int8).flatten(1), bits, group)
        scales[start : start + step] = scale.squeeze(-1)
    return packed, scales


def empty(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix [out, in], without values. Raises as `quantize`, but for numbers."""
    check_format(bits, group)
    check_matrix(weight)
    rows, groups = len(weight), -(-weight.shape[1] // group)
    codes = torch.uint8 if bits == 4 else torch.int8
    packed = torch.empty(rows, groups * group * bits // 8, dtype=codes, device=weight.device)
    return packed, torch.empty(rows, groups, dtype=torch.bfloat16, device=weight.device)


def _scale(cut: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return (cut.abs().amax(-1, keepdim=True) / 127).bfloat16()
    highest, lowest = cut.amax(-1, keepdim=True), cut.amin(-1, keepdim=True)
    top = torch.where(highest > -lowest, highest, lowest)
    ties = (highest == -lowest).squeeze(-1)
    if ties.any():  # then the first of them counts
        tied = cut[ties]
        top[ties] = tied.gather(-1, tied.abs().argmax(-1, keepdim=True))
    return (top / -8).bfloat16()


def check_matrix(weight: Tensor) -> None:
    """Raises UsageError unless it is a matrix of floating point numbers."""
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise UsageError(
            f"Only a matrix of floating point numbers can be quantized, not {weight.dtype} {list(weight.shape)}"
        )


def refuse_not_finite(block: Tensor) -> None:
    """Raises UsageError, with how many values are not finite."""
    if not torch.isfinite(block).all():
        nans = int(torch.isnan(block).sum())
        bad = f"{nans} NaN" if nans else f"{int(torch.isinf(block).sum())} infinite"
        raise UsageError(
            f"The weight has {bad} values", "only finite numbers can be rounded", "Check the checkpoint it came from"
        )


def pack(codes: Tensor, bits: int, group: int) -> Tensor:
    """Codes int8 [rows, groups * group] as they are stored."""
    if bits == 8:
        return codes
    rows, width = codes.shape
    low, high = (codes + 8).to(torch.uint8).view(rows, width // group, 2, group // 2).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpack(packed: Tensor, bits: int, group: int) -> Tensor:
    """The inverse of `pack`: int8 [rows, groups * group]."""
    if bits == 8:
        return packed
    rows, width = packed.shape
    halves = packed.view(rows, width * 2 // group, group // 2)
    return (torch.stack((halves & 15, halves >> 4), 2).to(torch.int8) - 8).flatten(1)


def dequantize(packed: Tensor, scales: Tensor, bits: int, group: int, in_features: int) -> Tensor:
    """The weight as float32 [rows, in_features]."""
    codes = unpack(packed, bits, group).view(*scales.shape, group)
    return (codes.float() * scales.float().unsqueeze(-1)).flatten(1)[:, :in_features]


def round_activations(x: Tensor, group: int) -> Tensor:
    """What the product sees of x [tokens, in]: float32, each group of each token rounded to int8 and back."""
    tokens, features = x.shape
    cut = F.pad(x.float(), (0, -features % group)).view(tokens, -(-features // group), group)
    top = cut.abs().amax(-1, keepdim=True)
    quiet = top < TINY
    codes = torch.where(quiet, 0, (cut * torch.div(torch.full_like(top, 127), torch.where(quiet, 1, top))).round())
    # A group with an infinity or a NaN is not a number as a whole, as in the kernels.
    return torch.where(torch.isfinite(top), codes * (top / 127), torch.nan).flatten(1)[:, :features]


def quantized_linear(
    x: Tensor, packed: Tensor, scales: Tensor, bits: int, group: int, in_features: int, bias: Tensor | None = None
) -> Tensor:
    """x [..., in] times the packed weight, [..., out] in x's type; rows are unpacked a block at a time."""
    rows = len(scales)
    tokens = x.reshape(-1, in_features)
    rounded = round_activations(tokens, group)
    y = torch.empty(len(tokens), rows, dtype=x.dtype, device=x.device)
    step = max(1, BLOCK // in_features)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weight = dequantize(packed[part], scales[part], bits, group, in_features)
        y[:, part] = F.linear(rounded, weight, None if bias is None else bias[part].float()).to(x.dtype)
    return y.view(*x.shape[:-1], rows)


def embedding(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    bits: int,
    group: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of the packed table, [*ids.shape, hidden] in `dtype`."""
    flat = ids.reshape(-1)
    return dequantize(packed[flat], scales[flat], bits, group, hidden).to(dtype).view(*ids.shape, hidden)

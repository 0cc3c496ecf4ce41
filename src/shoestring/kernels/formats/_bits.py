"""Codes of few bits, side by side in bytes. Every function takes and gives whole rows, [rows, ...]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.core.errors import UsageError


def block(group: int) -> int:
    """Columns that are packed together: 64, or a group where that is smaller."""
    return min(group, 64)


def pack_pairs(codes: Tensor, block: int) -> Tensor:
    """2-bit codes [rows, width] as uint8 [rows, width / 4].

    In a block of b columns byte j holds the columns j, j + b/4, j + b/2 and j + 3b/4, from its low bits upwards.
    """
    cut = codes.to(torch.uint8).view(len(codes), -1, 4, block // 4)
    return (cut[:, :, 0] | cut[:, :, 1] << 2 | cut[:, :, 2] << 4 | cut[:, :, 3] << 6).flatten(1)


def unpack_pairs(packed: Tensor, block: int) -> Tensor:
    """The inverse of `pack_pairs`: uint8 [rows, width]."""
    cut = packed.view(len(packed), -1, 1, block // 4)
    return torch.cat([cut >> shift & 3 for shift in (0, 2, 4, 6)], 2).flatten(1)


def pack_trits(trits: Tensor, group: int) -> Tensor:
    """Integers -1, 0 and 1 [rows, cols] as 2-bit codes t + 1, uint8 [rows, width / 4]; zeros fill the last group.

    Raises:
        UsageError: another number.
    """
    if trits.numel() and not -1 <= int(trits.min()) <= int(trits.max()) <= 1:
        raise UsageError(f"Numbers {int(trits.min())}..{int(trits.max())} are no trits", remedy="Trits are -1, 0 and 1")
    return pack_pairs(F.pad(trits.to(torch.int8), (0, -trits.shape[1] % group)) + 1, block(group))


def unpack_trits(packed: Tensor, group: int) -> Tensor:
    """The inverse of `pack_trits`: int8 [rows, width].

    Raises:
        UsageError: the code 3, which no trit has.
    """
    codes = unpack_pairs(packed, block(group))
    if (codes == 3).any():
        raise UsageError(
            "A ternary weight holds the code 3, which stands for nothing", remedy="Check the file it came from"
        )
    return codes.to(torch.int8) - 1


def pack_bits(bits: Tensor) -> Tensor:
    """Zeros and ones [..., width] as uint8 [..., width / 8]; bit j of byte t is column 8t + j."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.to(torch.uint8).unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)

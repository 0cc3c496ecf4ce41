"""ternary: weights of -1, 0 and 1 in groups with a float16 scale.

The format
    weight = scale * t. A trit is stored as the 2-bit code t + 1; the code 3 is refused. Codes lie as
    `_bits.pack_pairs` says, in blocks of 64 columns (32 in groups of 32): 2 + 16 / group bits per weight. A row's
    groups are filled up with zeros. Which trits and scales stand for a float matrix is a method's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.kernels.formats import _bits
from shoestring.kernels.formats._format import Format, Tensors


class Ternary(Format):
    """`ternary/64`."""

    def encode(self, trits: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The tensors of trits (integers [rows, cols]) and their groups' scales [rows, groups].

        Raises:
            UsageError: a number that is no trit, or a scale that float16 cannot hold.
        """
        return {"weight": _bits.pack_trits(trits, self.layout.group), "scales": half(scales)}

    def trits(self, tensors: Tensors, cols: int) -> Tensor:
        """-1, 0 and 1, int8 [rows, cols].

        Raises:
            UsageError: the code 3.
        """
        return _bits.unpack_trits(tensors["weight"], self.layout.group)[:, :cols]

    def unpack(self, tensors: Tensors, cols: int) -> Tensor:
        trits = _bits.unpack_trits(tensors["weight"], self.layout.group).unflatten(1, (-1, self.layout.group))
        return (trits * tensors["scales"].float().unsqueeze(-1)).flatten(1)[:, :cols]


def half(scales: Tensor) -> Tensor:
    """In float16.

    Raises:
        UsageError: a number that is none there.
    """
    made = scales.to(torch.float16)
    if not torch.isfinite(made).all():
        raise UsageError("A group's scale is beyond float16", remedy="Use a format with bfloat16 scales")
    return made


FORMAT = Ternary

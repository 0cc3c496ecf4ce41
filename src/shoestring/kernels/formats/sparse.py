"""sparse: bfloat16 without its zeros, a bit for each column and the numbers that are there.

The format
    1 + 16 * (1 - s) bits a number at a share s of zeros, and 32 for each row: 9 bits at one half, whatever the pattern;
    2 of 4 is no case of its own. Worth its while above one sixteenth.
    A matrix is one run of bytes, little end first: a head as `_rows` has it; uint32 ends of the rows among the numbers;
    uint64 [rows][pieces of 64 columns], bit j of a word set where column j of its piece is there, none beyond the last
    column; the numbers, uint16 [count], in the order of rows and columns; 64 zero bytes, so that a register may be read
    at the last number. What is left out is +0; -0 is a number.
Plain rounding
    Keeps everything that is not zero, each number rounded to the nearest that bfloat16 holds.
Products
    Those of the plain bfloat16 weight, zeros included, here and in the native kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.kernels import reference
from shoestring.kernels.formats import _bits, _rows
from shoestring.kernels.formats._format import Format, Tensors

NAME = b"SKSPARS1"
_SLACK = 64


class Sparse(Format):
    """`sparse/4096`: a matrix of 4096 bytes."""

    rounds = False

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        reference.check_matrix(weight)
        return {"weight": encode(weight.detach().to(torch.bfloat16))}

    def unpack(self, tensors: Tensors, cols: int) -> Tensor:
        return decode(tensors["weight"], cols).float()

    def bound(self, tensors: Tensors, cols: int) -> Tensor:
        return self.unpack(tensors, cols).abs() * 2.0**-8

    def rows(self, tensors: Tensors, ids: Tensor, cols: int) -> Tensor:
        return decode(tensors["weight"], cols, ids).float()


def size(rows: int, cols: int, count: int) -> int:
    """Bytes of a matrix with `count` numbers that are not zero."""
    return _rows.HEAD + 4 * (rows + 1) + rows * -(-cols // _rows.PIECE) * 8 + 2 * count + _SLACK


def encode(numbers: Tensor) -> Tensor:
    """The bytes of a bfloat16 matrix: uint8 [bytes], on the CPU."""
    rows, cols = numbers.shape
    bits = numbers.contiguous().view(torch.int16)
    there = bits != 0
    head = _rows.make_head(NAME, rows, cols, there.sum(1))
    map_ = _bits.pack_bits(F.pad(there, (0, -cols % _rows.PIECE)))
    slack = torch.zeros(_SLACK, dtype=torch.uint8)
    return torch.cat((head, map_.flatten().cpu(), _rows.to_bytes(bits[there], torch.int16), slack))


def decode(data: Tensor, cols: int, ids: Tensor | None = None) -> Tensor:
    """The bfloat16 matrix [rows, cols] that `encode` made bytes of, or its rows `ids` [count].

    Raises:
        UsageError: the bytes contradict themselves, or an id names no row.
    """
    head = _rows.read_head(NAME, data, cols)
    if size(head.rows, cols, head.entries) != data.numel():
        raise _rows.wrong(data.numel(), cols)
    width = -(-cols // _rows.PIECE) * 8
    begin = head.after + head.rows * width
    there = data[head.after : begin].view(head.rows, width)
    numbers = data[begin : begin + 2 * head.entries].clone().view(torch.int16)
    if ids is None:
        ids = torch.arange(head.rows, device=data.device)
    else:
        _rows.check_ids(head, ids)
        there = there[ids]
    wide = _bits.unpack_bits(there).bool()
    place, entry = _rows.entries_of(head, ids)
    # A row's bits and its numbers must be as many, or numbers would move to other rows.
    if bool((wide.sum(1) != torch.bincount(place, minlength=len(ids))).any()) or bool(wide[:, cols:].any()):
        raise _rows.wrong(data.numel(), cols)
    made = torch.zeros(wide.shape, dtype=torch.int16, device=data.device)
    made[wide] = numbers[entry]
    return made[:, :cols].contiguous().view(torch.bfloat16)


FORMAT = Sparse

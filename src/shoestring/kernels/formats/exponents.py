"""exponents: bfloat16 numbers to the bit, with 4 bits for the exponent where it is one of the matrix's 16 commonest.

The format
    The numbers of a trained matrix have few exponents: 16 codes cover all but some in ten thousand. A number is its
    sign and mantissa, a byte, and a code of 4 bits; one whose exponent has no code stands with it in a list. 12 bits a
    number, and 32 for each row and each listed number.
    A matrix is one run of bytes, little end first: a head as `_rows` has it, whose own 16 bytes are the exponents of
    the codes; uint32 ends of the rows in the list; the list, uint32 [count]: column + exponent * 2^24, columns growing
    within a row; the rows, in pieces of 64 columns: 64 bytes of sign (high bit) and mantissa, then 32 bytes of codes,
    byte j with column j in its low nibble and column j + 32 in the high one. Columns beyond the last are zeros.
Plain rounding
    None for what bfloat16 holds; other numbers become the nearest that it does.
Products
    Those of the plain bfloat16 weight, here and in the native kernels, which decode a piece just before it is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.kernels import reference
from shoestring.kernels.formats import _rows
from shoestring.kernels.formats._format import Format, Tensors

NAME = b"SKEXPON1"
CODES = 16
_PIECE_BYTES = _rows.PIECE * 3 // 2


class Exponents(Format):
    """`exponents/4096`: a matrix of 4096 bytes."""

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


def encode(numbers: Tensor) -> Tensor:
    """The bytes of a bfloat16 matrix: uint8 [bytes], on the CPU. Any bits are taken, those of NaN too."""
    rows, cols = numbers.shape
    bits = numbers.contiguous().view(torch.int16)
    step = max(1, reference.BLOCK // max(cols, 1))
    counts = sum(
        (torch.bincount(_exponents(part).flatten(), minlength=256) for part in bits.split(step)),
        torch.zeros(256, dtype=torch.int64, device=bits.device),
    )
    common = counts.argsort(descending=True, stable=True)[:CODES]
    code_of = torch.full((256,), CODES, dtype=torch.uint8, device=bits.device)
    code_of[common] = torch.arange(CODES, dtype=torch.uint8, device=bits.device)
    listed, entries, pieces = [], [], []
    for part in bits.split(step):
        exponents = _exponents(part)
        codes = code_of[exponents]
        rare = codes == CODES
        listed.append(rare.sum(1))
        entries.append((rare.nonzero()[:, 1] | exponents[rare].long() << 24).cpu())
        rest = (part >> 8 & 0x80 | part & 0x7F).to(torch.uint8)
        pieces.append(_pieces(rest, codes & CODES - 1).cpu())
    own = bytes(common.tolist())
    head = _rows.make_head(NAME, rows, cols, torch.cat(listed) if listed else torch.zeros(0), own)
    found = torch.cat(entries) if entries else torch.zeros(0, dtype=torch.int64)
    return torch.cat((head, _rows.to_bytes(found, torch.int32), *pieces))


def decode(data: Tensor, cols: int, ids: Tensor | None = None) -> Tensor:
    """The bfloat16 matrix [rows, cols] that `encode` made bytes of, or its rows `ids` [count].

    Raises:
        UsageError: the bytes contradict themselves, or an id names no row.
    """
    head = _rows.read_head(NAME, data, cols)
    pieces = -(-cols // _rows.PIECE)
    begin = head.after + 4 * head.entries
    if begin + head.rows * pieces * _PIECE_BYTES != data.numel():
        raise _rows.wrong(data.numel(), cols)
    packed = data[begin:].view(head.rows, pieces, _PIECE_BYTES)
    if ids is None:
        ids = torch.arange(head.rows, device=data.device)
    else:
        _rows.check_ids(head, ids)
        packed = packed[ids]
    table = torch.tensor(list(head.own), dtype=torch.int16, device=data.device) << 7
    rest, codes = packed.split((_rows.PIECE, _PIECE_BYTES - _rows.PIECE), 2)
    exponents = table[torch.cat((codes & 15, codes >> 4), 2).int()].flatten(1)[:, :cols].contiguous()
    place, entry = _rows.entries_of(head, ids)
    listed = _rows.words(data, head.after, head.entries)[entry]
    columns = listed & 0xFFFFFF
    if columns.numel() and int(columns.max()) >= cols:
        raise _rows.wrong(data.numel(), cols)
    exponents[place, columns] = (listed >> 24 << 7).to(torch.int16)
    # As a signed byte the sign spreads over the upper half.
    signs = rest.contiguous().view(torch.int8).flatten(1)[:, :cols].to(torch.int16) & -0x7F81
    return (signs | exponents).view(torch.bfloat16)


def _exponents(bits: Tensor) -> Tensor:
    return (bits >> 7 & 0xFF).int()


def _pieces(rest: Tensor, codes: Tensor) -> Tensor:
    """uint8 [rows, cols] of both as the bytes of whole pieces, uint8 [bytes]."""
    missing = -rest.shape[1] % _rows.PIECE
    rest, codes = (F.pad(part, (0, missing)).unflatten(1, (-1, _rows.PIECE)) for part in (rest, codes))
    low, high = codes.chunk(2, 2)
    return torch.cat((rest, low | high << 4), 2).flatten()


FORMAT = Exponents

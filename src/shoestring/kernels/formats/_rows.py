"""What formats share that are one run of bytes: a head, the ends of the rows in a list, the list, and the rest.

The head has 64 bytes, numbers with their little end first: 8 bytes that name the format, int64 rows, columns and
entries of the list, 16 bytes of the format's own, 16 zeros. After it come uint32 ends[rows + 1], growing from 0 to the
number of entries.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from shoestring.core.errors import UsageError

HEAD = 64
PIECE = 64  # columns that are decoded together
WIDEST = 1 << 24
_LIMIT = 1 << 32


class Head(NamedTuple):
    rows: int
    entries: int
    own: bytes
    ends: Tensor  # int64 [rows + 1]
    after: int  # where the bytes go on


def make_head(name: bytes, rows: int, cols: int, counts: Tensor, own: bytes = b"") -> Tensor:
    """The head and the ends of rows with so many entries each: uint8 [bytes].

    Raises:
        UsageError: more columns or entries than the format can count.
    """
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cpu().long().cumsum(0)))
    count = int(ends[-1])
    if cols >= WIDEST or count >= _LIMIT:
        raise UsageError(
            f"A matrix of {rows} x {cols} with {count} entries is too large for the format",
            remedy=f"It takes {WIDEST - 1} columns and {_LIMIT - 1} entries",
        )
    head = struct.pack("<8sqqq16s16x", name, rows, cols, count, own)
    return torch.cat((torch.frombuffer(bytearray(head), dtype=torch.uint8), to_bytes(ends, torch.int32)))


def read_head(name: bytes, data: Tensor, cols: int) -> Head:
    """The head of a matrix of `cols` columns.

    Raises:
        UsageError: the bytes contradict themselves, or are of something else.
    """
    size = data.numel()
    if size >= HEAD:
        found, rows, columns, count, own = struct.unpack("<8sqqq16s16x", bytes(data[:HEAD].tolist()))
        after = HEAD + 4 * (rows + 1)
        if found == name and columns == cols and rows >= 0 and 0 <= count < _LIMIT and after <= size:
            ends = words(data, HEAD, rows + 1)
            if ends[0] == 0 and ends[-1] == count and bool((ends.diff() >= 0).all()):
                return Head(rows, count, own, ends, after)
    raise wrong(size, cols)


def wrong(size: int, cols: int) -> UsageError:
    return UsageError(
        f"{size} bytes are not a packed matrix of {cols} columns", remedy="The file may be damaged: fetch it again"
    )


def words(data: Tensor, begin: int, count: int) -> Tensor:
    """uint32 numbers that stand at byte `begin`: int64 [count]."""
    # A copy stands at an even address, whatever the file does.
    return data[begin : begin + 4 * count].clone().view(torch.int32).long() & 0xFFFFFFFF


def to_bytes(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers as bytes of so many bits each, on the CPU: uint8 [bytes]."""
    return numbers.to(dtype).cpu().contiguous().flatten().view(torch.uint8)


def entries_of(head: Head, ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry of rows `ids` [count]: its row's place in `ids` and its own place in the list, int64 [entries]."""
    ends = head.ends.to(ids.device)
    first, counts = ends[ids], ends[ids + 1] - ends[ids]
    place = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
    before = counts.cumsum(0) - counts
    return place, torch.arange(len(place), device=ids.device) - before[place] + first[place]


def check_ids(head: Head, ids: Tensor) -> None:
    """Raises UsageError when an id names no row."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < head.rows:
        raise UsageError(f"Rows {int(ids.min())}..{int(ids.max())} do not all lie in a matrix of {head.rows} rows")

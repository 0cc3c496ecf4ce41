"""Matrices in the formats of the native kernels: made from stored weights, multiplied, read row by row. No torch.

`matrix_reference.py` says in numpy what the kernels compute.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoestring.core.errors import DoesNotFit, ShoestringError, UsageError, nearest
from shoestring.kernels.loader import load

# In the order of native/kernels.h.
FORMATS = (
    "fp32", "bf16", "int8", "int4", "q8_0", "q4_0", "q4_1", "uniform2", "uniform3", "uniform4", "uniform5",
    "uniform6", "ternary", "tritplanes", "binary2", "binary3", "binary4", "exponents", "sparse", "dictionary",
)  # fmt: skip
AS_STORED = {"fp32": 4, "bf16": 2}  # bytes of an element; rows stay where they are
SAY_THEIR_SIZE = ("exponents", "sparse", "dictionary")  # used as stored too, and as long as their content makes them
# 16-bit numbers that each group of a row has beside its codes.
SCALES = {
    "int8": 1, "int4": 1, **{f"uniform{bits}": 2 for bits in range(2, 7)}, "ternary": 1, "tritplanes": 2,
    "binary2": 3, "binary3": 4, "binary4": 5,
}  # fmt: skip
_BLOCK = 64 << 20


class SkMatrix(ctypes.Structure):
    """SkMatrix of native/kernels.h. It holds addresses: the Matrix it came from must outlive it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]


class _SkPacking(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source", "scales", "order", "out")),
        *((name, ctypes.c_int64) for name in ("format", "rows", "cols", "group", "source_size", "out_size")),
    ]


@functools.cache
def library() -> Any:
    """The native library.

    Raises:
        ShoestringError: there is none in this installation.
    """
    loaded = load()
    if loaded.library is None:
        raise ShoestringError("The native kernels are not available", loaded.reason)
    return loaded.library


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix [rows, cols] as the kernels read it, and the memory it stands in.

    Attributes:
        data: uint8 [bytes]; for fp32 and bf16 the caller's own memory, which may be a mapped file.
        bias: float32 [rows], or None.
    """

    format: str
    rows: int
    cols: int
    group: int
    data: np.ndarray
    bias: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Bytes that a product reads."""
        return self.data.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    @functools.cached_property
    def struct(self) -> SkMatrix:
        bias = None if self.bias is None else self.bias.ctypes.data
        number = FORMATS.index(self.format)
        return SkMatrix(self.data.ctypes.data, bias, self.rows, self.cols, number, self.group)

    def multiply(self, x: np.ndarray, threads: int = 1) -> np.ndarray:
        """x [tokens, cols] @ matrix.T + bias: float32 [tokens, rows]. The same bits for any number of threads.

        Raises:
            UsageError: x has another width.
        """
        if x.ndim != 2 or x.shape[1] != self.cols:
            raise UsageError(f"An input of shape {list(x.shape)} does not fit a matrix of {self.cols} columns")
        x = np.ascontiguousarray(x, dtype=np.float32)
        y = np.empty((len(x), self.rows), np.float32)
        failed = library().sk_matrix(ctypes.byref(self.struct), x.ctypes.data, y.ctypes.data, len(x), threads)
        if failed:
            raise ShoestringError("A matrix could not be multiplied", "memory for its input ran out")
        return y

    def rows_of(self, ids: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
        """Rows `ids` [count] as float32 [count, cols].

        Args:
            into: contiguous float32 of that shape to write them to, and to return.

        Raises:
            UsageError: an id that names no row.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        y = np.empty((len(ids), self.cols), np.float32) if into is None else into
        if y.shape != (len(ids), self.cols) or y.dtype != np.float32 or not y.flags.c_contiguous:
            raise UsageError(f"{y.dtype} of {y.shape} cannot take {len(ids)} rows of {self.cols} numbers")
        if library().sk_matrix_rows(ctypes.byref(self.struct), ids.ctypes.data, y.ctypes.data, len(ids)):
            raise UsageError(f"Rows {ids.min()}..{ids.max()} do not all lie in a matrix of {self.rows} rows")
        return y


def make(
    format: str,
    rows: int,
    cols: int,
    source: np.ndarray,
    *,
    group: int = 32,
    scales: np.ndarray | None = None,
    order: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    threads: int = 1,
    memory: Memory | None = None,
    packing: Packing | None = None,
) -> Matrix:
    """A matrix from weights as a file holds them.

    Args:
        source: the stored bytes in any shape and type, contiguous: GGUF blocks, or codes, or the elements of fp32 and
            bf16, or a format of `SAY_THEIR_SIZE`; the last three kinds are used where they stand.
        group: columns that share a scale: 32, 64 or 128, of int8 also 16; 32 for GGUF's formats, without meaning where
            there are no scales.
        scales: of the formats in `SCALES`: 16-bit numbers, [rows, groups] or [rows, groups, how many]; bfloat16 for
            int8 and int4, else float16.
        order: stored row of each row of the matrix, [rows]; makes a copy of fp32 and bf16 too.
        bias: [rows], in the matrix's order of rows.
        memory: where packed bytes go; None takes fresh memory for each matrix.
        packing: takes the work instead of this call; the matrix may be used when that is done.

    Raises:
        UsageError: an unknown format, or sizes that do not belong together.
        DoesNotFit: no memory.
    """
    if format not in FORMATS:
        raise UsageError(f"{format} names no weight format", remedy=nearest(format, FORMATS))
    number = FORMATS.index(format)
    stored = _bytes(source)
    size = library().sk_packed_size(number, rows, cols, group)
    if size < 0:
        raise UsageError(f"A matrix of {rows} x {cols} in groups of {group} cannot be {format}")
    if bias is not None:
        bias = np.ascontiguousarray(bias, dtype=np.float32)
        if bias.shape != (rows,):
            raise UsageError(f"A bias of shape {list(bias.shape)} does not fit {rows} rows")
    if order is not None:
        order = np.ascontiguousarray(order, dtype=np.int64)
        if order.shape != (rows,) or (rows and not 0 <= int(order.min()) <= int(order.max()) < rows):
            raise UsageError(f"An order of shape {list(order.shape)} does not name rows of a matrix of {rows} rows")
    if format in AS_STORED:
        if stored.nbytes != rows * cols * AS_STORED[format]:
            raise _wrong_size(format, rows, cols, stored.nbytes)
        if order is not None:
            stored = _bytes(stored.reshape(rows, -1)[order])
        return Matrix(format, rows, cols, group, stored, bias)
    if format in SAY_THEIR_SIZE:
        if order is not None:
            raise UsageError(f"The rows of a {format} matrix cannot change places")
        if library().sk_sound(number, rows, cols, group, stored.ctypes.data, stored.nbytes):
            raise _wrong_size(format, rows, cols, stored.nbytes)
        return Matrix(format, rows, cols, group, stored, bias)
    if format in SCALES:
        wanted = (rows, -(-cols // group), SCALES[format])
        if scales is None or scales.dtype.itemsize != 2 or scales.shape not in (wanted, wanted[:2] * (wanted[2] == 1)):
            shape = None if scales is None else list(scales.shape)
            raise UsageError(f"Scales of shape {shape} are not 16-bit {list(wanted)}, as {format} needs")
        scales = np.ascontiguousarray(scales)
    else:
        scales = None
    data = (memory or Memory()).take(size)
    made = Matrix(format, rows, cols, group, data, bias)
    (own := packing or Packing(threads)).add(made, stored, scales, order)
    if packing is None:
        own.run()
    return made


def to_int8(values: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, cols] as codes int8 [rows, groups, group] and scales, bfloat16 bits [rows, groups].

    A number is off by at most half a step, and a step is at most 1/126 of the largest number of its group.
    """
    rows, cols = values.shape
    groups = -(-cols // group)
    padded = np.zeros((rows, groups * group), np.float32)
    padded[:, :cols] = values
    blocks = padded.reshape(rows, groups, group)
    exact = (np.abs(blocks).max(axis=2) / np.float32(127)).view(np.uint32)
    scales = (exact + 0xFFFF) >> 16  # upwards, so that the largest number has a code
    steps = (scales << 16).view(np.float32)
    codes = np.rint(blocks * (1 / np.maximum(steps, np.float32(2.0**-126)))[..., None])
    return codes.astype(np.int8), scales.astype(np.uint16)


def _wrong_size(format: str, rows: int, cols: int, size: int) -> UsageError:
    return UsageError(
        f"{size} bytes are not a {format} matrix of {rows} x {cols}", remedy="The file may be truncated: fetch it again"
    )


def _bytes(array: np.ndarray) -> np.ndarray:
    if not array.flags.c_contiguous:
        raise UsageError(f"A stored weight of shape {list(array.shape)} and strides {list(array.strides)} has gaps")
    return array.reshape(-1).view(np.uint8)


class Packing:
    """Matrices that are laid out together: one call for many leaves Python to other threads for as long as it takes."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._jobs: list[_SkPacking] = []
        self._kept: list[tuple[Matrix, np.ndarray, np.ndarray | None, np.ndarray | None]] = []
        self.bytes = 0  # that wait

    def add(self, made: Matrix, stored: np.ndarray, scales: np.ndarray | None, order: np.ndarray | None) -> None:
        addresses = (None if array is None else array.ctypes.data for array in (stored, scales, order, made.data))
        sizes = (FORMATS.index(made.format), made.rows, made.cols, made.group, stored.nbytes, made.data.nbytes)
        self._jobs.append(_SkPacking(*addresses, *sizes))
        self._kept.append((made, stored, scales, order))
        self.bytes += made.data.nbytes

    def run(self) -> None:
        """Raises UsageError when a stored weight has not the size of its matrix."""
        wrong = library().sk_pack_all((_SkPacking * len(self._jobs))(*self._jobs), len(self._jobs), self._threads)
        if wrong:
            made, stored, *_ = self._kept[wrong - 1]
            raise _wrong_size(made.format, made.rows, made.cols, stored.nbytes)
        self._jobs, self._kept, self.bytes = [], [], 0


class Memory:
    """Hands out pieces of large blocks, for matrices that live and die together.

    Large pages are worth it only where matrices share them: one of a small model fills a quarter of a page.
    """

    def __init__(self) -> None:
        self._block, self._used = np.empty(0, np.uint8), 0

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], aligned to 64 bytes. What is not written to costs nothing.

        Raises:
            DoesNotFit: no memory.
        """
        if self._used + size > len(self._block):
            # The first block is as large as asked, so that a matrix alone wastes nothing.
            self._block, self._used = _block(max(size, _BLOCK) if len(self._block) else size), 0
        begin = self._used
        self._used = -(-(begin + size) // 64) * 64
        return self._block[begin : begin + size]


def _block(size: int) -> np.ndarray:
    """Fresh memory, in large pages where the system has them."""
    try:
        # Shared memory, which is the default, has no large pages on most systems.
        block = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise DoesNotFit(f"{size} bytes for a packed matrix are not to be had", str(error)) from error
    if size >= 1 << 21 and hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8, size)

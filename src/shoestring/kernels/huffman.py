"""bfloat16 numbers with Huffman codes for their exponents: written by numpy, read by the kernels or numpy. No torch.

A unit is one or several matrices that are coded together. Of a number, sign and mantissa are a byte as they are and the
exponent is a code word; the words of a unit are one stream, the highest bit first.

    luts             uint8 [tables + 1][256]: table 0 is asked with the next byte of the stream. An entry below 240 is
                     the exponent; one above names the table (256 - entry) that is asked with the byte after it. The
                     last row has the length in bits of each exponent's word.
    encoded_exponent uint8: the stream, its last byte filled up with a word that is no exponent's
    sign_mantissa    uint8 [numbers]: the sign in the high bit
    output_positions uint32: the first number of each block of 4096 bytes, then how many numbers there are
    gaps             of each chunk of 8 bytes the bit, 0 to 31, where the first word begins that begins in it: 5 bits
                     each, the high one first, zeros up to 512 chunks a block
    split_positions  int64: the numbers before the second, third ... matrix of the unit

A packed matrix (`pack`) is one run of bytes: a head of 64 (8 that name the format, int64 rows, columns, tables and
bytes of the stream, little end first), then luts, output_positions, sign_mantissa, encoded_exponent and gaps of a unit
of its own. A matrix that cannot be coded has no tables and follows as it is.

So every chunk and every block can be read alone, and any row is found without reading what is before it. An exponent of
240 or more (a number beyond 10^34) would pass for a table: such a unit cannot be coded.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any

import numpy as np

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.kernels.loader import load

BLOCK, CHUNK, CHUNKS = 4096, 8, 512  # bytes of a block and of a chunk, chunks of a block
BEYOND = 240  # the first exponent that has no code
LONGEST, TABLES = 32, 16
_NAME, _HEAD = b"SKHUFFM1", "<8sqqqq24x"
_END = 256  # what fills the last byte up
_STEP = 1 << 16  # numbers that are coded together, few enough to stay near
_TYPES = {"output_positions": np.uint32, "split_positions": np.int64}


class NoCode(ValueError):
    """The exponents of a unit cannot be coded."""


@dataclass(frozen=True, eq=False)
class Unit:
    """The arrays of a unit; see above."""

    luts: np.ndarray
    encoded_exponent: np.ndarray
    sign_mantissa: np.ndarray
    output_positions: np.ndarray
    gaps: np.ndarray
    split_positions: np.ndarray

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.nbytes for part in self.parts())

    @property
    def numbers(self) -> int:
        return len(self.sign_mantissa)

    def parts(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in fields(self)]

    @cached_property
    def blocks(self) -> int:
        return -(-len(self.encoded_exponent) // BLOCK)

    def decode(
        self, first: int = 0, count: int | None = None, threads: int = 1, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Numbers first..first + count - 1 as bfloat16 bits, uint16 [count], in `out` if given.

        Args:
            count: None is all from `first` on.

        Raises:
            UsageError: the arrays contradict themselves.
        """
        count = self.numbers - first if count is None else count
        self._check()
        library = _library()
        out = np.empty(count, np.uint16) if out is None else out
        if library is None:
            out[:] = decode_plain(self, first, count)
            return out
        # Kept until the call is done: contiguous copies, where a part is none.
        luts, encoded, rest, positions, gaps = map(np.ascontiguousarray, self.parts()[:5])
        failed = library.sk_huffman(
            luts.ctypes.data, len(luts) - 1, encoded.ctypes.data, len(encoded), gaps.ctypes.data, len(gaps),
            positions.ctypes.data, self.blocks, rest.ctypes.data, len(rest), first, count, out.ctypes.data, threads,
        )  # fmt: skip
        if failed == 2:
            raise ShoestringError("Huffman codes could not be read", "memory ran out")
        if failed:
            raise _damaged()
        return out

    def _check(self) -> None:
        luts, gaps = self.luts, self.gaps
        sound = luts.ndim == 2 and luts.shape[1] == 256 and 2 <= len(luts) <= TABLES + 1
        sound = sound and all(part.dtype == _TYPES.get(f.name, np.uint8) for f, part in zip(fields(self), self.parts()))
        sound = sound and len(self.output_positions) == self.blocks + 1
        if not sound or len(gaps) != self.blocks * CHUNKS * 5 // 8 or self.output_positions[-1] != self.numbers:
            raise _damaged()


@dataclass(frozen=True, eq=False)
class Coded:
    """A packed matrix [rows, cols]: its unit, or its numbers where they could not be coded."""

    rows: int
    cols: int
    held: Unit | np.ndarray

    def decode(
        self, first: int = 0, rows: int | None = None, threads: int = 1, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows from `first` on, all or so many: bfloat16 bits, uint16 [rows, cols]; `out` is their memory if given."""
        rows = self.rows - first if rows is None else rows
        begin, count = first * self.cols, rows * self.cols
        if isinstance(self.held, Unit):
            return self.held.decode(begin, count, threads, out).reshape(rows, self.cols)
        return self.held[begin : begin + count].reshape(rows, self.cols)


def pack(numbers: np.ndarray) -> np.ndarray:
    """A matrix of bfloat16 bits, uint16 [rows, cols], as one run of bytes, uint8. Any bits are taken, NaN's too."""
    tables, length, parts = 0, 0, [np.ascontiguousarray(numbers)]
    try:
        unit = encode([numbers])
    except NoCode:
        pass
    else:
        tables, length = len(unit.luts) - 1, len(unit.encoded_exponent)
        parts = [unit.luts, unit.output_positions, unit.sign_mantissa, unit.encoded_exponent, unit.gaps]
    head = struct.pack(_HEAD, _NAME, *numbers.shape, tables, length)
    return np.concatenate([np.frombuffer(head, np.uint8), *(part.reshape(-1).view(np.uint8) for part in parts)])


def unpack(data: np.ndarray, rows: int | None, cols: int) -> Coded:
    """What `pack` wrote, uint8; its parts stay where they stand. `rows` None takes what the bytes say.

    Raises:
        UsageError: the bytes contradict themselves, or are another matrix.
    """
    if len(data) < struct.calcsize(_HEAD):
        raise _damaged()
    name, own, columns, tables, length = struct.unpack(_HEAD, data[: struct.calcsize(_HEAD)].tobytes())
    rest = data[struct.calcsize(_HEAD) :]
    sound = name == _NAME and own >= 0 and rows in (None, own) and columns == cols and 0 <= length <= len(rest)
    if not sound or own * cols > len(data) or not 0 <= tables <= TABLES:
        raise _damaged()
    numbers, blocks = own * cols, -(-length // BLOCK)
    sizes = (
        (256 * (tables + 1), 4 * (blocks + 1), numbers, length, blocks * CHUNKS * 5 // 8) if tables else (2 * numbers,)
    )
    if sum(sizes) != len(rest):
        raise _damaged()
    parts = np.split(rest, np.cumsum(sizes)[:-1])
    if not tables:
        return Coded(own, cols, np.frombuffer(parts[0], np.uint16))
    luts, positions, signs, encoded, gaps = parts
    unit = Unit(luts.reshape(-1, 256), encoded, signs, np.frombuffer(positions, np.uint32), gaps, np.zeros(0, np.int64))
    return Coded(own, cols, unit)


def encode(matrices: Sequence[np.ndarray]) -> Unit:
    """Matrices of bfloat16 bits (uint16, any shapes) as one unit, one after the other.

    Raises:
        NoCode: an exponent of 240 or more, as those of infinity and NaN are.
    """
    flat = [np.ascontiguousarray(m).reshape(-1) for m in matrices]
    counts = np.zeros(256, np.int64)
    for part in _parts(flat):
        counts += np.bincount(_exponents(part), minlength=256)
    if counts[BEYOND:].any():
        raise NoCode(f"a number has the exponent {np.flatnonzero(counts)[-1]}")
    lengths, words, luts = code(counts)
    stream = _Stream(lengths, words)
    rest = []
    for part in _parts(flat):
        rest.append((part >> 8 & 0x80 | part & 0x7F).astype(np.uint8))
        stream.add(_exponents(part))
    encoded, positions, gaps = stream.end()
    splits = np.cumsum([len(part) for part in flat])[:-1].astype(np.int64)
    return Unit(luts, encoded, np.concatenate(rest or [np.zeros(0, np.uint8)]), positions, gaps, splits)


def code(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A Huffman code for exponents that occur so often, [256]: lengths and words of each [257] and its tables."""
    present = [int(symbol) for symbol in np.flatnonzero(counts)]
    rare = sorted(present, key=lambda symbol: (counts[symbol], symbol))
    flat = {symbol: int(counts[symbol]) for symbol in present} | {_END: 1}
    for k in range(1, len(rare) + 2):
        lengths = _lengths(flat)
        if max(lengths.values()) <= LONGEST:
            words = _words(lengths)
            if (luts := _tables(lengths, words)) is not None:
                both = np.zeros((2, 257), np.uint64)
                for symbol, length in lengths.items():
                    both[:, symbol] = length, words[symbol]
                return both[0].astype(np.int64), both[1], luts
        # The rarest count as equally rare until words are short enough and tables few enough.
        flat |= dict.fromkeys(rare[: k + 1], 1)
    raise NoCode("no code has words that are short enough")


def _lengths(counts: dict[int, int]) -> dict[int, int]:
    """Symbol -> length of its word. Two symbols at least, as `_END` is always one."""
    if len(counts) == 1:
        return dict.fromkeys(counts, 1)
    heap: list[tuple[int, int, tuple[int, ...]]] = [(count, symbol, (symbol,)) for symbol, count in counts.items()]
    heapq.heapify(heap)
    lengths = dict.fromkeys(counts, 0)
    serial = 257
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, serial, left + right))
        serial += 1
    # The word that stands for nothing is the last of the longest, so that no other is mistaken for it.
    longest = max(lengths, key=lambda symbol: (lengths[symbol], symbol))
    lengths[longest], lengths[_END] = lengths[_END], lengths[longest]
    return lengths


def _words(lengths: dict[int, int]) -> dict[int, int]:
    """The canonical words: shorter before longer, and smaller symbols first."""
    words, word, before = {}, 0, 0
    for symbol in sorted(lengths, key=lambda s: (lengths[s], s)):
        word <<= lengths[symbol] - before
        words[symbol], before = word, lengths[symbol]
        word += 1
    return words


def _tables(lengths: dict[int, int], words: dict[int, int]) -> np.ndarray | None:
    """The luts of a code, None when they would be too many."""
    texts = {s: format(words[s], f"0{n}b") for s, n in lengths.items() if s != _END}
    prefixes = sorted({text[: (len(text) - 1) // 8 * 8] for text in texts.values()} | {""}, key=lambda p: (len(p), p))
    # A word of three bytes passes through a table for its first, also when no word ends there.
    prefixes = sorted({p[:n] for p in prefixes for n in range(0, len(p) + 1, 8)}, key=lambda p: (len(p), p))
    if len(prefixes) > TABLES:
        return None
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    luts = np.zeros((len(prefixes) + 1, 256), np.uint8)
    for i, prefix in enumerate(prefixes):
        found: dict[int, int] = {}
        for symbol, text in texts.items():
            if not text.startswith(prefix):
                continue
            tail = text[len(prefix) :]
            found[int(tail[:8].ljust(8, "0"), 2)] = symbol if len(tail) <= 8 else 256 - number[prefix + tail[:8]]
        entry = found[min(found)] if found else 0
        for byte in range(256):
            entry = found.get(byte, entry)
            luts[i, byte] = entry
    for symbol in texts:
        luts[-1, symbol] = lengths[symbol]
    return luts


class _Stream:
    """Words put behind one another, a step of numbers at a time. A chunk is a 64-bit word of the stream."""

    def __init__(self, lengths: np.ndarray, words: np.ndarray) -> None:
        self._lengths, self._words = lengths, words
        self._bits = self._numbers = 0
        self._tail = np.zeros(1, np.uint64)  # the chunk that is not full yet
        self._full: list[np.ndarray] = []
        self._gaps: list[np.ndarray] = []  # of each chunk in which a word begins, and the first such number
        self._first: list[np.ndarray] = []
        self._known = 0

    def add(self, symbols: np.ndarray) -> None:
        if not len(symbols):
            return
        lengths = self._lengths[symbols]
        ends = self._bits + np.cumsum(lengths)
        starts = ends - lengths
        chunk, inside = starts >> 6, starts & 63
        base = self._bits >> 6
        # Left-aligned words, moved to where they begin; what does not fit goes on in the next chunk.
        left = self._words[symbols] << (64 - lengths).astype(np.uint64)
        change = np.flatnonzero(np.diff(chunk, prepend=chunk[0] - 1))
        sums = np.bitwise_or.reduceat(left >> inside.astype(np.uint64), change)
        chunks = np.zeros((ends[-1] >> 6) - base + 2, np.uint64)
        chunks[chunk[change] - base] = sums
        over = np.flatnonzero(inside + lengths > 64)
        chunks[chunk[over] + 1 - base] |= left[over] << (64 - inside[over]).astype(np.uint64)
        chunks[0] |= self._tail[0]
        new = change[chunk[change] >= self._known]
        self._gaps.append(inside[new])
        self._first.append(self._numbers + new)
        self._known += len(new)
        self._bits, self._numbers = int(ends[-1]), self._numbers + len(symbols)
        full = (self._bits >> 6) - base
        self._full.append(chunks[:full])
        self._tail = chunks[full : full + 1]

    def end(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The stream, output_positions and gaps."""
        numbers, used = self._numbers, -(-self._bits // 8)
        if self._bits % 8:
            self.add(np.array([_END]))
        stream = np.concatenate([*self._full, self._tail]).astype(">u8").view(np.uint8)[:used]
        gaps = np.concatenate([*self._gaps, np.zeros(0, np.int64)])
        first = np.concatenate([*self._first, np.zeros(0, np.int64)])
        blocks = -(-used // BLOCK)
        # Words behind the last number fill up; a chunk that only they begin in has no numbers.
        filled = np.zeros(blocks * CHUNKS, np.uint8)
        gaps = gaps[: len(filled)]
        filled[: len(gaps)] = gaps
        bits = filled[:, None] >> np.arange(4, -1, -1, dtype=np.uint8) & 1
        starts = np.minimum(first[::CHUNKS], numbers)[:blocks]
        starts = np.concatenate([starts, np.full(blocks + 1 - len(starts), numbers)])
        return stream.copy(), starts.astype(np.uint32), np.packbits(bits)


def decode_plain(unit: Unit, first: int = 0, count: int | None = None) -> np.ndarray:
    """As `Unit.decode`, in numpy: every chunk by itself, all at the same time."""
    encoded = unit.encoded_exponent
    chunks = -(-len(encoded) // CHUNK)
    bits = np.unpackbits(unit.gaps)[: unit.blocks * CHUNKS * 5].reshape(-1, 5)
    position = (bits @ np.array([16, 8, 4, 2, 1]))[:chunks] + 64 * np.arange(chunks)
    end = np.minimum(64 * np.arange(1, chunks + 1), 8 * len(encoded))
    padded = np.concatenate([encoded, np.zeros(16, np.uint8)]).astype(np.uint64)
    made, counts = [], np.zeros(chunks, np.int64)
    going = np.arange(chunks)
    lengths = unit.luts[-1]
    while len(going):
        at = position[going]
        byte, shift = at >> 3, (at & 7).astype(np.uint64)
        window = np.zeros(len(going), np.uint64)
        for i in range(5):
            window = window << np.uint64(8) | padded[byte + i]
        window = window >> (np.uint64(8) - shift) & np.uint64(0xFFFFFFFF)
        table, symbol = np.zeros(len(going), np.int64), np.zeros(len(going), np.int64)
        open_ = np.ones(len(going), bool)
        for level in range(4):
            entry = unit.luts[:-1][table, (window >> np.uint64(24 - 8 * level) & np.uint64(255)).astype(np.int64)]
            symbol = np.where(open_ & (entry < BEYOND), entry, symbol)
            table = np.where(open_ & (entry >= BEYOND), 256 - entry.astype(np.int64), 0)
            open_ &= entry >= BEYOND
            if bool((table >= len(unit.luts) - 1).any()):
                raise _damaged()
        step = lengths[symbol].astype(np.int64)
        if open_.any() or bool((step == 0).any() or (step > LONGEST).any()):
            raise _damaged()
        made.append((going, counts[going], symbol))
        counts[going] += 1
        position[going] = at + step
        going = going[position[going] < end[going]]
    before = np.cumsum(counts) - counts
    exponents = np.zeros(int(counts.sum()), np.uint16)
    for chunk, nth, symbol in made:
        exponents[before[chunk] + nth] = symbol
    count = unit.numbers - first if count is None else count
    if len(exponents) < unit.numbers or first < 0 or first + count > unit.numbers:
        raise _damaged()  # words of the last byte may pass for numbers, which is what the count is for
    rest = unit.sign_mantissa[first : first + count].astype(np.uint16)
    return (rest & 0x80) << 8 | exponents[first : first + count] << 7 | rest & 0x7F


def _parts(flat: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [part[i : i + _STEP] for part in flat for i in range(0, len(part), _STEP)]


def _exponents(bits: np.ndarray) -> np.ndarray:
    return (bits >> 7 & 0xFF).astype(np.uint8)


@cache
def _library() -> Any:
    """The kernels, None where there are none."""
    return load().library


def _damaged() -> UsageError:
    return UsageError("Huffman codes contradict themselves", remedy="The file may be damaged: fetch it again")

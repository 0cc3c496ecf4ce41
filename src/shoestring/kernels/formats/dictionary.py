"""dictionary: ternary rows in a fixed code of 16-bit words, each of which stands for 1 to 14 pairs of weights.

The format
    A weight is 0, its row's smallest value or its row's largest one: symbols 0, 1, 2. Two neighbours are a pair of the
    number first + 3 * second; a row of odd length ends with a zero. The dictionary holds the 65,536 sequences of up to
    14 pairs that are the most probable ones when a weight is 0 with probability 0.885 and either other value with
    0.0575; equally probable ones come in the order of their pairs. It is made, never stored. With every sequence it
    holds all beginnings of it, so the longest match, taken again and again, encodes any row.
    A matrix is one run of bytes, little end first: int32 row_off[rows + 1], the words before each row; bfloat16
    [rows][2], the row's smallest and largest value; uint16 w_comp[row_off[rows]].
Plain rounding
    The two values are the ends of the row, both forced to include zero (a row of zeros has -1 and 1). A weight above
    half the upper end becomes it, one below half the lower end becomes that, and all others become 0.
"""

from __future__ import annotations

from functools import cache
from math import comb
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.kernels import reference
from shoestring.kernels.formats._format import Format, Tensors

WORDS, LONGEST = 65_536, 14
_ZERO, _OTHER, _ONE = 1770, 115, 2000  # 0.885 and 0.0575 are these over 2000
_STEP = 1 << 22  # weights that are walked through together


class Dictionary(Format):
    """`dictionary/4096`: a matrix of 4096 bytes."""

    rounds = False
    native = True

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        reference.check_matrix(weight)
        reference.refuse_not_finite(weight)
        low, high = ends(weight.float())
        return {"weight": encode(to_symbols(weight.float(), low, high), low, high)}

    def unpack(self, tensors: Tensors, cols: int) -> Tensor:
        symbols, low, high = decode(tensors["weight"], cols)
        return values(symbols, low, high)

    def bound(self, tensors: Tensors, cols: int) -> Tensor:
        # Half of the farther end; bfloat16 has 8 digits.
        _, low, high = decode(tensors["weight"], cols)
        return (0.51 * torch.maximum(-low, high)).unsqueeze(1).expand(-1, cols)

    def rows(self, tensors: Tensors, ids: Tensor, cols: int) -> Tensor:
        return self.unpack(tensors, cols)[ids]


def ends(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The grid of each row of a float matrix [..., rows, cols]: its smallest and largest value, float32 [..., rows]."""
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    return low.bfloat16().float(), high.bfloat16().float()


def to_symbols(weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The nearest value of each row's grid: uint8 of the weight's shape."""
    below, above = weight < low.unsqueeze(-1) / 2, weight > high.unsqueeze(-1) / 2
    return (below + 2 * above).to(torch.uint8)


def values(symbols: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What symbols [..., rows, cols] stand for, float32."""
    return (symbols == 1) * low.unsqueeze(-1) + (symbols == 2) * high.unsqueeze(-1)


def encode(symbols: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The bytes of a ternary matrix: uint8 [bytes].

    Args:
        symbols: [rows, cols] of 0, 1, 2.
        low, high: [rows], the values of the symbols 1 and 2.

    Raises:
        UsageError: a symbol beyond 2, or more words than an int32 counts.
    """
    rows, cols = symbols.shape
    if symbols.numel() and int(symbols.max()) > 2:
        raise UsageError(f"{int(symbols.max())} is no ternary symbol", remedy="Give 0, 1 and 2")
    step = max(1, _STEP // max(1, cols))
    parts = [_encode(symbols[start : start + step].cpu().numpy()) for start in range(0, rows, step)]
    words = np.concatenate([words for words, _ in parts]) if parts else np.empty(0, np.uint16)
    counts = np.concatenate([count for _, count in parts]) if parts else np.empty(0, np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if offsets[-1] >= 1 << 31:
        raise UsageError(f"{offsets[-1]} code words are too many for one matrix", remedy="Split it by rows")
    minmax = torch.stack((low, high), 1).to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
    whole = b"".join((offsets.astype("<i4").tobytes(), minmax.astype("<i2").tobytes(), words.astype("<u2").tobytes()))
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


def decode(packed: Tensor, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols uint8 [rows, cols] and the values of 1 and 2, float32 [rows] each; the inverse of `encode`.

    Raises:
        UsageError: bytes that contradict themselves or the number of columns.
    """
    parts = split(packed, cols)
    pairs, lengths = table()
    words = parts.words
    rows, width = len(parts.offsets) - 1, -(-cols // 2)
    out = np.empty((rows, 2 * width), np.uint8)
    step = max(1, _STEP // max(1, cols))
    for start in range(0, rows, step):
        end = min(rows, start + step)
        some = words[parts.offsets[start] : parts.offsets[end]]
        kept = np.arange(LONGEST) < lengths[some][:, None]
        flat = pairs[some][kept]
        out[start:end] = np.stack((flat % 3, flat // 3), 1).reshape(end - start, 2 * width)
    if (out[:, cols:] != 0).any():
        raise _unsound(cols, "a row goes on beyond its last column")
    device = packed.device
    symbols = torch.from_numpy(np.ascontiguousarray(out[:, :cols])).to(device)
    minmax = torch.from_numpy(parts.minmax).view(torch.bfloat16).float().to(device)
    return symbols, minmax[:, 0], minmax[:, 1]


class Parts(NamedTuple):
    """The three tensors within the bytes: int32 [rows + 1], int16 [rows, 2] (bfloat16 bits), uint16 [words]."""

    offsets: np.ndarray
    minmax: np.ndarray
    words: np.ndarray


def split(packed: Tensor, cols: int) -> Parts:
    """The parts of a stored matrix, checked: every row has words for its columns and no more.

    Raises:
        UsageError: it is no such matrix.
    """
    data = packed.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    rows = _rows(data, cols)
    offsets = np.frombuffer(data, "<i4", rows + 1)
    minmax = np.frombuffer(data, "<i2", 2 * rows, 4 * (rows + 1)).reshape(rows, 2).copy()
    words = np.frombuffer(data, "<u2", -1, 8 * rows + 4)
    bounds = torch.from_numpy(minmax).view(torch.bfloat16).float()
    if not (torch.isfinite(bounds).all() and (bounds[:, 0] <= 0).all() and (bounds[:, 1] >= 0).all()):
        raise _unsound(cols, "a row's smallest and largest value are not numbers with zero between them")
    lengths = table()[1]
    before = np.concatenate([[0], np.cumsum(lengths[words], dtype=np.int64)])
    if (np.diff(before[offsets]) != -(-cols // 2)).any():
        raise _unsound(cols, "the words of a row do not fill its columns")
    return Parts(offsets, minmax, words)


def _rows(data: bytes, cols: int) -> int:
    """The number of rows: the only one with which the last offset says how many words follow."""
    offsets = np.frombuffer(data, "<i4", len(data) // 4).astype(np.int64)
    if cols < 1 or not len(offsets) or offsets[0] != 0:
        raise _unsound(cols, "its first row does not begin at its first word")
    # Each row takes words, so offsets grow, until the values of the rows begin: the first number that fits is it.
    fitting = np.flatnonzero(4 + 8 * np.arange(len(offsets)) + 2 * offsets == len(data))
    if not len(fitting) or (np.diff(offsets[: fitting[0] + 1]) <= 0).any():
        raise _unsound(cols, "its length is not what its rows add up to")
    return int(fitting[0])


def _unsound(cols: int, why: str) -> UsageError:
    return UsageError(
        f"The bytes are no ternary matrix of {cols} columns", why, "The file may be damaged: fetch it again"
    )


# --- the dictionary ---------------------------------------------------------------------------------------------------


@cache
def table() -> tuple[np.ndarray, np.ndarray]:
    """The pairs of each word, uint8 [65536, 14] filled up with 0, and how many there are, uint8 [65536]."""
    # Equally many pairs with equally many other weights are equally probable, and no two kinds are.
    kinds = sorted(
        ((length, other) for length in range(1, LONGEST + 1) for other in range(2 * length + 1)), key=_chance
    )[::-1]
    whole, left = {}, WORDS
    for length, other in kinds:
        count = comb(2 * length, other) << other
        whole[length, other] = min(count, left)
        left -= whole[length, other]
    others = np.array([(pair % 3 != 0) + (pair // 3 != 0) for pair in range(9)])
    found: dict[tuple[int, int], np.ndarray] = {}
    sequences, count_of = np.zeros((1, 0), np.uint8), np.zeros(1, np.int64)
    for length in range(1, LONGEST + 1):
        # In the order of their pairs, since their beginnings were.
        longer = np.concatenate(
            [np.repeat(sequences, 9, 0), np.tile(np.arange(9, dtype=np.uint8), len(sequences))[:, None]], 1
        )
        count_of = np.repeat(count_of, 9) + np.tile(others, len(sequences))
        kept = np.zeros(len(longer), bool)
        for other in range(2 * length + 1):
            places = np.flatnonzero(count_of == other)[: whole[length, other]]
            kept[places] = True
            found[length, other] = np.pad(longer[places], ((0, 0), (0, LONGEST - length)))
        sequences, count_of = longer[kept], count_of[kept]
    pairs = np.concatenate([found[kind] for kind in kinds])
    lengths = np.concatenate([np.full(len(found[kind]), kind[0], np.uint8) for kind in kinds])
    return pairs, lengths


def _chance(kind: tuple[int, int]) -> int:
    """Probability of one sequence of `length` pairs with `other` weights that are not 0, times a constant; exact."""
    length, other = kind
    return int(_ZERO ** (2 * length - other) * _OTHER**other * _ONE ** (2 * (LONGEST - length)))


@cache
def _children() -> np.ndarray:
    """int32 [65537, 9]: the word that a word and one more pair make, -1 where there is none; the last row begins."""
    pairs, lengths = table()
    found = np.full((WORDS + 1, 9), -1, np.int32)
    node = np.full(WORDS, WORDS, np.int64)
    for depth in range(LONGEST):
        ending = np.flatnonzero(lengths == depth + 1)
        found[node[ending], pairs[ending, depth]] = ending
        going = np.flatnonzero(lengths > depth + 1)
        node[going] = found[node[going], pairs[going, depth]]
    return found


def _encode(symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words uint16, row after row, and how many each row has."""
    rows, cols = symbols.shape
    padded = np.zeros((rows, cols + cols % 2), np.uint8)
    padded[:, :cols] = symbols
    pairs = (padded[:, 0::2] + 3 * padded[:, 1::2]).T
    children = _children()
    ended = np.empty(pairs.shape, np.int32)  # the word that ended before each pair, -1 where one goes on
    node = np.full(rows, WORDS, np.int32)
    for place, pair in enumerate(pairs):
        longer = children[node, pair]
        ended[place] = np.where((longer < 0) & (node < WORDS), node, -1)
        node = np.where(longer < 0, children[WORDS, pair], longer)
    whole = np.concatenate([ended, node[None]]).T
    kept = (whole >= 0) & (whole < WORDS)
    return whole[kept].astype(np.uint16), kept.sum(1)


FORMAT = Dictionary

"""Weights as the accelerator stores them: 16 x 16 blocks of which N in 16 of every row are kept, with 4-bit indices.

N is 2, 4, 8 or 16, the same within a block and free between blocks; it runs along K, where the sums are, so that a mux
in front of each multiplier can pick the activation a kept weight belongs to. A strip is 16 outputs over all K.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.methods.mapping._numbers import Array
from shoestring.methods.mapping._targets import BLOCK

KEEPS = (2, 4, 8, 16)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight matrix [N, K] as integers.

    Attributes:
        rows, columns: N and K, both multiples of 16.
        bits: of a stored value, 4 or 8.
        scales: float32 [N]; a weight is its integer times the scale of its output.
        keeps: uint8 [N / 16, K / 16]: how many of 16 each block keeps; None when all are kept and no index is stored.
        integers: int8 [N, K], zero where nothing is kept.
    """

    rows: int
    columns: int
    bits: int
    scales: Array
    integers: Array
    keeps: Array | None = None

    @property
    def sparse(self) -> bool:
        return self.keeps is not None

    def kept(self, strip: int, begin: int, end: int) -> int:
        """Values that one output of the strip keeps between two K blocks."""
        return BLOCK * (end - begin) if self.keeps is None else int(self.keeps[strip, begin:end].sum())

    def piece(self, strip: int, begin: int, end: int) -> tuple[Array, Array]:
        """Kept values, int8 [16, L], and their places within their blocks, uint8 [16, L]."""
        part = self.integers[strip * BLOCK : (strip + 1) * BLOCK, begin * BLOCK : end * BLOCK]
        if self.keeps is None:
            return part, np.zeros((BLOCK, 0), np.uint8)
        values, places = [], []
        for number, keep in enumerate(self.keeps[strip, begin:end]):
            block = part[:, number * BLOCK : (number + 1) * BLOCK]
            place = np.sort(np.argsort(block == 0, axis=1, kind="stable")[:, : int(keep)], axis=1)
            places.append(place.astype(np.uint8))
            values.append(np.take_along_axis(block, place, 1))
        return np.concatenate(values, 1), np.concatenate(places, 1)


@dataclass(frozen=True)
class Planned:
    """A matrix of which only the size is known: what `Packed` would take, with the same share in every block."""

    rows: int
    columns: int
    bits: int
    keep: float = 1.0

    @property
    def sparse(self) -> bool:
        return self.keep < 1

    def kept(self, strip: int, begin: int, end: int) -> int:
        """Values that one output keeps between two K blocks; even, as every N is."""
        return 2 * round(self.keep * BLOCK * (end - begin) / 2)


def unpack(values: Array, places: Array, keeps: Array) -> Array:
    """The strip [16, K] that `Packed.piece` took apart; `keeps` is N of each of its K blocks."""
    out = np.zeros((BLOCK, BLOCK * len(keeps)), np.int8)
    at = 0
    for number, keep in enumerate(keeps):
        inside = number * BLOCK + places[:, at : at + int(keep)].astype(np.int64)
        np.put_along_axis(out, inside, values[:, at : at + int(keep)], 1)
        at += int(keep)
    return out


def nibbles(values: Array) -> Array:
    """Numbers of 4 bits, signed or not, two to a byte, the first in the low half."""
    flat = values.reshape(-1).astype(np.uint8) & 15
    return np.asarray(flat[0::2] | flat[1::2] << 4)


def from_nibbles(data: Array, signed: bool) -> Array:
    """Back to int8 or uint8."""
    flat = np.stack([data & 15, data >> 4], -1).reshape(-1)
    return np.asarray(((flat.astype(np.int8) ^ 8) - 8).astype(np.int8) if signed else flat)


def pack(weight: Array, *, bits: int = 4, keep: float = 1.0) -> Packed:
    """Prune and round a weight matrix, float [N, K].

    Blocks get the N that keeps the most of the matrix's squares for its share `keep` of the weights: each step doubles
    the N of the block that gains most per weight. Values are rounded to nearest by one scale per output, the best of
    eight that clip more or less.

    Raises:
        UsageError: sides that are no multiples of 16, other widths than 4 and 8, or a share outside 1/8 to 1.
    """
    rows, columns = weight.shape
    if rows % BLOCK or columns % BLOCK:
        raise UsageError(
            f"a matrix of {rows} x {columns} has no blocks of {BLOCK} x {BLOCK}", remedy="Choose a model whose sides do"
        )
    if bits not in (4, 8):
        raise UsageError(f"weights of {bits} bits", remedy="Known: 4, 8")
    if not KEEPS[0] / BLOCK <= keep <= 1:
        raise UsageError(f"a share of {keep:g} cannot be kept", f"a block keeps {KEEPS[0]} to {BLOCK} of {BLOCK}")
    weight = weight.astype(np.float32)
    keeps = None
    if keep < 1:
        keeps, weight = _pruned(weight, keep)
    most = float(2 ** (bits - 1) - 1)
    top = np.maximum(np.abs(weight).max(1), 1e-12)
    best = np.full(rows, np.inf, np.float32)
    scales, integers = np.zeros(rows, np.float32), np.zeros(weight.shape, np.int8)
    for clip in np.linspace(1.0, 0.65 if bits == 4 else 1.0, 8 if bits == 4 else 1):
        scale = (top * clip / most).astype(np.float32)
        tried = np.clip(np.rint(weight / scale[:, None]), -most, most)
        error = ((tried * scale[:, None] - weight) ** 2).sum(1)
        better = error < best
        best[better], scales[better], integers[better] = error[better], scale[better], tried[better].astype(np.int8)
    return Packed(rows, columns, bits, scales, integers, keeps)


def _pruned(weight: Array, keep: float) -> tuple[Array, Array]:
    """N of every block, and the weights with the smallest of each row of a block zeroed."""
    strips, blocks = weight.shape[0] // BLOCK, weight.shape[1] // BLOCK
    split = weight.reshape(strips, BLOCK, blocks, BLOCK).transpose(0, 2, 1, 3)
    order = np.argsort(-np.abs(split), -1, kind="stable")
    energy = np.take_along_axis(split.astype(np.float64) ** 2, order, -1).sum(2).cumsum(-1)
    levels = np.stack([energy[..., n - 1] for n in KEEPS], -1)
    # What a doubling from level i gains for each weight it adds. The squares of sorted weights fall, so gains do too,
    # and taking the best first is the best.
    gains = np.diff(levels, axis=-1) / np.diff(np.array(KEEPS))
    costs = np.broadcast_to(np.diff(np.array(KEEPS)), gains.shape)
    wanted = round(keep * BLOCK * strips * blocks) - KEEPS[0] * strips * blocks
    ranked = np.argsort(-gains.reshape(-1), kind="stable")
    taken = np.zeros(gains.size, bool)
    taken[ranked] = costs.reshape(-1)[ranked].cumsum() <= wanted
    level = np.minimum.accumulate(taken.reshape(gains.shape), -1).sum(-1)
    keeps = np.array(KEEPS, np.uint8)[level]
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(BLOCK), order.shape), -1)
    pruned = np.where(rank < keeps[..., None, None], split, 0)
    return keeps, pruned.transpose(0, 2, 1, 3).reshape(weight.shape)

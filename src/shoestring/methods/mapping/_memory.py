"""Where everything lies in the memory outside: weights in the pieces that the buffers hold, cache, activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.methods.mapping._numbers import Array
from shoestring.methods.mapping._sparse import Packed, Planned, nibbles
from shoestring.methods.mapping._targets import BLOCK, Target

STRIPS = 32  # of one instruction in vector mode: 512 outputs
SET = 4  # strips that one channel holds; a set is padded to whole rows of the buffer
ROW = 512  # bytes of a row of buffer A in vector mode, all channels


@dataclass
class Memory:
    """Regions by name, one after another."""

    regions: dict[str, tuple[int, int]] = field(default_factory=dict)
    size: int = 0

    def place(self, name: str, size: int) -> int:
        """The address of the region `name`, made where it is new."""
        if name not in self.regions:
            self.regions[name] = (self.size, size)
            self.size += -(-size // 64) * 64
        return self.regions[name][0]

    def __getitem__(self, name: str) -> int:
        return self.regions[name][0]


@dataclass
class Placed:
    """A matrix in memory: for each group of 512 outputs and each piece of K the strips one after another.

    Raises:
        UsageError: a buffer cannot hold two pieces of one block each, so nothing can be loaded while another is used.
    """

    matrix: Packed | Planned
    target: Target
    memory: Memory
    name: str
    indices: bool = True

    def __post_init__(self) -> None:
        matrix = self.matrix
        self.strips, self.blocks = matrix.rows // BLOCK, matrix.columns // BLOCK
        self.sparse = matrix.sparse and self.indices
        count = 1
        while not self._fits(cut(self.blocks, count)):
            if count == self.blocks:
                raise UsageError(
                    f"{self.target.name} has buffers too small for two pieces of {self.name}",
                    f"even {BLOCK} of its {matrix.columns} inputs at a time do not fit twice",
                    "Give the target deeper buffers",
                )
            count += 1
        self.pieces = cut(self.blocks, count)
        self._at: dict[tuple[str, int, int], int] = {}
        totals = {"weights": 0, "index": 0, "N": 0}
        for group in self.groups():
            for piece in range(len(self.pieces)):
                for what, size in (
                    ("weights", sum(self.sets(group, piece)) * matrix.bits // 8),
                    ("index", sum(self.index_bytes(s, piece) for s in self.of(group))),
                    ("N", self.n_bytes(piece) * len(self.of(group))),
                ):
                    self._at[what, group, piece] = totals[what]
                    totals[what] += size
        if not self.sparse:
            totals["index"] = totals["N"] = 0
        totals["scales"] = 4 * matrix.rows
        self.base = {what: self.memory.place(f"{self.name}.{what}", size) for what, size in totals.items()}

    def _fits(self, pieces: list[tuple[int, int]]) -> bool:
        t = self.target
        for begin, end in pieces:
            most = max(self.matrix.kept(s, begin, end) for s in self._samples())
            vector = STRIPS // SET * _up(SET * BLOCK * most)
            if 2 * vector > t.a_vector or 2 * BLOCK * most > t.b_matrix:
                return False
            if self.sparse and (
                2 * STRIPS * 8 * most > t.b_depth * 128
                or 2 * 8 * most > t.b_depth * 16
                or 2 * STRIPS * (end - begin) > t.b_depth * 8
            ):
                return False
        return True

    def _samples(self) -> range:
        return range(self.strips) if isinstance(self.matrix, Packed) and self.sparse else range(1)

    def groups(self) -> range:
        return range(-(-self.strips // STRIPS))

    def of(self, group: int) -> range:
        """The strips of a group."""
        return range(group * STRIPS, min((group + 1) * STRIPS, self.strips))

    def kept(self, strip: int, piece: int) -> int:
        return self.matrix.kept(strip, *self.pieces[piece])

    def sets(self, group: int, piece: int) -> list[int]:
        """Bytes in the buffer of each set of strips."""
        strips = self.of(group)
        return [_up(sum(BLOCK * self.kept(s, piece) for s in strips[i : i + SET])) for i in range(0, len(strips), SET)]

    def index_bytes(self, strip: int, piece: int) -> int:
        return 8 * self.kept(strip, piece)

    def n_bytes(self, piece: int) -> int:
        return self.pieces[piece][1] - self.pieces[piece][0]

    def address(self, what: str, group: int, piece: int, strip: int | None = None) -> int:
        """Where the piece of a group begins, or that of one of its strips."""
        at = self.base[what] + self._at[what, group, piece]
        if strip is None:
            return at
        number = strip - self.of(group)[0]
        if what == "N":
            return at + number * self.n_bytes(piece)
        before = self.of(group)[:number]
        if what == "index":
            return at + sum(self.index_bytes(s, piece) for s in before)
        whole = sum(self.sets(group, piece)[: number // SET])
        rest = sum(BLOCK * self.kept(s, piece) for s in before[number // SET * SET :])
        return at + (whole + rest) * self.matrix.bits // 8

    def fill(self, image: Array) -> None:
        """Write the matrix into an image of the memory, uint8."""
        matrix = self.matrix
        assert isinstance(matrix, Packed)
        for group in self.groups():
            for piece, (begin, end) in enumerate(self.pieces):
                for strip in self.of(group):
                    values, places = matrix.piece(strip, begin, end)
                    write(image, self.address("weights", group, piece, strip),
                           nibbles(values) if matrix.bits == 4 else values)  # fmt: skip
                    if self.sparse:
                        assert matrix.keeps is not None
                        write(image, self.address("index", group, piece, strip), nibbles(places))
                        write(image, self.address("N", group, piece, strip), matrix.keeps[strip, begin:end])
        write(image, self.base["scales"], matrix.scales.astype(np.float32))


def cut(blocks: int, count: int) -> list[tuple[int, int]]:
    """K blocks in `count` pieces of nearly one size."""
    edges = [blocks * i // count for i in range(count + 1)]
    return list(zip(edges, edges[1:]))


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of `size`, the last one shorter."""
    for begin in range(0, total, size):
        yield begin, min(begin + size, total)


def _up(size: int) -> int:
    return -(-size // ROW) * ROW


def write(image: Array, at: int, values: Array) -> None:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    image[at : at + len(data)] = data

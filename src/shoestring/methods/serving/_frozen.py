"""Weights that somebody else keeps, as training reads them, and memory that is used again."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring.kernels.llama import Llama
from shoestring.kernels.matrix import Matrix
from shoestring.models.llama_like import PROJECTIONS, LlamaLike

_LAYER_BYTES = 64 << 20  # a layer whose float32 weights are more is unpacked matrix by matrix


class Rooms:
    """Memory that is used again, by name.

    To be given fresh pages takes longer than to fill them, and what is freed in pieces of many sizes leaves holes.
    """

    def __init__(self) -> None:
        self._rooms: dict[Any, Tensor] = {}

    def take(self, name: Any, *shapes: tuple[int, ...]) -> list[Tensor]:
        """float32 tensors of these shapes, filled with anything; what was taken under the name before is gone."""
        sizes = [math.prod(shape) for shape in shapes]
        room = self._rooms.pop(name, None)
        if room is None or len(room) < sum(sizes):
            room = None  # its pages are free before others are asked for
            room = torch.empty(sum(sizes))
        self._rooms[name] = room
        return [part.view(shape) for part, shape in zip(room[: sum(sizes)].split(sizes), shapes)]

    def forget(self) -> None:
        """Give all of it back."""
        self._rooms = {}


class Frozen:
    """The weights that answers are computed with, as float32 tensors for as long as they are needed.

    Those that are stored as float32 are the same memory. Others are unpacked one layer at a time.
    """

    def __init__(self, model: LlamaLike, weights: Llama) -> None:
        self.model, self.weights = model, weights
        self._rooms = Rooms()
        self._held: dict[Any, tuple[tuple[int, str], Tensor]] = {}  # by room: which matrix, and its numbers

    def size(self, layer: int) -> int:
        """Numbers in the matrices of a layer."""
        return sum(matrix.rows * matrix.cols for matrix in self._matrices(layer).values())

    def matrix(self, layer: int, role: str) -> Tensor:
        """float32 [out, in], until another one is asked for."""
        matrix = self._matrices(layer)[role]
        if matrix.format == "fp32":
            return unpacked(matrix)
        shape = matrix.rows, matrix.cols
        # Where a whole layer would be too much, matrices of one shape share a room.
        room = (role, *shape) if 4 * self.size(layer) <= _LAYER_BYTES else shape
        which, numbers = self._held.get(room, (None, None))
        if which != (layer, role) or numbers is None:
            (numbers,) = self._rooms.take(room, shape)
            self._held[room] = (layer, role), unpacked(matrix, into=numbers)
        return numbers

    def bias(self, layer: int, role: str) -> Tensor | None:
        bias = self._matrices(layer)[role].bias
        return None if bias is None else view(bias)

    def norm(self, layer: int, role: str) -> Tensor:
        return view(getattr(self.weights.blocks[layer], role))

    def heads(self, layer: int) -> tuple[int, int]:
        """Heads of queries, and of keys and values."""
        queries, keys = (self.model.shape_of(role, layer)[0] // self.model.head_dim for role in ("q", "k"))
        return queries, keys

    def embedded(self, ids: Tensor) -> Tensor:
        """float32 [tokens, hidden]: what enters the first layer."""
        rows = self.weights.embedding.rows_of(ids.numpy())
        return torch.from_numpy(rows) * self.weights.embedding_scale

    def head(self, first: int, last: int) -> Tensor:
        """float32 [last - first, hidden]: some rows of the head, until others are asked for."""
        head = self.weights.head
        if head.format == "fp32":
            return unpacked(head, first, last)
        return unpacked(head, first, last, *self._rooms.take("head", (last - first, head.cols)))

    def forget(self) -> None:
        """Give back what is unpacked."""
        self._rooms.forget()
        self._held = {}

    def _matrices(self, layer: int) -> dict[str, Matrix]:
        return {role: getattr(self.weights.blocks[layer], role) for role in PROJECTIONS}


def unpacked(matrix: Matrix, first: int = 0, last: int | None = None, into: Tensor | None = None) -> Tensor:
    """Rows first..last-1 as float32: a view of the matrix itself where it is stored so, else in `into` if given."""
    last = matrix.rows if last is None else last
    if matrix.format == "fp32":
        return view(matrix.data).view(torch.float32).view(matrix.rows, matrix.cols)[first:last]
    made = torch.empty(last - first, matrix.cols) if into is None else into
    if matrix.format == "bf16":
        return made.copy_(view(matrix.data).view(torch.bfloat16).view(matrix.rows, matrix.cols)[first:last])
    matrix.rows_of(np.arange(first, last), made.numpy())
    return made


def view(array: np.ndarray) -> Tensor:
    """A tensor over the same memory, only to be read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # nobody writes to it
        return torch.from_numpy(array)

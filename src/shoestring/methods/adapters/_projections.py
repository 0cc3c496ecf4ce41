"""Random projections P (n, d) with columns of unit norm: dense, sparse, and Fastfood, which is never made.

Each gives P v and P^T g. Everything random comes from a generator whose stream is fixed for good, so that a seed stands
for the projection wherever it is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_BLOCK = 16  # of the Walsh-Hadamard transform, in matrix products: the fastest of 8 to 256


def numbers(seed: int, *place: int) -> np.random.RandomState:
    """A stream of its own for each place. This generator's stream is fixed for good, whatever device or version."""
    return np.random.RandomState([seed, *place])


@cache
def hadamard(size: int) -> Tensor:
    """The Walsh-Hadamard matrix (size, size) of +-1; size is a power of two."""
    half = hadamard(size // 2) if size > 1 else torch.ones(0, 0)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)]) if size > 1 else torch.ones(1, 1)


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x, unnormalised, over a vector (L,) whose length is a power of two, in O(L log L)."""
    length, done, y = len(x), 1, x
    while done < length:
        block = min(_BLOCK, length // done)
        factor = hadamard(block).to(x)
        y = y.view(-1, block) @ factor if done == 1 else factor @ y.view(-1, block, done)
        done *= block
    return y.reshape(length)


@dataclass(frozen=True)
class Fastfood:
    """P = H G Pi H B, its first n rows, over a divisor. B, Pi and G are kept; P never is.

    Attributes:
        signs: B, the first l entries, with l the next power of two above d: behind them v is zero.
        order: Pi modulo l, (L,): H of the padded v is that of its first l entries, repeated.
        scale: G over the divisor, (L,).
    """

    n: int
    d: int
    signs: Tensor
    order: Tensor
    scale: Tensor

    def apply(self, v: Tensor) -> Tensor:
        head = nn.functional.pad(v, (0, len(self.signs) - self.d)) * self.signs.to(v)
        mixed = walsh_hadamard(head).index_select(0, self.order) * self.scale.to(v)
        return walsh_hadamard(mixed)[: self.n]

    def back(self, g: Tensor) -> Tensor:
        mixed = walsh_hadamard(nn.functional.pad(g, (0, len(self.order) - self.n))) * self.scale.to(g)
        head = g.new_zeros(len(self.signs)).index_add_(0, self.order, mixed)
        return (walsh_hadamard(head) * self.signs.to(g))[: self.d]


@dataclass(frozen=True)
class Dense:
    """P (n, d) itself."""

    matrix: Tensor

    def apply(self, v: Tensor) -> Tensor:
        return self.matrix.to(v) @ v

    def back(self, g: Tensor) -> Tensor:
        return self.matrix.to(g).T @ g


@dataclass(frozen=True)
class Sparse:
    """The non-zeros of P (n, d): where they stand and what they are."""

    n: int
    d: int
    rows: Tensor
    columns: Tensor
    values: Tensor

    def apply(self, v: Tensor) -> Tensor:
        return v.new_zeros(self.n).index_add_(0, self.rows, self.values.to(v) * v.index_select(0, self.columns))

    def back(self, g: Tensor) -> Tensor:
        return g.new_zeros(self.d).index_add_(0, self.columns, self.values.to(g) * g.index_select(0, self.rows))


Projection = Fastfood | Dense | Sparse


class _Project(torch.autograd.Function):
    """P v whose backward keeps nothing but the projection itself."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        return projection.apply(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.projection.back(grads[0].contiguous()), None


def project(v: Tensor, projection: Projection) -> Tensor:
    """P v (n,) for v (d,), with its gradient."""
    return _Project.apply(v, projection)  # type: ignore[no-untyped-call]


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def fastfood(counts: Sequence[int], d: int, seed: int) -> list[Fastfood]:
    """A transform for each tensor of so many weights, all of the same v; columns have unit norm over all of them.

    Tensors of equal size share Pi and G, which are most of the memory, and differ in B.
    """
    chains: dict[int, tuple[Tensor, Tensor]] = {}
    for n in dict.fromkeys(counts):
        length, stream = max(_power(n), _power(d)), numbers(seed, 1, n)
        order = torch.from_numpy(stream.permutation(length) % _power(d)).to(torch.int32)
        gauss = stream.standard_normal(length)
        divisor = math.sqrt(length * float(np.square(gauss).sum())) * math.sqrt(n / length)
        chains[n] = order, torch.from_numpy(gauss / divisor).float()
    made = []
    for index, n in enumerate(counts):
        signs = torch.from_numpy(numbers(seed, 2, index).randint(0, 2, _power(d)) * 2.0 - 1).float()
        made.append(Fastfood(n, d, signs * math.sqrt(n / sum(counts)), *chains[n]))
    return made


def dense(n: int, d: int, seed: int, orthonormal: bool = False) -> Dense:
    """Normal entries, columns then divided by their norms; or one whose columns are orthogonal too."""
    matrix = torch.from_numpy(numbers(seed, 3).standard_normal((n, d)))
    matrix = torch.linalg.qr(matrix)[0] if orthonormal else matrix / matrix.norm(dim=0)
    return Dense(matrix.float())


def sparse(counts: Sequence[int], d: int, seed: int) -> Sparse:
    """Density 1 / sqrt(n) in a tensor of n weights; `counts` are those of each tensor. Columns then get unit norm."""
    rows, columns, values, before = [], [], [], 0
    for index, count in enumerate(counts):
        density, cells, stream = 1 / math.sqrt(count), count * d, numbers(seed, 4, index)
        found, last = [np.empty(0, np.int64)], -1
        while last < cells:  # gaps between non-zeros are geometric, so no cell that stays zero is ever drawn
            places = last + np.cumsum(stream.geometric(density, int(1.1 * density * (cells - last)) + 16))
            found.append(places)
            last = int(places[-1])
        places = np.concatenate(found)
        places = places[places < cells]
        rows.append(before + places // d)
        columns.append(places % d)
        values.append((stream.randint(0, 2, len(places)) * 2.0 - 1) * math.sqrt(1 / (density * d)))
        before += count
    row, column = (torch.from_numpy(np.concatenate(part)).to(torch.int32) for part in (rows, columns))
    value = torch.from_numpy(np.concatenate(values))
    norms = value.new_zeros(d).index_add_(0, column, value.square()).sqrt().clamp(min=1e-12)
    return Sparse(before, d, row, column, (value / norms.index_select(0, column)).float())


def to(part: Projection, device: torch.device | None) -> Projection:
    """The projection with its tensors on another device."""
    moved: dict[str, Any] = {}
    for f in fields(part):
        value = getattr(part, f.name)
        moved[f.name] = value.to(device) if isinstance(value, Tensor) else value
    return type(part)(**moved)

"""One trained array that many matrices are gathered from: the map, the gradients' way back, layers without a weight.

Steps and letters are those of the method's own file: n weights in one line through all modules, W[j] = lambda g(j)
psi[h(j)], m numbers in psi. Nothing of size n is held: a layer's matrix is gathered for its product and dropped, in the
forward pass and again in the backward pass. What all layers send back is added up in one float32 array, which psi gets
at the end of a backward pass as one gradient, already divided; so accumulating, clipping and optimizers see it so.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shoestring.core.errors import UsageError

NAME = "psi"
PRIME = 2038074743
TILE, STRIP = 16, 8  # roast: a matrix goes in tiles of 16 x 16, an embedding's row in strips of 8


@dataclass(frozen=True)
class Place:
    """Where a matrix [rows, columns] stands in the line of all weights, and its scale lambda."""

    name: str
    offset: int
    rows: int
    columns: int
    looked_up: bool
    scale: float = 1.0

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Map:
    """Which of m slots a weight is, and with which sign; the same everywhere for the same seed.

    Raises:
        UsageError: m is too small for the blocks of `roast`.
    """

    m: int
    seed: int = 0
    mapping: str = "fold"
    signs: bool = True

    def __post_init__(self) -> None:
        if self.m <= (TILE * TILE if self.mapping == "roast" else 0):
            raise UsageError(f"An array of {self.m} numbers is too small", remedy="Raise kept")

    @property
    def _factors(self) -> tuple[int, ...]:
        draw = random.Random(self.seed)
        return tuple(draw.randrange(1, PRIME - 1) | 1 for _ in range(3))

    def turn(self, chunk: int) -> int:
        """H(chunk), by how much the array is turned there (step 2)."""
        a, b, c = self._factors
        return (a * chunk + b * chunk * chunk + c) % PRIME % self.m

    def slices(self, place: Place) -> Iterator[tuple[int, int]]:
        """Start and length of the pieces of psi that are the matrix, one after another, with `fold` (step 2)."""
        at, end = place.offset, place.offset + place.size
        while at < end:
            chunk, within = divmod(at, self.m)
            length = min(end - at, self.m - within)
            start = (self.turn(chunk) + within) % self.m
            first = min(length, self.m - start)
            yield start, first
            if length > first:
                yield 0, length - first
            at += length

    def slots(self, place: Place, rows: Tensor) -> Tensor:
        """Slots of some rows' weights, int64 [..., columns]."""
        row, column = rows[..., None].long(), torch.arange(place.columns, device=rows.device)
        if self.mapping == "fold":
            j = place.offset + row * place.columns + column
            first, last = place.offset // self.m, (place.offset + place.size - 1) // self.m
            turns = torch.tensor([self.turn(chunk) for chunk in range(first, last + 1)], device=rows.device)
            return (turns[j // self.m - first] + j % self.m) % self.m
        high, wide = (1, STRIP) if place.looked_up else (TILE, TILE)
        block = place.offset + row // high * -(-place.columns // wide) + column // wide
        a, b, c = self._factors
        x = block % PRIME
        start = ((a * x) % PRIME + (b * (x * x % PRIME)) % PRIME + c) % PRIME % (self.m - high * wide)  # step 3
        return start + row % high * wide + column % wide

    def sign(self, j: Tensor) -> Tensor:
        """g(j), -1 or 1, of int32 numbers of weights, which may have wrapped around."""
        x = j ^ (random.Random(self.seed + 1).getrandbits(31))
        for factor in (0x7FEB352D, 0x2C1B3C6D):
            x = (x ^ (x >> 16)) * factor
        return (x >> 31) | 1


def size_of(count: int, rows: Iterable[int], kept: float) -> int:
    """m for `count` weights in rows of these lengths: below `count` it has no divisor in common with any of them."""
    m = max(1, math.floor(kept * count + 1e-9))
    lengths = set(rows)
    if m < count:
        while any(math.gcd(m, length) > 1 for length in lengths):
            m += 1
    return m


class Shared:
    """The array of a model and the ways from it and back. Modules hold this; the model holds the parameter.

    Attributes:
        places: one for each matrix, tied ones once.
    """

    def __init__(self, model: nn.Module, array: Map, places: tuple[Place, ...], scaler: str) -> None:
        self._model, self.map, self.places, self.scaler = (model,), array, places, scaler
        self._forget()

    def _forget(self) -> None:
        self._token: tuple[Tensor, nn.Parameter, torch.dtype] | None = None
        self._sums: dict[int, Tensor] = {}
        self._gamma: Tensor | None = None
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("_model", "map", "places", "scaler")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def psi(self) -> nn.Parameter:
        found: nn.Parameter = getattr(self._model[0], NAME)
        return found

    # ---- from the array

    @torch.no_grad()
    def matrix(self, place: Place) -> Tensor:
        """W [rows, columns] of a place, anew (step 1)."""
        psi = self.psi.detach()
        if self.map.mapping == "fold":
            flat = torch.cat([psi[start : start + length] for start, length in self.map.slices(place)])
        else:
            flat = psi[self.map.slots(place, torch.arange(place.rows, device=psi.device))].flatten()
        return self.signed(flat.view(place.rows, place.columns), place)

    @torch.no_grad()
    def rows(self, place: Place, rows: Tensor) -> Tensor:
        """Some rows of a place, [..., columns]; nothing else is read."""
        return self.signed(self.psi.detach()[self.map.slots(place, rows)], place, rows)

    def weight(self, place: Place) -> Tensor:
        """W for whoever reads it: as long as one is alive, the same tensor for all that are tied."""
        known, version = self._seen.get(place.offset, (lambda: None, -1))
        found, now = known(), self.psi._version
        if found is None or version != now or found.device != self.psi.device or found.dtype != self.psi.dtype:
            found = self.matrix(place)
            self._seen[place.offset] = weakref.ref(found), now
        return found

    def signed(self, values: Tensor, place: Place, rows: Tensor | None = None) -> Tensor:
        """`values` times lambda g, in place."""
        if place.scale != 1.0:
            values *= place.scale
        if self.map.signs:
            values *= self.signs(place, rows)
        return values

    def signs(self, place: Place, rows: Tensor | None = None) -> Tensor:
        """g of a place's weights, or of those of some rows."""
        device = self.psi.device
        begin = (place.offset + 2**31) % 2**32 - 2**31  # the hash is of 32 bits
        if rows is None:
            j = torch.arange(place.size, dtype=torch.int32, device=device) + begin
            return self.map.sign(j.view(place.rows, place.columns))
        j = place.offset + rows[..., None].long() * place.columns + torch.arange(place.columns, device=device)
        return self.map.sign(((j + 2**31) % 2**32 - 2**31).to(torch.int32))

    # ---- back to it

    def token(self) -> Tensor:
        """What a module's gradients hang on: its backward pass hands psi the sum of all of them."""
        psi = self.psi
        if torch._C._current_graph_task_id() == -1:
            self._sums.clear()  # left by a backward pass that broke off
        if not (psi.requires_grad and torch.is_grad_enabled()):
            return torch.zeros((), device=psi.device)
        made = self._token
        # Autograd remembers a parameter's type, which changes in place when training begins.
        if made is None or made[1] is not psi or made[2] != psi.dtype or made[0].device != psi.device:
            made = self._token = _Root.apply(psi, self), psi, psi.dtype
        return made[0]

    def add(self, place: Place, gradient: Tensor, rows: Tensor | None = None) -> None:
        """Add lambda g dL/dW of a place, or of some rows, to the sum of this backward pass, in float32 (step 5)."""
        key = torch._C._current_graph_task_id()
        if key not in self._sums:
            self._sums[key] = torch.zeros(self.map.m, device=gradient.device)
        self.scatter(self._sums[key], place, self.signed(gradient.float().clone(), place, rows), rows)

    def scatter(self, into: Tensor, place: Place, values: Tensor, rows: Tensor | None = None) -> None:
        """Add values [rows, columns] to the slots they belong to."""
        flat = values.reshape(-1)
        if self.map.mapping == "fold" and rows is None:
            at = 0
            for start, length in self.map.slices(place):
                into[start : start + length] += flat[at : at + length]
                at += length
            return
        chosen = torch.arange(place.rows, device=into.device) if rows is None else rows
        into.index_add_(0, self.map.slots(place, chosen).flatten(), flat)

    def take(self) -> Tensor:
        """The sum of this backward pass, divided by Gamma."""
        total = self._sums.pop(torch._C._current_graph_task_id())
        return total if self.scaler == "none" else total.div_(self.gamma())

    def users(self, power: int) -> Tensor:
        """Sum of lambda^power over the users of each slot, float32 [m]; 0 counts them."""
        total = torch.zeros(self.map.m, device=self.psi.device)
        for place in self.places:
            self.scatter(total, place, torch.tensor(place.scale**power, device=total.device).expand(place.size))
        return total

    def gamma(self) -> Tensor:
        """What gradients are divided by (step 5), [m]; worked out once."""
        if self._gamma is None or self._gamma.device != self.psi.device:
            sums, counts = self.users(1), self.users(0)
            found = {
                "v1": lambda: sums.square() / (counts + 1e-3),
                "v2": lambda: sums,
                "v3": lambda: sums / (counts + 1e-3),
                "v4": lambda: self.users(2).sqrt(),
                "v5": lambda: self.users(2),
                "none": lambda: torch.ones_like(sums),
            }[self.scaler]()
            self._gamma = found if self.scaler == "none" else found + 1e-6
        return self._gamma


class _Root(torch.autograd.Function):
    """The node that all gradients of the array pass, once in a backward pass."""

    @staticmethod
    def forward(ctx: Any, psi: Tensor, shared: Shared) -> Tensor:
        ctx.shared = shared
        return torch.zeros((), device=psi.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        return ctx.shared.take(), None


class _Multiply(torch.autograd.Function):
    """x W^T + bias; W is gathered in both directions and kept in none (step 6)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, token: Tensor, shared: Shared, place: Place) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shared, ctx.place = shared, place
        return F.linear(x, shared.matrix(place).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (grad,) = ctx.saved_tensors, grads
        back = bias = token = None
        flat = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            back = grad @ ctx.shared.matrix(ctx.place).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            bias = flat.sum(0)
        if ctx.needs_input_grad[2]:
            ctx.shared.add(ctx.place, flat.T @ x.flatten(0, -2).to(flat.dtype))
            token = torch.zeros((), device=grad.device)
        return back, bias, token, None, None


class _LookUp(torch.autograd.Function):
    """Rows of W; those of the padding token get no gradient, as in torch's embedding."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, ids: Tensor, shared: Shared, place: Place, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shared, ctx.place, ctx.padding = shared, place, padding
        return shared.rows(place, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (ids,), (grad,) = ctx.saved_tensors, grads
        if ctx.padding is not None:
            grad = grad * (ids != ctx.padding)[..., None]
        ctx.shared.add(ctx.place, grad, ids)
        return torch.zeros((), device=grad.device), None, None, None, None


class SharedLinear(nn.Module):
    """A linear layer whose matrix is a part of the model's array; its bias, if it has one, is its own."""

    shared_with = NAME

    def __init__(self, shared: Shared, place: Place, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.shared, self.place = shared, place
        self.register_parameter("bias", bias)
        self.in_features, self.out_features = place.columns, place.rows

    @property
    def weight(self) -> Tensor:
        return self.shared.weight(self.place)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = None if bias is None else bias.to(x.dtype)
        return _Multiply.apply(x, bias, self.shared.token(), self.shared, self.place)  # type: ignore[no-any-return]


class SharedEmbedding(nn.Module):
    """An embedding whose table is a part of the model's array."""

    shared_with = NAME

    def __init__(self, shared: Shared, place: Place, padding_idx: int | None) -> None:
        super().__init__()
        self.shared, self.place, self.padding_idx = shared, place, padding_idx
        self.num_embeddings, self.embedding_dim = place.rows, place.columns

    @property
    def weight(self) -> Tensor:
        return self.shared.weight(self.place)

    def forward(self, ids: Tensor) -> Tensor:
        token = self.shared.token()
        return _LookUp.apply(token, ids, self.shared, self.place, self.padding_idx)  # type: ignore[no-any-return]

"""Which rows of a table each id reads, as plain numbers without torch, and the rules of hashing beside clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError

PRIME = 2**31 - 1
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Hash:
    """A universal hash into the rows [first, first + size): first + ((a x + b) mod p) mod size, p = 2^31 - 1."""

    a: int
    b: int
    first: int
    size: int

    @classmethod
    def draw(cls, random: np.random.RandomState, size: int, first: int = 0) -> Hash:
        return cls(int(random.randint(1, PRIME)), int(random.randint(PRIME)), first, size)

    def __call__(self, ids: Array) -> Array:
        ids = np.asarray(ids, np.int64) % PRIME  # so that the product stays within 64 bits
        return self.first + (self.a * ids + self.b) % PRIME % self.size


@dataclass(frozen=True)
class Rows:
    """The rows that ids read from a table; those of several columns are summed.

    Attributes:
        index: int32 [ids, columns].
        count: rows of the table.
        others: for each column the hash that says what an id beyond `index` reads.
    """

    index: Array
    count: int
    others: tuple[Hash, ...]

    def look_up(self, ids: Any) -> Array:
        """int32 [..., columns]; any whole number is an id, those never seen are hashed."""
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise UsageError(f"ids are {ids.dtype}", remedy="Give whole numbers")
        known = (ids >= 0) & (ids < len(self.index))
        hashed = np.stack([other(ids) for other in self.others], -1)
        inside = self.index[np.where(known, ids, 0)] if len(self.index) else hashed
        return np.where(known[..., None], inside, hashed).astype(np.int32)

    def nbytes(self, width: int, itemsize: int = 4) -> int:
        """Bytes of a table `width` wide with the mapping beside it."""
        return self.count * width * itemsize + self.index.nbytes + 32 * len(self.others)


def full(interactions: Any, count: int, random: np.random.RandomState) -> Rows:
    """A row for each id, what all others are measured against; `count` is not kept to."""
    ids = interactions.shape[0]
    return Rows(_column(np.arange(ids)), ids, (Hash.draw(random, ids),))


def modulo(interactions: Any, count: int, random: np.random.RandomState) -> Rows:
    """id mod count."""
    return Rows(_column(np.arange(interactions.shape[0]) % count), count, (Hash(1, 0, 0, count),))


def universal(interactions: Any, count: int, random: np.random.RandomState) -> Rows:
    """One universal hash."""
    hash = Hash.draw(random, count)
    return Rows(_column(hash(np.arange(interactions.shape[0]))), count, (hash,))


def double(interactions: Any, count: int, random: np.random.RandomState) -> Rows:
    """Two universal hashes into one table, summed."""
    pair = (Hash.draw(random, count), Hash.draw(random, count))
    ids = np.arange(interactions.shape[0])
    return Rows(np.stack([hash(ids) for hash in pair], 1).astype(np.int32), count, pair)


def frequency(interactions: Any, count: int, random: np.random.RandomState) -> Rows:
    """Half of the rows belong to the most frequent ids alone, the others share the rest by id mod (count - half)."""
    return _with_private(interactions, count, (Hash(1, 0, 0, count - count // 2),))


def double_frequency(interactions: Any, count: int, random: np.random.RandomState) -> Rows:
    """As `frequency`, the others by two universal hashes; a private row is read twice, as the authors' code does."""
    left = count - count // 2
    return _with_private(interactions, count, (Hash.draw(random, left), Hash.draw(random, left)))


def lsh(interactions: Any, count: int, random: np.random.RandomState) -> Rows:
    """Signs of random projections of an id's interactions, as a number, mod count: like interactions, same row.

    The authors keep all 2^bits rows, which is up to twice the count.
    """
    planes = random.standard_normal((interactions.shape[1], count.bit_length()))
    signs = np.asarray(interactions @ planes) > 0
    numbers = signs @ (1 << np.arange(planes.shape[1], dtype=np.int64))
    return Rows(_column(numbers % count), count, (Hash.draw(random, count),))


# Rules by name: (interactions [ids, others], rows, random state) -> Rows. A rule that reads only ids ignores the rest.
RULES: dict[str, Callable[[Any, int, np.random.RandomState], Rows]] = {
    "full": full,
    "modulo": modulo,
    "universal": universal,
    "frequency": frequency,
    "double": double,
    "double_frequency": double_frequency,
    "lsh": lsh,
}


def by_rule(name: str, interactions: Any, count: int, seed: int = 0) -> Rows:
    """The rows by one of `RULES`, for the ids that are the rows of a sparse matrix [ids, others].

    Raises:
        UsageError: no such rule, or fewer than 2 rows.
    """
    if name not in RULES:
        raise UsageError(f"no rule is called {name}", remedy=f"Known: {', '.join(RULES)}")
    if count < 2:
        raise UsageError(f"a table of {count} rows", "a rule needs two at least", "Ask for more rows")
    return RULES[name](interactions, count, np.random.RandomState(seed))


def _with_private(interactions: Any, count: int, others: tuple[Hash, ...]) -> Rows:
    ids, half = interactions.shape[0], min(count // 2, interactions.shape[0])
    index = np.stack([other(np.arange(ids)) for other in others], 1)
    often = np.argsort(-np.diff(interactions.tocsr().indptr), kind="stable")[:half]
    index[often] = (count - count // 2 + np.arange(half))[:, None]
    return Rows(index.astype(np.int32), count, others)


def _column(numbers: Array) -> Array:
    return numbers.astype(np.int32)[:, None]

"""Which experts stay when there is room for few: the same policies serve a model at work and a recorded trace."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from shoestring.core.errors import UsageError, nearest

Key = tuple[int, int]  # layer, expert


class Policy(Protocol):
    """Says what an expert in memory is worth. The least worth one goes first."""

    def used(self, key: Key) -> None:
        """A token meets it now."""

    def worth(self, key: Key, layer: int) -> float:
        """While the model stands in `layer`."""


class Recent:
    """The one that was used longest ago goes (LRU)."""

    def __init__(self) -> None:
        self._clock, self._last = 0, dict[Key, int]()

    def used(self, key: Key) -> None:
        self._clock += 1
        self._last[key] = self._clock

    def worth(self, key: Key, layer: int) -> float:
        return self._last.get(key, 0)


class Frequent:
    """The one that was used least goes, and old uses count less: half after `half_life` visits of its layer (LFU).

    Counts are kept as logarithms that grow with time instead of counts that shrink, so nothing is done to the rest.
    """

    def __init__(self, half_life: float = 64.0, layers: int = 1) -> None:
        self._half = half_life
        self._visits, self._log = [0] * layers, dict[Key, float]()

    def used(self, key: Key) -> None:
        now = self._now(key[0])
        # log2(2^(log - now) + 1) + now: the aged count and one more.
        self._log[key] = math.log2(2.0 ** (self._log.get(key, -math.inf) - now) + 1.0) + now

    def visited(self, layer: int) -> None:
        self._visits[layer] += 1

    def worth(self, key: Key, layer: int) -> float:
        return self._log.get(key, -math.inf) - self._now(key[0])

    def _now(self, layer: int) -> float:
        return self._visits[layer] / self._half


class Costly(Frequent):
    """What is likely used soon and takes long to load stays.

    An expert's share of its layer's recent visits, times the time to load it, over how many layers away it is.
    """

    def __init__(self, half_life: float = 64.0, layers: int = 1, seconds: Callable[[Key], float] = lambda key: 1.0):
        super().__init__(half_life, layers)
        self._layers, self._seconds = layers, seconds

    def worth(self, key: Key, layer: int) -> float:
        away = (key[0] - layer - 1) % self._layers + 1
        recent = max(1.0, min(self._visits[key[0]], self._half / math.log(2)))
        return min(1.0, 2.0 ** super().worth(key, layer) / recent) * self._seconds(key) / away


class Drawn:
    """Any of them, by lot: what the others are held against."""

    def __init__(self, seed: int = 0) -> None:
        self._draw = random.Random(seed)

    def used(self, key: Key) -> None:
        pass

    def worth(self, key: Key, layer: int) -> float:
        return self._draw.random()


class Clairvoyant:
    """The one whose next use is furthest away goes (Belady). It needs to know the visits to come: traces only.

    Args:
        visits: (layer, experts) in the order in which they will come.
    """

    def __init__(self, visits: Sequence[tuple[int, Sequence[int]]]) -> None:
        self._to_come: dict[Key, list[int]] = {}
        for time in range(len(visits) - 1, -1, -1):
            layer, experts = visits[time]
            for expert in experts:
                self._to_come.setdefault((layer, expert), []).append(time)

    def used(self, key: Key) -> None:
        self._to_come[key].pop()

    def worth(self, key: Key, layer: int) -> float:
        left = self._to_come.get(key)
        return -left[-1] if left else -math.inf


POLICIES = ("lru", "lfu", "cost", "random")


def policy(
    name: str, layers: int, *, seconds: Callable[[Key], float] = lambda key: 1.0, half_life: float = 64.0, seed: int = 0
) -> Policy:
    """A policy by its name.

    Args:
        seconds: how long it takes to load an expert.

    Raises:
        UsageError: an unknown name.
    """
    made: Mapping[str, Callable[[], Policy]] = {
        "lru": Recent,
        "lfu": lambda: Frequent(half_life, layers),
        "cost": lambda: Costly(half_life, layers, seconds),
        "random": lambda: Drawn(seed),
    }
    if name not in made:
        raise UsageError(f"policy {name!r} is unknown", remedy=nearest(name, POLICIES))
    return made[name]()


class Trust:
    """Whether reading ahead pays: whether guesses for a layer come true at least as often as those of its experts that
    are in memory anyway are asked for again, since a guess takes the place of one of these. Old visits count less."""

    FADING = 0.98  # what a count is worth after the next one

    def __init__(self, layers: int) -> None:
        self._true, self._again = ([[1.0, 2.0] for _ in range(layers)] for _ in range(2))
        self._open: dict[Key, int] = {}  # guesses that were not in memory -> the visit for which

    def guessed(self, key: Key, until: int) -> bool:
        """Note a guess for the visit `until` of an expert that is not in memory; whether it shall be read ahead."""
        self._open[key] = until
        (true, guesses), (again, held) = self._true[key[0]], self._again[key[0]]
        return true * held >= again * guesses

    def visited(self, visit: int, asked: Collection[Key], held: Collection[Key]) -> None:
        """Visit number `visit` asks for experts of a layer, of which `held` were in memory without a guess."""
        over = [key for key, until in self._open.items() if until <= visit]
        for counts, keys in ((self._true, over), (self._again, held)):
            for key in keys:
                hits, tries = counts[key[0]]
                counts[key[0]] = [hits * self.FADING + (key in asked), tries * self.FADING + 1]
        for key in over:
            del self._open[key]


class Slots:
    """Places for `count` experts, shared by all layers or divided among them.

    Args:
        quota: places that each layer has for itself; 0 for one pool.
    """

    def __init__(self, count: int, policy: Policy, quota: int = 0) -> None:
        self.count, self.policy, self.quota = count, policy, quota
        self.held: dict[Key, int] = {}  # expert -> slot
        self._free = list(range(count - 1, -1, -1))
        self._of_layer: dict[int, int] = {}

    def visit(self, layer: int) -> None:
        """The model enters a layer."""
        getattr(self.policy, "visited", lambda layer: None)(layer)

    def use(self, key: Key) -> None:
        self.policy.used(key)

    def admit(self, key: Key, layer: int, keep: Collection[Key], spare: Collection[Key] = ()) -> tuple[int, Key | None]:
        """A slot for `key`, and who had to leave it; (-1, None) when everyone must stay.

        Args:
            layer: where the model stands.
            keep: those who must not leave.
            spare: those who leave only if nobody else can.
        """
        full = self.quota and self._of_layer.get(key[0], 0) >= self.quota
        if self._free and not full:
            return self._put(key, self._free.pop()), None
        may = [k for k in self.held if k not in keep and (not full or k[0] == key[0])]
        may = [k for k in may if k not in spare] or may
        if not may:
            return -1, None
        leaving = min(may, key=lambda k: self.policy.worth(k, layer))
        slot = self.drop(leaving)
        self._free.remove(slot)
        return self._put(key, slot), leaving

    def drop(self, key: Key) -> int:
        """Empty the slot of `key`; returns it."""
        slot = self.held.pop(key)
        self._of_layer[key[0]] -= 1
        self._free.append(slot)
        return slot

    def _put(self, key: Key, slot: int) -> int:
        self.held[key] = slot
        self._of_layer[key[0]] = self._of_layer.get(key[0], 0) + 1
        return slot

"""A world of tables for caches that move requests to a small model: topics, how well each model does, and a clock.

No language model: a topic's requests have vectors around one centre, and an answer is right with the probability that
the tables give. Everything else (pool, selector, router, load) is what serves.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

WIDTH = 64
TOPICS = 12
COMMON = 0.35  # noise of a request around its topic, as a share of the centre's length


@dataclass(frozen=True)
class Outcome:
    """One request: who answered, the chance of a right answer, and how far it was from the best model's."""

    small: bool
    chance: float
    regret: float = 0.0
    arrival: float = 0.0
    latency: float = 0.0


class World:
    """Topics with the chance of a right answer: of the small model with good examples, without, and of the large."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        centres = self.draw.standard_normal((TOPICS, WIDTH))
        self.centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        self.helped = self.draw.uniform(0.4, 0.95, TOPICS)
        self.alone = self.helped * self.draw.uniform(0.1, 0.6, TOPICS)
        self.large = self.draw.uniform(0.6, 0.9, TOPICS)
        self._vectors: dict[str, np.ndarray] = {}
        self.now = 0.0

    def embed(self, text: str) -> np.ndarray:
        """The vector of a request that `request` made; others have one by their letters."""
        if text not in self._vectors:
            made = np.random.default_rng(len(text)).standard_normal(WIDTH)
            self._vectors[text] = (made / np.linalg.norm(made)).astype(np.float32)
        return self._vectors[text]

    def request(self, number: int) -> tuple[int, str]:
        """A topic and a text of it; popular topics come more often."""
        topic = int(self.draw.choice(TOPICS, p=_shares()))
        vector = self.centres[topic] + COMMON * self.draw.standard_normal(WIDTH) / np.sqrt(WIDTH)
        text = f"topic {topic} request {number}"
        self._vectors[text] = (vector / np.linalg.norm(vector)).astype(np.float32)
        return topic, text

    def chance(self, topic: int, small: bool, examples: Sequence[Any]) -> float:
        """Of a right answer. Examples help the small model by the share of them that are of the topic and right."""
        if not small:
            return float(self.large[topic])
        good = sum(e.request.startswith(f"topic {topic} ") and e.answer == "right" for e in examples)
        share = good / len(examples) if examples else 0.0
        return float(self.alone[topic] + share * (self.helped[topic] - self.alone[topic]))

    def cache(self, modules: Any, **options: Any) -> Any:
        """A cache of the method over a small and a large model of this world."""
        config = replace(modules.example(), small="", large="", **options)
        models = [modules.Model("small", 0.2, 2048), modules.Model("large", 1.0, 2048)]
        return modules.Cache(config, models, self.embed, "world", clock=lambda: self.now)

    def outcomes(
        self, cache: Any, modules: Any, count: int, labelled: float = 0.1, at_random: float | None = None
    ) -> list[Outcome]:
        """`count` requests one after another, a share of them with feedback that comes some requests later.

        Args:
            at_random: the share that goes to the large model by chance, in place of the router's choice.
        """
        found, late = [], []
        for number in range(count):
            self.now += 1.0
            topic, text = self.request(number)
            without: tuple[str, ...] = ()
            if at_random is not None and cache.pool.examples:
                without = ("small",) if self.draw.random() < at_random else ("large",)
            decision = cache.decide(modules.Asked("a/", text, 30, 30), without)
            small = decision.model.name == "small"
            chance = self.chance(topic, small, decision.kept.examples)
            right = bool(self.draw.random() < chance)
            cache.finish(decision, "right" if right else "wrong", True)
            if decision.wanted and self.draw.random() < 0.5 or self.draw.random() < labelled / 2:
                late.append((decision.id, float(right)))
            while len(late) > 5:
                cache.feedback("a", *late.pop(int(self.draw.integers(len(late)))))
            best = max(self.large[topic], self.helped[topic])
            found.append(Outcome(small, chance, max(0.0, float(best - chance))))
        return found


def _shares() -> np.ndarray:
    weights = 1 / np.arange(1, TOPICS + 1)
    return np.asarray(weights / weights.sum())


def burst(world: World, cache: Any, modules: Any, *, rate: float, times: float, seconds: float) -> list[Outcome]:
    """Requests at `rate` a second, `times` as many in the middle third; each model answers one at a time, in order.

    The large model takes a second a request, the small one a fifth. Returns the outcomes by arrival.
    """
    draw = random.Random(int(world.draw.integers(1 << 30)))
    begin, number, clock = world.now, 0, 0.0
    free = {"small": 0.0, "large": 0.0}
    takes = {"small": 0.2, "large": 1.0}
    ending: list[tuple[float, int, Any, bool, int]] = []
    found = []

    def settle(until: float) -> None:
        while ending and ending[0][0] <= until:
            end, _, decision, right, tokens = heapq.heappop(ending)
            world.now = begin + end
            cache.end(tokens)
            cache.finish(decision, "right" if right else "wrong", True)

    while clock < seconds:
        busy = seconds / 3 <= clock < 2 * seconds / 3
        clock += draw.expovariate(rate * (times if busy else 1.0))
        settle(clock)
        world.now = begin + clock
        topic, text = world.request(-1 - number)
        decision = cache.decide(modules.Asked("a/", text, 30, 30))
        name = decision.model.name
        free[name] = max(free[name], clock) + takes[name]
        chance = world.chance(topic, name == "small", decision.kept.examples)
        right = bool(world.draw.random() < chance)
        heapq.heappush(ending, (free[name], number, decision, right, cache.begin(decision)))
        found.append(Outcome(name == "small", chance, 0.0, clock, free[name] - clock))
        number += 1
    settle(float("inf"))
    return found

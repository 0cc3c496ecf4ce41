"""Which examples a prompt gets: near ones first, then those that are worth their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoestring.methods.serving._pool import Example
from shoestring.methods.serving._router import Model, Ridge

GRID = (0.2, 0.35, 0.5, 0.65, 0.8)  # thresholds that are tried
FEATURES = 7


@dataclass(frozen=True)
class Kept:
    """Examples in the order of the prompt, the most useful one last, and how useful each is."""

    examples: tuple[Example, ...] = ()
    utilities: tuple[float, ...] = ()
    cosines: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(example.tokens for example in self.examples)


class Utility:
    """How much an example helps a model with a request, 0..1 (eq. 2).

    u = cosine x quality until something is known; a ridge regression for each model learns what is to be added.
    """

    def __init__(self) -> None:
        self._learned: dict[str, Ridge] = {}

    def features(
        self, example: Example, cosine: float, request_tokens: int, model: Model, producer: float
    ) -> np.ndarray:
        """(FEATURES,). `producer` is the cost of the model that made the example."""
        long, asked = example.tokens / model.context, request_tokens / model.context
        return np.array([1.0, cosine, example.quality, producer, long, asked, float(model.cost < producer)])

    def of(self, features: Sequence[np.ndarray], model: str) -> list[float]:
        """The utility of each example by its features."""
        if not features:
            return []
        rows, known = np.stack(features), self._learned.get(model)
        learned = rows @ known.weights() if known else 0.0
        return [float(u) for u in np.clip(rows[:, 1] * rows[:, 2] + learned, 0.0, 1.0)]

    def learn(self, features: np.ndarray, model: str, score: float) -> None:
        """A prompt with this example got an answer of this score."""
        ridge = self._learned.setdefault(model, Ridge(np.zeros(FEATURES)))
        ridge.learn(features, score - float(features[1] * features[2]))

    def to_json(self) -> dict[str, Any]:
        return {name: ridge.to_json() for name, ridge in self._learned.items()}

    def read(self, data: Mapping[str, Any]) -> None:
        for name, stored in data.items():
            self._learned.setdefault(name, Ridge(np.zeros(FEATURES))).read(stored)


class Threshold:
    """The least utility, tuned on a small share of the requests: the grid's best mean of quality less cost (eq. 3)."""

    def __init__(self, start: float, share: float, draw: np.random.Generator) -> None:
        self.start, self.share, self._draw = start, share, draw
        self.sums = dict.fromkeys(GRID, 0.0)
        self.counts = dict.fromkeys(GRID, 0)

    @property
    def best(self) -> float:
        tried = [t for t in GRID if self.counts[t] >= 3]
        return max(tried, key=lambda t: self.sums[t] / self.counts[t]) if len(tried) == len(GRID) else self.start

    def next(self) -> float:
        """The threshold for a request: the best, or now and then another."""
        if self._draw.random() < self.share:
            return GRID[int(self._draw.integers(len(GRID)))]
        return self.best

    def learn(self, threshold: float, worth: float) -> None:
        if threshold in self.sums:
            self.sums[threshold] += worth
            self.counts[threshold] += 1

    def to_json(self) -> dict[str, Any]:
        return {"sums": list(self.sums.values()), "counts": list(self.counts.values())}

    def read(self, data: Mapping[str, Any]) -> None:
        if len(data.get("sums", ())) == len(GRID):
            self.sums, self.counts = dict(zip(GRID, data["sums"])), dict(zip(GRID, data["counts"]))


def kept(
    found: Sequence[tuple[Example, float]], utilities: Sequence[float], *, threshold: float, room: int, context: int,
    most: int, redundancy: float, length: float,
) -> Kept:  # fmt: skip
    """The examples worth having (eq. 3).

    Args:
        found: near examples with their cosines.
        room: tokens that examples may take.
        context: the model's, in tokens: an example's length is counted as a share of it.
        most: examples of a prompt.
        redundancy, length: lambda_r and lambda_l.
    """
    chosen: list[int] = []
    used = 0
    for i in sorted(range(len(found)), key=lambda i: (-utilities[i], found[i][0].id)):
        example = found[i][0]
        if len(chosen) == most or utilities[i] <= threshold:
            break
        alike = max((float(example.vector @ found[j][0].vector) for j in chosen), default=0.0)
        marginal = utilities[i] - redundancy * max(0.0, alike) - length * example.tokens / context
        if marginal > 0 and used + example.tokens <= room:
            chosen.append(i)
            used += example.tokens
    chosen.reverse()  # the best example stands next to the request
    return Kept(
        tuple(found[i][0] for i in chosen), tuple(utilities[i] for i in chosen), tuple(found[i][1] for i in chosen)
    )

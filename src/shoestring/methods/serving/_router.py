"""Which model answers: a contextual bandit on judged quality, with a bias for load that teaches it nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from shoestring.core.errors import UsageError

RIDGE = 1.0  # lam: keeps every A_m regular


@dataclass(frozen=True)
class Model:
    """One that may answer. `cost` is relative to the dearest, which has 1; `context` in tokens."""

    name: str
    cost: float
    context: int = 4096


class Ridge:
    """A linear model learned one observation at a time: A = lam I + sum f f^T, b = lam mean + sum r f (eq. 4)."""

    def __init__(self, mean: Sequence[float] | np.ndarray) -> None:
        self.mean = np.asarray(mean, float)
        self.moments = RIDGE * np.eye(len(self.mean))
        self.sums = RIDGE * self.mean
        self.seen = 0

    def learn(self, features: np.ndarray, target: float) -> bool:
        """Take in an observation; one that is not finite is refused."""
        if not (math.isfinite(target) and np.isfinite(features).all()):
            return False
        self.moments = self.moments + np.outer(features, features)
        self.sums = self.sums + target * features
        self.seen += 1
        return True

    def expected(self, features: np.ndarray) -> float:
        return float(features @ self.weights())

    def weights(self) -> np.ndarray:
        return np.asarray(cho_solve(cho_factor(self.moments), self.sums))

    def drawn(self, features: np.ndarray, spread: float, draw: np.random.Generator) -> float:
        """theta . features with theta ~ N(A^-1 b, spread^2 A^-1): only its projection is needed, which is normal."""
        factor = cho_factor(self.moments)
        mean = features @ cho_solve(factor, self.sums)
        variance = max(0.0, float(features @ cho_solve(factor, features)))
        return float(mean + spread * math.sqrt(variance) * draw.standard_normal())

    def to_json(self) -> dict[str, Any]:
        return {"moments": self.moments.tolist(), "sums": self.sums.tolist(), "seen": self.seen}

    def read(self, data: Mapping[str, Any]) -> None:
        """Go on from what was stored; of another size it is of another time, and nothing is taken over."""
        moments, sums = np.array(data["moments"], float), np.array(data["sums"], float)
        if moments.shape == self.moments.shape and sums.shape == self.sums.shape:
            self.moments, self.sums, self.seen = moments, sums, int(data["seen"])


class Load:
    """Running mean of how busy the models are, 0..1 and beyond (eq. 5)."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.level = 0.0

    def see(self, now: float) -> None:
        self.level += self.share * (now - self.level)


@dataclass(frozen=True)
class Choice:
    """`close` says that the two best were so near that a label of this request is worth most."""

    model: Model
    scores: Mapping[str, float]
    close: bool


class Router:
    """One linear Thompson sampler for each model.

    Args:
        models: in any order; more may come and go while running, and one that returns knows what it knew.
        width: of the contexts, whose first number is 1 and whose second is the largest utility of the examples.
        spread: v, how boldly it tries.
        threshold, gain, steepness: L0, gamma and kappa of the load bias.
        margin: scores nearer than this are close.
    """

    def __init__(
        self, models: Sequence[Model], width: int, *, spread: float, threshold: float, gain: float, steepness: float,
        margin: float, seed: int,
    ) -> None:  # fmt: skip
        self.width, self.spread, self.margin = width, spread, margin
        self.threshold, self.gain, self.steepness = threshold, gain, steepness
        self._draw = np.random.default_rng(seed)
        self._learned: dict[str, Ridge] = {}
        self.models: dict[str, Model] = {}
        for model in models:
            self.add(model)

    def add(self, model: Model) -> None:
        """A model may answer from now on."""
        self.models[model.name] = model
        if model.name not in self._learned:
            # Before anything is known the dearest model is trusted, a cheaper one as far as examples help it.
            prior = np.zeros(self.width)
            prior[:2] = (0.7, 0.0) if model.cost >= 1 else (0.2, 0.5)
            self._learned[model.name] = Ridge(prior)

    def remove(self, name: str) -> None:
        """A model answers no more. Raises UsageError for an unknown one, or the last."""
        self._known(name)
        if len(self.models) == 1:
            raise UsageError(f"{name} is the only model", remedy="Add another one first")
        del self.models[name]

    def exchange(self, models: Sequence[Model]) -> None:
        """These models answer from now on, and no others."""
        for model in models:
            self.add(model)
        for name in set(self.models) - {model.name for model in models}:
            self.remove(name)

    def bias(self, model: Model, load: float) -> float:
        """What a model's price counts for now: gamma c_m tanh(kappa (L - L0)), nothing below L0 (eq. 5)."""
        return self.gain * model.cost * math.tanh(self.steepness * max(0.0, load - self.threshold))

    def choose(self, contexts: Mapping[str, np.ndarray], load: float) -> Choice:
        """The model of the best drawn quality less its bias.

        Args:
            contexts: one (width,) for each model that may answer this request.
        """
        scores = {}
        for name, context in contexts.items():
            drawn = self._of(name).drawn(context, self.spread, self._draw)
            scores[name] = drawn - self.bias(self._known(name), load)
        order = sorted(scores, key=lambda name: (-scores[name], self.models[name].cost))
        close = len(order) > 1 and scores[order[0]] - scores[order[1]] < self.margin
        return Choice(self.models[order[0]], scores, close)

    def learn(self, name: str, context: np.ndarray, reward: float) -> bool:
        """Only the model that answered learns, whatever the bias was."""
        return self._of(name).learn(context, reward)

    def expected(self, name: str, context: np.ndarray) -> float:
        return self._of(name).expected(context)

    def to_json(self) -> dict[str, Any]:
        return {name: ridge.to_json() for name, ridge in self._learned.items()}

    def read(self, data: Mapping[str, Any]) -> None:
        for name, stored in data.items():
            self._learned.setdefault(name, Ridge(np.zeros(self.width))).read(stored)

    def _of(self, name: str) -> Ridge:
        if name not in self._learned:
            self._known(name)
        return self._learned[name]

    def _known(self, name: str) -> Model:
        if name not in self.models:
            raise UsageError(f"there is no model {name}", remedy="There are: " + ", ".join(self.models))
        return self.models[name]

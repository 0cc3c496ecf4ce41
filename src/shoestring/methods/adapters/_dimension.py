"""The smallest dimension that is enough: a search over d with seeds, an interval, an early stop, and a memory.

Training is a function `score(d, seed)`; nothing here knows what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.core.files import write_text

_RESAMPLES = 100
_FLAT = 0.02  # of the baseline: a curve that rises less over two steps is flat


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        d: the smallest tried dimension whose mean score is enough; None when none is.
        below: the largest tried dimension under it that is not enough; 0 when there is none. The truth is between.
        low, high: 95% of `d` when seeds are drawn again; None where no tried dimension is enough.
        enough: the score that is asked for.
        baseline: the mean score it is a share of.
        curve: tried dimension -> its scores, seed by seed.
        flat: whether the search stopped because the curve rose no more.
    """

    d: int | None
    below: int
    low: int | None
    high: int | None
    enough: float
    baseline: float
    curve: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    flat: bool = False


class Memory:
    """Scores by name in one file, so that an interrupted search goes on where it stood.

    Raises:
        UsageError: the file belongs to a search with other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, json.loads(json.dumps(settings))
        self.scores: dict[str, float] = {}
        if file.is_file():
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["settings"] != self.settings:
                other = sorted(k for k in self.settings if held["settings"].get(k) != self.settings[k])
                raise UsageError(
                    f"{file} holds a search with other settings", f"{', '.join(other)} differ", "Use another folder"
                )
            self.scores = held["scores"]

    def __call__(self, name: str, score: Callable[[], float]) -> float:
        """The score `name`, worked out only if it is not known yet."""
        if name not in self.scores:
            self.scores[name] = float(score())
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps({"settings": self.settings, "scores": self.scores}, indent=2) + "\n")
        return self.scores[name]


def search(
    score: Callable[[int, int], float],
    baseline: Sequence[float],
    *,
    grid: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    share: float = 0.9,
    refine: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """Raise d along `grid` until the mean score over `seeds` is at least `share` of the baseline's, then halve the gap.

    Args:
        baseline: scores of direct training, one a seed; or one number that counts for all.
        refine: how many dimensions to try between the last that is not enough and the first that is.

    Raises:
        UsageError: an empty grid, no seeds, or a baseline that leaves nothing to reach.
    """
    whole = float(np.mean(baseline))
    if not grid or not seeds or min(grid) < 1:
        raise UsageError("a search needs dimensions of at least 1 and seeds", f"grid {list(grid)}, seeds {list(seeds)}")
    if not 0 < share <= 1 or not whole > 0:
        raise UsageError(
            f"there is nothing to reach: {share:g} of a baseline of {whole:.4g}",
            "direct training must score above 0",
            "Give more steps, or another learning rate",
        )
    curve: dict[int, tuple[float, ...]] = {}
    enough, flat = share * whole, False

    def mean(d: int) -> float:
        if d not in curve:
            curve[d] = tuple(score(d, seed) for seed in seeds)
            say(f"d {d}: {np.mean(curve[d]):.4f}, enough is {enough:.4f}")
        return float(np.mean(curve[d]))

    first = None
    for d in sorted(set(grid)):
        if mean(d) >= enough:
            first = d
            break
        tried = [float(np.mean(curve[k])) for k in sorted(curve)]
        # A curve is flat at its foot as well.
        if len(tried) >= 3 and tried[-1] > enough / 2 and tried[-1] - tried[-3] < _FLAT * whole:
            flat = True
            break
    below = max((d for d in curve if first is None or d < first), default=0)
    for _ in range(refine):
        if first is None:
            break
        between = round((max(below, 1) * first) ** 0.5)
        if between in (below, first) or between < 1:
            break
        first, below = (between, below) if mean(between) >= enough else (first, between)
    low, high = _interval(curve, baseline, share)
    return Found(first, below, low, high, enough, whole, dict(sorted(curve.items())), flat)


def _interval(
    curve: Mapping[int, tuple[float, ...]], baseline: Sequence[float], share: float
) -> tuple[int | None, int | None]:
    """95% of the smallest tried dimension that is enough, seeds being drawn again with replacement."""
    tried, draw = sorted(curve), np.random.RandomState(0)
    scores = np.array([curve[d] for d in tried])
    found = []
    for _ in range(_RESAMPLES):
        pick = draw.randint(0, scores.shape[1], scores.shape[1])
        whole = np.asarray(baseline)[pick].mean() if len(baseline) == scores.shape[1] else np.mean(baseline)
        passed = [d for d, mean in zip(tried, scores[:, pick].mean(1)) if mean >= share * whole]
        found.append(float(passed[0]) if passed else float("inf"))
    bounds = np.percentile(found, [2.5, 97.5], method="nearest")
    low, high = (None if np.isinf(bound) else int(bound) for bound in bounds)
    return low, high

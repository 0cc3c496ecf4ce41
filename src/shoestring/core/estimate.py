"""Medians and ratios with a bootstrap interval: what repeated runs are allowed to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from shoestring.core.errors import UsageError

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A median over `n` values with its 95% interval; the interval is None when n = 1."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    def covers(self, value: float) -> bool:
        """Whether the interval holds `value`; True when there is no interval, since one run rules nothing out."""
        return self.low is None or self.high is None or self.low <= value <= self.high


def interval(values: Sequence[float], seed: int = 0) -> Estimate:
    """The median with a percentile bootstrap 95% interval. Same values, same seed: same interval.

    Raises:
        UsageError: no values, or one that is not finite.
    """
    if not len(values):
        raise UsageError("an interval needs at least one value")
    if not all(map(math.isfinite, values)):
        raise UsageError(f"an interval needs finite values, got {[v for v in values if not math.isfinite(v)][0]}")
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), None, None, 1)
    import numpy as np  # here, because most commands never come this far and numpy takes a tenth of a second

    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    rows = max(1, min(RESAMPLES, 2_000_000 // n))  # a bound on memory, not on the number of resamples
    medians = [
        np.median(data[rng.integers(0, n, (min(rows, RESAMPLES - done), n))], axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(medians), (0.025, 0.975))
    return Estimate(float(median(values)), float(low), float(high), n)


def paired_ratio(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Estimate:
    """The median of a_i / b_i over paired runs, with its interval: a speed-up when `a` are the baseline's seconds.

    Raises:
        UsageError: unequal numbers of runs, none, or a value that is not above zero.
    """
    if len(a) != len(b):
        raise UsageError(
            f"{len(a)} runs against {len(b)} cannot be paired", remedy="Run both arms in turn, equally often"
        )
    if any(not value > 0 for value in (*a, *b)):
        raise UsageError("a ratio needs values above zero")
    return interval([x / y for x, y in zip(a, b, strict=True)], seed)

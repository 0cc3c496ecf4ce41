"""How far two models say the same: loyalty, fidelity and compression, position by position.

Feed it log-probabilities chunk by chunk; it keeps sums, never the chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shoestring.core.errors import UsageError

_ROWS = 32  # positions worked on at once: bounds the temporaries to some tens of megabytes for a large vocabulary


@dataclass(frozen=True)
class Mean:
    """A mean over `n` positions with its standard error (None when n < 2 or the mean is infinite)."""

    value: float
    error: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the normal approximation, which takes positions as independent."""
        return None if self.error is None else (self.value - 1.96 * self.error, self.value + 1.96 * self.error)


@dataclass
class _Sums:
    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        # Chan's update: exact whatever the chunks, and no cancellation between large sums.
        n, mean = values.size, float(values.mean())
        if not math.isfinite(mean + self.mean):
            self.mean, self.squares, self.n = math.inf, math.inf, self.n + n
            return
        delta, total = mean - self.mean, self.n + n
        self.squares += float(((values - mean) ** 2).sum()) + delta * delta * self.n * n / total
        self.mean += delta * n / total
        self.n = total

    def result(self) -> Mean:
        if not self.n:
            raise UsageError("no positions were compared")
        known = self.n > 1 and math.isfinite(self.squares)
        error = math.sqrt(self.squares / (self.n - 1) / self.n) if known else None
        return Mean(self.mean, error, self.n)


@dataclass
class Agreement:
    """A student against a teacher.

    agreement = Agreement()
    for batch in batches:
        agreement.add(teacher_log_probabilities, student_log_probabilities)
    """

    _same: _Sums = field(default_factory=_Sums)
    _loyalty: _Sums = field(default_factory=_Sums)
    _kl: _Sums = field(default_factory=_Sums)

    def add(self, teacher: ArrayLike, student: ArrayLike, keep: ArrayLike | None = None) -> None:
        """Add positions.

        Args:
            teacher, student: natural log-probabilities, shape [..., classes].
            keep: bool, shape [...]; positions that count (padding does not).

        Raises:
            UsageError: shapes differ, or rows that are not log-probabilities.
        """
        p, q = np.asarray(teacher), np.asarray(student)
        if p.shape != q.shape or p.ndim < 1:
            raise UsageError(f"teacher {p.shape} and student {q.shape} differ in shape")
        p, q = p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1])
        if keep is not None:
            mask = np.asarray(keep, dtype=bool).reshape(-1)
            if mask.size != len(p):
                raise UsageError(f"keep has {mask.size} positions, the log-probabilities {len(p)}")
            p, q = p[mask], q[mask]
        for start in range(0, len(p), _ROWS):
            self._add(p[start : start + _ROWS].astype(np.float64), q[start : start + _ROWS].astype(np.float64))

    def _add(self, log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> None:
        p, q = np.exp(log_p), np.exp(log_q)
        for name, rows in (("teacher", p), ("student", q)):
            sums = rows.sum(axis=-1)
            if not np.all(np.abs(sums - 1) < 0.02):  # wide enough for log-probabilities rounded to bfloat16
                raise UsageError(
                    f"the {name}'s rows are not log-probabilities",
                    f"their exponentials sum to {sums[np.argmax(np.abs(sums - 1))]:.4g}",
                    "Apply log_softmax first",
                )
        middle = np.log((p + q) / 2, where=(p + q) > 0, out=np.zeros_like(p))
        # A class of probability zero adds nothing: 0 log 0 = 0. One that only the student excludes makes KL infinite.
        kl = np.multiply(p, log_p - log_q, where=p > 0, out=np.zeros_like(p)).sum(axis=-1)
        js = np.multiply(p, log_p - middle, where=p > 0, out=np.zeros_like(p)).sum(axis=-1)
        js += np.multiply(q, log_q - middle, where=q > 0, out=np.zeros_like(q)).sum(axis=-1)
        js = np.clip(js / (2 * math.log(2)), 0, 1)
        self._same.add((p.argmax(axis=-1) == q.argmax(axis=-1)).astype(np.float64))
        self._loyalty.add(1 - np.sqrt(js))
        self._kl.add(kl)

    def label_loyalty(self) -> Mean:
        """Share of positions where both prefer the same class: top-1 agreement."""
        return self._same.result()

    def changed(self) -> Mean:
        """Share of positions where the preferred class changed."""
        same = self._same.result()
        return Mean(1 - same.value, same.error, same.n)

    def probability_loyalty(self) -> Mean:
        """Mean of 1 - sqrt(JS), with the Jensen-Shannon divergence in base 2: 1 = same distributions, 0 = disjoint."""
        return self._loyalty.result()

    def kl(self) -> Mean:
        """Mean KL(teacher || student) in nats; infinite when the student excludes what the teacher allows."""
        return self._kl.result()


def compression_ratio(before: float, after: float) -> float:
    """Size before / size after.

    Raises:
        UsageError: a size that is not above zero.
    """
    if not (before > 0 and after > 0):
        raise UsageError(f"a compression ratio needs two sizes above zero, got {before} and {after}")
    return before / after


def remaining(before: float, after: float) -> float:
    """Share of the weights that is left, 0..1."""
    if not (before > 0 and 0 <= after <= before):
        raise UsageError(f"{after} of {before} weights cannot be what is left")
    return after / before

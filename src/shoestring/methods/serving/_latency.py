"""How long an iteration takes: measured tables of the engine's steps and of training's units, and what still fits."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

_KEPT, _SHARE = 64, 0.97  # measurements that count, and how many of them an estimate must cover
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
_CONTEXTS = 512  # tokens of a context bucket


@dataclass
class _Cell:
    """The latest measurements, in seconds."""

    seen: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    likely: float = 0.0  # what few of them exceed; of the first ones, what none did, and some more

    def add(self, seconds: float) -> None:
        self.seen.append(seconds)
        ordered = sorted(self.seen)
        self.likely = ordered[int(_SHARE * (len(ordered) - 1) + 0.5)] * (1 + 1 / len(ordered))


class Table:
    """Seconds of work by kind, tokens and context. Between measured numbers of tokens it is linear."""

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        self._sizes = sizes  # a number of tokens counts as the next of these, whose figure is of its largest members
        self._cells: dict[tuple[str, int], dict[int, _Cell]] = {}

    def add(self, kind: str, tokens: int, context: int, seconds: float) -> None:
        size = self._sizes[min(bisect_left(self._sizes, tokens), len(self._sizes) - 1)]
        self._cells.setdefault((kind, context // _CONTEXTS), {}).setdefault(size, _Cell()).add(seconds)

    def likely(self, kind: str, tokens: int, context: int) -> float | None:
        """Seconds that are seldom exceeded; None when nothing of the kind was measured.

        A context without measurements takes those of the nearest. Beyond the largest measured number of tokens seconds
        grow in proportion, below the smallest they stay: both are more than it will be.
        """
        cells = self._nearest(kind, context // _CONTEXTS)
        if not cells:
            return None
        sizes = sorted(cells)
        at = bisect_left(sizes, tokens)
        if at == 0:
            return cells[sizes[0]].likely
        low = cells[sizes[at - 1]].likely
        beyond = low * tokens / sizes[at - 1]
        if at == len(sizes):
            return beyond
        if sizes[at] == tokens:  # of which the first figures say more than it will be
            return min(cells[tokens].likely, beyond)
        share = (tokens - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return low + share * (cells[sizes[at]].likely - low)

    def largest(self, kind: str, context: int, seconds: float, most: int) -> int:
        """The most tokens, of SIZES and at most `most`, whose work fits in so many seconds; 0 when not even the fewest.

        Of a kind that was never measured, the fewest: f(c, s) must be known before s grows.
        """
        fits = 0
        for size in SIZES:
            likely = self.likely(kind, size, context)
            if likely is None:
                return min(SIZES[0], most)
            if likely <= seconds:  # one that does not fit says nothing of larger ones: it may have had a bad moment
                fits = size
            if size >= most:
                break
        return min(fits, most)

    def _nearest(self, kind: str, bucket: int) -> dict[int, _Cell]:
        known = [(abs(at - bucket), at) for name, at in self._cells if name == kind]
        return self._cells[kind, min(known)[1]] if known else {}


@dataclass
class Clock:
    """The hybrid token scheduler: inference first, training in what an objective leaves of each iteration.

    f(c, s) of an iteration with c tokens of inference and s of training is the sum of two tables, since one follows the
    other: `steps` knows c and how far back its sequences reach, `units` knows s in one layer and where its window lies.

    Attributes:
        first_token, each_token: objectives, in seconds.
        share: of an objective that is planned for; the rest is for what is not measured here.
        round: seconds of training at a stretch when nobody waits.
    """

    first_token: float
    each_token: float
    share: float = 0.85
    round: float = 0.25

    def __post_init__(self) -> None:
        self.steps, self.units = Table((1, 2, 4, *SIZES)), Table()

    def allowed(self, running: int, context: int, seconds: float) -> float:
        """Seconds that training may take before the next step.

        Args:
            running: answers that wait for it, of all together `context` tokens.
            seconds: that the latest step took, which stands for the next while nothing else is known.
        """
        if not running:
            return self.round
        step = self.steps.likely("step", running, context)
        return self.share * self.each_token - (seconds if step is None else step)

    def longest(self, running: int) -> float:
        """Seconds of a single unit. Whoever comes meanwhile waits for its end, and then for the prompt."""
        return self.share * (self.each_token if running else self.first_token / 4)

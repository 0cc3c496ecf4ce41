"""Whether reading ahead pays here: passes with and without guesses by turns, until one kind is known to be faster."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable

ROUND = 8  # passes of one kind; the first of them finds in memory what the other kind left, and does not count
PAIRS = 4  # of rounds one after another, the latest of which say what is better; from so many on it goes on alone
PAUSE, LONGEST = 8, 128  # rounds until the other kind has one again: twice as many each time that it was no better


class Trial:
    """Two kinds of passes of one size, held against each other. A kind's round is compared with the other's beside it:
    contexts grow and neighbours come and go, and both are alike then.

    Attributes:
        on: whether the next pass is to guess.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.on = True
        self._clock, self._began = clock, 0.0
        self._round: list[float] = []
        self._before: tuple[bool, float] | None = None  # the latest round: its kind, and seconds of a pass
        self._gains: deque[float] = deque(maxlen=PAIRS)
        self._better: bool | None = None
        self._alone, self._pause = 0, PAUSE

    @property
    def gain(self) -> float | None:
        """Seconds of a pass without guesses over those of one with them; None before both are known."""
        return statistics.geometric_mean(self._gains) if self._gains else None

    def begin(self) -> None:
        """A pass begins."""
        self._began = self._clock()

    def end(self) -> None:
        """It has ended. One that did not get so far does not count."""
        self._round.append(self._clock() - self._began)
        if len(self._round) < ROUND:
            return
        took, self._round = statistics.fmean(self._round[1:]), []
        if self._before and self._before[0] != self.on:
            other = self._before[1]
            self._gains.append(other / took if self.on else took / other)
        self._before = self.on, took
        self.on = self._next()

    def _next(self) -> bool:
        if len(self._gains) < PAIRS:
            return not self.on
        better = statistics.geometric_mean(self._gains) > 1
        if better != self._better:
            self._better, self._alone, self._pause = better, 0, PAUSE
        self._alone += 1
        if self._alone <= self._pause:
            return better
        self._alone, self._pause = 0, min(2 * self._pause, LONGEST)
        return not better


class Trials:
    """A trial for each size of a pass, as passes of several answers meet other experts than those of one."""

    MOST = 64  # tokens of a pass that is tried: one of more meets nearly all experts, whatever is guessed

    def __init__(self) -> None:
        self._trials = defaultdict[int, Trial](Trial)
        self._size = 0

    @property
    def on(self) -> bool:
        """Whether the pass that has begun is to guess."""
        return self._size > self.MOST or self._trials[self._size].on

    @property
    def gain(self) -> float:
        """How many times as long passes took without guesses as with them; 1 while nothing is known."""
        return statistics.geometric_mean([t.gain for t in self._trials.values() if t.gain] or [1.0])

    def begin(self, tokens: int) -> None:
        self._size = tokens
        if tokens <= self.MOST:
            self._trials[tokens].begin()

    def end(self) -> None:
        if self._size <= self.MOST:
            self._trials[self._size].end()

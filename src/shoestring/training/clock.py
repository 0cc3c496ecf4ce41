"""How many steps fit into a time limit, from the speed of the steps so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

_LOOK = 3  # steps after the first, which is slower than the others, before the speed is believed
_SLACK = 0.02


@dataclass
class Clock:
    """Times the steps of a run.

    Attributes:
        limit: seconds the whole run may take; None for no limit.
        before: seconds spent by earlier parts of a resumed run.
        aside: seconds that evaluations and checkpoints took so far, which are not steps.
    """

    limit: float | None
    before: float = 0.0
    aside: float = 0.0
    last_aside: dict[str, float] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)
    _step_seconds: list[float] = field(default_factory=list)
    _step_start: float = 0.0

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self._start

    def step_begins(self) -> None:
        self._step_start = time.monotonic()

    def step_ends(self) -> None:
        self._step_seconds.append(time.monotonic() - self._step_start)

    def put_aside(self, name: str, seconds: float) -> None:
        self.aside += seconds
        self.last_aside[name] = seconds

    def affordable(self, step: int, total: int, reserve: float = 0.0) -> int:
        """The number of steps that fit, at most `total`; `reserve` seconds are kept for the work after the last one."""
        if self.limit is None:
            return total
        left = self.limit * (1 - _SLACK) - self.elapsed()
        usual = self.usual_step()
        if usual is None:
            return total if left > 0 else step
        return min(total, step + max(0, int((left - reserve) / usual)))

    def usual_step(self) -> float | None:
        """Mean seconds of a step, the first one left out; None while too few were seen."""
        usual = self._step_seconds[1:]
        return sum(usual) / len(usual) if len(usual) >= _LOOK else None

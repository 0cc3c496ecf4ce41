"""What a pass costs by its number of tokens: measured before the first request, kept true while answering."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from shoestring.engine.runner import BLOCK, Batch, Runner

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tokens of the passes that are measured
_PLACES = [bisect_left(SIZES, tokens) for tokens in range(SIZES[-1] + 1)]  # the size that stands for so many tokens
_CONTEXT = 64  # tokens before them
_SHORTEST, _LONGEST = 3, 7  # rounds over all sizes
_PATIENCE = 1.0  # seconds after which no further round is begun
_OWN, _OTHERS = 0.1, 0.02  # how fast a size believes what it, or another size, has just cost
_GUESS = 0.06  # cost of a further token before anything is measured, as a share of the first


class Costs:
    """Seconds of a pass over n tokens, for any n.

    A measured curve gives the shape. Every pass that is observed then corrects its own size, and a little all others:
    longer contexts and busy neighbours slow down all of them, and what once seemed slow is not left out for ever.

    Args:
        seconds: of passes over `SIZES` tokens; None begins with a guess.
    """

    def __init__(self, seconds: Sequence[float] | None = None) -> None:
        self.measured = seconds is not None
        known = seconds or [1 + _GUESS * (size - 1) for size in SIZES]
        # More tokens never take less: what seems so is noise.
        whole = np.interp(np.arange(SIZES[-1] + 1), SIZES, np.maximum.accumulate(known))
        self._base: list[float] = whole.tolist()
        self._slope = max((known[-1] - known[-4]) / (SIZES[-1] - SIZES[-4]), 0.0)
        self._factors = [1.0] * len(SIZES)
        self._seen = [2] * len(SIZES)  # what was measured first counts like so many passes
        self._first = seconds is None

    def of(self, tokens: int) -> float:
        """Expected seconds of a pass over so many tokens."""
        return self.base(tokens) * self._factors[_PLACES[min(tokens, SIZES[-1])]]

    def base(self, tokens: int) -> float:
        """As first measured; beyond the curve as it ended."""
        last = SIZES[-1]
        return self._base[tokens] if tokens <= last else self._base[last] + self._slope * (tokens - last)

    def observe(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        ratio = seconds / self.base(tokens)
        if self._first:  # only the guess's unit was wrong so far
            self._factors, self._first = [ratio] * len(SIZES), False
            return
        own = _PLACES[min(tokens, SIZES[-1])]
        ratio = min(ratio, 2 * self._factors[own])  # a pass that was held up says little
        self._seen[own] += 1
        rate = max(_OWN, 1 / self._seen[own])
        self._factors = [f + (rate if i == own else _OTHERS) * (ratio - f) for i, f in enumerate(self._factors)]


def measured(runner: Runner, pages: int, clock: Callable[[], float] = time.perf_counter) -> Costs:
    """The costs of a runner whose cache nobody uses yet. They cover layers, head and the choice of the likeliest token.

    Args:
        pages: of the cache; a small one shortens the curve.
    """
    room = min(pages * BLOCK, runner.facts.context)
    context = min(_CONTEXT, room // 2)
    sizes = [size for size in SIZES if context + size <= room]
    table = np.arange(-(-(context + SIZES[-1]) // BLOCK), dtype=np.int32)[None, :pages]
    ids = np.arange(context + SIZES[-1], dtype=np.int32) * 7919 % runner.facts.vocab

    def once(start: int, count: int) -> float:
        began = clock()
        positions = np.arange(start, start + count, dtype=np.int32)
        # A tree without branches, as the plainest of drafts is.
        parents = np.arange(-1, count - 1, dtype=np.int32) if count > 1 else None
        ends, contexts = np.array([0, count], np.int32), np.array([start], np.int32)
        hidden = runner.run(Batch(ids[start : start + count].copy(), positions, ends, contexts, table, parents))
        for row in runner.logits(hidden, np.arange(count, dtype=np.int32)):
            row.argmax()
        return clock() - began

    if context:
        once(0, context)
    found: dict[int, list[float]] = {size: [] for size in sizes}
    until = clock() + _PATIENCE
    for turn in range(_LONGEST + 1):
        # From the longest one down: a long pass would leave one over a single token other caches than decoding has.
        for size in reversed(sizes):
            taken = once(context, size)
            if turn or size == sizes[-1]:  # the first round warms up
                found[size].append(taken)
        if turn >= _SHORTEST and clock() > until:
            break
    best = [min(found[size]) for size in sizes]
    each = (best[-1] - best[0]) / max(sizes[-1] - sizes[0], 1)
    return Costs(best + [best[-1] + each * (size - sizes[-1]) for size in SIZES[len(sizes) :]])

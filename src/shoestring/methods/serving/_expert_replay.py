"""What a recorded trace says without the model: hit rates of policies, stalls of a loader, guesses that come true."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.methods.serving._expert_slots import Clairvoyant, Key, Policy, Slots, Trust, policy
from shoestring.models.routing import Trace

ORACLE = "belady"
# (layer, experts met there) -> [(layer, expert, how sure)]: what a guesser says after each visit.
Guesser = Callable[[int, Sequence[int]], Sequence[tuple[int, int, float]]]


@dataclass(frozen=True)
class Replayed:
    """What a cache did with a trace.

    Attributes:
        hits, misses: of the experts that were asked for; a hit was in memory, or on its way.
        loads: experts that were read.
        wasted: experts that were read ahead and left again before anybody asked.
        stall: seconds in which the model waited; `seconds` is how long everything took.
    """

    hits: int
    misses: int
    loads: int
    wasted: int
    stall: float
    seconds: float

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def replay(
    trace: Trace,
    name: str,
    slots: int,
    *,
    quota: bool = False,
    guess: Guesser | None = None,
    compute: float = 1e-3,
    load: float = 2e-3,
    seed: int = 0,
) -> Replayed:
    """Pass the visits of a trace through a cache of `slots` experts.

    A layer takes `compute` seconds once its experts are there; one loader reads an expert in `load` seconds, those that
    are asked for before those that are guessed: t = max(compute, what is left of the loading).

    Args:
        name: of `_expert_slots.POLICIES`, or "belady", which knows what will come and bounds all others.
        quota: divide the slots evenly among the layers.

    Raises:
        UsageError: an unknown policy, or fewer slots than a token's experts.
    """
    visits = list(trace.visits())
    most = max((len(experts) for _, experts in visits), default=0)
    each = slots // trace.layers
    check_slots(each if quota else slots, trace.experts.shape[-1], quota)
    if most > (each if quota else slots):
        raise UsageError(
            f"{slots} slots are too few for passes of many tokens",
            f"one visit asks for {most} experts",
            "Replay the trace token by token (`as_decoding`), or allow more slots",
        )
    chosen: Policy = Clairvoyant(visits) if name == ORACLE else policy(name, trace.layers, seed=seed)
    cache = Slots(slots, chosen, each if quota else 0)
    ready: dict[Key, float] = {}  # when an expert is, or will be, in memory
    spared: dict[Key, int] = {}  # guessed and in memory -> the visit for which
    waiting: dict[Key, int] = {}  # guesses that the loader has not begun -> the visit for which
    ahead: set[Key] = set()  # read on a guess, and not asked for yet
    trust = Trust(trace.layers)
    clock = loader = stall = 0.0
    hits = misses = loads = wasted = 0

    def begin(key: Key, layer: int, keep: Collection[Key]) -> bool:
        nonlocal loader, loads, wasted
        slot, left = cache.admit(key, layer, keep, spared)
        if slot < 0:
            return False
        if left is not None:
            wasted += left in ahead
            ahead.discard(left)
            spared.pop(left, None)
        loader = ready[key] = max(clock, loader) + load
        loads += 1
        return True

    for number, (layer, experts) in enumerate(visits):
        cache.visit(layer)
        keys = [(layer, expert) for expert in experts]
        spared = {key: until for key, until in spared.items() if until > number}
        waiting = {key: until for key, until in waiting.items() if until > number}
        here = [key for key in keys if key in cache.held]
        trust.visited(number, keys, [key for key in cache.held if key[0] == layer and key not in ahead])
        ahead -= set(here)
        for key in here:
            cache.use(key)
        hits, misses = hits + len(here), misses + len(keys) - len(here)
        for key in keys:
            if key not in here:
                cache.use(key)
                begin(key, layer, keys)
        for at, expert, _ in guess(layer, experts) if guess else ():
            key, until = (at, expert), number + (at - layer - 1) % trace.layers + 1
            if key in cache.held:
                spared[key] = until
            elif trust.guessed(key, until):
                waiting[key] = until
        arrives = max((ready[key] for key in keys), default=clock)
        wait = max(0.0, arrives - clock)
        stall += wait
        # The loader goes on with guesses as soon as it is free, and a guess that was begun is not broken off.
        end = max(clock, arrives) + compute
        for key, until in list(waiting.items()):
            if max(loader, clock) >= end:
                break
            if begin(key, layer, {*keys, *spared}):
                del waiting[key]
                spared[key] = until
                ahead.add(key)
        clock = end
    return Replayed(hits, misses, loads, wasted, stall, clock)


def check_slots(slots: int, chosen: int, quota: bool = False) -> None:
    """Raises UsageError when a token's experts do not fit."""
    if slots < chosen:
        raise UsageError(
            f"{slots} slots{' for each layer' if quota else ''} are too few",
            f"a token meets {chosen} experts at once",
            f"Allow at least {chosen}",
        )


class Together:
    """How often an expert of a later layer was met after those of an earlier one.

    P(e at l + ahead | set at l) is the mean over the set of the counts, each divided by how often its expert was met.
    The layer after the last is the first one of the next token.
    """

    def __init__(self, counts: Sequence[int], ahead: int = 1) -> None:
        self.counts, self.ahead = tuple(counts), ahead
        pairs = [(count, self.counts[(layer + ahead) % len(counts)]) for layer, count in enumerate(counts)]
        self.met = [np.zeros(count) for count in counts]
        self.both = [np.zeros(pair) for pair in pairs]

    def learn(self, trace: Trace) -> Together:
        """Count what a trace holds, token by token; returns itself."""
        for layer in range(trace.layers):
            later = layer + self.ahead
            shift, target = divmod(later, trace.layers)
            now = trace.experts[: len(trace.experts) - shift, layer]
            then = trace.experts[shift:, target]
            for a in range(now.shape[1]):
                fits = now[:, a] >= 0
                np.add.at(self.met[layer], now[fits, a], 1)
                for b in range(then.shape[1]):
                    both = fits & (then[:, b] >= 0)
                    np.add.at(self.both[layer], (now[both, a], then[both, b]), 1)
        return self

    def see(self, layer: int, earlier: Sequence[int], later: Sequence[int]) -> None:
        """`later` was met `ahead` layers after `earlier`, which is in `layer`."""
        for a in earlier:
            self.met[layer][a] += 1
            for b in later:
                self.both[layer][a, b] += 1

    def likely(self, layer: int, experts: Sequence[int]) -> np.ndarray:
        """P of each expert `ahead` layers later, float64 [experts]."""
        rows = list(experts)
        seen = np.maximum(self.met[layer][rows], 1.0)[:, None]
        return (self.both[layer][rows] / seen).mean(0) if rows else np.zeros(self.both[layer].shape[1])

    def guesser(self, guesses: int, confidence: float = 0.0) -> Guesser:
        """The `guesses` likeliest, those that are at least so sure, the surest first."""

        def guess(layer: int, experts: Sequence[int]) -> list[tuple[int, int, float]]:
            likely = self.likely(layer, experts)
            best = np.argsort(-likely, kind="stable")[:guesses]
            to = (layer + self.ahead) % len(self.counts)
            return [(to, int(e), float(likely[e])) for e in best if likely[e] > 0 and likely[e] >= confidence]

        return guess

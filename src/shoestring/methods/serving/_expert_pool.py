"""Experts in memory: a few slots that one thread fills from a file, ahead of need where somebody guesses well."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.methods.serving._expert_file import ALIGN, EXACT, ExpertFile, Record, unpack
from shoestring.methods.serving._expert_slots import Key, Policy, Slots, Trust

MERGE = 8  # experts that one read brings at most
PARTS = 8  # a guess is read in so many parts, so that what is asked for meanwhile need not wait for it
REMEMBERED = 4096  # events of the timeline


@dataclass
class Tally:
    """What happened so far. Times in seconds of a clock that only goes forward."""

    hits: int = 0
    misses: int = 0
    late: int = 0  # hits that were still on their way
    reads: int = 0
    loads: int = 0
    bytes: int = 0
    guessed: int = 0  # experts read ahead
    wasted_bytes: int = 0  # of those, what left again before anybody asked
    small: int = 0  # experts that were read in fewer bits
    stall: float = 0.0  # the model waited for an expert
    loading: float = 0.0
    timeline: deque[tuple[str, Key, float, float]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))


@dataclass
class _Held:
    slot: int
    width: str
    pieces: Record
    size: int
    ready: bool = False
    users: int = 0
    ahead: bool = False  # read on a guess and not asked for yet
    until: int = 0  # the visit for which it was guessed; it is spared until then
    come: int = 0  # bytes of a guess that were read before it had to wait
    error: Exception | None = None  # what reading it met


class Pool:
    """Slots for experts of a file, and the thread that fills them.

    One thread computes and calls `want`, `wait` and `done`; the loader's thread does nothing else than read. What the
    computation asks for goes before guesses, and is merged with its neighbours in the file. A guess gets a slot when
    its reading begins, and is given up when its layer has come without asking for it.

    Args:
        count: slots. `quota`: of each layer, 0 for one pool.
        delay: seconds that each read of a whole expert takes at least, less for one of fewer bits: a slower memory than
            this machine has, for experiments.
        keep_cached: as for `ExpertFile.read`.
    """

    def __init__(
        self,
        file: ExpertFile,
        count: int,
        policy: Policy,
        *,
        layers: int,
        quota: int = 0,
        delay: float = 0.0,
        keep_cached: bool = True,
    ) -> None:
        self.file, self.layers, self.delay, self.keep_cached = file, layers, delay, keep_cached
        self.tally = Tally()
        exact = [record for (_, width), record in file.records.items() if width == EXACT]
        self.stride = (
            -(-max(sum(-(-p.size // ALIGN) * ALIGN for p in record.pieces) for record in exact) // ALIGN) * ALIGN
        )
        self.memory = torch.empty(count * self.stride + ALIGN, dtype=torch.uint8)
        shift = -self.memory.data_ptr() % ALIGN
        self.memory = self.memory[shift : shift + count * self.stride]
        self.slots = Slots(count, policy, quota)
        self._held: dict[Key, _Held] = {}
        self._urgent: deque[Key] = deque()
        self._guesses: dict[Key, int] = {}  # what to read ahead -> the visit for which; the nearest first
        self._trust = Trust(layers)
        self._visits = self._layer = 0
        self._writing: frozenset[int] = frozenset()  # slots that the loader writes into
        self._change = threading.Condition()
        self._closed = False
        self._loader = threading.Thread(target=self._work, name="expert loader", daemon=True)
        self._loader.start()

    # ---- the computation's side ----

    def enter(self, layer: int) -> None:
        """The model stands in `layer` now."""
        with self._change:
            self._visits, self._layer = self._visits + 1, layer
            self.slots.visit(layer)

    def want(self, layer: int, keys: Sequence[tuple[Key, str]], *, first: bool = True, wait: bool = True) -> list[Key]:
        """Ask for experts of the layer where the model stands; returns those that got a place.

        Each of them stays until `done`. Others must be asked for again (with `first` false) when places are free.

        Args:
            keys: expert and the width that is enough; more bits are as good.
            wait: for a place when there is none for any of them.

        Raises:
            UsageError: the pool is closed.
        """
        with self._change:
            if first:
                self._settle({key for key, _ in keys})
            while True:
                if self._closed:
                    raise UsageError("The experts of this model were closed", remedy="Load the model again")
                if (given := self._give(layer, keys, first)) or not keys or not wait:
                    break
                first = False
                self._change.wait()  # every slot is being written into
            if self._urgent:
                self._change.notify_all()
        return given

    def guess(self, layer: int, keys: Iterable[Key]) -> None:
        """Read these ahead, the likeliest first, and keep those that are there, until their layer has come."""
        with self._change:
            for key in keys:
                until = self._visits + (key[0] - layer - 1) % self.layers + 1
                if held := self._held.get(key):
                    held.until = max(held.until, until)
                elif self._trust.guessed(key, until):
                    self._guesses.setdefault(key, until)
            if self._guesses:
                self._guesses = dict(sorted(self._guesses.items(), key=lambda guess: guess[1]))
                self._change.notify_all()

    def ready(self, key: Key) -> bool:
        with self._change:
            return self._held[key].ready

    def wait(self, keys: Iterable[Key]) -> None:
        """Until all of them are there. Raises what the loader met when it read one of them."""
        begin = time.perf_counter()
        with self._change:
            waiting = {key: held for key in keys if not (held := self._held[key]).ready}
            if not waiting:
                return
            while not all(held.ready or held.error for held in waiting.values()):
                self._change.wait()
            for held in waiting.values():
                if held.error:
                    raise held.error
        end = time.perf_counter()
        self.tally.stall += end - begin
        self.tally.timeline.append(("wait", next(iter(waiting)), begin, end))

    def slot(self, key: Key) -> int:
        return self._held[key].slot

    def done(self, keys: Iterable[Key]) -> None:
        """These may leave again."""
        with self._change:
            for key in keys:
                held = self._held[key]
                held.users -= 1
                if held.error and not held.users:  # whoever asks next has it read again
                    self._drop(key)
            if self._guesses:  # there may be a place for one now
                self._change.notify_all()

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._loader.join()
        self.file.close()
        self.memory = torch.empty(0, dtype=torch.uint8)

    # ---- inside ----

    def _settle(self, asked: Collection[Key]) -> None:
        """The guesses for this visit are over: those that came true are wanted now, the others are given up."""
        there = [key for key, held in self._held.items() if key[0] == self._layer and not held.ahead]
        self._trust.visited(self._visits, asked, there)
        for key, held in self._held.items():
            if held.until <= self._visits or key in asked:
                held.until = 0
        over = [key for key, until in self._guesses.items() if until <= self._visits or key in asked]
        for key in over:
            del self._guesses[key]
            if key in self._held and key not in asked:  # begun, and put off
                self._drop(key)
            elif key in self._held:
                self._urgent.append(key)

    def _give(self, layer: int, keys: Sequence[tuple[Key, str]], first: bool) -> list[Key]:
        given = []
        for key, width in keys:
            held = self._held.get(key)
            if held and held.width in (EXACT, width):
                held.users, held.ahead = held.users + 1, False
                if first:
                    self.tally.hits += 1
                    self.tally.late += not held.ready
                    self.slots.use(key)
                given.append(key)
        here = set(given)
        for key, width in keys:
            if key in here:
                continue
            if first:
                self.tally.misses += 1
                self.slots.use(key)
            if self._place(key, width, layer):
                self._held[key].users += 1
                self._urgent.append(key)
                given.append(key)
        return given

    def _place(self, key: Key, width: str, layer: int, until: int = 0) -> bool:
        """Give `key` a slot. Who was guessed leaves it only to what is asked for, and if nobody else can."""
        again = self._held.get(key)
        if again:  # it is there in too few bits
            if again.users or self._busy(again):
                return False
            self._drop(key)
        spared = {k for k, h in self._held.items() if h.until}
        keep = {k for k, h in self._held.items() if h.users or self._busy(h)}
        slot, leaving = self.slots.admit(key, layer, keep | spared if until else keep, spared)
        if slot < 0:
            return False
        if leaving is not None:
            self._leave(leaving)
        pieces, size = self.file.records[key, EXACT], self.file.records[key, width].size
        self._held[key] = _Held(slot, width, pieces, size, ahead=until > 0, until=until)
        return True

    def _drop(self, key: Key) -> None:
        self._leave(key)
        self.slots.drop(key)

    def _leave(self, key: Key) -> None:
        held = self._held.pop(key)
        self._guesses.pop(key, None)
        if held.ahead:
            self.tally.wasted_bytes += held.come

    def _busy(self, held: _Held) -> bool:
        """The loader writes into its slot."""
        return held.slot in self._writing

    # ---- the loader's thread ----

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._closed and not (batch := self._next()):
                    self._change.wait()
                if self._closed:
                    return
                helds = [self._held[key] for key in batch]
                self._writing = frozenset(held.slot for held in helds)
            begin, reads, count = time.perf_counter(), 1, 0
            met: Exception | None = None
            try:
                if helds[0].come or not helds[0].users:
                    reads, count = self._in_parts(batch[0], helds[0])
                else:
                    count = self._at_once(batch, helds)
            except Exception as error:  # raised where somebody waits
                met = error
            with self._change:
                self._writing = frozenset()
                self._count(batch[0], begin, reads, count)
                for key, held in zip(batch, helds):
                    self._arrive(key, held, met)
                self._change.notify_all()

    def _next(self) -> list[Key]:
        """The next expert to read, and of those asked for the ones behind it in the file; none where there is no work.

        A guess gets its slot here: whoever leaves for it would be missed for nothing as long as the loader is busy.
        """
        if not self._urgent:
            for key, until in self._guesses.items():
                if key in self._held or self._place(key, EXACT, self._layer, until):
                    del self._guesses[key]
                    return [key]
            return []
        batch = [self._urgent.popleft()]
        width = self._held[batch[0]].width
        while len(batch) < MERGE and not self._held[batch[-1]].come:
            last = batch[-1]
            after = next(
                (
                    key
                    for key in self._urgent
                    if (held := self._held[key]).width == width
                    and not held.come
                    and self.file.follows((last, width), (key, width))
                ),
                None,
            )
            if after is None:
                break
            self._urgent.remove(after)
            batch.append(after)
        return batch

    def _at_once(self, batch: Sequence[Key], helds: Sequence[_Held]) -> int:
        begin = time.perf_counter()
        width = helds[0].width
        records = [self.file.records[key, width] for key in batch]
        raws = [torch.empty(record.size, dtype=torch.uint8) for record in records] if width != EXACT else []
        targets = raws or [self._bytes(held.slot) for held in helds]
        count = self.file.read([(key, width) for key in batch], targets, keep_cached=self.keep_cached)
        for held, record, raw in zip(helds, records, raws):
            unpack(record, width, raw, held.pieces, self._bytes(held.slot))
        self._slow_down(begin, len(batch) * count / sum(held.pieces.size for held in helds))
        for held in helds:
            held.come = held.size
        return count

    def _in_parts(self, key: Key, held: _Held) -> tuple[int, int]:
        """Read a guess, or what is left of it, until it is there, given up, or somebody waits for another.

        Returns:
            reads and bytes.
        """
        size, reads, total, begin = held.size, 0, 0, time.perf_counter()
        while held.come < size:
            end = min(size, held.come + -(-size // PARTS))
            total += self.file.read_part((key, held.width), self._bytes(held.slot), held.come, end, self.keep_cached)
            self._slow_down(begin, total / size)
            held.come, reads = end, reads + 1
            if not held.users and (self._urgent or not held.until):
                break
        return reads, total

    def _count(self, first: Key, begin: float, reads: int, count: int) -> None:
        end, t = time.perf_counter(), self.tally
        t.reads, t.bytes, t.loading = t.reads + reads, t.bytes + count, t.loading + end - begin
        t.timeline.append(("load", first, begin, end))

    def _arrive(self, key: Key, held: _Held, met: Exception | None) -> None:
        """What becomes of an expert that the loader has been at."""
        if met:
            held.error = met
            if not held.users:
                self._drop(key)
        elif held.come == held.size:
            held.ready = True
            self.tally.loads += 1
            self.tally.small += held.width != EXACT
            self.tally.guessed += held.ahead
        elif held.users:  # asked for between the last look and now
            self._urgent.append(key)
        elif held.until:
            self._guesses = {key: held.until, **self._guesses}
        else:
            self._drop(key)

    def _slow_down(self, begin: float, experts: float) -> None:
        left = begin + self.delay * experts - time.perf_counter()
        if self.delay and left > 0:
            time.sleep(left)

    def _bytes(self, slot: int) -> Tensor:
        return self.memory[slot * self.stride : (slot + 1) * self.stride]


def views(pool: Pool, pieces: Record) -> dict[str, Tensor]:
    """Parameter -> its values in all slots, (slots, ...), for experts that lie as `pieces` say; nothing is copied."""
    found = {}
    for piece in pieces.pieces:
        values = pool.memory.view(piece.dtype).view(pool.slots.count, -1)
        at = piece.at // piece.dtype.itemsize
        found[piece.name] = values[:, at : at + piece.size // piece.dtype.itemsize].unflatten(1, piece.dims)
    return found

"""Experts in memory: a few slots that one thread fills from a file, ahead of need where somebody guesses well."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoestring.methods.serving._expert_file import ALIGN, EXACT, ExpertFile, Record, unpack
from shoestring.methods.serving._expert_slots import Key, Policy, Slots

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
    ready: bool = False
    users: int = 0
    ahead: bool = False  # read on a guess and not asked for yet
    until: int = -1  # the visit up to which a guess is spared
    size: int = 0
    come: int = 0  # bytes of a guess that were read before it had to wait


class Pool:
    """Slots for experts of a file, and the thread that fills them.

    One thread computes and calls `want`, `wait` and `done`; the loader's thread does nothing else than read. What the
    computation asks for goes before guesses, and is merged with its neighbours in the file.

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
        self._guesses: deque[Key] = deque()
        self._visits = 0
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._closed = False
        self._loader = threading.Thread(target=self._work, name="expert loader", daemon=True)
        self._loader.start()

    # ---- the computation's side ----

    def enter(self, layer: int) -> None:
        """The model stands in `layer` now."""
        with self._change:
            self._visits += 1
            self.slots.visit(layer)

    def want(self, layer: int, keys: Sequence[tuple[Key, str]], *, first: bool = True, wait: bool = True) -> list[Key]:
        """Ask for experts of the layer where the model stands; returns those that got a place.

        Each of them stays until `done`. Others must be asked for again (with `first` false) when places are free.

        Args:
            keys: expert and the width that is enough; more bits are as good.
            wait: for a place when there is none for any of them.
        """
        with self._change:
            while not (given := self._give(layer, keys, first)) and keys and wait:
                first = False
                self._change.wait()  # every slot is being written into
            self._change.notify_all()
        return given

    def guess(self, layer: int, keys: Iterable[Key], width: str = EXACT) -> None:
        """Read these ahead, the likeliest first, as far as that makes nobody leave who is needed."""
        with self._change:
            for key in keys:
                if key in self._held:
                    continue
                keep = {k for k, h in self._held.items() if h.users or self._busy(h) or h.until >= self._visits}
                if not self._place(key, width, layer, keep):
                    break
                held = self._held[key]
                held.ahead, held.until = True, self._visits + (key[0] - layer - 1) % self.layers + 1
                self._guesses.append(key)
            self._change.notify_all()

    def ready(self, key: Key) -> bool:
        with self._change:
            return self._held[key].ready

    def wait(self, keys: Iterable[Key]) -> None:
        """Until all of them are there. Raises what the loader met."""
        begin = time.perf_counter()
        with self._change:
            waiting = [key for key in keys if not self._held[key].ready]
            if not waiting:
                return
            while any(not self._held[key].ready for key in waiting) and not self._error:
                self._change.wait()
            if self._error:
                raise self._error
        end = time.perf_counter()
        self.tally.stall += end - begin
        self.tally.timeline.append(("wait", waiting[0], begin, end))

    def slot(self, key: Key) -> int:
        return self._held[key].slot

    def done(self, keys: Iterable[Key]) -> None:
        """These may leave again."""
        with self._change:
            for key in keys:
                self._held[key].users -= 1

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._loader.join()
        self.file.close()
        self.memory = torch.empty(0, dtype=torch.uint8)

    # ---- inside ----

    def _give(self, layer: int, keys: Sequence[tuple[Key, str]], first: bool) -> list[Key]:
        given = []
        for key, width in keys:
            held = self._held.get(key)
            if held and held.width in (EXACT, width):
                self._found(key, held, first)
                given.append(key)
        here = set(given)
        for key, width in keys:
            if key in here:
                continue
            if first:
                self.tally.misses += 1
                self.slots.use(key)
            if self._place(key, width, layer, {k for k, h in self._held.items() if h.users or self._busy(h)}):
                self._held[key].users += 1
                self._urgent.append(key)
                given.append(key)
        return given

    def _found(self, key: Key, held: _Held, first: bool) -> None:
        held.users, held.ahead, held.until = held.users + 1, False, -1
        if first:
            self.tally.hits += 1
            self.tally.late += not held.ready
            self.slots.use(key)
        if not held.ready and key in self._guesses:  # it has not been begun: no guess any more
            self._guesses.remove(key)
            self._urgent.append(key)

    def _place(self, key: Key, width: str, layer: int, keep: set[Key]) -> bool:
        again = self._held.get(key)
        if again:  # it is there in too few bits
            if again.users or self._busy(again):
                return False
            self._leave(key)
            self.slots.drop(key)
        spare = {k for k, h in self._held.items() if h.until >= self._visits}
        slot, leaving = self.slots.admit(key, layer, keep, spare)
        if slot < 0:
            return False
        if leaving is not None:
            self._leave(leaving)
        self._held[key] = _Held(slot, width, self.file.records[key, EXACT], size=self.file.records[key, width].size)
        return True

    def _leave(self, key: Key) -> None:
        held = self._held.pop(key)
        if key in self._guesses:
            self._guesses.remove(key)
        if held.ahead:
            self.tally.wasted_bytes += held.come

    def _busy(self, held: _Held) -> bool:
        """The loader writes into its slot."""
        return held.slot in self._writing

    _writing: frozenset[int] = frozenset()

    # ---- the loader's thread ----

    def _work(self) -> None:
        try:
            while True:
                with self._change:
                    while not (self._closed or self._urgent or self._guesses):
                        self._change.wait()
                    if self._closed:
                        return
                    batch = self._next()
                    helds = [self._held[key] for key in batch]
                    self._writing = frozenset(held.slot for held in helds)
                begin, reads = time.perf_counter(), 1
                if helds[0].come or not helds[0].users:
                    reads, count = self._in_parts(batch[0], helds[0])
                else:
                    count = self._at_once(batch, helds)
                with self._change:
                    self._writing = frozenset()
                    self._count(batch, helds, begin, reads, count)
                    self._change.notify_all()
        except BaseException as error:  # raised where somebody waits
            with self._change:
                self._error = error
                self._change.notify_all()

    def _next(self) -> list[Key]:
        """The next expert to read, and of those asked for the ones behind it in the file."""
        if not self._urgent:
            return [self._guesses.popleft()]
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
        return count

    def _in_parts(self, key: Key, held: _Held) -> tuple[int, int]:
        """Read a guess, or what is left of it, until it is there or somebody waits for another; reads and bytes."""
        size, reads, total = held.size, 0, 0
        while held.come < size:
            begin = time.perf_counter()
            end = min(size, held.come + -(-size // PARTS))
            count = self.file.read_part((key, held.width), self._bytes(held.slot), held.come, end, self.keep_cached)
            self._slow_down(begin, count / size)
            held.come, reads, total = end, reads + 1, total + count
            if self._urgent and not held.users:
                break
        return reads, total

    def _count(self, batch: Sequence[Key], helds: Sequence[_Held], begin: float, reads: int, count: int) -> None:
        end, t = time.perf_counter(), self.tally
        t.reads, t.bytes, t.loading = t.reads + reads, t.bytes + count, t.loading + end - begin
        t.timeline.append(("load", batch[0], begin, end))
        if helds[0].come and helds[0].come < helds[0].size:
            self._guesses.appendleft(batch[0])
            if helds[0].users:  # asked for between the last look and now
                self._guesses.remove(batch[0])
                self._urgent.append(batch[0])
            return
        for held in helds:
            held.ready = True
        t.loads += len(batch)
        t.small += sum(held.width != EXACT for held in helds)
        t.guessed += sum(held.ahead for held in helds)

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

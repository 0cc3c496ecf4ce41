"""Who is served next. A policy orders sequences; the scheduler counts tokens and moves pages."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from shoestring.engine.sequence import Sequence

if TYPE_CHECKING:
    from shoestring.engine.scheduler import Chunk


class Policy(Protocol):
    """What a scheduler asks. One object serves one scheduler.

    Nothing may starve: with `next` and `rank` every waiting sequence must come first at some time, and of the running
    ones there must always be one that no choice of `victim` and `yields` touches until it has ended.
    """

    def on_add(self, sequence: Sequence) -> None:
        """It joins the waiting line: new, forked or preempted."""

    def on_admit(self, sequence: Sequence) -> None:
        """It leaves the line and runs."""

    def on_step(self, chunks: Iterable[Chunk]) -> None:
        """This is what the step computes."""

    def on_finish(self, sequence: Sequence) -> None:
        """It has ended, or was cancelled, wherever it stood."""

    def next(self) -> Sequence | None:
        """Who is admitted next. While it does not fit, nobody else is."""

    def rank(self, sequence: Sequence) -> Any:
        """Unfinished prompts are computed in ascending order of this, waiting or running."""

    def victim(self, running: Collection[Sequence]) -> Sequence:
        """Who gives up its pages when running sequences need more than there are."""

    def yields(self, running: Collection[Sequence], newcomer: Sequence) -> Sequence | None:
        """Who goes back to the line so that `newcomer` can run; None lets it wait."""

    def share(self, tokens: int, decoding: int) -> int:
        """How many of a step's `tokens` may go to prompts and drafts, when `decoding` of them are taken.

        What is not given away is the plan's `spare`.
        """


class Fifo:
    """First come, first served; smaller priorities go first.

    One step of priority is worth `patience` tokens of waiting: a sequence is overtaken only by those that arrive before
    so many tokens were computed for others, so that no priority starves. Clients are not told apart.
    """

    def __init__(self, patience: int = 16384) -> None:
        self.patience = patience
        self._clock = 0  # tokens computed so far: waiting is measured in work, so that a schedule can be repeated
        self._number = 0
        self._places: dict[Sequence, tuple[int, int]] = {}  # of everyone in the house; the smallest came first
        self._line = _Line()

    def on_add(self, sequence: Sequence) -> None:
        self._place(sequence)
        self._line.add(self._places[sequence], sequence)

    def on_admit(self, sequence: Sequence) -> None:
        self._line.remove(sequence)

    def on_step(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self._clock += chunk.count + chunk.draft

    def on_finish(self, sequence: Sequence) -> None:
        self._line.remove(sequence)
        del self._places[sequence]

    def next(self) -> Sequence | None:
        return self._line.first()

    def rank(self, sequence: Sequence) -> Any:
        return self._places[sequence]

    def victim(self, running: Collection[Sequence]) -> Sequence:
        return max(running, key=self._places.__getitem__)

    def yields(self, running: Collection[Sequence], newcomer: Sequence) -> Sequence | None:
        return None

    def share(self, tokens: int, decoding: int) -> int:
        return tokens - decoding

    def _place(self, sequence: Sequence) -> None:
        # Who was preempted keeps its place, and so stands before all that came later.
        if sequence not in self._places:
            self._number += 1
            self._places[sequence] = (self._clock + self.patience * sequence.request.priority, self._number)


class Fair(Fifo):
    """Clients share the machine alike, however many requests each has; the requests of one client are served by `Fifo`.

    Each client's account counts the tokens computed for it. The one with the smallest account goes first. A client that
    comes back to an empty line starts no lower than where an equal share would have brought it: what it did not use
    while away is not owed, so that whoever waits is overtaken by finitely many. When all places are taken, a client
    that has two more than another client who waits gives one up.
    """

    def __init__(self, patience: int = 16384) -> None:
        super().__init__(patience)
        self._accounts: dict[str, float] = {}
        self._level = 0.0  # the account of somebody who had an equal share all the time
        self._present: dict[str, int] = {}  # sequences of each client, waiting or running
        self._running: dict[str, int] = {}
        self._lines: dict[str, _Line] = {}
        self._order: list[
            tuple[float, tuple[int, int], str]
        ] = []  # heap; accounts in it may be lower than they are by now
        self._entries: dict[
            str, tuple[float, tuple[int, int], str]
        ] = {}  # of each client with a line, the entry that counts

    def on_add(self, sequence: Sequence) -> None:
        client = sequence.request.client
        if sequence in self._places:
            self._count(self._running, client, -1)
        else:
            self._place(sequence)
            self._count(self._present, client, 1)
        line = self._lines.get(client)
        if line is None:
            line = self._lines[client] = _Line()
            account = self._accounts[client] = max(self._accounts.get(client, 0.0), self._level)
            entry = self._entries[client] = account, self._places[sequence], client
            heapq.heappush(self._order, entry)
            self._skip()
        line.add(self._places[sequence], sequence)

    def on_admit(self, sequence: Sequence) -> None:
        self._count(self._running, sequence.request.client, 1)
        self._leave(sequence)

    def on_step(self, chunks: Iterable[Chunk]) -> None:
        accounts, total = self._accounts, 0
        for chunk in chunks:
            tokens = chunk.count + chunk.draft
            accounts[chunk.sequence.request.client] += tokens
            total += tokens
        self._clock += total
        if total:
            self._level += total / len(self._present)

    def on_finish(self, sequence: Sequence) -> None:
        client = sequence.request.client
        if not self._leave(sequence):
            self._count(self._running, client, -1)
        self._count(self._present, client, -1)
        del self._places[sequence]
        if not self._present:
            self._accounts.clear()
            self._order.clear()
            self._level = 0.0
        elif client not in self._present and len(self._accounts) > 2 * len(self._present) + 64:
            # Accounts at or below the level are as good as none.
            self._accounts = {c: a for c, a in self._accounts.items() if c in self._present or a > self._level}

    def next(self) -> Sequence | None:
        order = self._order
        while order:
            entry = order[0]
            client = entry[2]
            first = self._lines[client].first()
            assert first is not None
            now = (self._accounts[client], self._places[first], client)
            if now == entry:
                return first
            self._entries[client] = now
            heapq.heapreplace(order, now)
            self._skip()
        return None

    def rank(self, sequence: Sequence) -> Any:
        return self._accounts[sequence.request.client], self._places[sequence]

    def victim(self, running: Collection[Sequence]) -> Sequence:
        counts, places = self._running, self._places
        return max(running, key=lambda sequence: (counts[sequence.request.client], places[sequence]))

    def yields(self, running: Collection[Sequence], newcomer: Sequence) -> Sequence | None:
        has = self._running.get(newcomer.request.client, 0)
        if max(self._running.values(), default=0) < has + 2:
            return None
        return self.victim(running)

    def _leave(self, sequence: Sequence) -> bool:
        client = sequence.request.client
        line = self._lines.get(client)
        if line is None or not line.remove(sequence):
            return False
        if line.first() is None:
            del self._lines[client], self._entries[client]
            self._skip()
        return True

    def _skip(self) -> None:
        order, entries = self._order, self._entries
        while order and entries.get(order[0][2]) is not order[0]:
            heapq.heappop(order)

    @staticmethod
    def _count(counts: dict[str, int], client: str, change: int) -> None:
        left = counts.get(client, 0) + change
        if left:
            counts[client] = left
        else:
            del counts[client]


class _Line:
    """Sequences by place. Leaving is cheap wherever one stands: whoever has left is passed over later."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._waiting: set[Sequence] = set()

    def add(self, place: tuple[int, int], sequence: Sequence) -> None:
        self._waiting.add(sequence)
        heapq.heappush(self._heap, (place, sequence))

    def remove(self, sequence: Sequence) -> bool:
        if sequence not in self._waiting:
            return False
        self._waiting.remove(sequence)
        self._skip()
        return True

    def first(self) -> Sequence | None:
        return self._heap[0][1] if self._heap else None

    def _skip(self) -> None:
        while self._heap and self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)

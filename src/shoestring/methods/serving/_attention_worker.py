"""The process that holds keys and values and computes attention over them; it has no weights.

It is spoken to over links, one for each batch that is under way at the same time. What a message has:

    HELLO    JSON: the session and a `Share`; answered by READY or FAILED (text)
    RESERVE  int64 blocks; READY or FAILED
    BATCH    int32: sequences, tokens, width of tables, whether there are parents; starts, contexts, tables, parents
    QUERY    float32 q of the batch; nothing is answered
    KEYS     float32 k, then v; answered by RESULT
    WHOLE    q, k, v together; RESULT
    RESULT   float32 attention of this share's heads; with a split of sequences also log sum exp(score) of each
    COPY     int32 pairs of blocks; READY
    MOVE     int32 length of a table, the table, pairs of slots; READY
    TRACE    answered by TRACE: float64 rows (link, what, layer, begin, end), what as the kind it served
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.text import show_bytes
from shoestring.engine.memory import free_memory
from shoestring.kernels.pages import Pages, page_bytes
from shoestring.methods.serving import _link
from shoestring.methods.serving._link import Link, Lost, Message

PAGE = 16  # tokens, as of the engine
HELLO, READY, FAILED, RESERVE, BATCH, QUERY, KEYS, WHOLE, RESULT, COPY, MOVE, TRACE = range(1, 13)
VERSION = 1
_LONGEST_NAP = 0.1  # seconds between two looks of a worker that nobody asks anything
_EVENTS = 100_000  # of a trace; later ones are dropped


@dataclass(frozen=True)
class Share:
    """What one worker has of every layer's attention: its KV heads, or its part of each sequence's pages.

    Attributes:
        heads, kv_heads: of this worker.
        page_step, page_first: it keeps pages page_first, page_first + page_step ... of every sequence.
        cache: type of the numbers it keeps, "fp32" or "bf16".
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    cache: str = "fp32"
    page_step: int = 1
    page_first: int = 0
    threads: int = 1
    traced: bool = False

    @property
    def block_bytes(self) -> int:
        return self.layers * page_bytes(self.kv_heads, self.head_dim, self.cache)


@dataclass
class _Batch:
    """The batch of a link, as this share sees it; the fields of `engine.runner.Batch` are as there.

    Attributes:
        tables: those pages of each sequence that are kept here.
        slots: [tokens] where a token's key and value go, -1 for elsewhere.
        kept: [tokens] indices of those that are kept here.
        seen: [tokens] slots of its table that a token sees once it is stored itself.
        early: sequences of one new token: what they see of earlier ones needs no key of it.
        rest: the other sequences.
    """

    starts: np.ndarray
    contexts: np.ndarray
    tables: np.ndarray
    parents: np.ndarray | None
    slots: np.ndarray
    kept: np.ndarray
    seen: np.ndarray
    early: np.ndarray
    rest: np.ndarray
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.slots)

    def part(self, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows, starts, contexts and tables of the `early` or the other sequences as a batch of their own."""
        if which not in self.parts:
            chosen = getattr(self, which)
            counts = np.diff(self.starts)[chosen]
            starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            rows = np.repeat(self.starts[:-1][chosen] - starts[:-1], counts) + np.arange(starts[-1])
            tables = np.ascontiguousarray(self.tables[chosen])
            self.parts[which] = rows, starts, np.ascontiguousarray(self.contexts[chosen]), tables
        return self.parts[which]

    def own(self) -> tuple[np.ndarray, np.ndarray]:
        """Which of the early rows have their key and value here, and where among the keys and values that come."""
        if "own" not in self.parts:
            rows = self.part("early")[0]
            here = np.flatnonzero(self.slots[rows] >= 0)
            self.parts["own"] = here, np.searchsorted(self.kept, rows[here])
        return self.parts["own"]


@dataclass
class _Lane:
    """One link and what is under way on it."""

    link: Link
    greeted: bool = False
    batch: _Batch | None = None
    q: np.ndarray | None = None
    earlier: tuple[np.ndarray, np.ndarray] | None = None  # attention and log-sums of the early sequences so far


class Worker:
    """Keys and values of one share, and the answers to messages."""

    def __init__(self, memory: int | None = None) -> None:
        self.memory = memory
        self.session = ""
        self.share: Share | None = None
        self.pages: Pages | None = None
        self.lanes: list[_Lane] = []
        self.events: list[tuple[float, ...]] = []
        self.ending = 0  # set to an exit code, it ends `serve`

    @property
    def needed(self) -> bool:
        """Whether it keeps something for somebody."""
        return any(lane.greeted for lane in self.lanes)

    def serve(self, links: Sequence[Link], door: socket.socket | None = None) -> None:
        """Answer until no link is left; with a door, newcomers are let in, and it is for a signal to end it."""
        self.lanes = [_Lane(link) for link in links]
        idle = 0
        while (self.lanes or door) and not self.ending:
            by_link = {id(lane.link): lane for lane in self.lanes}
            found = _link.wait_for_any(
                [lane.link for lane in self.lanes], [door] if door else [], min(_link.NAP * 2**idle, _LONGEST_NAP)
            )
            idle = 0 if found else min(idle + 1, 16)
            for ready in found:
                if door is not None and ready is door:
                    self.lanes.append(_Lane(Link(_link.Wire(door.accept()[0]))))
                elif (lane := by_link[id(ready)]) in self.lanes:
                    self._one(lane)

    def _one(self, lane: _Lane) -> None:
        try:
            if not lane.link.stream.ready:  # it was only woken; an end shows as something to read, or here
                _still_there(lane.link)
                return
            message = lane.link.receive()
            began = time.perf_counter()
            try:
                self._answer(lane, message)
            except Lost:
                raise
            except Exception as error:  # whatever it is, it is the asker's to know, and others' keys are kept here
                lane.link.send(FAILED, message.layer, message.tag, _text(str(error) or repr(error)))
            if self.share and self.share.traced and len(self.events) < _EVENTS:
                number = float(self.lanes.index(lane))
                self.events.append((number, message.kind, message.layer, began, time.perf_counter()))
        except Lost:
            lane.link.close()
            if lane in self.lanes:
                self.lanes.remove(lane)

    def _answer(self, lane: _Lane, message: Message) -> None:
        kind, ints = message.kind, lambda: message.array(np.int32)
        if kind == HELLO:
            self._greet(lane, json.loads(message.payload))
        elif self.share is None:
            raise UsageError("A worker must be greeted first")
        elif kind == RESERVE:
            self._reserve(int(message.array(np.int64)[0]))
        elif kind == BATCH:
            lane.batch = _batch(ints(), self.share)
            return
        elif kind in (QUERY, KEYS, WHOLE):
            found = self._compute(lane, message)
            if found is not None:
                lane.link.send(RESULT, message.layer, message.tag, *found)
            return
        elif kind == COPY:
            self._copy(ints().reshape(-1, 2))
        elif kind == MOVE:
            self._move(ints())
        elif kind == TRACE:
            lane.link.send(TRACE, 0, message.tag, np.array(self.events, np.float64))
            return
        else:
            raise UsageError(f"A worker knows no message {kind}")
        lane.link.send(READY, message.layer, message.tag)

    def _greet(self, lane: _Lane, said: dict[str, Any]) -> None:
        if said.get("version") != VERSION:
            raise UsageError("This worker is of another version of shoestring", remedy="Install the same on both sides")
        session = str(said["session"])
        others = [other for other in self.lanes if other is not lane and other.greeted]
        if self.session and session.partition("/")[0] != self.session.partition("/")[0]:
            others = [other for other in others if _alive(other.link)]
            if others:
                raise UsageError("This worker is at work for another model", remedy="Start one of its own for each")
        if session != self.session:  # newly begun, also by the same model after it lost us
            for other in [other for other in self.lanes if other is not lane and other.greeted]:
                other.link.close()
                self.lanes.remove(other)
            known = {f.name for f in fields(Share)}
            self.share = Share(**{k: v for k, v in said["share"].items() if k in known})
            self.share.block_bytes  # noqa: B018  # raises for sizes that the kernels do not have
            self.session, self.pages, self.events = session, None, []
        lane.greeted = True

    def _reserve(self, blocks: int) -> None:
        assert self.share
        size, room = blocks * self.share.block_bytes // self.share.page_step, free_memory()
        room = room if self.memory is None else min(room, self.memory)
        if blocks < 1 or size > room:
            raise DoesNotFit(
                f"{show_bytes(size)} for keys and values are not to be had in an attention worker",
                f"it has {show_bytes(room)}",
                "Take more workers, or give the cache less memory",
            )
        s = self.share
        self.pages = Pages.fresh(s.layers, blocks, s.kv_heads, s.head_dim, s.cache)

    # ---- attention ----

    def _compute(self, lane: _Lane, message: Message) -> tuple[np.ndarray, ...] | None:
        batch, pages, share = lane.batch, self.pages, self.share
        if batch is None or pages is None or share is None or message.layer >= share.layers:
            raise UsageError("A worker needs pages and a batch before it computes")
        heads, kv_heads, dim = share.heads, share.kv_heads, share.head_dim
        at = 0
        if message.kind != KEYS:
            at = batch.tokens * heads * dim
            lane.q = message.array(count=at).reshape(-1, heads, dim)
        assert lane.q is not None
        if message.kind == QUERY:
            lane.earlier = self._earlier(lane, message.layer)
            return None
        k, v = message.array(offset=4 * at).reshape(2, -1, kv_heads, dim)
        pages.store(message.layer, batch.slots[batch.kept], k, v)
        if message.kind == WHOLE:
            out, sums = self._whole(lane, message.layer)
        else:
            out, sums = self._merged(lane, message.layer, k, v)
        return (out,) if share.page_step == 1 else (out, sums)

    def _earlier(self, lane: _Lane, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Attention of single new tokens over all before them, and log S (4); it needs nothing but their queries."""
        batch, pages = lane.batch, self.pages
        assert batch and pages and lane.q is not None and self.share
        lane.earlier = None
        rows, starts, contexts, tables = batch.part("early")
        if not len(rows):
            return None
        before = _kept_slots(contexts, self.share)
        return pages.attend(layer, lane.q[rows], starts, contexts, tables, seen=before, threads=self.share.threads)

    def _merged(self, lane: _Lane, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch, q, share = lane.batch, lane.q, self.share
        assert batch and q is not None and share
        out, sums = np.empty_like(q), np.empty(q.shape[:2], np.float32)
        if lane.earlier is not None:
            rows, (earlier, log_s) = batch.part("early")[0], lane.earlier
            whole = len(rows) == len(q) == len(k)  # the usual step: every sequence decodes, and all is kept here
            if whole:
                out, sums = _added(q, k, v, earlier, log_s, share)
            else:
                here, own = batch.own()
                earlier[here], log_s[here] = _added(q[rows[here]], k[own], v[own], earlier[here], log_s[here], share)
                out[rows], sums[rows] = earlier, log_s
        if len(batch.rest):
            rows, starts, contexts, tables = batch.part("rest")
            parents = None if batch.parents is None else np.ascontiguousarray(batch.parents[rows])
            out[rows], sums[rows] = self._attend(layer, q[rows], starts, contexts, tables, batch.seen[rows], parents)
        return out, sums

    def _whole(self, lane: _Lane, layer: int) -> tuple[np.ndarray, np.ndarray]:
        batch = lane.batch
        assert batch and lane.q is not None
        return self._attend(layer, lane.q, batch.starts, batch.contexts, batch.tables, batch.seen, batch.parents)

    def _attend(
        self, layer: int, q: np.ndarray, starts: np.ndarray, contexts: np.ndarray, tables: np.ndarray,
        seen: np.ndarray, parents: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        assert self.pages and self.share
        threads = self.share.threads
        return self.pages.attend(layer, q, starts, contexts, tables, seen=seen, parents=parents, threads=threads)

    # ---- pages ----

    def _copy(self, pairs: np.ndarray) -> None:
        assert self.pages and self.share
        _check_range(pairs, self.pages.data.shape[1])
        for source, target in pairs.tolist():
            self.pages.copy(source, target)

    def _move(self, ints: np.ndarray) -> None:
        assert self.pages and self.share
        size = int(ints[0])
        table, moves = ints[1 : 1 + size], ints[1 + size :].reshape(-1, 2)
        _check_range(table, self.pages.data.shape[1])
        _check_range(moves, size * PAGE)
        if self.share.page_step > 1:
            raise UsageError("Slots cannot be moved where sequences are split over workers")
        self.pages.move(table, moves)


def _added(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, earlier: np.ndarray, log_s: np.ndarray, share: Share
) -> tuple[np.ndarray, np.ndarray]:
    """What earlier tokens gave, and log S, with each token's own term added: A = v, S = exp(q.k / sqrt(d)) (4)."""
    if share.cache == "bf16":
        k, v = rounded(k), rounded(v)
    grouped = q.reshape(len(q), share.kv_heads, share.heads // share.kv_heads, share.head_dim)
    score = (grouped @ k[..., None]) * np.float32(share.head_dim**-0.5)
    before, attended = log_s.reshape(score.shape), earlier.reshape(grouped.shape)
    with np.errstate(over="ignore"):  # a term that counts for nothing
        weight = 1 / (1 + np.exp(before - score))
    out = (attended + (v[:, :, None] - attended) * weight).reshape(q.shape)
    sums = np.logaddexp(before, score).reshape(log_s.shape) if share.page_step > 1 else log_s
    return out, sums


def merge(a: np.ndarray, log_a: np.ndarray, b: np.ndarray, log_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention over two disjoint sets of keys as one: A = (A1 S1 + A2 S2) / (S1 + S2), with logarithms of S (4).

    a, b: [..., dim]; log_a, log_b: [...]. A set without keys has log S = -inf; two of them give 0 and -inf.
    """
    joint = np.logaddexp(log_a, log_b)
    highest = np.where(np.isneginf(joint), 0, joint)
    merged = np.exp(log_a - highest)[..., None] * a + np.exp(log_b - highest)[..., None] * b
    return merged.astype(np.float32), joint.astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 numbers as bfloat16 pages give them back: rounded to the nearest, halves to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def batch_ints(starts: np.ndarray, contexts: np.ndarray, tables: np.ndarray, parents: np.ndarray | None) -> np.ndarray:
    """The payload of a BATCH."""
    head = np.array([len(contexts), starts[-1], tables.shape[1], parents is not None], np.int32)
    arrays = [head, starts, contexts, tables.ravel(), *([] if parents is None else [parents])]
    return np.concatenate(arrays).astype(np.int32)


def kept_tokens(starts: np.ndarray, contexts: np.ndarray, share: Share) -> np.ndarray:
    """Indices of the tokens whose keys and values this share keeps."""
    slot = np.repeat(contexts - starts[:-1], np.diff(starts)) + np.arange(starts[-1])
    return np.flatnonzero(slot // PAGE % share.page_step == share.page_first)


def _batch(ints: np.ndarray, share: Share) -> _Batch:
    sequences, tokens, width, tree = (int(n) for n in ints[:4])
    sizes = [sequences + 1, sequences, sequences * width, tokens if tree else 0]
    if min(sequences, tokens, width) < 0 or len(ints) != 4 + sum(sizes):
        raise UsageError("A batch of another size was announced")
    starts, contexts, tables, parents = np.split(ints[4:], np.cumsum(sizes)[:-1])
    counts = np.diff(starts)
    if starts[0] != 0 or starts[-1] != tokens or counts.min(initial=0) < 0 or contexts.min(initial=0) < 0:
        raise UsageError("The arrays of a batch do not belong together")
    tables = tables.reshape(sequences, width)
    slot = np.repeat(contexts - starts[:-1], counts) + np.arange(tokens)
    if tokens and int((slot // PAGE).max()) >= width:
        raise UsageError("A batch has more tokens than its tables hold")
    blocks = tables[np.repeat(np.arange(sequences), counts), slot // PAGE]
    kept = kept_tokens(starts, contexts, share)
    slots = np.full(tokens, -1, np.int32)
    slots[kept] = blocks[kept] * PAGE + slot[kept] % PAGE
    early = np.flatnonzero(counts == 1) if not tree else np.zeros(0, np.int64)
    rest = np.flatnonzero(counts > 1) if not tree else np.arange(sequences)
    mine = np.ascontiguousarray(tables[:, share.page_first :: share.page_step])
    mine = mine if mine.shape[1] else np.zeros((sequences, 1), np.int32)
    seen = _kept_slots(slot + 1, share)
    return _Batch(starts, contexts, mine, parents if tree else None, slots, kept, seen, early, rest)


def _kept_slots(lengths: np.ndarray, share: Share) -> np.ndarray:
    """How many of a sequence's first slots are kept here."""
    step, first = share.page_step, share.page_first
    full, rest = np.divmod(lengths, PAGE * step)
    return (full * PAGE + np.clip(rest - first * PAGE, 0, PAGE)).astype(np.int32)


def _check_range(values: np.ndarray, end: int) -> None:
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < end:
        raise UsageError(f"Places {values.min()} to {values.max()} do not all lie in 0 to {end - 1}")


def _alive(link: Link) -> bool:
    try:
        _still_there(link)
    except Lost:
        return False
    return True


def _still_there(link: Link) -> None:
    """Raises Lost when the other side of an idle link has closed."""
    stream = link.stream
    if isinstance(stream, _link.Ring) and not stream.heard():
        raise Lost("The other process has ended")


def _text(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def greeting(session: str, share: Share) -> np.ndarray:
    """The payload of a HELLO."""
    return _text(json.dumps({"version": VERSION, "session": session, "share": asdict(share)}))


def work_at(address: str, memory: int | None, ready: Callable[[str], None]) -> int:
    """Be a worker at tcp://host:port for whoever connects, until SIGINT or SIGTERM; returns the exit code."""
    worker = Worker(memory)

    def end(number: int, _: Any) -> None:
        worker.ending = 128 + number

    with _link.listen(address) as door:
        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            host, port = door.getsockname()[:2]
            ready(f"tcp://{f'[{host}]' if ':' in host else host}:{port}")
            worker.serve([], door)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return worker.ending if worker.needed else 0


def main() -> None:
    """A worker that was started by the engine it works for, and ends when that closes its links."""
    parser = argparse.ArgumentParser(prog="attention worker", description="Hold keys and values; compute attention.")
    parser.add_argument("--cpu", type=int, help="the core to stay on")
    parser.add_argument("--inherit", action="append", required=True, help="descriptors of a link, with commas")
    given = parser.parse_args()
    if given.cpu is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {given.cpu})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine's process says when it is time to go
    Worker().serve([Link(_link.inherited([int(n) for n in text.split(",")])) for text in given.inherit])


if __name__ == "__main__":
    main()

"""Attention offloading: keys, values and attention live in other processes, and the model's own computes all the rest.

How it works
    1. A decoding step has two kinds of work. A linear layer of N weights takes 2 N B flops for e (N + 2 B d) bytes, so
       its intensity grows with the batch B; attention reads every answer's own keys and values: its intensity stays.
       Keys and values therefore go to workers with much memory, the weights stay where arithmetic is cheap.
    2. For each layer and token q (d numbers), k and v (2 d / G, with G queries to a key head) go out and o (d) comes
       back: (2 + 2 / G) e d B L bytes a step for L layers of e-byte numbers. A link that may cost the share alpha of a
       step needs (2 + 2 / G) e d B L / (alpha (MTIME(B) + ATIME(B, l))) bytes a second.
    3. A model is cut at its attention: `splits(model)` traces one pass into a graph of tensors, takes each attention
       out and finds the minimum cut between what it reads and what it gives; the cut is the context that a slice hands
       to the next (the residual stream). Within a slice what q needs comes first, then q is sent, and k and v at the
       end. That is the order in which the native step computes.
    4. With A(I) = sum softmax(q.k_i / sqrt(d)) v_i and S(I) = sum exp(q.k_i / sqrt(d)) over a set I of tokens,
       A = (A1 S1 + A2 S2) / (S1 + S2) for two that share none. So a worker attends to all earlier tokens as soon as q
       has come, and adds the new token's term when k and v have. It carries log S, from which nothing overflows.
    5. Workers share the key heads; b must divide them. Otherwise each keeps every b-th page of a sequence, and their
       parts are merged by 4.
    6. With two batches under way (`batches=2`) a step's sequences are halved, and while a worker attends for one half
       the model computes the other: t_a = t_m keeps both busy.
    7. Prompts go to the workers layer by layer as they are computed. The model's process keeps no keys or values, so a
       worker that is lost is started anew and every running answer is computed again from its tokens.
    8. Processes of one machine talk through rings in shared memory, looked at for 50 us and then slept on; machines
       talk over TCP.
    9. `plan(...)` prices every pair (a, b) of compute and memory devices by their published figures.

Where it bends
    Devices are processes: no RDMA, no GPU memory. On one CPU model and workers share the memory bus, so nothing is won
    there but memory of its own for each process; and since k and v take a small model less time than a message does,
    q is early only when asked for (`early=true`). Chunks of prompts and draft trees are attended to when k and v have
    come, not before: they are compute-bound. Modules of transformers give q, k and v at once, so q is early on the
    native runner only. Two batches at most are under way, since with n of them n - 1 replicas compute and one process
    holds one. TCP is neither encrypted nor authenticated: for a network one trusts. Sliding windows, capped scores,
    sinks and int8 keys are refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.method import Method, Paper
from shoestring.engine.decoder import Decoder
from shoestring.engine.hooks import Hooks
from shoestring.engine.runner import BLOCK, Batch, CacheLost, Facts, Runner
from shoestring.methods.serving import _attention_worker as protocol
from shoestring.methods.serving import _link
from shoestring.methods.serving._attention_worker import Share
from shoestring.methods.serving._link import Link, Lost, Message

if TYPE_CHECKING:
    from shoestring.engine.open import Opened

METHOD = Method(
    paper=Paper(
        "Efficient and Economic Large Language Model Inference with Attention Offloading", "2024-05", arxiv="2405.01814"
    ),
    provides="AttentionOffloading",
    saves=("money", "memory"),
    traits={"plugs": "attention, decoder", "roles": "attention=worker"},
)

SPLITS = ("auto", "heads", "sequence")
_TRIES, _WHILE = 5, 60.0  # so many restarts in so many seconds are not worth another


@dataclass(frozen=True)
class AttentionOffloading:
    """Where attention is computed.

    Args:
        workers: how many processes to start here, or addresses tcp://host:port of workers that run, with commas.
        split: what workers share: "heads", "sequence", or "auto": heads where their number can be divided.
        early: send q before k and v are computed. Sums are then merged in another order; without it every bit is that
            of one process.
        batches: 1, or 2 halves of a step that take turns in model and workers.
        pin: bind each worker started here to a core, and the engine to the others, where there are enough.
        threads: of each worker started here.
        patience: seconds without an answer after which a worker counts as lost.
        trace: file for a timeline in Chrome's trace format, written when the engine is closed; empty for none.
    """

    workers: int | str = 1
    split: str = "auto"
    early: bool = False
    batches: int = 1
    pin: bool = True
    threads: int = 1
    patience: float = 60.0
    trace: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.workers, str):
            for address in self.addresses:
                _link.place(address)
        elif isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise UsageError(f"workers={self.workers} are none", remedy="Use a number, or tcp://host:port")
        if self.split not in SPLITS:
            raise UsageError(f"split={self.split!r} is not possible", remedy=f"Use one of {', '.join(SPLITS)}")
        if self.batches not in (1, 2):
            raise UsageError(
                f"batches={self.batches} cannot be under way",
                "with n batches n - 1 replicas of the model compute, and one process has one",
                "Use 1 or 2",
            )
        if self.threads < 1 or not self.patience > 0:
            raise UsageError(f"threads={self.threads}, patience={self.patience}", remedy="Use numbers above 0")

    @property
    def addresses(self) -> list[str]:
        """Of workers that run elsewhere; empty when they are started here."""
        return [a.strip() for a in self.workers.split(",")] if isinstance(self.workers, str) else []

    @property
    def count(self) -> int:
        return len(self.addresses) or int(self.workers)


def example() -> AttentionOffloading:
    return AttentionOffloading()


def plug(config: AttentionOffloading, opened: Opened) -> Hooks:
    """The workers, started and greeted, as the engine's attention.

    Raises:
        UsageError: a model whose attention a worker does not know, or workers that do not divide it.
    """
    runner = opened.runner
    if config.batches > 1 and runner.facts.backend != "native":
        raise UsageError(
            "Two batches take turns on the native runner only",
            "modules of transformers keep one pass at a time",
            "Leave out batches=2",
        )
    cache = str(runner.facts.extra.get("cache", "fp32"))
    elsewhere = Elsewhere(runner.facts, config, cache)
    try:
        _try_out(runner)
        if config.pin and not config.addresses and hasattr(runner, "threads"):
            runner.threads = max(1, min(runner.threads, len(elsewhere.left) or _cores() - config.count))
    except BaseException:
        elsewhere.close()
        raise
    if config.batches == 1:
        return Hooks(attention=elsewhere)
    return Hooks(
        attention=elsewhere,
        decoder=lambda runner, sampler, hooks: Decoder(Staggered(runner, elsewhere), sampler, hooks),  # type: ignore[arg-type]
    )


def worker(config: AttentionOffloading, settings: Any, ready: Callable[[str], None]) -> int:
    """Work for engines elsewhere, at the address and with the memory for keys and values that the settings give.

    Returns:
        0 when a signal ended it while nobody needed it, 130 or 143 when somebody did.

    Raises:
        UsageError: options, which are the engine's to have, or an address that is not to be had.
    """
    if config != AttentionOffloading():
        raise UsageError(
            "A worker takes no options", "the engine that it works for tells it what to do", "Give them to --plug there"
        )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return protocol.work_at(f"tcp://{host}:{settings.port}", settings.cache_bytes, ready)


def splits(model: Any, tokens: int = 4) -> list[Any]:
    """The slices of a transformers model between its attentions (3); see `_splitter.Slice`.

    Raises:
        UsageError: a model without attention behind transformers' interface.
    """
    from shoestring.methods.serving._splitter import split

    return split(model, tokens)


def plan(model: Any, **options: Any) -> Any:
    """Throughput per dollar of every (a, b) devices (9); see `_offload_planner.plan`.

    Args:
        model: a `core.shape.Shape`, or (parameters, layers, width of all queries, width of all keys of a layer).
    """
    from shoestring.methods.serving._offload_planner import Load
    from shoestring.methods.serving._offload_planner import plan as priced

    return priced(Load(*model) if isinstance(model, tuple) else model, **options)


def attach(model: Any, config: AttentionOffloading | None = None, **sizes: int) -> Any:
    """A transformers model's attention elsewhere; see `_placeholder_cache.attach`."""
    from shoestring.methods.serving._placeholder_cache import attach as attached

    return attached(model, lambda facts: Elsewhere(facts, config or example()), **sizes)


# ---- the attention of an engine ----


@dataclass(eq=False)
class _Lane:
    """What one batch under way has said to the workers."""

    links: list[Link] = field(default_factory=list)
    batch: Batch | None = None
    kept: list[np.ndarray] = field(default_factory=list)  # tokens whose k and v go to each worker
    tag: int = 0
    begun: int = -1  # the layer whose q has gone out


class Elsewhere:
    """An `engine.runner.AttentionWorker` that keeps pages in other processes.

    With `turns` set, whoever waits for an answer lets the other batch compute meanwhile.
    """

    def __init__(self, facts: Facts, config: AttentionOffloading, cache: str = "fp32") -> None:
        self.config, self.facts = config, facts
        self.shares = shares(facts, config, cache)
        self.begin: Callable[[int, np.ndarray, Batch], None] | None = self._begin if config.early else None
        self.turns: Turns | None = None
        self.blocks = 0
        self.waited, self.restarts, self.events = 0.0, 0, list[tuple[str, int, int, float, float]]()
        self._past: dict[str, int] = {"headers": 0}  # bytes of links that are no more
        self._here, self._mended = threading.local(), list[float]()
        self._session, self._epoch = uuid.uuid4().hex, 0
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * config.count
        self._lanes = [_Lane() for _ in range(config.batches)]
        cores = _own_cores()
        # A core for each worker, from the end, and the rest for those who start them: this thread and its children.
        self.left = cores[: -config.count] if config.pin and config.threads == 1 and not config.addresses else []
        self._cores = cores[::-1] if self.left else []
        self._edits: list[tuple[int, np.ndarray]] = []  # copies and moves that the workers do not know of yet
        self._mending = threading.RLock()
        try:
            self._start()
            if self.left:
                os.sched_setaffinity(0, self.left)
        except BaseException as error:
            self.close()
            if isinstance(error, Lost):
                raise UsageError("The attention workers cannot be reached", str(error)) from error
            raise

    # ---- what an engine calls ----

    def reserve(self, blocks: int) -> None:
        """Raises DoesNotFit."""
        self.blocks = blocks
        for link in self._lanes[0].links:
            _ask(link, protocol.RESERVE, np.array([blocks], np.int64))

    def _begin(self, layer: int, q: np.ndarray, batch: Batch) -> None:
        lane = self._lane()
        with self._watched():
            self._announce(lane, batch)
            for link, part in zip(lane.links, self._heads(q), strict=True):
                link.send(protocol.QUERY, layer, lane.tag, part)
        lane.begun = layer

    def __call__(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, batch: Batch) -> np.ndarray:
        lane = self._lane()
        with self._watched():
            kind, first = protocol.KEYS, [np.empty(0, np.float32)] * len(self.shares)
            if lane.begun != layer or lane.batch is not batch:
                self._announce(lane, batch)
                kind, first = protocol.WHOLE, self._heads(q)
            lane.begun = -1
            for link, rows, *parts in zip(lane.links, lane.kept, first, self._heads(k), self._heads(v), strict=True):
                own = [x if len(rows) == len(x) else x[rows] for x in parts[1:]]
                link.send(kind, layer, lane.tag, parts[0], *own)
            epoch, began = self._epoch, time.perf_counter()
            if self.turns:
                self.turns.hand_over(self._lanes.index(lane))
                if self._epoch != epoch:  # these workers were never asked
                    raise Lost("A worker was lost while the other batch computed")
            found = [_answer(link, lane.tag, protocol.RESULT) for link in lane.links]
            ended = time.perf_counter()
            self.waited += ended - began
            if self.config.trace:
                self.events.append(("wait", self._lanes.index(lane), layer, began, ended))
            lane.tag = (lane.tag + 1) & 0x7FFFFFFF
        return self._joined([message.array() for message in found], q.shape)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:
            self._edits.append((protocol.COPY, np.array(pairs, np.int32).ravel()))

    def move_slots(self, table: Sequence[int], moves: Sequence[tuple[int, int]]) -> None:
        if moves:
            said = [len(table), *table, *(slot for move in moves for slot in move)]
            self._edits.append((protocol.MOVE, np.array(said, np.int32)))

    def close(self) -> None:
        if self.config.trace and self._lanes[0].links:
            self._write_trace()
        for lane in self._lanes:
            for link in lane.links:
                self._forget(link)
            lane.links = []
        for i, process in enumerate(self._processes):
            if process is not None:
                _end(process)
                self._processes[i] = None
        if self.left:
            os.sched_setaffinity(0, {*self.left, *self._cores})
            self.left = []

    def stats(self) -> Mapping[str, float]:
        """Counters since the start: bytes of q, k, v and o as equation 2 has them, and all that goes beside them."""
        counted = self.counted()
        payload = sum(counted.get(kind, 0) for kind in ("query", "keys", "whole", "result"))
        return {
            "attention_workers": float(len(self.shares)),
            "attention_payload_bytes": float(payload),
            "attention_header_bytes": float(sum(counted.values()) - payload),
            "attention_wait_seconds": self.waited,
            "attention_restarts": float(self.restarts),
        }

    def counted(self) -> dict[str, int]:
        """Bytes by kind of message, sent and received, and of all headers."""
        found = dict(self._past)
        for lane in self._lanes:
            for link in lane.links:
                _add(found, link)
        return found

    # ---- between the lines ----

    @contextmanager
    def on_lane(self, number: int) -> Iterator[None]:
        """Calls of this thread belong to another batch under way."""
        self._here.lane = number
        try:
            yield
        finally:
            self._here.lane = 0

    def _lane(self) -> _Lane:
        return self._lanes[getattr(self._here, "lane", 0)]

    def _announce(self, lane: _Lane, batch: Batch) -> None:
        """Tell the workers what is about to be computed, and first what has changed in the pages since."""
        if not lane.links:
            raise Lost("The workers were closed")
        with self._mending:
            edits, self._edits = self._edits, []
            for kind, said in edits:
                for link in self._lanes[0].links:
                    _ask(link, kind, said)
        if lane.batch is batch:
            return
        tree = None if batch.parents is None or _is_chain(batch) else batch.parents
        if tree is not None and self.shares[0].page_step > 1:
            raise UsageError(
                "A tree of drafts cannot be attended to where sequences are split over workers",
                "a worker does not see which of its slots are ancestors",
                "Use as many workers as divide the heads, or no drafts",
            )
        said = protocol.batch_ints(batch.starts, batch.contexts, batch.tables, tree)
        lane.kept = [protocol.kept_tokens(batch.starts, batch.contexts, share) for share in self.shares]
        for link in lane.links:
            link.send(protocol.BATCH, 0, lane.tag, said)
        lane.batch = batch

    def _heads(self, x: np.ndarray) -> list[np.ndarray]:
        """x [tokens, heads, dim] as each worker gets it."""
        if self.shares[0].page_step > 1 or len(self.shares) == 1:
            return [x] * len(self.shares)
        return list(np.split(x, len(self.shares), axis=1))

    def _joined(self, found: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        tokens, heads, dim = shape
        if self.shares[0].page_step == 1:
            return np.concatenate([part.reshape(tokens, -1, dim) for part in found], axis=1)
        split = tokens * heads * dim
        out, log_s = found[0][:split].reshape(shape), found[0][split:].reshape(tokens, heads)
        for part in found[1:]:  # (4)
            out, log_s = protocol.merge(out, log_s, part[:split].reshape(shape), part[split:].reshape(tokens, heads))
        return out

    # ---- workers come and go ----

    def _start(self) -> None:
        """Start or reach every worker, on all lanes."""
        self._epoch += 1
        fresh: list[list[Link]] = [[] for _ in self._lanes]
        for i, share in enumerate(self.shares):
            for links, stream in zip(fresh, self._streams(i), strict=True):
                link = Link(stream, self.config.patience)
                links.append(link)
                _ask(link, protocol.HELLO, protocol.greeting(f"{self._session}/{self._epoch}", share))
        for lane, links in zip(self._lanes, fresh, strict=True):
            lane.links, lane.batch, lane.begun = links, None, -1

    def _streams(self, i: int) -> list[_link.Stream]:
        if self.config.addresses:
            patience = min(self.config.patience, 10.0)
            return [_link.connect(self.config.addresses[i], patience) for _ in self._lanes]
        pairs = [_link.pair() for _ in self._lanes]
        command = [sys.executable, "-m", protocol.__name__]
        for _, numbers, _ in pairs:
            command += ["--inherit", ",".join(map(str, numbers))]
        if self._cores:
            command += ["--cpu", str(self._cores[i])]
        kept = [number for _, some, _ in pairs for number in some]
        root = str(Path(protocol.__file__).parents[3])
        paths = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "PYTHONPATH": paths}
        process = subprocess.Popen(command, pass_fds=kept, stdin=subprocess.DEVNULL, env=environment)
        self._processes[i] = process
        for _, _, close in pairs:
            close()
        return [stream for stream, _, _ in pairs]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """What is lost here is mended, and said to be lost."""
        epoch = self._epoch
        try:
            yield
        except Lost as error:
            with self._mending:
                if self._epoch == epoch:  # else the other batch has seen to it
                    self._mend(error)
            raise CacheLost("An attention worker was lost", str(error)) from error

    def _mend(self, why: Lost) -> None:
        now = time.monotonic()
        self._mended = [*(at for at in self._mended if at > now - _WHILE), now]
        if len(self._mended) > _TRIES:
            raise ShoestringError(
                "The attention workers are lost again and again", str(why), "Look at their memory and at the network"
            ) from why
        self.restarts += 1
        for lane in self._lanes:
            for link in lane.links:
                self._forget(link)
            lane.links = []
        for process in self._processes:
            if process is not None:
                _end(process)
        self._edits = []
        try:
            self._start()
            self.reserve(self.blocks)
        except Lost as error:
            raise ShoestringError(
                "A lost attention worker cannot be replaced", str(error), "Start it again, then ask again"
            ) from error

    def _forget(self, link: Link) -> None:
        _add(self._past, link)
        link.close()

    def _write_trace(self) -> None:
        events = [_event(f"model, batch {lane}", word, layer, a, b) for word, lane, layer, a, b in self.events]
        names = {
            protocol.QUERY: "attend to earlier tokens",
            protocol.KEYS: "add the new ones",
            protocol.WHOLE: "attend",
        }
        for i, link in enumerate(self._lanes[0].links):
            try:
                rows = _ask(link, protocol.TRACE, answer=protocol.TRACE).array(np.float64).reshape(-1, 5)
            except ShoestringError:  # it is gone, and its part of the timeline with it
                continue
            for lane, kind, layer, a, b in rows.tolist():
                if kind in names:
                    events.append(_event(f"worker {i}, batch {lane:.0f}", names[int(kind)], int(layer), a, b))
        Path(self.config.trace).write_text(json.dumps({"traceEvents": events}))


class Turns:
    """Two batches that compute by turns. Whoever has asked for attention hands over and is handed back to when the
    other has asked too, so nobody looks out for an answer while there is something to compute."""

    def __init__(self) -> None:
        self._calls = [threading.Lock(), threading.Lock()]  # held while it is not the batch's turn
        for call in self._calls:
            call.acquire()
        self._under_way: set[int] = set()

    @contextmanager
    def of(self, lane: int) -> Iterator[None]:
        """Compute when `lane` is called, and call the other at the end."""
        self._calls[lane].acquire()
        try:
            yield
        finally:
            self._under_way.discard(lane)
            self._call(1 - lane)

    def begin(self, lanes: int) -> None:
        """So many batches are about to start; the first is called."""
        self._under_way = set(range(lanes))
        self._call(0)

    def hand_over(self, lane: int) -> None:
        if self._call(1 - lane):
            self._calls[lane].acquire()

    def _call(self, lane: int) -> bool:
        """Whether there is somebody to call."""
        if lane in self._under_way:
            self._calls[lane].release()
        return lane in self._under_way


class Staggered:
    """A runner whose batches run as two halves: while one waits for attention, the other computes (6)."""

    def __init__(self, runner: Runner, elsewhere: Elsewhere) -> None:
        self._runner, self._elsewhere = runner, elsewhere
        elsewhere.turns = self._turns = Turns()
        self._other = ThreadPoolExecutor(1, "second-batch")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, batch: Batch, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
        at = _middle(batch)
        if not at:
            self._turns.begin(1)
            return self._half(0, batch, first, last, hidden)
        tokens = int(batch.starts[at])
        parts = [_sequences(batch, 0, at), _sequences(batch, at, batch.sequences)]
        streams = [None, None] if hidden is None else [hidden[:tokens].copy(), hidden[tokens:].copy()]
        self._turns.begin(2)
        other = self._other.submit(self._half, 1, parts[1], first, last, streams[1])
        try:
            mine = self._half(0, parts[0], first, last, streams[0])
        except BaseException:
            other.exception()
            raise
        return np.concatenate([mine, other.result()])

    def _half(self, lane: int, batch: Batch, first: int, last: int | None, hidden: Any) -> Any:
        with self._turns.of(lane), self._elsewhere.on_lane(lane):
            return self._runner.run(batch, first, last, hidden)


def shares(facts: Facts, config: AttentionOffloading, cache: str = "fp32") -> list[Share]:
    """What each worker gets (5).

    Raises:
        UsageError: they do not divide the key heads, or the cache is of integers.
    """
    kinds = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16"}
    if cache not in kinds:
        raise UsageError(
            f"Attention workers do not keep keys and values in {cache}",
            "what they merge is exact only beside numbers that were rounded once",
            "Use bf16 or fp32 keys and values",
        )
    count, by_heads = config.count, facts.kv_heads % config.count == 0
    if config.split == "heads" and not by_heads:
        raise UsageError(
            f"{count} workers do not divide {facts.kv_heads} heads of keys and values",
            "each would get as many",
            f"Use {_divisors(facts.kv_heads)} workers, or split=sequence",
        )
    whole = Share(
        facts.layers, facts.heads, facts.kv_heads, facts.head_dim, kinds[cache], threads=config.threads,
        traced=bool(config.trace),
    )  # fmt: skip
    if config.split == "sequence" or not by_heads:
        return [replace(whole, page_step=count, page_first=i) for i in range(count)]
    return [replace(whole, heads=facts.heads // count, kv_heads=facts.kv_heads // count)] * count


def bytes_per_step(facts: Facts, tokens: int, element: int = 4) -> int:
    """Payload of one step of so many tokens with heads split: (2 + 2 / G) e d B L, d the width of all queries (2)."""
    width, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    return (2 * width + 2 * keys) * element * tokens * facts.layers


def _try_out(runner: Runner) -> None:
    """Pass one token with an attention that only looks: what a worker is not told about is refused here."""
    facts = runner.facts

    class Looking:
        def __call__(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, batch: Batch) -> np.ndarray:
            wanted = (1, facts.heads, facts.head_dim), (1, facts.kv_heads, facts.head_dim)
            if (q.shape, k.shape) != wanted or v.shape != k.shape:
                raise UsageError(
                    "Attention cannot be computed elsewhere for this model",
                    f"layer {layer} has queries {q.shape[1:]}, keys {k.shape[1:]} and values {v.shape[1:]}",
                    "Use a model whose layers are alike",
                )
            return q

        def reserve(self, blocks: int) -> None: ...

    zero = np.zeros(1, np.int32)
    before, runner.attention = runner.attention, Looking()
    try:
        runner.reserve(1)
        runner.run(Batch(zero, zero, np.array([0, 1], np.int32), zero, np.zeros((1, 1), np.int32)))
    finally:
        runner.attention = before


def _answer(link: Link, tag: int, wanted: int) -> Message:
    """The answer to what was sent under `tag`; answers to what was given up before are passed over.

    Raises:
        Lost: there comes none. ShoestringError: the worker says why not.
    """
    while True:
        message = link.receive()
        if message.tag != tag:
            continue
        if message.kind == protocol.FAILED:
            raise UsageError("An attention worker refuses", message.payload.decode(errors="replace"))
        if message.kind == wanted:
            return message


def _ask(link: Link, kind: int, *arrays: np.ndarray, answer: int = protocol.READY) -> Message:
    tag = 0xFFFFFFFF  # no step's
    link.send(kind, 0, tag, *arrays)
    return _answer(link, tag, answer)


def _add(counts: dict[str, int], link: Link) -> None:
    names = {protocol.QUERY: "query", protocol.KEYS: "keys", protocol.WHOLE: "whole", protocol.RESULT: "result"}
    for kind, size in link.bytes.items():
        name = names.get(kind, "other")
        counts[name] = counts.get(name, 0) + size
    counts["headers"] = counts.get("headers", 0) + link.headers


def _event(row: str, name: str, layer: int, begin: float, end: float) -> dict[str, Any]:
    process, _, thread = row.partition(", ")
    return {
        "name": f"{name}, layer {layer}", "ph": "X", "pid": process, "tid": thread,
        "ts": begin * 1e6, "dur": (end - begin) * 1e6,
    }  # fmt: skip


def _middle(batch: Batch) -> int:
    """How many of the sequences make the first half of the tokens, as near as can be; 0 where there is only one."""
    if batch.sequences < 2:
        return 0
    return int(1 + np.abs(batch.starts[1:-1] - batch.tokens / 2).argmin())


def _sequences(batch: Batch, first: int, last: int) -> Batch:
    """Sequences first..last-1 as a batch of their own."""
    some, rows = slice(first, last), slice(int(batch.starts[first]), int(batch.starts[last]))
    starts = batch.starts[first : last + 1] - batch.starts[first]
    return replace(
        batch, ids=batch.ids[rows], positions=batch.positions[rows], starts=starts, contexts=batch.contexts[some],
        tables=batch.tables[some], owners=batch.owners[some],
        parents=None if batch.parents is None else batch.parents[rows],
        adapters=None if batch.adapters is None else batch.adapters[rows],
    )  # fmt: skip


def _is_chain(batch: Batch) -> bool:
    assert batch.parents is not None
    own = np.arange(batch.tokens) - np.repeat(batch.starts[:-1], np.diff(batch.starts))
    return bool((batch.parents == own - 1).all())


def _end(process: subprocess.Popen[bytes]) -> None:
    """It ends by itself when its links are closed; one that does not is ended."""
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _divisors(number: int) -> str:
    return " or ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _own_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _cores() -> int:
    return len(_own_cores()) or os.cpu_count() or 1


assert BLOCK == protocol.PAGE

"""The upper half of a split model: what edges have sent of each dialogue, and the layers that finish it on demand."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from shoestring.core.errors import UsageError, nearest
from shoestring.engine.blocks import BlockPool
from shoestring.engine.memory import free_memory
from shoestring.engine.runner import BLOCK, Batch, Runner

log = logging.getLogger("shoestring.server")

FORMS = ("fp32", "fp16", "bf16", "int8")
_PIECE = 512  # tokens that go through the layers together
_PATIENCE = 60.0  # longest wait for states, in seconds
_SAMPLES, _SAMPLE = 64, 4096  # how much of each file of weights a fingerprint reads


# ---- what goes over the wire ----


def packed(rows: np.ndarray, form: str) -> bytes:
    """Hidden states float32 [tokens, hidden] in one of FORMS; int8 has one float32 scale a token, before its codes.

    Raises:
        OverflowError: a number that fp16 cannot hold.
    """
    if form == "fp32":
        return rows.astype("<f4").tobytes()
    if form == "bf16":
        bits = rows.astype("<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    if form == "fp16":
        if np.abs(rows).max(initial=0) > 65504:
            raise OverflowError("hidden states of this model are too large for fp16; use transfer=bf16 or int8")
        return rows.astype("<f2").tobytes()
    scale = np.abs(rows).max(-1, keepdims=True) / 127
    codes = np.rint(rows / np.where(scale > 0, scale, 1)).astype(np.int8)
    return b"".join(s.astype("<f4").tobytes() + c.tobytes() for s, c in zip(scale, codes))


def unpacked(data: bytes, form: str, count: int, hidden: int) -> np.ndarray:
    """The inverse of `packed`: float32 [count, hidden].

    Raises:
        ValueError: other bytes than those of so many numbers, or numbers that are not finite.
    """
    width = {"fp32": 4 * hidden, "fp16": 2 * hidden, "bf16": 2 * hidden, "int8": 4 + hidden}.get(form)
    if width is None or count < 1 or len(data) != count * width:
        raise ValueError(f"{len(data)} bytes are not {count} states of {hidden} numbers as {form}")
    if form == "int8":
        rows = np.frombuffer(data, np.uint8).reshape(count, width)
        scale = rows[:, :4].copy().view("<f4")
        found = rows[:, 4:].view(np.int8).astype(np.float32) * scale
    elif form == "bf16":
        found = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        found = np.frombuffer(data, "<f4" if form == "fp32" else "<f2")
    found = found.astype(np.float32).reshape(count, hidden)
    if not np.isfinite(found).all():
        raise ValueError("states that are not finite")
    return found


def fingerprint(path: Path) -> str:
    """One word for configuration and weights: both sides must say the same. Reads samples of large files."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".gguf"))
    digest = hashlib.blake2b(digest_size=16)
    if (path / "config.json").is_file():
        digest.update((path / "config.json").read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            for place in np.linspace(0, max(0, size - _SAMPLE), _SAMPLES).astype(int):
                stream.seek(int(place))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


# ---- the context manager ----


@dataclass
class Dialogue:
    """One answer of one edge.

    Attributes:
        filled: tokens whose keys and values stand in the upper layers.
        waiting: hidden states of the tokens after those, as they came.
        said: position and token of the latest answer, should the edge not have got it.
    """

    blocks: list[int] = field(default_factory=list)
    filled: int = 0
    waiting: list[np.ndarray] = field(default_factory=list)
    said: tuple[int, int] = (-1, 0)
    touched: float = field(default_factory=time.monotonic)

    @property
    def arrived(self) -> int:
        """The position that is expected next."""
        return self.filled + sum(map(len, self.waiting))


class Upper:
    """Dialogues and the layers that they share. Not thread-safe; `compute` alone may run beside the rest.

    No more states wait than there are places in `pages`: beyond, who has not been heard of longest is forgotten.
    """

    def __init__(self, runner: Runner, pages: int) -> None:
        runner.reserve(pages)
        self.runner, self.pool = runner, BlockPool(pages, BLOCK)
        self.waiting = 0  # states of all dialogues
        self.dialogues: dict[str, Dialogue] = {}
        self.counts = dict.fromkeys(("infer", "tokens", "layer_steps", "evicted", "states"), 0)
        self._busy: set[str] = set()

    def take(self, name: str, start: int, rows: np.ndarray) -> int:
        """States of the tokens start.. of a dialogue; what is there already is passed over. The next wanted position:
        above `start` + rows where all is well, else where a gap begins."""
        dialogue = self.dialogues.setdefault(name, Dialogue())
        dialogue.touched = time.monotonic()
        expected = dialogue.arrived
        if start <= expected < start + len(rows):
            dialogue.waiting.append(rows[expected - start :])
            self.counts["states"] += len(dialogue.waiting[-1])
            self.waiting += len(dialogue.waiting[-1])
            while self.waiting > self.pool.count * BLOCK and self._forget({name}):
                pass
        return dialogue.arrived

    def gather(self, asked: Sequence[tuple[str, int]]) -> tuple[Batch, np.ndarray, list[tuple[str, int]]] | None:
        """The pending spans of dialogues up to the positions that are asked for, as one batch; who is in it.

        Dialogues that wait for pages longest unasked give theirs up; who finds no pages is left out.
        """
        ids, parts, contexts, who = [], [], [], []
        for name, at in asked:
            dialogue = self.dialogues[name]
            count = min(at + 1 - dialogue.filled, _PIECE)
            if not self._room(name, dialogue, dialogue.filled + count, {n for n, _ in asked}):
                continue
            rows = np.concatenate(dialogue.waiting)
            parts.append(rows[:count])
            dialogue.waiting = [rows[count:]] if len(rows) > count else []
            self.waiting -= count
            contexts.append(dialogue.filled)
            dialogue.filled += count
            dialogue.touched = time.monotonic()
            ids += [0] * count
            who.append((name, at))
        if not who:
            return None
        sizes = [len(part) for part in parts]
        tables = np.zeros((len(who), max(len(self.dialogues[n].blocks) for n, _ in who)), np.int32)
        for row, (name, _) in zip(tables, who):
            blocks = self.dialogues[name].blocks
            row[: len(blocks)] = blocks
        positions = np.concatenate([np.arange(at, at + n) for at, n in zip(contexts, sizes)]).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        batch = Batch(np.array(ids, np.int32), positions, starts, np.array(contexts, np.int32), tables)
        self._busy = {name for name, _ in who}
        self.counts["tokens"] += len(ids)
        self.counts["layer_steps"] += len(ids) * self.runner.facts.layers
        return batch, np.concatenate(parts), who

    def compute(self, batch: Batch, states: np.ndarray) -> list[int]:
        """The likeliest token after each span."""
        hidden = self.runner.run(batch, 0, None, self.runner.from_host(states))
        return [int(row.argmax()) for row in self.runner.logits(hidden, batch.starts[1:] - 1)]

    def settle(self, who: Sequence[tuple[str, int]], tokens: Sequence[int]) -> None:
        """What `compute` said of the spans that `gather` gave it."""
        for (name, at), token in zip(who, tokens):
            dialogue = self.dialogues.get(name)
            if dialogue and dialogue.filled == at + 1:
                dialogue.said = at, token
        self._busy = set()

    def fail(self) -> None:
        """`compute` raised: what it was given is half done, so these dialogues are forgotten."""
        lost, self._busy = self._busy, set()
        for name in lost:
            self.end(name)

    def end(self, name: str) -> None:
        """Forget a dialogue; one that is being computed a little later, by `expire`."""
        if name in self._busy:
            self.dialogues[name].touched = -math.inf
        elif dialogue := self.dialogues.pop(name, None):
            self.waiting -= sum(map(len, dialogue.waiting))
            self.pool.release(dialogue.blocks)

    def expire(self, seconds: float) -> None:
        """Forget who has not been heard of for so long."""
        old = time.monotonic() - seconds
        for name in [n for n, d in self.dialogues.items() if d.touched < old and n not in self._busy]:
            self.end(name)

    def _room(self, name: str, dialogue: Dialogue, slots: int, kept: set[str]) -> bool:
        wanted = -(-slots // BLOCK) - len(dialogue.blocks)
        while wanted > self.pool.free:
            if not self._forget(kept, paged=True):
                return False
        dialogue.blocks += [self.pool.allocate() for _ in range(max(0, wanted))]
        return True

    def _forget(self, kept: set[str], paged: bool = False) -> bool:
        """End the dialogue that has not been heard of longest, of those with pages or of all; whether there was one."""
        known = self.dialogues
        others = [n for n, d in known.items() if (d.blocks or not paged) and n not in kept and n not in self._busy]
        if others:
            self.end(min(others, key=lambda n: known[n].touched))
            self.counts["evicted"] += 1
        return bool(others)


def pages_for(runner: Runner, memory: int | None, dialogues: int) -> int:
    """Pages for so many dialogues of full length, within `memory` bytes or a quarter of what is free."""
    facts = runner.facts
    most = dialogues * -(-facts.context // BLOCK)
    return max(2, min(most, (memory or min(1 << 30, free_memory() // 4)) // facts.block_bytes))


# ---- HTTP ----


class Cloud:
    """The routes that edges speak to; bodies are msgpack. An ASGI application behind the server's own door."""

    def __init__(self, upper: Upper, word: str, after: int, idle: float, close: Callable[[], None]) -> None:
        self.upper, self.word, self.after, self.idle = upper, word, after, idle
        self._close = close
        self._asked: list[tuple[str, int, asyncio.Future[int]]] = []
        self._wake, self._arrivals = asyncio.Event(), asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._router = Router(
            [
                Route("/split/hello", self.hello, methods=["POST"]),
                Route("/split/{dialogue}/states", self.states, methods=["POST"]),
                Route("/split/{dialogue}/infer", self.infer, methods=["POST"]),
                Route("/split/{dialogue}", self.end, methods=["DELETE"]),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        await self._router(scope, receive, send)

    def stats(self) -> dict[str, float]:
        upper = self.upper
        return {
            **{f"cloud_{name}": float(count) for name, count in upper.counts.items()},
            "cloud_dialogues": float(len(upper.dialogues)),
            "cloud_pages_used": float(upper.pool.used),
        }

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._close)

    # ---- routes ----

    async def hello(self, request: Request) -> Response:
        """Whether this edge and this cloud are halves of the same model."""
        given = await _body(request)
        facts = self.upper.runner.facts
        ours = {"fingerprint": self.word, "after": self.after, "hidden": facts.hidden}
        for name, value in ours.items():
            if given.get(name) != value:
                return _answer({"error": f"{name} is {value!r} here and {repr(given.get(name))[:60]} there"}, 409)
        return _answer({"forms": list(FORMS), "context": facts.context})

    async def states(self, request: Request) -> Response:
        given, facts = await _body(request), self.upper.runner.facts
        try:
            start, count = _count(given, "start"), _count(given, "count")
            if start + count > facts.context:
                raise ValueError(f"positions {start} to {start + count} are outside the context of {facts.context}")
            rows = unpacked(given["rows"], given["form"], count, facts.hidden)
        except (KeyError, TypeError, ValueError) as error:
            return _answer({"error": f"a bad request: {error}"[:200]}, 400)
        expected = self.upper.take(_name(request), start, rows)
        async with self._arrivals:
            self._arrivals.notify_all()
        return _answer({"next": expected}, 200 if expected >= start + count else 409)

    async def infer(self, request: Request) -> Response:
        """The token after a position; waits until the states up to there have come."""
        given, name = await _body(request), _name(request)
        try:
            at, patience = _count(given, "at"), given.get("patience", 10.0)
            if not isinstance(patience, int | float) or not 0 <= patience < math.inf:
                raise ValueError("patience is no number of seconds")
        except ValueError as error:
            return _answer({"error": f"a bad request: {error}"}, 400)
        try:
            async with asyncio.timeout(min(patience, _PATIENCE)), self._arrivals:
                await self._arrivals.wait_for(lambda: self._has(name, at))
        except TimeoutError:
            dialogue = self.upper.dialogues.get(name)
            return _answer({"next": dialogue.arrived if dialogue else 0}, 409)
        said = self.upper.dialogues[name].said
        if said[0] == at:
            return _answer({"token": said[1]})
        if at < self.upper.dialogues[name].filled:
            return _answer({"error": f"position {at} was passed", "next": 0}, 409)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked.append((name, at, future))
        self._wake.set()
        try:
            return _answer({"token": await future})
        except LookupError:
            return _answer({"next": 0}, 409)
        except RuntimeError as error:
            return _answer({"error": str(error)}, 500)

    async def end(self, request: Request) -> Response:
        self.upper.end(_name(request))
        return _answer({})

    def _has(self, name: str, at: int) -> bool:
        dialogue = self.upper.dialogues.get(name)
        return dialogue is not None and dialogue.arrived > at

    def _open(self, name: str, at: int) -> bool:
        """Whether the token after `at` can be computed, and has not been."""
        return self._has(name, at) and self.upper.dialogues[name].filled <= at

    # ---- the one who computes ----

    async def _work(self) -> None:
        """Whoever has asked meanwhile is computed together."""
        while True:
            try:
                await asyncio.wait_for(self._wake.wait(), max(1.0, self.idle / 4))
            except TimeoutError:
                pass
            self._wake.clear()
            self.upper.expire(self.idle)
            while self._asked:
                asked, self._asked = self._asked, []
                latest = {name: (at, future) for name, at, future in asked}
                for name, _, future in asked:
                    if future is not latest[name][1]:  # nobody waits for it: the edge has asked again
                        _give_up(future)
                try:
                    await self._round(latest)
                except Exception:
                    log.exception("The cloud could not compute what edges asked for")
                    self.upper.fail()
                    for _, future in latest.values():
                        _give_up(future, RuntimeError("the layers could not be computed"))
                for _, future in latest.values():
                    _give_up(future)

    async def _round(self, asked: dict[str, tuple[int, asyncio.Future[int]]]) -> None:
        left = {name: at for name, (at, _) in asked.items()}
        while left := {name: at for name, at in left.items() if self._open(name, at)}:
            gathered = self.upper.gather(list(left.items()))
            if gathered is None:
                break
            batch, states, who = gathered
            tokens = await asyncio.to_thread(self.upper.compute, batch, states)
            self.upper.settle(who, tokens)
            for (name, at), token in zip(who, tokens):
                dialogue = self.upper.dialogues.get(name)
                if dialogue and dialogue.filled == at + 1:
                    self.upper.counts["infer"] += 1
                    if not asked[name][1].done():
                        asked[name][1].set_result(token)


def _give_up(future: asyncio.Future[int], why: Exception | None = None) -> None:
    if not future.done():
        future.set_exception(why or LookupError("no pages, or it has ended"))


def _count(given: dict[str, Any], name: str) -> int:
    value = given.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is no count")
    return value


async def _body(request: Request) -> dict[str, Any]:
    try:
        found = msgpack.unpackb(await request.body(), strict_map_key=True)
    except (ValueError, msgpack.UnpackException):
        return {}
    return found if isinstance(found, dict) else {}


def _name(request: Request) -> str:
    """A dialogue is its key's own."""
    client = getattr(request.state, "client", None)
    return f"{client.digest if client else ''}:{request.path_params['dialogue'][:64]}"


def _answer(data: dict[str, Any], status: int = 200) -> Response:
    return Response(msgpack.packb(data), status, media_type="application/msgpack")


def check_form(form: str) -> None:
    if form not in FORMS:
        raise UsageError(f"transfer={form} is unknown", remedy=nearest(form, FORMS))


def own_key() -> str:
    return os.environ.get("SHOESTRING_API_KEY", "")

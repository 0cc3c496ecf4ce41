"""The engine beside an event loop: one thread steps it, and answers come out as asynchronous iterators."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from shoestring.core.errors import ShoestringError
from shoestring.engine.engine import Counts, Engine
from shoestring.engine.request import Delta, Request

T = TypeVar("T")
# The interpreter lets a thread run for so long before another gets its turn. The usual 5 ms are two steps.
_SWITCH_SECONDS = 0.0002


class AsyncEngine:
    """Wraps an engine; from now on nothing else may call it.

    Attributes:
        state: "ready", "failing" after an error that ended the thread, or "closed".
        last_step: when the thread last came round, in seconds of the monotonic clock; old while `busy` means it hangs.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state = "ready"
        self.failure = ""
        self.last_step = time.monotonic()
        self._orders: deque[tuple[Callable[[], None], Callable[[], object]]] = deque()  # what to do, how to refuse it
        self._wake = threading.Event()
        self._streams: dict[str, tuple[_Inbox, int]] = {}  # of each request: who listens, and its number there
        self._held: list[Delta] = []  # what the latest pass gave, until the next one computes
        self._closing = self._freed = False
        self._counts = engine.counts()
        engine.urgent = lambda: bool(self._orders) or self._closing
        engine.computing = self._hand_over
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        self._thread = threading.Thread(target=self._work, name="shoestring-engine", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether the thread has something to compute."""
        return bool(self._streams) or bool(self._orders)

    def counts(self) -> Counts:
        """As after the latest step."""
        return self._counts

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The answer(s) of a request, piece by piece. Leaving the iterator cancels it.

        Raises:
            RequestError: the request cannot be served. ShoestringError: the engine has failed.
        """
        async with aclosing(self.streams([request])) as batches:
            async for batch in batches:
                for _, delta in batch:
                    yield delta

    async def streams(self, requests: Sequence[Request]) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """All that has come for several requests since the last look, each delta with the number of its request.
        Leaving the iterator cancels what has not ended.

        Raises:
            RequestError: a request cannot be served. ShoestringError: the engine has failed.
        """
        inbox = _Inbox(asyncio.get_running_loop())
        left = {request.id: request.sampling.n for request in requests}
        for i, request in enumerate(requests):
            self._streams[request.id] = inbox, i
        try:
            await self.run(self._submit, requests)
            while left:
                batch = await inbox.take()
                if not batch:
                    raise self._failed()
                for _, delta in batch:
                    if delta.finish_reason is not None:
                        left[delta.request_id] -= 1
                        if not left[delta.request_id]:
                            del left[delta.request_id]
                yield batch
        finally:
            for request in requests:
                self._streams.pop(request.id, None)
            for request_id in left:
                self.abort(request_id)

    def _submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.submit(request)

    def abort(self, request_id: str) -> None:
        """Cancel a request soon; its pages are freed before the next step."""
        self._order(lambda: self.engine.cancel(request_id), lambda: None)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a function that uses the engine, called on its thread between two steps."""
        if self.state != "ready":
            raise self._failed()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error else future.set_result(result)  # type: ignore[arg-type]

        def order() -> None:
            try:
                result, error = function(*args), None
            except Exception as raised:
                result, error = None, raised
            loop.call_soon_threadsafe(settle, result, error)

        self._order(order, lambda: loop.call_soon_threadsafe(settle, None, self._failed()))
        return await future

    def close(self, deadline: float = 10.0) -> None:
        """Cancel what is running, end the thread within `deadline` seconds and free the model."""
        self._closing = True
        self._wake.set()
        self._thread.join(deadline)
        if not (self._thread.is_alive() or self._freed):
            self._freed, self.state = True, "closed"
            self.engine.close()

    def _failed(self) -> ShoestringError:
        return ShoestringError("The engine has stopped", self.failure or "it was closed", "Start it again")

    def _order(self, order: Callable[[], None], refuse: Callable[[], object]) -> None:
        self._orders.append((order, refuse))
        self._wake.set()
        if self.state != "ready":  # the thread may have ended since the caller looked
            self._refuse()

    def _refuse(self) -> None:
        """Nobody carries out orders any more: whoever waits for one is told."""
        while self._orders:
            try:
                _, refuse = self._orders.popleft()
            except IndexError:  # the other thread took it
                return
            try:
                refuse()
            except RuntimeError:
                pass  # that loop has ended, and with it whoever waited

    def _work(self) -> None:
        engine = self.engine
        try:
            while not self._closing:
                if self._orders:
                    self._hand_over()
                while self._orders:
                    self._orders.popleft()[0]()
                self.last_step = time.monotonic()
                deltas = engine.advance() if not engine.idle or engine.hooks.filler else []
                self._hand_over()  # where no pass was due
                self._held, self._counts = deltas, engine.counts()
                # Where the next pass may take its time to come.
                if engine.idle or engine.hooks.filler or engine.hooks.drafter:
                    self._hand_over()
                filled = engine.fill()
                if not deltas and not filled and engine.idle and not self._orders:
                    self._wake.wait(0.05 if engine.hooks.filler else 1.0)
                    self._wake.clear()
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}" if not isinstance(error, ShoestringError) else str(error)
            self.state = "failing"
            raise
        finally:
            if self.state == "ready":
                self.state = "closed"
            self._refuse()
            self._hand_over()
            for inbox, _ in list(self._streams.values()):
                _soon(inbox.loop, inbox.shut)

    def _hand_over(self) -> None:
        """One call into each event loop for all that a pass gave.

        Best done while the next pass computes: then the interpreter is free, and writing to clients delays nobody.
        """
        held, self._held = self._held, []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Inbox, int, Delta]]] = {}
        for delta in held:
            if listening := self._streams.get(delta.request_id):
                inbox, number = listening
                by_loop.setdefault(inbox.loop, []).append((inbox, number, delta))
        for loop, items in by_loop.items():
            _soon(loop, _deliver, items)


class _Inbox:
    """What has come for one listener since it last looked. Used in its event loop alone."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: list[tuple[int, Delta]] = []
        self._bell: asyncio.Future[None] | None = None
        self._shut = False

    def put(self, number: int, delta: Delta) -> None:
        self._items.append((number, delta))
        self._ring()

    def shut(self) -> None:
        """Nothing more will come."""
        self._shut = True
        self._ring()

    async def take(self) -> list[tuple[int, Delta]]:
        """Everything that is there, once there is something; empty when nothing more will come."""
        while not (self._items or self._shut):
            self._bell = self.loop.create_future()
            await self._bell
        items, self._items = self._items, []
        return items

    def _ring(self) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)


def _deliver(items: list[tuple[_Inbox, int, Delta]]) -> None:
    for inbox, number, delta in items:
        inbox.put(number, delta)


def _soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        pass  # that loop has ended, and with it whoever was listening

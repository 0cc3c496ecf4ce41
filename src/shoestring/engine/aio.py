"""The engine beside an event loop: one thread steps it, and answers come out as asynchronous iterators."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
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
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Delta | None]]] = {}
        self._closing = self._freed = False
        self._counts = engine.counts()
        engine.urgent = lambda: bool(self._orders) or self._closing
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

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        """The answer(s) of a request, piece by piece. Leaving the iterator cancels it.

        Raises:
            RequestError: the request cannot be served. ShoestringError: the engine has failed.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta | None] = asyncio.Queue()
        self._streams[request.id] = (loop, queue)
        left = request.sampling.n
        try:
            await self.run(self.engine.submit, request)
            while left:
                delta = await queue.get()
                if delta is None:
                    raise self._failed()
                left -= delta.finish_reason is not None
                yield delta
        finally:
            self._streams.pop(request.id, None)
            if left:
                self.abort(request.id)

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

    async def embed(self, request: Request) -> Delta:
        """The delta that carries the embedding of a request made with `embed=True`."""
        async for delta in self.stream(request):
            if delta.embedding is not None:
                return delta
        raise self._failed()

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
                while self._orders:
                    self._orders.popleft()[0]()
                self.last_step = time.monotonic()
                deltas = engine.advance() if not engine.idle or engine.hooks.filler else []
                self._counts = engine.counts()
                if deltas:
                    self._send(deltas)
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
            for loop, queue in list(self._streams.values()):
                _soon(loop, queue.put_nowait, None)

    def _send(self, deltas: list[Delta]) -> None:
        """One call into each event loop for all that a step gave."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Delta | None], Delta]]] = {}
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream:
                by_loop.setdefault(stream[0], []).append((stream[1], delta))
        for loop, items in by_loop.items():
            _soon(loop, _put, items)


def _put(items: list[tuple[asyncio.Queue[Delta | None], Delta]]) -> None:
    for queue, delta in items:
        queue.put_nowait(delta)


def _soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], argument: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        pass  # that loop has ended, and with it whoever was listening

"""Server-sent events: written as they come, kept open while nothing comes, cut off when nobody reads."""

from __future__ import annotations

import asyncio
import json
import time
from json.encoder import encode_basestring_ascii as quoted  # type: ignore[attr-defined]
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoestring.engine.request import Delta
from shoestring.server.errors import ApiError, body
from shoestring.server.service import Service, log
from shoestring.server.work import ClientGone, Work, attended

DONE = b"data: [DONE]\n\n"
_PING = b": keep-alive\n\n"
_FAREWELL_SECONDS = 1.0

__all__ = ["DONE", "EventStream", "Events", "Tail", "event", "quoted"]


class Events(Protocol):
    """Writes the events of one HTTP answer; each is called for every token, so it does not wait for anything."""

    def begin(self) -> bytes:
        """Before there is any token."""

    def add(self, at: int, delta: Delta) -> bytes:
        """What is new in answer `at`; nothing where nothing is settled yet."""

    def end(self, work: Work) -> bytes:
        """After the last token."""


def event(data: Any) -> bytes:
    """One event that carries JSON."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class Tail:
    """Ends an event of an answer: without usage, with none yet, or with the tokens of the answer so far."""

    def __init__(self, usage_in_stream: bool, so_far: bool) -> None:
        self._same = "" if so_far else ',"usage":null}\n\n' if usage_in_stream else "}\n\n"

    def __call__(self, prompt: int, done: int) -> str:
        if self._same:
            return self._same
        counts = f'"prompt_tokens":{prompt},"completion_tokens":{done},"total_tokens":{prompt + done}'
        return f',"usage":{{{counts}}}}}\n\n'


class EventStream(Response):
    """Sends events until they end, the client leaves, does not read, or time is up. Closes the work in any case."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, work: Work, events: Events, headers: dict[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._service, self._work, self._events = service, work, events
        self._sending, self._sent = False, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # Layers around the routes see to how an answer begins; what follows it would only pass through them.
            send = scope.get("shoestring.send", send)
            await attended(self._service, receive, self._write(scope, send))
        except ClientGone:
            pass
        except ApiError as error:
            await self._tell(send, error)
        except Exception as error:
            log.error("a stream failed: %s", type(error).__name__, extra={"error": error})
            await self._tell(send, ApiError(500, "The answer could not be finished"))
        finally:
            self._work.close()

    async def _write(self, scope: Scope, send: Send) -> None:
        watch = asyncio.create_task(self._watch(scope, send))
        add, noted = self._events.add, self._work.noted
        try:
            await self._say(send, self._events.begin())
            async with self._work.batches() as batches:
                async for batch in batches:
                    if chunk := b"".join([add(noted(i, delta), delta) for i, delta in batch]):
                        await self._say(send, chunk)
        finally:
            watch.cancel()
        await send({"type": "http.response.body", "body": self._events.end(self._work) + DONE, "more_body": False})

    async def _say(self, send: Send, chunk: bytes) -> None:
        self._sending, self._sent = True, time.monotonic()
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._sending = False

    async def _watch(self, scope: Scope, send: Send) -> None:
        settings = self._service.settings
        ping, idle = settings.ping_seconds, settings.idle_seconds
        while True:
            await asyncio.sleep(min(ping, idle) / 4)
            still = time.monotonic() - self._sent
            if self._sending and still > idle:
                log.info("a client did not read its stream for %.0f s and is cut off", idle)
                scope["shoestring.abort"]()
                return
            if not self._sending and still >= ping:
                await self._say(send, _PING)

    async def _tell(self, send: Send, error: ApiError) -> None:
        """An error after the first byte, as OpenAI's client understands it."""
        last = event(body(error.status_code, str(error.detail), error.param, error.code)) + DONE
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await send({"type": "http.response.body", "body": last, "more_body": False})
        except (TimeoutError, RuntimeError):
            pass  # it does not read, or the answer was complete

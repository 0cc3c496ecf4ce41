"""Server-sent events: written as they come, kept open while nothing comes, cut off when nobody reads."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from json.encoder import encode_basestring_ascii as quoted  # type: ignore[attr-defined]
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoestring.server.errors import ApiError, body
from shoestring.server.service import Service, log
from shoestring.server.work import ClientGone, Work, attended

DONE = b"data: [DONE]\n\n"
_PING = {"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True}
_FAREWELL_SECONDS = 1.0

__all__ = ["DONE", "EventStream", "event", "quoted"]


def event(data: Any) -> bytes:
    """One event that carries JSON."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends events until they end, the client leaves, does not read, or time is up. Closes the work in any case."""

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, work: Work, events: AsyncGenerator[bytes, None], headers: dict[str, str]
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._service, self._work, self._events = service, work, events
        self._sending, self._sent = False, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
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
        message: dict[str, Any] = {"type": "http.response.body", "more_body": True}
        clock = time.monotonic
        try:
            async with aclosing(self._events) as events:  # type: ignore[type-var]
                async for chunk in events:
                    self._sending, self._sent = True, clock()
                    await send({**message, "body": chunk})
                    self._sending = False
        finally:
            watch.cancel()
        await send({**message, "body": DONE, "more_body": False})

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
                self._sending, self._sent = True, time.monotonic()
                await send(_PING)
                self._sending = False

    async def _tell(self, send: Send, error: ApiError) -> None:
        """An error after the first byte, as OpenAI's client understands it."""
        last = event(body(error.status_code, str(error.detail), error.param, error.code)) + DONE
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await send({"type": "http.response.body", "body": last, "more_body": False})
        except (TimeoutError, RuntimeError):
            pass  # it does not read, or the answer was complete

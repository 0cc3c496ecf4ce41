"""Limits below HTTP: how many connections, how long the head of a request may be and take."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

from shoestring.server.errors import body
from shoestring.server.settings import Settings


def limited(base: Any, settings: Settings) -> Any:
    """The server's protocol class with limits. Applications find in the scope `shoestring.send`, the connection's own,
    and `shoestring.abort`: it ends the connection at once, whatever is still to be written.
    """

    class Limited(base):  # type: ignore[misc]
        _timer: asyncio.TimerHandle | None = None
        _head = 0
        app: Any

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            application: Any = self.app
            self.app = partial(_with_means, application, self)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                self._refuse(503, "Too many connections are open")
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.transport.is_closing():
                return
            if self.cycle is not None and (self.cycle is not before or not self.cycle.response_complete):
                self._head = len(data) if self.cycle is not before else 0
                self._stop_waiting()
                if self._head > settings.max_header_bytes + settings.max_body_bytes:
                    self._refuse(413, "The request is too large")
                return
            self._head += len(data)
            if self._timer is None:
                self._wait_for_head()
            if self._head > settings.max_header_bytes:
                self._refuse(431, f"The headers are longer than {settings.max_header_bytes} bytes")

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "This is not an HTTP request that can be read")

        def _wait_for_head(self) -> None:
            self._timer = self.loop.call_later(settings.header_seconds, self._too_slow)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            if self._head:
                self._refuse(408, "The request did not arrive in time")
            else:
                self.transport.close()

        def _refuse(self, status: int, message: str) -> None:
            text = json.dumps(body(status, message)).encode()
            head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + text)
            self.transport.close()

    return Limited


async def _with_means(app: Any, protocol: Any, scope: Any, receive: Any, send: Any) -> None:
    scope["shoestring.abort"], scope["shoestring.send"] = protocol.transport.abort, send
    await app(scope, receive, send)

"""A method that answers in front of other servers, in place of an engine: how it is opened, and guarded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoestring.core import catalog
from shoestring.engine.plug import configured, method_for, spelled
from shoestring.server.errors import ApiError, body
from shoestring.server.service import Service
from shoestring.server.settings import Settings
from shoestring.server.work import ClientGone, attended

if TYPE_CHECKING:
    from shoestring.server.keys import Client

_POINT = "front"
_UNASKED = (b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data")
_CLOSE = {"connection": "close"}


def opened(settings: Settings) -> ASGIApp:
    """The application that `--front` names, or that plays `--role`.

    It may have `stats() -> dict[str, float]`, shown at /metrics; `health() -> str`, "ready" or another word of
    Service.health; a coroutine `reports()`, how processes stand that answer for this one, as `report.Report`; and a
    coroutine `close()`, awaited at the end.

    Raises:
        UsageError: an unknown method or option, or what the method refuses.
    """
    name, options = spelled(settings.fronted)
    method = method_for(name, _POINT, _POINT)
    made: ASGIApp = catalog.module(method.name).front(configured(method.name, options), settings)
    return made


class Guard:
    """Keeps limits for a front: requests of a key and of all, sizes and times, clients that leave or do not read."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, settings = self._service, self._service.settings
        front = service.front
        service.check(front is not None)
        client: Client = scope["state"]["client"]
        ticket = service.gate.enter(client, 1) if scope["method"] == "POST" else None
        began = False

        async def answer(message: Message) -> None:
            nonlocal began
            began = True
            try:
                async with asyncio.timeout(settings.idle_seconds):
                    await send(message)
            except TimeoutError:
                scope["shoestring.abort"]()
                raise ClientGone from None

        try:
            if scope["method"] == "POST":
                _check_type(scope["headers"])
            given = _Given(await _read(receive, settings))
            await attended(service, receive, front(scope, given.receive, answer))
        except ApiError as error:
            if not began:
                raise
            await send({"type": "http.response.body", "body": _farewell(error), "more_body": False})
        finally:
            if ticket:
                ticket.leave()


class _Given:
    """A body that has arrived, as an application receives it. That the client leaves is seen to elsewhere."""

    def __init__(self, whole: bytes) -> None:
        self._message: Message | None = {"type": "http.request", "body": whole, "more_body": False}

    async def receive(self) -> Message:
        message, self._message = self._message, None
        if message is None:
            await asyncio.Event().wait()
        return message  # type: ignore[return-value]


async def _read(receive: Receive, settings: Settings) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.header_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > settings.max_body_bytes:
                    limit = settings.max_body_bytes
                    raise ApiError(413, f"The body is longer than {limit} bytes", headers=_CLOSE)
                parts.append(part)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, "The body did not arrive in time", headers=_CLOSE) from None


def _check_type(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """A page of another site can send forms and plain text from a browser without asking, and nothing else."""
    given = [value for name, value in headers if name == b"content-type"]
    kind = given[0].partition(b";")[0].strip().lower() if len(given) == 1 else b""
    if kind in _UNASKED:
        raise ApiError(415, "A body says what it is: send Content-Type: application/json", headers=_CLOSE)


def _farewell(error: ApiError) -> bytes:
    """An error after the first byte of a stream, as OpenAI's client understands it."""
    said = json.dumps(body(error.status_code, str(error.detail), error.param, error.code))
    return f"data: {said}\n\ndata: [DONE]\n\n".encode()

"""What every request passes first: a name for it, the Host header, the key; and what every answer gets."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable
from typing import Any

from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoestring.server.errors import ApiError, respond
from shoestring.server.keys import Client
from shoestring.server.service import Service, log
from shoestring.server.settings import names
from shoestring.server.work import ClientGone

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = ("/health", "/metrics", "/v1/ledger")
_ALWAYS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Door:
    """An ASGI application around the routes. `open_route` is the one that needs no key."""

    def __init__(self, app: ASGIApp, service: Service, open_route: Any) -> None:
        self._app, self._service, self._open_route = app, service, open_route
        self._hosts = frozenset(_hosts(service))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        scope.setdefault("state", {})["request_id"] = request_id = _request_id(scope["headers"])
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id.encode()), *_ALWAYS],
                }
                if self._service.state == "draining":
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        # Balancers ask for the head alone. It is that of the whole answer; what speaks HTTP drops the rest.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        client = None
        try:
            client = self._let_in(asked)
            await self._app(asked, receive, answer)
        except ApiError as error:
            await respond(error)(scope, receive, answer)
        except ClientGone:
            status = 499
        except Exception as error:
            # Where, but not what: a message may quote the request.
            log.error("a request failed: %s at %s", type(error).__name__, _place(error), exc_info=_shown(error))
            if not status:
                await respond(ApiError(500, "The server failed", headers={"x-should-retry": "false"}))(
                    scope, receive, answer
                )
        finally:
            self._service.metrics.count(status or 499)
            if scope["path"] not in _QUIET:
                log.info(
                    "%s %s %s %d %.3f s key=%s id=%s", _peer(scope), scope["method"], _safe(scope["path"]),
                    status or 499, time.monotonic() - began, client.name if client else "-", request_id,
                )  # fmt: skip

    def _let_in(self, scope: Scope) -> Client:
        headers = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1:
            raise ApiError(400, "A request has one Host header", headers={"connection": "close"})
        if self._hosts and _host(hosts[0]) not in self._hosts:
            # A page of another site may have let its name point here.
            raise ApiError(403, "This Host is not served here; see --allowed-hosts", code="host_not_allowed")
        client = self._service.keys.client(headers)
        if client is None and self._open_route.matches(scope)[0] is not Match.NONE:
            client = Client("-", "-")
        if client is None:
            # A person at a browser is asked for the key as a password.
            scheme = 'Basic realm="shoestring"' if scope["path"] == "/" else "Bearer"
            raise ApiError(401, "A valid key is needed", headers={"www-authenticate": scheme})
        scope["state"]["client"] = client
        return client


def _hosts(service: Service) -> Iterable[str]:
    settings = service.settings
    if settings.allowed_hosts:
        return [name.lower() for name in names(settings.allowed_hosts)]
    return ("localhost", "127.0.0.1", "[::1]", settings.host.lower()) if settings.loopback else ()


def _host(header: bytes) -> str:
    """The name in a Host header, without its port."""
    text = header.decode("latin-1").strip().lower()
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]*)(?::[0-9]{0,5})?", text)
    return match[1] if match else ""


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own, when it is harmless; else a new one."""
    given = [value.decode("latin-1") for name, value in headers if name == b"x-request-id"]
    return given[0] if len(given) == 1 and _ID.fullmatch(given[0]) else f"req_{secrets.token_hex(12)}"


def _peer(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else "-"


def _safe(text: str) -> str:
    """One line of plain ASCII, whatever was sent."""
    return text[:200].encode("unicode_escape").decode("ascii")


def _place(error: BaseException) -> str:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return f"{last.tb_frame.f_code.co_qualname} line {last.tb_lineno}" if last else "-"


def _shown(error: BaseException) -> BaseException | None:
    return error if log.isEnabledFor(logging.DEBUG) else None

"""Reading request bodies: bounded in size, depth and time, and only JSON that means one thing."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from shoestring.server.errors import ApiError, bad

_CLOSE = {"connection": "close"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DIGITS = 400  # a number longer than that is no number anybody means


class JsonRoute(APIRoute):
    """A route whose body is read as strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await inner(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_read"):
            self._read = await _body(self)
        return self._read

    async def json(self) -> Any:
        return parse(await self.body(), self.app.state.service.settings.max_json_depth)


async def _body(request: Request) -> bytes:
    settings = request.app.state.service.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON: send Content-Type: application/json", headers=_CLOSE)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "A compressed body is not read", headers=_CLOSE)
    limit = settings.max_body_bytes
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told[:20]) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.header_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, "The body did not arrive in time", headers=_CLOSE) from None
    except ClientDisconnect:
        raise ApiError(400, "The body ended too early", headers=_CLOSE) from None
    whole = b"".join(parts)
    if not whole:
        raise bad(None, "The body is empty", "invalid_json")
    return whole


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is longer than {limit} bytes", headers=_CLOSE)


def parse(body: bytes, depth: int) -> Any:
    """The value that JSON text stands for.

    Raises:
        ApiError: not UTF-8, not JSON, a name twice in one object, NaN or Infinity, a number that is too large, half of
            a surrogate pair, nested deeper than `depth`.
    """
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_float, parse_int=_int
        )
    except UnicodeDecodeError:
        raise bad(None, "The body is not UTF-8", "invalid_json") from None
    except RecursionError:
        raise _too_deep(depth) from None
    except json.JSONDecodeError as error:
        raise bad(None, f"The body is not JSON: {error.msg} at character {error.pos}", "invalid_json") from None
    _check(value, depth, bool(_SURROGATE.search(body)))
    return value


def depth_of(value: Any, limit: int) -> int:
    """How deep lists and objects are nested; counting ends beyond `limit`."""
    level, here = 0, [value]
    while level <= limit:
        containers = [item for item in here if isinstance(item, dict | list)]
        if not containers:
            break
        here = [part for item in containers for part in (item.values() if isinstance(item, dict) else item)]
        level += 1
    return level


def _check(value: Any, depth: int, surrogates: bool) -> None:
    level, here = 0, [value]
    while here:
        containers = [item for item in here if isinstance(item, dict | list)]
        if surrogates:
            for item in here:
                for text in item if isinstance(item, dict) else (item,) if isinstance(item, str) else ():
                    if not _encodable(text):
                        raise bad(None, "The body has half of a surrogate pair, which is no text", "invalid_json")
        if containers and level >= depth:
            raise _too_deep(depth)
        here = [part for item in containers for part in (item.values() if isinstance(item, dict) else item)]
        level += 1


def _too_deep(depth: int) -> ApiError:
    return bad(None, f"The body is nested deeper than {depth}", "invalid_json")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise bad(None, "An object in the body has the same name twice", "invalid_json")
    return found


def _refuse(word: str) -> Any:
    raise bad(None, f"{word} is not JSON", "invalid_json")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise bad(None, "A number in the body is too large", "invalid_json")
    return value


def _int(text: str) -> int:
    if len(text) > _DIGITS:
        raise bad(None, "A number in the body is too large", "invalid_json")
    return int(text)

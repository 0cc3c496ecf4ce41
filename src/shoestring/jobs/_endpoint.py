"""An OpenAI-compatible endpoint, timed from outside: bytes are stamped as they arrive and read when all is over.

A client that takes streams apart while they come competes with the server for the cores and sees its own delays:
general HTTP clients need 0.2 to 0.3 ms of CPU for each streamed token. This one keeps (time, bytes) and no more; what
the bytes say is worked out afterwards by `outcome`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from shoestring.core.errors import ShoestringError, UsageError

_DONE = b"\ndata: [DONE]"  # a line break inside JSON is escaped, so no answer's text can look like this


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers. `base` is the path before `/v1`-style routes, such as "/v1"."""

    host: str
    port: int
    secure: bool
    base: str
    key: str = ""

    @classmethod
    def at(cls, url: str, key: str = "") -> Endpoint:
        """From a URL with or without `/v1` at its end; http is assumed.

        Raises:
            UsageError: it is no http(s) address.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url} is not the address of a server", remedy="Write http://127.0.0.1:8000")
        base = parts.path.rstrip("/") or "/v1"
        return cls(parts.hostname, port or {"http": 80, "https": 443}[parts.scheme], parts.scheme == "https", base, key)

    @property
    def _place(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def send(self, method: str, route: str, body: Mapping[str, Any] | None, timeout: float, due: float) -> Heard:
        """One request on a connection of its own; never raises for what the other side does.

        Args:
            due: when it should have been sent, in seconds of `time.perf_counter`; delays count from here.
        """
        heard = Heard(due)
        written = json.dumps(body).encode() if body is not None else b""
        lines = [f"{method} {self.base}{route} HTTP/1.1", f"host: {self._place}", "connection: close"]
        lines += ["content-type: application/json", f"content-length: {len(written)}"]
        lines += [f"authorization: Bearer {self.key}"] if self.key else []
        message = "\r\n".join([*lines, "", ""]).encode() + written
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        transport: asyncio.BaseTransport | None = None
        try:
            async with asyncio.timeout(timeout):
                tls = ssl.create_default_context() if self.secure else None
                transport, _ = await loop.create_connection(
                    lambda: _Ear(heard, over, message), self.host, self.port, ssl=tls
                )
                await over
        except TimeoutError:
            heard.error = "timeout"
        except OSError as error:
            heard.error = f"connection: {(error.strerror or type(error).__name__).lower()}"
        finally:
            heard.ended = time.perf_counter()
            if transport is not None:
                transport.abort() if isinstance(transport, asyncio.WriteTransport) else transport.close()
        return heard

    async def get(self, route: str, timeout: float = 10.0) -> Any:
        """The JSON of a route.

        Raises:
            ShoestringError: nobody answers, or not with JSON.
        """
        heard = await self.send("GET", route, None, timeout, time.perf_counter())
        place = f"http{'s' * self.secure}://{self._place}{self.base}{route}"
        status, body = _read(heard)
        if heard.error or status != 200:
            raise ShoestringError(
                f"{place} does not answer", heard.error or f"status {status}", "Start the server, and check the key"
            )
        try:
            return json.loads(body)
        except ValueError:
            raise ShoestringError(f"{place} did not answer with JSON") from None


@dataclass
class Heard:
    """What came back, with the time of each arrival. Times in seconds of `time.perf_counter`."""

    due: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    error: str = ""


class _Ear(asyncio.Protocol):
    def __init__(self, heard: Heard, over: asyncio.Future[None], message: bytes) -> None:
        self.heard, self.over, self.message = heard, over, message

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self.message)

    def data_received(self, data: bytes) -> None:
        self.heard.pieces.append((time.perf_counter(), data))
        if _DONE in data and not self.over.done():
            self.over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.heard.error = "connection: reset" if error else ""
            self.over.set_result(None)


@dataclass(frozen=True)
class Outcome:
    """One streamed answer.

    Attributes:
        due, ended: when it should have been sent, and when it was over.
        arrivals: when each chunk with text arrived.
        completion_tokens, prompt_tokens, cached_tokens: as the server's usage says; None where it says nothing.
        error: its kind in a few words; empty for a whole answer.
    """

    due: float
    ended: float
    arrivals: tuple[float, ...] = ()
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    error: str = ""

    @property
    def tokens(self) -> int:
        """By usage, else one for each chunk."""
        return len(self.arrivals) if self.completion_tokens is None else self.completion_tokens

    @property
    def first_token_seconds(self) -> float:
        return self.arrivals[0] - self.due

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time of a token after the first; None when there is but one."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1) if self.tokens > 1 else None


def outcome(heard: Heard) -> Outcome:
    """What the bytes of a streamed chat or text completion say."""
    arrivals: list[float] = []
    usage: Mapping[str, Any] = {}
    error, ended, whole = heard.error, heard.ended, False
    status = 200
    try:
        for when, status, line in _lines(heard):
            if status != 200 or not line.startswith(b"data:"):
                continue
            written = line[5:].strip()
            if written == b"[DONE]":
                whole, ended = True, when
                break
            event = json.loads(written)
            if "error" in event:
                error = error or "in the stream: " + _kind(event)
                break
            usage = event.get("usage") or usage
            if any(choice.get("finish_reason") for choice in event.get("choices") or ()):
                whole, ended = True, when  # not every server says [DONE] after it
            if any(_said(choice) for choice in event.get("choices") or ()):
                arrivals.append(when)
    except (ValueError, AttributeError, TypeError):
        error = error or "no event stream"
    if not error and status != 200:
        error = f"status {status} " + _refusal(heard)
    if not error and not whole:
        error = "the stream broke off" if arrivals else "no answer"
    if not error and not arrivals:
        error = "an empty answer"
    details = usage.get("prompt_tokens_details") or {}
    return Outcome(
        heard.due,
        ended,
        tuple(arrivals),
        usage.get("completion_tokens"),
        usage.get("prompt_tokens"),
        details.get("cached_tokens"),
        error.strip(),
    )


def _said(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))


def _lines(heard: Heard) -> Iterator[tuple[float, int, bytes]]:
    """(arrival, status, line) of a body."""
    rest = b""
    for when, status, data in _bodies(heard):
        *lines, rest = (rest + data).split(b"\n")
        yield from ((when, status, line) for line in lines)
    if rest:
        yield when, status, rest


def _bodies(heard: Heard) -> Iterator[tuple[float, int, bytes]]:
    """(arrival, status, bytes) of a body without HTTP's framing.

    Raises:
        ValueError: the other side does not speak HTTP/1.1.
    """
    import h11

    reader = h11.Connection(h11.CLIENT)
    # The reader wants to have sent something before it hears an answer.
    reader.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    status = 0
    for when, data in [*heard.pieces, (heard.ended, b"")]:
        try:
            reader.receive_data(data)
            while isinstance(event := reader.next_event(), h11.Event):
                if isinstance(event, h11.Response):
                    status = event.status_code
                    yield when, status, b""
                elif isinstance(event, h11.Data):
                    yield when, status, bytes(event.data)
                elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    return
        except h11.RemoteProtocolError:
            if data:  # a body that ends too early is for the caller to notice
                raise ValueError("no HTTP") from None


def _read(heard: Heard) -> tuple[int, bytes]:
    try:
        pieces = list(_bodies(heard))
    except ValueError:
        return 0, b""
    return pieces[-1][1] if pieces else 0, b"".join(data for _, _, data in pieces)


def _refusal(heard: Heard) -> str:
    try:
        return _kind(json.loads(_read(heard)[1]))
    except ValueError:
        return ""


def _kind(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return str(error or "")[:60]
    return str(error.get("code") or error.get("type") or error.get("message") or "")[:60]

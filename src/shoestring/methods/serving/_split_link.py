"""The edge's end of the link: states go up beside the computation, tokens are asked for, cut cables are survived."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np

from shoestring.core.errors import UsageError
from shoestring.methods.serving._split import packed

_MESSAGE = 1 << 20  # most bytes of states in one message
_PROBE = 0.5  # seconds before a link that is down is tried again


@dataclass
class Sent:
    """One dialogue: all its states, so that a cloud that has forgotten can be told again.

    Attributes:
        up_to: positions that the cloud is known to have.
        refused: whether the cloud cannot take them.
    """

    name: str
    states: list[np.ndarray] = field(default_factory=list)
    length: int = 0
    up_to: int = 0
    refused: bool = False

    def rows(self, start: int, most: int) -> np.ndarray:
        self.states = [np.concatenate(self.states)]
        return self.states[0][start : start + most]


class Link:
    """A cloud at `url`. `send` returns at once; `ask` waits, at most `patience` seconds a token.

    Every connection begins with a greeting, so a cloud that has been restarted with another model is refused. While the
    cloud does not answer, nobody waits for it: the sender tries it again, now and then.

    Attributes:
        bytes: by direction and kind of message, heads of HTTP included.
        up: whether the cloud answered when it was last spoken to.
    """

    def __init__(self, url: str, key: str, hello: Mapping[str, Any], form: str, hidden: int, patience: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"cloud={url} is no address", remedy="Write http://HOST:PORT")
        self._parts, self._key, self._hello = parts, key, dict(hello)
        self.form, self.patience = form, patience
        self._most = self._limit = max(1, _MESSAGE // (4 * hidden + 4))
        self.bytes: dict[str, int] = {}
        self.up = False
        self._lock, self._news = threading.Lock(), threading.Condition()
        self._dialogues: dict[str, Sent] = {}
        self._ended: list[str] = []
        self._closing = False
        self._local = threading.local()
        self._askers = ThreadPoolExecutor(8, thread_name_prefix="shoestring-ask")
        self._sender = threading.Thread(target=self._run, name="shoestring-upload", daemon=True)
        self._sender.start()

    # ---- what the engine calls ----

    def greet(self) -> None:
        """Check that the cloud has the other half of this model.

        Raises:
            UsageError: it has another model, or cuts it elsewhere. A cloud that is not there raises nothing.
        """
        try:
            self._call("POST", "hello", "hello", self._hello)
        except _Refused as error:
            raise UsageError(
                f"The cloud at {self._parts.geturl()} refuses this edge", str(error),
                "Serve the same model on both sides, cut at the same layer",
            ) from None  # fmt: skip
        except OSError:
            pass

    def send(self, name: str, start: int, rows: np.ndarray) -> None:
        """States of the tokens start.. of a dialogue, to be uploaded; from an earlier start they replace what was."""
        with self._news:
            dialogue = self._dialogues.setdefault(name, Sent(name))
            if start < dialogue.length:  # computed again after a preemption: the same numbers
                rows = rows[dialogue.length - start :]
            if len(rows):
                dialogue.states.append(np.array(rows, np.float32))
                dialogue.length += len(rows)
            self._news.notify_all()

    def ask(self, asked: Sequence[tuple[str, int]]) -> list[int | None]:
        """The cloud's token after each (dialogue, position); None where it does not answer in time."""
        if len(asked) == 1:
            return [self._ask(*asked[0])]
        return list(self._askers.map(lambda one: self._ask(*one), asked))

    def end(self, name: str) -> None:
        with self._news:
            if self._dialogues.pop(name, None):
                self._ended.append(name)
                self._news.notify_all()

    def close(self) -> None:
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._sender.join(2 * self.patience)
        self._askers.shutdown(wait=False, cancel_futures=True)

    # ---- its threads ----

    def _ask(self, name: str, at: int) -> int | None:
        deadline = time.monotonic() + self.patience
        while self.up and (left := deadline - time.monotonic()) > 0:
            try:
                status, said = self._call("POST", f"{name}/infer", "infer", {"at": at, "patience": left}, left + 0.2)
            except OSError:
                return None
            if status != 409:
                return _whole(said, "token")
            with self._news:  # it lacks states: they go up again from there
                dialogue = self._dialogues.get(name)
                if dialogue is None or dialogue.refused:
                    return None
                dialogue.up_to = min(dialogue.up_to, _whole(said, "next") or 0)
                self._news.notify_all()
            time.sleep(0.005)
        return None

    def _run(self) -> None:
        while True:
            with self._news:
                if not self.up:
                    self._news.wait_for(lambda: self._closing, _PROBE)
                while self.up and not (self._closing or self._ended or self._behind()):
                    self._news.wait(_PROBE)
                if self._closing and not (self.up and self._ended):
                    return
                ended, self._ended = self._ended, []  # a cloud that is down forgets them by itself
                part = self._behind()
                if part:
                    start = part.up_to
                    rows = part.rows(start, self._most)
            try:
                if not self.up:
                    self._call("POST", "hello", "hello", self._hello)
                    continue
                for name in ended:
                    self._call("DELETE", name, "end", None)
                if part:
                    self._upload(part, start, rows)
            except OSError:
                pass

    def _upload(self, part: Sent, start: int, rows: np.ndarray) -> None:
        form = self.form
        try:
            data = packed(rows, form)
        except OverflowError:  # as many bytes, and room for large numbers
            form = "bf16"
            data = packed(rows, form)
        body = {"start": start, "count": len(rows), "form": form, "rows": data}
        try:
            status, said = self._call("POST", f"{part.name}/states", "states", body)
        except TimeoutError:
            self._most = max(1, len(rows) // 2)  # a slow link: less at a time arrives
            raise
        with self._news:
            if status in (200, 409):
                part.up_to = min(_whole(said, "next") or 0, part.length)
                self._most = min(self._limit, 2 * self._most)
            elif status in (400, 413):
                part.refused = True
            else:
                self.up = False

    def _behind(self) -> Sent | None:
        return next((d for d in self._dialogues.values() if d.up_to < d.length and not d.refused), None)

    # ---- HTTP ----

    def _call(
        self, verb: str, path: str, kind: str, data: Mapping[str, Any] | None, timeout: float | None = None
    ) -> tuple[int, dict[str, Any]]:
        """One request over this thread's own connection.

        Raises:
            OSError: no answer in time, or none that can be read.
        """
        body = b"" if data is None else msgpack.packb(data)
        kept = getattr(self._local, "connection", None) is not None
        try:
            return self._once(verb, path, kind, body, timeout or self.patience)
        except TimeoutError:
            raise
        except OSError:
            if not kept:
                raise
        # The other side may have closed a connection that was kept; all messages may be said twice.
        return self._once(verb, path, kind, body, timeout or self.patience)

    def _once(self, verb: str, path: str, kind: str, body: bytes, timeout: float) -> tuple[int, dict[str, Any]]:
        try:
            connection = self._connection(timeout, greets=kind != "hello")
            before = connection.sent
            headers = {"content-type": "application/msgpack"}
            if self._key:
                headers["authorization"] = f"Bearer {self._key}"
            prefix = self._parts.path.rstrip("/")
            connection.request(verb, f"{prefix}/split/{path}", body, headers)
            reply = connection.getresponse()
            answer = reply.read()
            said = msgpack.unpackb(answer) if reply.headers.get_content_type() == "application/msgpack" else {}
            if not isinstance(said, dict):
                raise ValueError("an answer that is no mapping")
            if kind == "hello" and reply.status != 200:
                busy = reply.status == 429 or reply.status >= 500
                raise (OSError if busy else _Refused)(str(said.get("error", reply.status)))
        except (OSError, http.client.HTTPException, ValueError, msgpack.UnpackException) as error:
            self._drop()
            with self._lock:
                self.up = False
            if isinstance(error, OSError):
                raise
            raise OSError(str(error)) from error
        head = sum(len(name) + len(value) + 4 for name, value in reply.getheaders()) + 19
        with self._lock:
            self.up = True
            for way, size in (("up", connection.sent - before), ("down", head + len(answer))):
                self.bytes[f"{way}_{kind}"] = self.bytes.get(f"{way}_{kind}", 0) + size
        return reply.status, said

    def _connection(self, timeout: float, greets: bool) -> Any:
        """This thread's own, a new one after a greeting unless that is what it is for."""
        made = getattr(self._local, "connection", None)
        if made is None:
            base = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
            made = self._local.connection = _counting(base)(
                self._parts.hostname or "", self._parts.port, timeout=timeout
            )
            if greets:
                self._once("POST", "hello", "hello", msgpack.packb(self._hello), timeout)
        made.timeout = timeout
        if made.sock:
            made.sock.settimeout(timeout)
        return made

    def _drop(self) -> None:
        made = getattr(self._local, "connection", None)
        if made is not None:
            made.close()
            self._local.connection = None


class _Refused(OSError):
    """The cloud has another model, cuts it elsewhere, or does not know the key."""


def _whole(said: dict[str, Any], name: str) -> int | None:
    value = said.get(name)
    return value if isinstance(value, int) and value >= 0 else None


def _counting(base: Any) -> Any:
    class Counting(base):  # type: ignore[misc]
        sent = 0

        def connect(self) -> None:
            super().connect()
            import socket

            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send(self, data: Any) -> None:
            self.sent += len(data)
            super().send(data)

    return Counting

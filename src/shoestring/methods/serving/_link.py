"""A link between two processes that carries arrays: shared memory on one machine, TCP between two.

A message is a header of 16 bytes and its arrays, one after another. Whoever waits looks for at most `SPIN` seconds and
then sleeps until it is woken: looking on would cost other jobs their core.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from shoestring.core.errors import ShoestringError, UsageError

SPIN = 50e-6  # seconds
NAP = 2e-3  # longest sleep between two looks: what a wake-up that was missed costs
_HEADER = struct.Struct("<QHHI")  # bytes that follow, kind, layer, tag
HEADER_BYTES = _HEADER.size
_MOST = 1 << 33  # bytes of a message; more is no message of ours
_RING = 1 << 22  # bytes of one direction


class Lost(ShoestringError):
    """The other side is gone."""


class Stream(Protocol):
    """Bytes in order, both ways."""

    def write(self, parts: Sequence[Any]) -> None: ...

    def read(self, into: memoryview, patience: float) -> None: ...

    @property
    def ready(self) -> bool:
        """Whether something has come."""

    def doze(self) -> None:
        """Before a sleep: the other side is to wake us through `fileno`."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Message:
    kind: int
    layer: int
    tag: int
    payload: bytearray

    def array(self, dtype: Any = np.float32, offset: int = 0, count: int = -1) -> np.ndarray:
        return np.frombuffer(self.payload, dtype, count, offset)


@dataclass(eq=False)
class Link:
    """Messages over a stream, counted. Not thread-safe.

    Attributes:
        bytes: kind -> bytes of payload, sent and received.
        headers: bytes of all headers.
    """

    stream: Stream
    patience: float = 60.0  # seconds without an answer after which the other side counts as gone
    bytes: dict[int, int] = field(default_factory=dict)
    headers: int = 0
    closed: bool = False

    def send(self, kind: int, layer: int, tag: int, *arrays: np.ndarray) -> None:
        """Raises Lost."""
        parts = [np.ascontiguousarray(array).data.cast("B") for array in arrays if array.size]
        size = sum(map(len, parts))
        with self._open():
            self.stream.write([_HEADER.pack(size, kind, layer, tag), *parts])
        self._count(kind, size)

    def receive(self) -> Message:
        """The next message.

        Raises:
            Lost: none came in time, or none can come any more.
        """
        header = bytearray(HEADER_BYTES)
        with self._open():
            self.stream.read(memoryview(header), self.patience)
            size, kind, layer, tag = _HEADER.unpack(header)
            if size > _MOST:
                raise Lost("The other side does not speak our language", f"a message of {size} bytes was announced")
            payload = bytearray(size)
            if size:
                self.stream.read(memoryview(payload), self.patience)
        self._count(kind, size)
        return Message(kind, layer, tag, payload)

    def close(self) -> None:
        """Another thread may be at it: it then loses the link."""
        self.closed = True
        self.stream.close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:  # what its memory and its sockets say once they are gone
            if not self.closed:
                raise
            raise Lost("The link was closed") from error

    def _count(self, kind: int, size: int) -> None:
        self.bytes[kind] = self.bytes.get(kind, 0) + size
        self.headers += HEADER_BYTES


def wait_for_any(links: Sequence[Link], others: Sequence[Any] = (), nap: float = NAP) -> list[Any]:
    """Those of `links` that have something to read and of `others` (with a fileno) that are readable; may be none.

    nap: seconds it sleeps at most.
    """
    limit = time.perf_counter() + SPIN
    while True:
        found: list[Any] = [link for link in links if link.stream.ready]
        if found:
            return found
        if time.perf_counter() > limit:
            break
    for link in links:
        link.stream.doze()
    found = [link for link in links if link.stream.ready]
    if found:
        return found
    by_number = {thing.fileno(): thing for thing in others} | {link.stream.fileno(): link for link in links}
    readable = select.select([*by_number], [], [], nap)[0]
    return [by_number[number] for number in readable]


# ---- one machine ----


class Ring:
    """Two rings in memory that both processes map, and a pair of sockets to wake each other and to notice an end.

    The one who writes a ring owns its count of bytes written, the one who reads it the count of bytes read, so nothing
    is locked. That bytes are seen before the count that announces them is a promise of x86; see `pair`.
    """

    def __init__(self, memory: mmap.mmap, bell: socket.socket, *, first: bool) -> None:
        self._bell, self._memory = bell, memory
        bell.setblocking(False)
        whole = memoryview(memory)
        half = len(whole) // 2
        parts = [whole[:half], whole[half:]]
        out, into = parts if first else parts[::-1]
        # Counts stand on lines of their own: written, read, and whether the reader sleeps.
        self._out, self._in = out[256:], into[256:]
        self._sent, self._taken, self._sleeper = (out[at : at + 8].cast("Q") for at in (0, 64, 128))
        self._came, self._read, self._asleep = (into[at : at + 8].cast("Q") for at in (0, 64, 128))
        self._size = len(self._out)

    @property
    def ready(self) -> bool:
        return self._came[0] != self._read[0]

    def write(self, parts: Sequence[Any]) -> None:
        at, size, out = self._sent[0], self._size, self._out
        for part in parts:
            view, done = memoryview(part).cast("B"), 0
            while done < len(view):
                room = size - (at - self._taken[0])
                if not room:
                    self._wait(lambda full=at - size: self._taken[0] != full, 60.0, asleep=None)
                    continue
                place = at % size
                count = min(room, len(view) - done, size - place)
                out[place : place + count] = view[done : done + count]
                at, done = at + count, done + count
                if done < len(view):  # the other side must make room: it has to see what is there
                    self._publish(at)
        self._publish(at)

    def read(self, into: memoryview, patience: float) -> None:
        at, size, done = self._read[0], self._size, 0
        self._asleep[0] = 0
        while done < len(into):
            there = self._came[0] - at
            if not there:
                self._wait(lambda at=at: self._came[0] != at, patience, asleep=self._asleep)
                continue
            place = at % size
            count = min(there, len(into) - done, size - place)
            into[done : done + count] = self._in[place : place + count]
            at, done = at + count, done + count
            self._read[0] = at

    def doze(self) -> None:
        self.heard()
        self._asleep[0] = 1

    def fileno(self) -> int:
        return self._bell.fileno()

    def close(self) -> None:
        self._bell.close()
        for name in ("_out", "_in", "_sent", "_taken", "_sleeper", "_came", "_read", "_asleep"):
            getattr(self, name).release()

    def _publish(self, at: int) -> None:
        self._sent[0] = at
        if self._sleeper[0]:
            self._sleeper[0] = 0
            try:
                self._bell.send(b"!")
            except BlockingIOError:  # it is full of bells
                pass
            except OSError as error:
                raise Lost("The other process has ended") from error

    def _wait(self, there: Callable[..., bool], patience: float, asleep: memoryview | None) -> None:
        began = time.perf_counter()
        while not there():
            now = time.perf_counter()
            if now - began < SPIN:
                continue
            if now - began > patience:
                raise Lost("The other process does not answer", f"nothing came for {patience:.0f} s")
            if asleep is not None:
                asleep[0] = 1
                if there():
                    break
            select.select([self._bell], [], [], NAP)
            if not self.heard() and not there():
                raise Lost("The other process has ended")
        if asleep is not None:
            asleep[0] = 0

    def heard(self) -> bool:
        """Take the bells away; False when the other side has closed."""
        try:
            return bool(self._bell.recv(4096))
        except BlockingIOError:
            return True
        except OSError:
            return False


class Wire:
    """A connected socket."""

    def __init__(self, plug: socket.socket) -> None:
        self._socket = plug
        plug.setblocking(False)
        if plug.family != getattr(socket, "AF_UNIX", None):
            plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    @property
    def ready(self) -> bool:
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK)) or True  # an end is to be read too
        except BlockingIOError:
            return False
        except OSError:
            return True

    def write(self, parts: Sequence[Any]) -> None:
        views = [memoryview(part).cast("B") for part in parts]
        while views:
            try:
                done = self._socket.sendmsg(views[:512])
            except BlockingIOError:
                if not select.select([], [self._socket], [], 60.0)[1]:
                    raise Lost("The other side takes nothing any more") from None
                continue
            except OSError as error:
                raise Lost("The connection broke", str(error)) from error
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = views[0][done:]

    def read(self, into: memoryview, patience: float) -> None:
        done, began = 0, time.perf_counter()
        while done < len(into):
            try:
                count = self._socket.recv_into(into[done:])
            except BlockingIOError:
                waited = time.perf_counter() - began
                if waited < SPIN:
                    continue
                if not select.select([self._socket], [], [], max(patience - waited, 0))[0]:
                    raise Lost("The other side does not answer", f"nothing came for {patience:.0f} s") from None
                continue
            except OSError as error:
                raise Lost("The connection broke", str(error)) from error
            if not count:
                raise Lost("The other side has closed the connection")
            done += count
            began = time.perf_counter()

    def doze(self) -> None: ...

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


def pair() -> tuple[Stream, tuple[int, ...], Callable[[], None]]:
    """Our end of a stream to a child process, the descriptors it inherits, and what closes them here after the start.

    The child makes its end of them with `inherited`. Where the processor does not keep the order of writes, or memory
    cannot be shared by descriptor, it is a socket.
    """
    ours, theirs = socket.socketpair()
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return Wire(ours), (theirs.fileno(),), theirs.close
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("attention")
    else:
        with tempfile.TemporaryFile() as file:
            number = os.dup(file.fileno())
    os.ftruncate(number, 2 * _RING)
    memory = mmap.mmap(number, 2 * _RING)

    def close() -> None:
        theirs.close()
        os.close(number)

    return Ring(memory, ours, first=True), (theirs.fileno(), number), close


def inherited(numbers: Sequence[int]) -> Stream:
    """The other end of a `pair`, in the child process."""
    bell = socket.socket(fileno=numbers[0])
    if len(numbers) == 1:
        return Wire(bell)
    memory = mmap.mmap(numbers[1], 2 * _RING)
    os.close(numbers[1])
    return Ring(memory, bell, first=False)


# ---- two machines ----


def place(address: str) -> tuple[str, int]:
    """Host and port of tcp://host:port.

    Raises:
        UsageError: it is not of that form.
    """
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{address!r} is no address of a worker", remedy="Write tcp://host:port")
    return host.strip("[]"), int(port)


def connect(address: str, patience: float) -> Stream:
    """Raises Lost when nobody answers in `patience` seconds."""
    limit = time.monotonic() + patience
    while True:
        try:
            return Wire(socket.create_connection(place(address), timeout=max(1.0, limit - time.monotonic())))
        except OSError as error:
            if time.monotonic() > limit:
                raise Lost(f"No attention worker answers at {address}", str(error)) from error
            time.sleep(0.2)


def listen(address: str) -> socket.socket:
    """Raises UsageError when the address is not to be had."""
    host, port = place(address)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(f"{address} is not to be had", str(error)) from error

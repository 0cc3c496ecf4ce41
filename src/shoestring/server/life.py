"""From the first flag to the last answer: listen, load, be ready, drain, end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.engine.plug import configured, spelled
from shoestring.server.keys import VARIABLE, Keys
from shoestring.server.settings import Settings

if TYPE_CHECKING:
    import uvicorn

    from shoestring.engine.aio import AsyncEngine
    from shoestring.server.service import Service

log = logging.getLogger("shoestring.server")
_LAST_WORDS = 1.0  # seconds for answers that were cut off to say so
_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def serve(settings: Settings, say: Callable[[str], None] = lambda line: None) -> int:
    """Serve until a signal comes. `say` is given the address when the model is ready.

    Returns:
        0 when all that was running has been answered; 130 or 143 when some of it was cut off.

    Raises:
        UsageError: settings that cannot be, an address that cannot be had, a model that cannot be opened.
    """
    if settings.worker:
        return _work(settings, say)
    keys = Keys.load(settings.api_key_file)
    if not (settings.loopback or keys or settings.no_auth):
        raise UsageError(
            f"{settings.host} can be reached from other machines, and there is no key",
            remedy=f"Give --api-key-file or set {VARIABLE}; --no-auth lets everybody in",
        )
    if settings.allow_runtime_adapters and not os.path.isdir(settings.allow_runtime_adapters):
        raise UsageError(f"{settings.allow_runtime_adapters} is no folder", remedy="--allow-runtime-adapters needs one")
    listener = _bind(settings)
    loading = _Loading(settings)
    loading.start()  # reads files while the imports below compute
    try:
        return _run(settings, keys, listener, loading, say)
    finally:
        listener.close()


def _work(settings: Settings, say: Callable[[str], None]) -> int:
    """Work for the engines of others, without HTTP. `say` is given the address."""
    if not (settings.loopback or settings.no_auth):
        raise UsageError(
            f"{settings.host} can be reached from other machines, and a worker asks nobody for a key",
            remedy="Inside a network that you trust, --no-auth lets everybody in",
        )
    name, options = spelled(settings.worker)
    code: int = catalog.module(name).worker(configured(name, options), settings, say)
    return code


def _run(settings: Settings, keys: Keys, listener: socket.socket, loading: _Loading, say: Callable[[str], None]) -> int:
    from shoestring.server.service import Service

    new_event_loop: Any = asyncio.new_event_loop
    try:
        from uvloop import new_event_loop
    except ImportError:
        pass
    service = Service(settings, keys)
    life = _Life(service, http_server(service), loading, say)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(life.live(listener))


def http_server(service: Service) -> uvicorn.Server:
    """What speaks HTTP for a service."""
    import uvicorn

    from shoestring.server.app import build
    from shoestring.server.connection import limited

    protocol: Any
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as protocol
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as protocol
    settings = service.settings
    config = uvicorn.Config(
        build(service),
        http=limited(protocol, settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=max(5, int(settings.header_seconds)),
        h11_max_incomplete_event_size=2 * settings.max_header_bytes,  # the limit itself is kept below HTTP
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def open_engine(s: Settings) -> AsyncEngine:
    """The engine that the settings ask for, beside an event loop.

    Raises:
        UsageError: a model that cannot be opened, or what cannot be plugged in.
    """
    from shoestring.engine.aio import AsyncEngine
    from shoestring.engine.engine import Engine

    engine = Engine(
        s.model,
        runner=s.runner,
        dtype=s.dtype,
        cache_dtype=s.kv_dtype,
        memory=s.cache_bytes,
        max_sequences=s.max_num_seqs,
        max_step_tokens=s.max_step_tokens,
        context=s.max_model_len,
        threads=s.threads,
        adapters=s.adapters,
        plugs=s.plugs,
        prefix_cache=not s.no_prefix_cache,
        trust_remote_code=s.trust_remote_code,
    )
    return AsyncEngine(engine)


@dataclass
class _Loading:
    """Opens the engine, or what answers in its place, in a thread of its own."""

    settings: Settings
    engine: AsyncEngine | None = None
    front: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._load, name="shoestring-load", daemon=True).start()

    def _load(self) -> None:
        try:
            if self.settings.fronted:
                from shoestring.server.front import opened

                self.front = opened(self.settings)
            elif self.settings.replicas > 1:
                from shoestring.server.replicas import started

                self.front = started(self.settings)
            else:
                self.engine = open_engine(self.settings)
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


class _Life:
    """One server in its event loop."""

    def __init__(self, service: Service, server: uvicorn.Server, loading: _Loading, say: Callable[[str], None]) -> None:
        self.service, self.server, self.loading, self.say = service, server, loading, say
        self._signal: signal.Signals | None = None
        self._called = asyncio.Event()
        self._cut_off = False

    async def live(self, listener: socket.socket) -> int:
        self._hear_signals()
        serving = asyncio.create_task(self._serve(listener))
        try:
            await self._until(self._load())
            if self._signal is None and not serving.done():
                self.say(_address(listener))
                await self._until(asyncio.shield(serving))
            await self._drain()
        finally:
            self.server.should_exit = True
            await asyncio.gather(serving, return_exceptions=True)
            if self.service.loaded:
                await asyncio.to_thread(self.service.loaded.close, 2.0)
            if hasattr(self.service.front, "close"):
                await self.service.front.close()
        return _CODES[self._signal] if self._signal and self._cut_off else 0

    async def _serve(self, listener: socket.socket) -> None:
        # Signals are heard here, since the server's own way would stop listening at once.
        self.server.capture_signals = _nothing  # type: ignore[method-assign]
        await self.server.serve(sockets=[listener])

    async def _load(self) -> None:
        while not self.loading.done.is_set():
            await asyncio.sleep(0.01)
        if self.loading.error is not None:
            raise self.loading.error
        if self.loading.front is not None:
            self._hear_signals()  # again: what it has started may have taken them
            self.service.open_front(self.loading.front)
            return
        engine = self.loading.engine
        assert engine
        if not self.service.settings.fine_tune:
            self.service.open(engine)
        else:
            from shoestring.server.fine_tuning import FineTuning

            try:
                tuning = FineTuning(self.service, Path(self.service.settings.fine_tune))
                await tuning.plug(engine)
            except BaseException:
                await asyncio.to_thread(engine.close, 2.0)
                raise
            self.service.open(engine)
            self.service.tuning = tuning
            await tuning.open()
        if engine.engine.note:
            log.warning("%s", engine.engine.note)

    async def _until(self, work: Any) -> None:
        """Wait for `work`, or for a signal."""
        task = asyncio.ensure_future(work)
        called = asyncio.create_task(self._called.wait())
        try:
            await asyncio.wait({task, called}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            called.cancel()
            if not task.done():
                task.cancel()

    async def _drain(self) -> None:
        """New requests are refused; those under way are finished, or cut off when time is up."""
        service = self.service
        service.state = "draining"
        end = time.monotonic() + service.settings.drain_seconds
        while service.gate.requests and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if service.gate.requests:
            self._cut_off = True
            for task in list(service.tasks):
                task.cancel()
            end = time.monotonic() + _LAST_WORDS
            while service.gate.requests and time.monotonic() < end:
                await asyncio.sleep(0.02)

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in _CODES:
            try:
                loop.add_signal_handler(number, self._hear, number)
            except (ValueError, RuntimeError, NotImplementedError):
                return  # not the main thread: signals are somebody else's

    def _hear(self, number: signal.Signals) -> None:
        if self._signal is not None and number == signal.SIGINT:
            sys.stderr.flush()
            os._exit(_CODES[number])
        self._signal = self._signal or number
        self._called.set()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _bind(settings: Settings) -> socket.socket:
    """A socket that listens at the address.

    Raises:
        UsageError: it is in use, is not this machine's, or does not exist.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UsageError(f"--host {host} is no address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        remedy = "Choose another with --port; 0 takes a free one" if error.errno in (98, 48) else ""
        raise UsageError(f"{host} port {port} cannot be listened at", error.strerror or "", remedy) from None
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def log_to_stderr(level: int = logging.INFO) -> None:
    """The server's own log; libraries say only what is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers = [handler]
    log.setLevel(level)
    log.propagate = False
    others = logging.getLogger("uvicorn")
    others.handlers = [handler]
    others.setLevel(logging.ERROR)
    others.propagate = False

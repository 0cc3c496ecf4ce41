"""Several engines, each with the whole application in a process of its own: Ray Serve starts, watches and asks them.

This process keeps the address, the keys and the limits. What it lets in goes through a handle of Ray Serve, whose
router is ours (`ray_router`), to one replica, and the pieces of the answer come back as they are made.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Receive, Scope, Send

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.server.errors import ApiError
from shoestring.server.keys import ANYONE, Client, Keys
from shoestring.server.routing import BLOCK, PER_TOKEN, Ask, asked, shared
from shoestring.server.settings import Settings

if TYPE_CHECKING:
    from shoestring.server.report import Report
    from shoestring.server.service import Service

log = logging.getLogger("shoestring.server")
_NAME = "shoestring"
_STORE = 80 << 20  # bytes of Ray's object store, near its least: answers do not pass through it
_TRIES = 3  # replicas that may die under one request
_TOLD = 5.0  # seconds for all replicas to say how they stand
_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # anywhere, this is what makes Ray stay on 127.0.0.1
    "RAY_AUTH_MODE": "token",  # else every user of the machine could run code here
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # a fifth of the time that a piece takes as an object of Ray
    "RAY_memory_monitor_refresh_ms": "0",  # memory has its limits in the engine
    "RAY_COLOR_PREFIX": "0",
}


@dataclass(frozen=True)
class Sent:
    """A request on its way to a replica. `key` is its own, `ask` what the router goes by."""

    key: str
    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    client: Client
    request_id: str
    ask: Ask = Ask()


# ---------------------------------------------------------------- in a replica's process


class Replica:
    """An engine and the application over it, as Ray Serve runs it.

    Args:
        settings: of the one engine.
        later: file that names the adapters which were loaded while running, as JSON {name: path}.
    """

    def __init__(self, settings: Settings, later: str) -> None:
        from shoestring.server.app import routes
        from shoestring.server.life import log_to_stderr, open_engine
        from shoestring.server.service import Service

        log_to_stderr(logging.WARNING)
        self._later, self._loaded = Path(later), dict[str, str]()
        self._service: Service = Service(settings, Keys(()))
        self._error: ShoestringError | None = None
        try:
            self._service.open(open_engine(settings))
            self._app = routes(self._service)
        except ShoestringError as error:
            self._error = error  # Ray would start it again and again, and tell less

    async def answer(self, sent: Sent) -> AsyncIterator[list[Message]]:
        """What the application says to a request, as it says it. Ending the iterator is leaving."""
        pieces: asyncio.Queue[Message | None] = asyncio.Queue()
        given: list[Message] = [{"type": "http.request", "body": sent.body, "more_body": False}]
        never = asyncio.Event()

        async def receive() -> Message:
            if not given:
                await never.wait()
            return given.pop()

        async def send(message: Message) -> None:
            pieces.put_nowait(message)

        task = asyncio.create_task(self._app(_scope(sent), receive, send))
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while True:
                some = [await pieces.get()]
                while not pieces.empty():
                    some.append(pieces.get_nowait())
                if found := [message for message in some if message is not None]:
                    yield found
                if some[-1] is None:
                    break
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def whole(self, sent: Sent) -> list[Message]:
        """All of an answer."""
        return [message async for messages in self.answer(sent) for message in messages]

    async def report(self) -> Report:
        if self._error:
            raise self._error
        from ray import serve

        from shoestring.server.report import report

        return report(self._service, str(serve.get_replica_context().rank.rank))

    async def check_health(self) -> None:
        """Raises when Ray should start another in place of this one."""
        if self._service.health() == "failing":
            raise RuntimeError("The engine has stopped")
        try:
            await self._catch_up()
        except Exception as error:  # a replica without an adapter is better than none
            log.warning("an adapter that the others have cannot be loaded: %s", type(error).__name__)

    async def close(self) -> None:
        if engine := self._service.loaded:
            await asyncio.to_thread(engine.close, 2.0)

    async def _catch_up(self) -> None:
        """Load and drop what the other replicas were told to before this one was there."""
        engine = self._service.loaded
        if engine is None or not self._later.is_file():
            return
        wanted: dict[str, str] = json.loads(self._later.read_text())
        there = engine.engine.adapters
        for name, path in wanted.items():
            if name not in there:
                root = Path(self._service.settings.allow_runtime_adapters)
                await engine.run(engine.engine.add_adapter, name, root / path)
        for name in self._loaded.keys() - wanted.keys():
            if name in there:
                await engine.run(engine.engine.drop_adapter, name)
        self._loaded = wanted


def _scope(sent: Sent) -> MutableMapping[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path,
        "raw_path": sent.path.encode(),
        "query_string": sent.query,
        "root_path": "",
        "headers": list(sent.headers),
        "client": None,
        "server": None,
        "state": {"client": sent.client, "request_id": sent.request_id},
        "shoestring.abort": lambda: None,  # the connection is not here
    }


# ---------------------------------------------------------------- in front of them


def started(settings: Settings) -> Replicas:
    """Replicas that are ready to answer.

    Raises:
        UsageError: Ray is not installed, or what the engine refuses.
    """
    from shoestring.models.load import locate

    locate(settings.model)  # said, or fetched, once and before Ray is started
    return Replicas(settings)


@dataclass
class _Ray:
    """Ray and what it serves, in a thread that lives as long: the kernel ends Ray's processes with the thread that
    started them.
    """

    settings: Settings
    routing: str
    later: Path = Path()
    handle: Any = None
    error: BaseException | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    ending: threading.Event = field(default_factory=threading.Event)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="shoestring-ray", daemon=True)
        thread.start()
        self.ready.wait()
        return thread

    def _run(self) -> None:
        folder = tempfile.mkdtemp(prefix="shoestring-ray-")
        if len(folder) > 40:  # Ray's sockets stand below it, and a socket's path ends at 107 characters
            os.rmdir(folder)
            folder = tempfile.mkdtemp(prefix="shoestring-ray-", dir="/tmp")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        try:
            self.later = Path(folder) / "adapters.json"
            self._serve(folder)
        except BaseException as error:
            self.error = error
        finally:
            self.ready.set()
        self.ending.wait()
        if ray := sys.modules.get("ray"):
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    def _serve(self, folder: str) -> None:
        os.environ.update(_ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
        try:  # not before: what Ray reads of the environment, it reads now
            import ray
            from ray import serve
            from ray.serve.config import RequestRouterConfig

            from shoestring.server.ray_router import PrefixRouter
        except ImportError:
            raise UsageError(
                f"--replicas {self.settings.replicas} needs Ray Serve",
                "it is not installed, or too old",
                "Install it with `pip install 'shoestring[replicas]'`",
            ) from None
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        quiet = {"log_level": "ERROR", "enable_access_log": False}
        s = self.settings
        ray.init(
            address="local",
            num_cpus=s.replicas + 1,
            object_store_memory=_STORE,
            include_dashboard=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        serve.start(proxy_location="Disabled", logging_config=quiet)
        router = RequestRouterConfig.model_validate(
            {"request_router_class": PrefixRouter, "request_router_kwargs": {"name": self.routing}}
        )
        deployment: Any = serve.deployment(
            Replica,
            name=_NAME,
            num_replicas=s.replicas,
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=s.max_connections + s.replicas,  # this server's limits are kept before and behind Ray
            request_router_config=router,
            health_check_period_s=1,
            health_check_timeout_s=30,
            logging_config=quiet,
        )
        app = deployment.bind(of_one(s), str(self.later))
        self.handle = serve.run(app, name=_NAME, route_prefix=None, logging_config=quiet)


class Replicas:
    """An application that answers by asking replicas.

    Attributes:
        names: what clients call the model.
    """

    def __init__(self, settings: Settings) -> None:
        key = secrets.token_hex(8)
        self._routing, self._retried = shared(key), 0
        self._ray = _Ray(settings, key)
        self._thread = self._ray.start()
        try:
            if self._ray.error:
                raise self._ray.error
            self._handle = self._ray.handle
            reports = self._handle.broadcast("report").results(timeout_s=60)
        except BaseException as error:
            self._end()
            raise _own(error) from None
        self.names: list[str] = reports[0].ledger["models"]
        tokens = min(report.cache_tokens for report in reports)
        self._routing.room = max(1, tokens * PER_TOKEN // BLOCK)
        self._stream = self._handle.options(method_name="answer", stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = await _sent(scope, receive)
        try:
            if sent.method == "POST" and sent.path in (_LOAD, _UNLOAD):
                await self._everywhere(sent, send)
            else:
                await self._somewhere(sent, send)
        finally:
            self._routing.end(sent.key)

    async def _somewhere(self, sent: Sent, send: Send) -> None:
        """One replica answers; another one if it dies before it has begun to."""
        for last in (False,) * (_TRIES - 1) + (True,):
            began, done = False, False
            stream = self._stream.remote(sent)
            try:
                async for messages in stream:
                    for message in messages:
                        began = True
                        done = message["type"] == "http.response.body" and not message.get("more_body")
                        await send(message)
                        if done:
                            return  # at once: whoever listens for the client takes its end for the client's
                return
            except Exception as error:
                if not _lost(error):
                    raise
                log.warning("a replica has died under a request: %s", type(error).__name__)
                if began or last:
                    raise ApiError(503, "What computed the answer has ended", code="replica_lost") from None
                self._retried += 1
            finally:
                if not done:
                    stream.cancel()

    async def _everywhere(self, sent: Sent, send: Send) -> None:
        """Every replica loads an adapter, or none; or every one drops it."""
        if sent.path == _UNLOAD:
            self._remember(sent)  # before: a replica that catches up meanwhile must not load it again
        status = lambda messages: int(messages[0]["status"])
        answers: list[list[Message]] = await self._handle.broadcast("whole", sent).results_async()
        answer = (max if sent.path == _LOAD else min)(answers, key=status)
        if sent.path == _LOAD and status(answer) < 300:
            self._remember(sent)
        elif sent.path == _LOAD and any(status(one) < 300 for one in answers):
            await self._handle.broadcast("whole", replace(sent, path=_UNLOAD)).results_async()
        for message in answer:
            await send(message)

    def _remember(self, sent: Sent) -> None:
        """For replicas that are started later."""
        file = self._ray.later
        wanted: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
        try:
            given = json.loads(sent.body)
            wanted.pop(given["lora_name"], None)
        except (ValueError, LookupError, TypeError):
            return  # the replicas will say what is wrong with it
        if sent.path == _LOAD:
            wanted[given["lora_name"]] = given["lora_path"]
        aside = file.with_suffix(".new")
        aside.write_text(json.dumps(wanted))
        aside.rename(file)

    async def reports(self) -> list[Report]:
        """How each replica stands that can say so now."""
        try:
            told = self._handle.broadcast("report").results_async(timeout_s=_TOLD, return_exceptions=True)
            found = [report for report in await told if not isinstance(report, BaseException)]
        except Exception:  # none is there
            return []
        return sorted(found, key=lambda report: report.name)

    def health(self) -> str:
        return "ready" if self._routing.replicas else "loading"

    def stats(self) -> dict[str, float]:
        return self._routing.stats() | {"retried": self._retried}

    async def close(self) -> None:
        """End all processes."""
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        if self._ray.handle is not None:
            try:
                self._ray.handle.broadcast("close").results(timeout_s=_TOLD, return_exceptions=True)
            except Exception:  # those that are gone need no closing
                pass
        self._ray.ending.set()
        self._thread.join(30)


def of_one(settings: Settings) -> Settings:
    """Settings of one replica: its share of the cores, and without the limits that are kept for all together."""
    from shoestring.core import probes

    return replace(
        settings,
        replicas=1,
        threads=settings.threads or max(1, probes.cores() // settings.replicas),
        key_concurrency=0,
        key_requests_per_minute=0,
        allowed_origins="",
    )


async def _sent(scope: Scope, receive: Receive) -> Sent:
    body = (await receive()).get("body", b"")
    client: Client = scope["state"].get("client", ANYONE)
    return Sent(
        secrets.token_hex(8),
        scope["method"],
        scope["path"],
        scope["query_string"],
        tuple(scope["headers"]),
        body,
        client,
        scope["state"]["request_id"],
        asked(scope["path"], client.digest, body) if scope["method"] == "POST" else Ask(),
    )


def _lost(error: Exception) -> bool:
    """Whether the replica has gone, rather than failed at the request."""
    import grpc
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, grpc.RpcError):
        code: Callable[[], Any] = getattr(error, "code", lambda: None)
        return bool(code() == grpc.StatusCode.UNAVAILABLE)
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _own(error: BaseException) -> BaseException:
    """The error of the engine that Ray has wrapped."""
    found = getattr(error, "cause", None) or error
    return found if isinstance(found, BaseException) else error

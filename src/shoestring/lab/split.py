"""A model in two processes' worth of parts, for contracts and claims: exit heads, a cloud, and a link that is slow."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from shoestring.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json

_PIECE = 4096  # bytes that a slow link passes on together


def random_heads(model: Path, gates: Sequence[int], rank: int = 4, seed: int = 0, spread: float = 0.3) -> Path:
    """A folder beside the model's files with exit heads that say anything; a check's stand-in for trained ones."""
    config = read_json(model / "config.json")
    width, rng = config["hidden_size"], np.random.default_rng(seed)
    tensors = {}
    for gate in gates:
        name = f"base_model.model.model.layers.{gate - 1}.exit.gate."
        tensors[name + "down"] = rng.normal(0, spread, (rank, width)).astype(np.float32)
        tensors[name + "up"] = rng.normal(0, spread, (width, rank)).astype(np.float32)
        tensors[name + "norm.weight"] = np.ones(width, np.float32)
        tensors[name + "warmth"] = np.zeros(1, np.float32)
    out = model / "heads"
    out.mkdir(exist_ok=True)
    save_file(tensors, out / ADAPTER_WEIGHTS)
    said = {"peft_type": "EXIT_HEADS", "gates": list(gates), "epsilon": config["rms_norm_eps"], "r": rank}
    (out / ADAPTER_CONFIG).write_text(json.dumps(said), encoding="utf-8")
    return out


@dataclass(frozen=True)
class FrontSettings:
    """What a front reads of the server's settings."""

    model: str
    runner: str = "auto"
    dtype: str = "fp32"
    kv_dtype: str = "fp32"
    threads: int | None = 1
    cache_bytes: int | None = None
    trust_remote_code: bool = False


@contextmanager
def cloud(model: Path | str, front: Callable[[Any, Any], Any], config: Any, **settings: Any) -> Iterator[str]:
    """The application that `front` makes, answering on a free port; its address. `app` is in `cloud.latest`."""
    import uvicorn

    app = front(config, FrontSettings(str(model), **settings))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the cloud did not start")
        time.sleep(0.01)
    cloud.latest = app  # type: ignore[attr-defined]
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


class SlowLink:
    """A cable between a port here and another address: so many bits a second each way, so long on the way.

    `cut` drops every connection and lets none through, until `mend`; `swallow` takes what is sent and delivers nothing.
    """

    def __init__(self, target: str, bits_per_second: float = 0.0, delay: float = 0.0) -> None:
        self.lead_to(target)
        self._rate, self._delay = bits_per_second / 8, delay
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._whole, self._delivers = True, True
        self._open: set[socket.socket] = set()
        self.bytes = {"up": 0, "down": 0}
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def lead_to(self, target: str) -> None:
        """Where new connections end."""
        host, _, port = target.removeprefix("http://").rpartition(":")
        self._target = host, int(port)

    def swallow(self) -> None:
        self._delivers = False

    def cut(self) -> None:
        self._whole = False
        for end in list(self._open):
            _shut(end)

    def mend(self) -> None:
        self._whole, self._delivers = True, True

    def close(self) -> None:
        self.cut()
        _shut(self._listener)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._whole:
                _shut(near)
                continue
            try:
                far = socket.create_connection(self._target, 5)
            except OSError:
                _shut(near)
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.add(end)
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pass, args=(source, sink, way), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        """What is read leaves when the wire is free, and arrives `delay` later; reading goes on meanwhile."""
        line: list[tuple[float, bytes]] = []
        news = threading.Condition()

        def deliver() -> None:
            while True:
                with news:
                    news.wait_for(lambda: bool(line))
                    due, data = line.pop(0)
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    _shut(sink)
                    return
                if self._delivers:
                    with suppress(OSError):
                        sink.sendall(data)

        threading.Thread(target=deliver, daemon=True).start()
        free = 0.0
        data = b"-"
        while data:
            try:
                data = source.recv(_PIECE)
            except OSError:
                data = b""
            self.bytes[way] += len(data)
            now = time.monotonic()
            free = max(free, now) + (len(data) / self._rate if self._rate else 0.0)
            with news:
                line.append((free + self._delay, data))
                news.notify()
        self._open.discard(source)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()

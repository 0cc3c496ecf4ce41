"""A server to test: in a thread with the toy model, or the real command with a real model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
from safetensors.numpy import save_file
from toy import TEMPLATE, ToyRunner, tokenizer

import shoestring
from shoestring.engine.aio import AsyncEngine
from shoestring.engine.engine import Engine
from shoestring.engine.tokenizer import Tokenizer
from shoestring.server.keys import Keys
from shoestring.server.life import _bind, http_server
from shoestring.server.service import Service
from shoestring.server.settings import Settings

HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Server:
    """A server at an address, and ways to speak to it."""

    url: str
    model: str
    key: str = ""
    runner: Any = None
    service: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = httpx.Client(base_url=self.url, headers=self.headers, timeout=60)

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", **options)

    def chat(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=self.chat_body(**fields))

    def chat_body(self, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": HELLO, "max_tokens": 2, **fields}

    def complete(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": self.model, "prompt": "ab", "max_tokens": 2, **fields})

    def metrics(self) -> dict[str, float]:
        """Every sample without its prefix; labels other than the model's stand behind the name."""
        found = {}
        for line in self.http.get("/metrics").text.splitlines():
            if match := re.fullmatch(r"[a-z]+:(\w+)\{(.*)\} (\S+)", line):
                labels = ",".join(part for part in match[2].split(",") if not part.startswith("model_name"))
                found[match[1] + (f"{{{labels}}}" if labels else "")] = float(match[3])
        return found

    def settled(self, seconds: float = 5.0) -> dict[str, float]:
        """The metrics once nothing runs or waits; a good request is answered then."""
        end = time.monotonic() + seconds
        gauges = ("num_requests_running", "num_requests_waiting", "requests_open")
        while True:
            now = self.metrics()
            busy = {name: now[name] for name in gauges if now[name]}
            if not busy:
                return now
            assert time.monotonic() < end, busy
            time.sleep(0.02)


@contextmanager
def toy(
    *, keys: list[str] | None = None, seconds: float = 0.0, context: int = 512, template: str | None = None,
    words: Tokenizer | None = None, engine: dict[str, Any] | None = None, **settings: Any,
) -> Iterator[Server]:  # fmt: skip
    """A server in this process, on a free port."""
    made = Settings(port=0, **settings)
    runner = ToyRunner(context, seconds)
    words = words or (tokenizer() if template is None else tokenizer(template))
    inner = Engine((runner, words), max_sequences=made.max_num_seqs, **(engine or {}))  # type: ignore[arg-type]
    for name, folder in made.adapters.items():
        inner.add_adapter(name, folder)
    service = Service(made, Keys(keys or []))
    service.open(AsyncEngine(inner))
    http, listener = http_server(service), _bind(made)
    thread = threading.Thread(target=http.run, args=([listener],), daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    host, port = listener.getsockname()[:2]
    try:
        yield Server(f"http://{host}:{port}", "toy", (keys or [""])[0], runner, service)
    finally:
        http.should_exit = True
        thread.join(10)
        assert service.loaded
        service.loaded.close(2)


@dataclass
class Process:
    """The command `shoestring serve`, started."""

    process: subprocess.Popen[str]
    began: float
    lines: list[str] = field(default_factory=list)
    url: str = ""
    seconds: float = 0.0  # until it was ready
    http: Any = None

    def wait_ready(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.url:
            assert time.monotonic() < end and self.process.poll() is None, self.lines
            for line in list(self.lines):
                if match := re.search(r"is ready at (http://\S+)", line):
                    self.url, self.seconds = match[1], time.monotonic() - self.began
                    self.http = httpx.Client(base_url=self.url, timeout=60)
            time.sleep(0.01)

    def end(self, number: int = signal.SIGTERM, seconds: float = 20) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def command(*words: str, env: dict[str, str] | None = None, ready: bool = True) -> Iterator[Process]:
    """`shoestring serve WORDS` on a free port."""
    source = str(Path(shoestring.__file__).parents[1])
    path = source + os.pathsep + os.environ.get("PYTHONPATH", "")
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "shoestring", "serve", *words, "--port", "0"], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(env or {})},
    )  # fmt: skip
    made = Process(process, began)

    def read() -> None:
        assert process.stderr
        for line in process.stderr:
            made.lines.append(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if ready:
            made.wait_ready()
        yield made
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)
        reader.join(5)


def tiny_llama(folder: Path, context: int = 4096) -> Path:
    """Writes a random Llama of a few thousand weights with the toy's tokenizer."""
    folder.mkdir()
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=258, hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=context,
        rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=True, eos_token_id=257,
        bos_token_id=256, torch_dtype="float32",
    )  # fmt: skip
    draw = np.random.default_rng(0)
    weight = lambda rows, cols: draw.normal(0, 0.1, (rows, cols)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": weight(258, 64), "model.norm.weight": np.ones(64, np.float32)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        for part, rows, cols in (
            ("self_attn.q", 64, 64), ("self_attn.k", 32, 64), ("self_attn.v", 32, 64), ("self_attn.o", 64, 64),
            ("mlp.gate", 96, 64), ("mlp.up", 96, 64), ("mlp.down", 64, 96),
        ):  # fmt: skip
            tensors[f"{name}.{part}_proj.weight"] = weight(rows, cols)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{part}.weight"] = np.ones(64, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer().json)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    return folder


def events(text: str) -> list[Any]:
    """The data of server-sent events; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]", data[-1]
    return [json.loads(line) for line in data[:-1]]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in an answer, which must have OpenAI's shape and give nothing away."""
    found = answer.json()
    assert set(found) == {"error"}, found
    assert set(found["error"]) == {"message", "type", "param", "code"}, found
    assert found["error"]["message"] and not re.search(r"/home|/root|/usr|\.py|0x[0-9a-f]{6}|Traceback", answer.text)
    assert answer.headers["x-request-id"]
    return dict(found["error"])

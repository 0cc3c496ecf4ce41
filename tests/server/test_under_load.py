"""Many at once, those that leave, and those that find no room."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from serving import Server, error_of, events, toy
from test_bad_requests import connected

ABORTS = 'request_success_total{finished_reason="abort"}'


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    """Two answers at a time, four may wait, five milliseconds a step."""
    with toy(seconds=0.005, max_num_seqs=2, max_queue=4) as running:
        yield running


def test_counters_are_exact_and_gauges_return_to_zero() -> None:
    with toy(max_num_seqs=8, max_queue=20) as running:
        before = running.settled()
        draw = random.Random(1)

        def ask(i: int) -> tuple[int, int, int]:
            stream, n = draw.random() < 0.5, draw.choice([1, 1, 2])
            fields: dict[str, Any] = dict(max_tokens=draw.randrange(1, 20), n=n, stream=stream)
            if stream:
                fields["stream_options"] = {"include_usage": True}
            answer = httpx.post(f"{running.url}/v1/chat/completions", json=running.chat_body(**fields), timeout=60)
            if answer.status_code == 503:
                assert int(answer.headers["retry-after"]) >= 1
                return 0, 0, 503
            assert answer.status_code == 200
            usage = events(answer.text)[-1]["usage"] if stream else answer.json()["usage"]
            return usage["prompt_tokens"], usage["completion_tokens"], 200

        with ThreadPoolExecutor(24) as pool:
            done = list(pool.map(ask, range(200)))
        after = running.settled()
        moved = lambda name: after[name] - before.get(name, 0)
        assert moved("prompt_tokens_total") == sum(d[0] for d in done)
        assert moved("generation_tokens_total") == sum(d[1] for d in done)
        good = sum(d[2] == 200 for d in done)
        assert good >= 20 and moved('http_responses_total{status="2xx"}') >= good
        assert after["kv_cache_usage_perc"] == 0 and moved(ABORTS) == 0


def test_a_full_queue_refuses_at_once(slow: Server) -> None:
    slow.runner.seconds = 0.2

    def ask(i: int) -> int:
        answer = slow.chat(max_tokens=20)
        if answer.status_code == 503:
            assert error_of(answer)["code"] == "queue_full" and answer.headers["retry-after"]
        return int(answer.status_code)

    with ThreadPoolExecutor(20) as pool:
        began = time.monotonic()
        asked = [pool.submit(ask, i) for i in range(20)]
        while sum(one.done() for one in asked) < 14:
            assert time.monotonic() - began < 2, "a refusal took as long as an answer"
            time.sleep(0.01)
        assert all(one.result() == 503 for one in asked if one.done())
        slow.runner.seconds = 0.005
    assert [one.result() for one in asked].count(200) == 6
    slow.settled()


def leave(server: Server, fields: dict[str, Any], after: float | bytes) -> None:
    """Begin a request and close the connection after some seconds, or after some bytes have come."""
    body = json.dumps(server.chat_body(**fields)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    with connected(server) as client:
        client.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        if isinstance(after, float):
            time.sleep(after)
            return
        said = b""
        while after not in said:
            said += client.recv(4096)


def test_a_stream_that_is_left_stops(slow: Server) -> None:
    before = slow.settled()
    leave(slow, dict(max_tokens=400, stream=True), b'"content":"')
    begun = slow.runner.steps
    after = slow.settled(2)
    assert after[ABORTS] == before[ABORTS] + 1
    assert after["kv_cache_usage_perc"] == 0
    assert slow.runner.steps - begun < 10  # two steps, and what the notice takes


def test_an_answer_nobody_waits_for_stops(slow: Server) -> None:
    before = slow.settled()
    leave(slow, dict(max_tokens=400, n=2), 0.2)
    assert slow.settled(2)[ABORTS] == before[ABORTS] + 2
    assert slow.chat().status_code == 200


def test_two_hundred_that_leave() -> None:
    with toy(seconds=0.002, max_num_seqs=4, max_queue=300) as running:
        threads = [
            threading.Thread(target=leave, args=(running, dict(max_tokens=400, stream=i % 2 == 0), 0.5))
            for i in range(200)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        began = time.monotonic()
        assert running.chat().status_code == 200 and time.monotonic() - began < 5
        assert running.settled()["kv_cache_usage_perc"] == 0
        used = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - used < 0.25  # nothing goes on computing
        assert not running.service.tasks


def test_a_request_alone_and_among_others_is_the_same(slow: Server) -> None:
    fields: dict[str, Any] = dict(max_tokens=30, temperature=1.0, seed=11)
    alone = slow.chat(**fields).json()["choices"]
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(slow.chat, max_tokens=60, seed=i) for i in range(3)]
        assert slow.chat(**fields).json()["choices"] == alone
        assert all(other.result().status_code == 200 for other in others)


def test_one_key_cannot_have_more_than_its_share_open() -> None:
    with toy(seconds=0.005, keys=["k"], key_concurrency=2) as running:
        ask = lambda i: running.chat(max_tokens=60)
        with ThreadPoolExecutor(6) as pool:
            done = list(pool.map(ask, range(6)))
        assert sorted(a.status_code for a in done) == [200, 200, 429, 429, 429, 429]
        assert all(a.headers["retry-after"] for a in done if a.status_code == 429)
        running.settled()


def test_a_stalled_engine_shows() -> None:
    with toy(stall_seconds=0.3) as running:
        running.runner.seconds = 1.2
        thread = threading.Thread(target=running.chat, kwargs={"max_tokens": 1})
        thread.start()
        states = set()
        while thread.is_alive():
            states.add(running.http.get("/health").json()["state"])
            time.sleep(0.05)
        assert states >= {"ready", "stalled"}
        running.runner.seconds = 0.0
        assert running.http.get("/health").json()["state"] == "ready"
        running.settled()


def test_heavy_work_does_not_hold_others_up(slow: Server) -> None:
    """A request at every limit beside a small one."""
    schema: Any = {"type": "integer"}
    for _ in range(14):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    heavy = dict(n=4, stop=["a" * 60, "b" * 60], max_tokens=100, logprobs=True, top_logprobs=20,
                 response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})  # fmt: skip
    slow.chat()
    with ThreadPoolExecutor(2) as pool:
        work = pool.submit(slow.chat, **heavy)
        began = time.monotonic()
        assert slow.chat(max_tokens=1).status_code == 200
        assert time.monotonic() - began < 3
        assert work.result().status_code == 200
    slow.settled()

import json
import random

import pytest
from fake_server import fake_server
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.cli._bench_table import alone, served, together
from shoestring.core.errors import ShoestringError, UsageError
from shoestring.jobs._endpoint import Endpoint, Heard, Outcome, outcome
from shoestring.jobs.bench import ServeRequest, bench_serve, lengths, mix, summary
from shoestring.jobs.bench_engine import LatencyRequest, ThroughputRequest, bench_latency, bench_throughput


def to(fake, **mixed):
    plain = {"input_tokens": "8", "output_tokens": "5", "requests": 6, "concurrency": 3, "warmup": 0}
    return ServeRequest(url=f"http://127.0.0.1:{fake.port}", **(plain | mixed))


# ---------------------------------------------------------------- against a server whose delays are known


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_known_delays_come_out(route):
    with fake_server(first=0.06, gap=0.02) as fake:
        found = bench_serve(to(fake, route=route, ttft=500, tpot=5))
    assert found["requests"] == {"sent": 6, "done": 6, "errors": {}}
    assert found["tokens"] == {"prompt": 42, "cached": 0, "output": 30, "counted_by": "usage"}
    assert 0.06 <= found["first_token"]["p50"] < 0.2
    assert 0.02 <= found["per_token"]["p50"] < 0.08 and 0.015 <= found["between_chunks"]["p50"] < 0.08
    assert 0.14 <= found["request"]["p50"] < 0.6
    assert 0.28 <= found["seconds"] < 1.5, "six requests, three at once, 0.14 s each"
    assert found["throughput"]["output_tokens_per_s"] == pytest.approx(30 / found["seconds"])
    assert fake.most == 3 and found["goodput"]["share"] == 0, "no token came within 5 ms of the one before"
    assert found["model"] == "fake" and fake.seen[0]["stream_options"] == {"include_usage": True}


def test_tokens_are_counted_from_chunks_where_the_server_tells_no_usage():
    with fake_server(first=0, gap=0.001, usage=False) as fake:
        found = bench_serve(to(fake))
    assert found["tokens"] == {"prompt": 0, "cached": 0, "output": 30, "counted_by": "chunks"}


def test_errors_are_told_apart_and_left_out_of_the_figures():
    kinds = ["refuse", "hang", "garbage", "cut", "error"]
    with fake_server(first=0, gap=0.001, trouble=dict(enumerate(kinds))) as fake:
        found = bench_serve(to(fake, requests=7, concurrency=1, timeout=0.3))
    assert found["requests"] == {
        "sent": 7,
        "done": 2,
        "errors": dict.fromkeys(
            ("status 429 rate_limit_exceeded", "timeout", "no event stream", "the stream broke off",
             "in the stream: engine_failed"), 1
        ),
    }  # fmt: skip
    assert found["tokens"]["output"] == 10


def test_a_rate_that_cannot_be_kept_shows_as_waiting():
    with fake_server(first=0.05, gap=0) as fake:
        slow = bench_serve(to(fake, rate=1000, requests=8, concurrency=1, output_tokens="1"))
        free = bench_serve(to(fake, rate=1000, requests=8, output_tokens="1", concurrency=None))
    assert slow["first_token"]["max"] > 8 * 0.05 - 0.1, "one after another, and all were due at once"
    assert free["first_token"]["p50"] < slow["first_token"]["p50"] and fake.most > 3


def test_gaps_follow_the_rate():
    with fake_server(first=0, gap=0) as fake:
        found = bench_serve(to(fake, rate=50, seconds=0.8, requests=None, output_tokens="1"))
    assert 15 <= found["requests"]["sent"] <= 70


def test_seconds_end_the_sending():
    with fake_server(first=0.01, gap=0) as fake:
        found = bench_serve(to(fake, seconds=0.2, requests=None, output_tokens="1"))
    assert 0.15 <= found["seconds"] < 2 and found["requests"]["sent"] >= 3


def test_warmup_key_and_extra_fields(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "Secret")
    with fake_server(first=0, gap=0, reuse=3) as fake:
        found = bench_serve(to(fake, warmup=2, requests=2, body={"ignore_eos": True, "max_tokens": 3}))
    assert len(fake.seen) == 4 and found["requests"]["sent"] == 2
    assert all(body["ignore_eos"] is True and body["max_tokens"] == 3 for body in fake.seen)
    assert fake.seen[0]["messages"] != fake.seen[2]["messages"], "what warms up must not be in the server's cache"
    assert fake.keys == {"bearer secret"} and found["tokens"]["cached"] == 6


def test_no_server_and_no_answer_at_all():
    with pytest.raises(ShoestringError, match="does not answer.*connection"):
        bench_serve(ServeRequest(url="127.0.0.1:9"))
    with fake_server(trouble=dict.fromkeys(range(9), "refuse")) as fake:
        with pytest.raises(ShoestringError, match=r"None of 6 requests was answered.*429 rate_limit_exceeded \(6\)"):
            bench_serve(to(fake))
        with pytest.raises(ShoestringError, match="does not answer fake"):
            bench_serve(to(fake, warmup=1))


def test_the_client_takes_little_of_a_core():
    with fake_server(first=0, gap=0.002) as fake:
        found = bench_serve(to(fake, requests=8, concurrency=8, output_tokens="100"))
    # The fake server runs in this process too, so this is an upper limit.
    assert found["client"]["cpu_seconds_per_chunk"] < 5e-3


# ---------------------------------------------------------------- what bytes say


EVENTS = [
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n',
    b": still here\n\n",
    b'data: {"choices": [{"delta": {"content": "data: [DONE] is text"}}]}\r\n\r\n',
    b'data: {"choices": [{"delta": {"content": "b"}}], "usage": null}\n\n',
    b'data: {"choices": [], "usage": {"completion_tokens": 4, "prompt_tokens": 9}}\n\n',
    b"data: [DONE]\n\n",
]
WHOLE = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(
    b"%x\r\n%s\r\n" % (len(event), event) for event in EVENTS
)


@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_borders_of_packets_do_not_matter(cuts):
    ends = sorted({*cuts, len(WHOLE)})
    pieces = [(float(i), WHOLE[a:b]) for i, (a, b) in enumerate(zip([0, *ends], ends))]
    found = outcome(Heard(-1.0, pieces, ended=99.0))
    assert (found.error, found.completion_tokens, found.prompt_tokens, len(found.arrivals)) == ("", 4, 9, 2)
    second = WHOLE.index(b'"b"') + len(EVENTS[3]) - EVENTS[3].index(b'"b"') - 1
    assert found.arrivals[1] == next(float(i) for i, end in enumerate(ends) if end >= second)


def test_an_answer_that_ends_without_the_last_word_is_whole():
    last = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": {"completion_tokens": 2}}\n\n'
    said = b"HTTP/1.1 200 OK\r\n\r\n" + EVENTS[2] + EVENTS[3]
    cut, whole = outcome(Heard(0.0, [(1.0, said)], 2.0)), outcome(Heard(0.0, [(1.0, said), (1.5, last)], 2.0))
    assert cut.error == "the stream broke off"
    assert (whole.error, whole.ended, whole.tokens, len(whole.arrivals)) == ("", 1.5, 2, 2)


def test_figures_of_one_answer():
    found = Outcome(due=1.0, ended=3.0, arrivals=(1.5, 2.0, 2.5), completion_tokens=5)
    assert (found.first_token_seconds, found.seconds_per_token, found.tokens) == (0.5, 0.25, 5)
    assert Outcome(1.0, 2.0, (1.5,)).seconds_per_token is None


def test_figures_of_many_answers():
    answers = [Outcome(0.0, 4.0, (float(k), 4.0), 4, 10, 2) for k in (1, 2, 3)] + [Outcome(0.0, 10.0, error="timeout")]
    found = summary(ServeRequest(ttft=2000, tpot=1000), answers, cpu=0.6)
    assert found["seconds"] == 10 and found["requests"]["errors"] == {"timeout": 1}
    assert found["tokens"] == {"prompt": 30, "cached": 6, "output": 12, "counted_by": "usage"}
    assert found["throughput"] == {"requests_per_s": 0.3, "output_tokens_per_s": 1.2}
    assert found["goodput"]["share"] == 0.5 and found["goodput"]["requests_per_s"] == 0.2
    assert found["first_token"] == {
        "mean": 2, "p50": 2, "p95": pytest.approx(2.9), "p99": pytest.approx(2.98), "max": 3
    }  # fmt: skip
    assert found["client"]["cpu_seconds_per_chunk"] == pytest.approx(0.1)


# ---------------------------------------------------------------- the mix


def words(body):
    return body["messages"][0]["content"].split()


def test_the_mix_follows_its_seed_and_its_lengths():
    asked = ServeRequest(requests=20, input_tokens="5:9", output_tokens="2:3")
    bodies = list(mix(asked))
    assert bodies == list(mix(asked)) != list(mix(ServeRequest(**(vars(asked) | {"seed": 1}))))
    assert {len(words(body)) for body in bodies} == {5, 6, 7, 8, 9}
    assert {body["max_tokens"] for body in bodies} == {2, 3}


def test_a_shared_prefix_is_shared():
    halves = [words(body) for body in mix(ServeRequest(requests=5, input_tokens="40", shared_prefix=0.5))]
    assert len({tuple(half[:20]) for half in halves}) == 1 and len({tuple(half[20:]) for half in halves}) == 5


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file.write_text(json.dumps({"prompt": "p", "max_tokens": 9}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    chat = list(mix(ServeRequest(prompts=str(file), requests=3, output_tokens="4")))
    assert [body["max_tokens"] for body in chat] == [9, 4, 9] and chat[1]["messages"] == messages
    assert chat[0]["messages"] == [{"role": "user", "content": "p"}]
    text = list(mix(ServeRequest(prompts=str(file), requests=2, route="completions")))
    assert [body["prompt"] for body in text] == ["p", "s\nu"]


def test_lengths():
    rng = random.Random(0)
    drawn = sorted(next(numbers) for numbers in [lengths("lognormal:100:0.5", rng)] for _ in range(2001))
    assert 90 < drawn[1000] < 110 and drawn[0] >= 1 and drawn[-1] > 250
    for bad in ("0", "9:3", "-1", "a", "1:2:3", "lognormal:5", "lognormal:0:1", "normal:5:1", ""):
        with pytest.raises(UsageError, match="is no number of tokens"):
            lengths(bad, rng)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"url": "ftp://x"}, "not the address"), ({"url": "http://"}, "not the address"), ({"url": "http://a:b"}, "ad"),
     ({"route": "chats"}, "unknown route chats"), ({"shared_prefix": 1.5}, "no share"), ({"rate": 0.0}, "rate=0.0"),
     ({"requests": -1}, "requests=-1"), ({"input_tokens": "x"}, "x is no number"), ({"prompts": "none"}, "none cannot"),
     ({"timeout": float("inf")}, "timeout=inf")],
)  # fmt: skip
def test_impossible_mixes_are_refused(wrong, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        bench_serve(ServeRequest(**wrong))


def test_bad_lines_are_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    for text, sentence in (('{"prompt": "a"}\n{"x": 1}\n', "line 2 has neither"), ("", "is empty"), ("[1]", "line 1")):
        file.write_text(text)
        with pytest.raises(UsageError, match=sentence):
            next(mix(ServeRequest(prompts=str(file))))


def test_addresses():
    assert Endpoint.at("127.0.0.1:80") == Endpoint("127.0.0.1", 80, False, "/v1")
    assert Endpoint.at("https://a.b/v1/") == Endpoint("a.b", 443, True, "/v1")
    assert Endpoint.at("http://[::1]:8000/api/v1").host == "::1"


# ---------------------------------------------------------------- the engine by itself


def test_latency_of_the_engine(tiny):
    found = bench_latency(LatencyRequest(str(tiny), input_tokens=20, output_tokens=6, repeats=3, threads=1))
    assert set(found["first_token"]) == {"mean", "p50", "p95", "p99", "max"} and found["threads"] == 1
    assert found["decode_tokens_per_s"] == pytest.approx(1 / found["per_token"]["p50"])
    assert found["prefill_tokens_per_s"] == pytest.approx(20 / found["first_token"]["p50"])
    assert found["best_decode_tokens_per_s"] >= found["decode_tokens_per_s"]
    for wrong in ({"output_tokens": 1}, {"input_tokens": 0}, {"repeats": 0}):
        with pytest.raises(UsageError):
            bench_latency(LatencyRequest(str(tiny), **wrong))


def test_throughput_of_the_engine(tiny):
    asked = {"input_tokens": "8", "output_tokens": "5", "requests": 6, "concurrency": 3, "threads": 1}
    found = bench_throughput(ThroughputRequest(str(tiny), **asked))
    assert found["tokens"] == {"prompt": 48, "output": 30}
    assert found["throughput"]["all_tokens_per_s"] == pytest.approx(78 / found["seconds"])
    assert 10 <= found["steps"] <= 14, "two groups of three, a step for each token and a few for prompts"
    with pytest.raises(UsageError, match="requests=0"):
        bench_throughput(ThroughputRequest(str(tiny), requests=0))
    with pytest.raises(UsageError, match="context is 256"):
        bench_throughput(ThroughputRequest(str(tiny), input_tokens="300"))


def test_tables_for_people(tiny):
    with fake_server(first=0, gap=0.001, trouble={1: "refuse"}, reuse=2) as fake:
        text = served(bench_serve(to(fake, ttft=1000)))
    for words in ("5 of 6 requests answered", "1 x status 429", "counted by usage", "time to first token", "goodput"):
        assert words in text
    assert "prefill" in alone(bench_latency(LatencyRequest(str(tiny), input_tokens=4, output_tokens=3, repeats=1)))
    assert "steps" in together(bench_throughput(ThroughputRequest(str(tiny), "4", "3", requests=2)))

"""CE-CoLLM: two halves of a model over HTTP, on a tiny one."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shoestring.core.errors import UsageError
from shoestring.engine.engine import Engine
from shoestring.engine.exits import read_exits
from shoestring.engine.open import open_model
from shoestring.engine.request import RequestError, Sampling
from shoestring.lab import answering
from shoestring.lab.answering import GREEDY, PROMPTS, answers, exact
from shoestring.lab.split import SlowLink, cloud, random_heads
from shoestring.methods.serving._split import FORMS, Upper, fingerprint, packed, unpacked
from shoestring.methods.serving.ce_collm import CeCollmConfig, Edge, front
from shoestring.models.folder import ADAPTER_WEIGHTS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.folder(tmp_path_factory.mktemp("tiny"), num_hidden_layers=6)


@pytest.fixture(scope="module")
def heads(model: Path) -> Path:
    return random_heads(model, (2, 4), spread=0.6)


@pytest.fixture(scope="module")
def plain(model: Path) -> list[tuple[int, ...]]:
    with exact(model) as engine:
        return answers(engine)


@pytest.fixture
def upper(model: Path) -> Iterator[str]:
    with cloud(model, front, CeCollmConfig(after=2)) as url:
        yield url


def edge(model: Path, heads: Path, url: str = "", **options: Any) -> Engine:
    said = {"threshold": 1, "transfer": "fp32", **options}
    words = ",".join([f"ce_collm,heads={heads}", *(f"{k}={v}" for k, v in said.items())])
    return exact(model, plugs=[words + (f",cloud={url}" if url else "")])


def of(engine: Engine) -> Edge:
    assert isinstance(engine.hooks.exit, Edge)
    return engine.hooks.exit


def app() -> Any:
    return cloud.latest  # type: ignore[attr-defined]


# ---- exactness ----


def test_a_threshold_of_one_is_the_whole_model_and_asks_for_every_token(
    model: Path, heads: Path, upper: str, plain: list[tuple[int, ...]]
) -> None:
    with edge(model, heads, upper) as engine:
        assert answers(engine) == plain
        assert of(engine).counts == {"exit 1": 0, "exit 2": 0, "cloud": 96, "fallback": 0}
        assert {said.by for said in of(engine).log} == {"cloud"}


def test_fifty_prompts(model: Path, heads: Path, upper: str) -> None:
    rng = np.random.default_rng(5)
    prompts = [list(map(int, rng.integers(3, 64, rng.integers(1, 40)))) for _ in range(50)]
    with exact(model) as whole, edge(model, heads, upper) as engine:
        assert answers(engine, GREEDY, prompts) == answers(whole, GREEDY, prompts)


def test_a_lower_threshold_asks_for_fewer(model: Path, heads: Path, upper: str) -> None:
    asked = []
    for threshold in (1.0, 0.9, 0.6, 0.3, 0.0):
        with edge(model, heads, upper, threshold=threshold) as engine:
            answers(engine)
            asked.append(of(engine).counts["cloud"])
    assert asked[0] == 96 and asked == sorted(asked, reverse=True) and asked[1] > asked[3] and asked[-1] == 0


def test_what_the_cloud_says_does_not_depend_on_when_it_is_asked(
    model: Path, heads: Path, upper: str, plain: list[tuple[int, ...]]
) -> None:
    """What the edge answers, rightly, is computed in the cloud in bulk; the rest comes out as in single steps."""
    with edge(model, heads, upper, threshold=0.5) as engine:
        policy = of(engine)
        real, places = policy.leave, {tuple(prompt): line for prompt, line in zip(PROMPTS, plain)}

        def knowing(layer: int, hidden: Any, group: Any) -> list[Any]:
            found = real(layer, hidden, group)
            for i, answer in enumerate(group):
                at = len(answer.tokens) - answer.prompt_tokens
                if found[i] is not False and not _is_only(found[i]):  # an exit: let it say what is right
                    row = np.full(64, -9.0, np.float32)
                    row[places[tuple(answer.tokens[: answer.prompt_tokens])][at]] = 9.0
                    found[i] = row
            return found

        policy.leave = knowing  # type: ignore[method-assign]
        assert answers(engine) == plain
        assert 0 < policy.counts["cloud"] < 96
        counts = app().upper.counts
        assert counts["tokens"] > counts["infer"] > 0  # spans of more than one token


def _is_only(row: Any) -> bool:
    return bool(np.isneginf(row).any())


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_transfer(form: str) -> None:
    rows = np.random.default_rng(0).normal(0, 3, (7, 64)).astype(np.float32)
    data = packed(rows, form)
    width = {"fp32": 256, "fp16": 128, "bf16": 128, "int8": 68}[form]
    assert len(data) == 7 * width
    bound = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "int8": 1 / 253}[form]
    assert np.abs(unpacked(data, form, 7, 64) - rows).max() <= bound * np.abs(rows).max()
    assert not unpacked(packed(np.zeros((2, 64), np.float32), form), form, 2, 64).any()
    for bad in (data[:-1], data + b"x"):
        with pytest.raises(ValueError, match="bytes are not"):
            unpacked(bad, form, 7, 64)


def test_numbers_that_do_not_travel() -> None:
    with pytest.raises(OverflowError, match="transfer=bf16"):
        packed(np.full((1, 4), 1e5, np.float32), "fp16")
    with pytest.raises(ValueError, match="not finite"):
        unpacked(np.array([np.inf], "<f4").tobytes(), "fp32", 1, 1)


# ---- bytes and parameters ----


def test_every_byte_of_a_message_is_counted(model: Path, heads: Path, upper: str) -> None:
    wire = SlowLink(upper)
    with edge(model, heads, wire.url, transfer="fp16") as engine:
        answers(engine, GREEDY, [PROMPTS[0]])
        deadline = time.monotonic() + 5
        while not _idle(engine) and time.monotonic() < deadline:
            time.sleep(0.01)
        link = of(engine).link
        assert link is not None
        states = (len(PROMPTS[0]) + 15) * 64 * 2  # the last token is never computed
        assert states < link.bytes["up_states"] < states + 16 * 400
        assert link.bytes["down_infer"] < 16 * 250  # one id, not logits, not states
        up = sum(n for kind, n in link.bytes.items() if kind.startswith("up"))
        assert up == wire.bytes["up"]
        down = sum(n for kind, n in link.bytes.items() if kind.startswith("down"))
        assert abs(down - wire.bytes["down"]) <= 0.1 * down
    wire.close()


def _idle(engine: Engine) -> bool:
    link = of(engine).link
    return link is not None and not link._dialogues and not link._ended


def test_neither_side_has_the_layers_of_the_other(model: Path, heads: Path, upper: str) -> None:
    with edge(model, heads, upper) as engine:
        assert engine.facts.layers == 4 and app().upper.runner.facts.layers == 4  # 1..e2, e1+1..L
        whole = open_model(model, dtype="fp32").runner
        one = (whole.facts.weight_bytes - engine.facts.weight_bytes) / 2
        assert one == (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3 + 2 * 64) * 4
        whole.close()


def test_states_go_up_while_the_edge_computes(model: Path, heads: Path, upper: str) -> None:
    """On a slow wire: all is there before the sum of its parts."""
    wire = SlowLink(upper, bits_per_second=0.4e6, delay=0.01)  # 10 ms and the delay for a token's states
    with edge(model, heads, wire.url) as engine:
        run = engine.runner.run

        def slow(batch: Any, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
            time.sleep(0.02 if first else 0)
            return run(batch, first, last, hidden)

        engine.runner.run = slow  # type: ignore[method-assign]
        answers(engine, Sampling(max_tokens=3, ignore_eos=True), [PROMPTS[0]])
        began = time.perf_counter()
        answers(engine, Sampling(max_tokens=13, ignore_eos=True), [PROMPTS[0]])
        took = (time.perf_counter() - began) / 13
    wire.close()
    sending = 0.01 + (256 + 230) * 8 / 0.4e6
    asking = 2 * 0.01 + (230 + 180) * 8 / 0.4e6
    assert took < 0.02 + sending + asking, f"{took:.3f} s a token"


# ---- a link that fails ----


def test_a_cut_cable_and_a_mended_one(
    model: Path, heads: Path, upper: str, plain: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoestring.methods.serving._split_link._PROBE", 0.05)
    wire = SlowLink(upper)
    with edge(model, heads, wire.url, patience=0.5) as engine:
        stream = engine.stream(PROMPTS[3], Sampling(max_tokens=40, ignore_eos=True))
        by: list[str] = []
        for i, _ in enumerate(stream):
            by.append(of(engine).log[-1].by)
            if i == 9:
                wire.cut()
            if i == 19:
                wire.mend()
                time.sleep(0.2)
        assert set(by[:10]) == {"cloud"} and set(by[10:20]) == {"fallback"} and set(by[21:]) == {"cloud"}
        assert of(engine).counts["fallback"] in (10, 11)
        # What is written when the cable is whole again is what the whole model writes after those tokens.
        assert answers(engine) == plain
    wire.close()


def test_no_cloud_at_all(model: Path, heads: Path) -> None:
    with edge(model, heads, "http://127.0.0.1:9", patience=0.3) as down, edge(model, heads) as alone:
        assert answers(down, GREEDY, PROMPTS[:2]) == answers(alone, GREEDY, PROMPTS[:2])
        assert of(down).counts["fallback"] == 32 and of(alone).counts["exit 2"] == 32


def test_a_cloud_that_has_forgotten_is_told_again(
    model: Path, heads: Path, upper: str, plain: list[tuple[int, ...]]
) -> None:
    with edge(model, heads, upper) as engine:
        tokens: list[int] = []
        for delta in engine.stream(PROMPTS[1], GREEDY):
            tokens += delta.tokens
            if len(tokens) == 6:
                for name in list(app().upper.dialogues):
                    app().upper.end(name)
        assert tuple(tokens) == plain[1] and of(engine).counts["fallback"] == 0


def test_a_cloud_that_comes_back_with_another_model_is_not_believed(
    model: Path, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoestring.methods.serving._split_link._PROBE", 0.05)
    stranger = answering.folder(tmp_path, num_hidden_layers=6, seed=1)
    with cloud(model, front, CeCollmConfig(after=2)) as ours, cloud(stranger, front, CeCollmConfig(after=2)) as theirs:
        wire = SlowLink(ours)
        with edge(model, heads, wire.url, patience=0.5) as engine:
            assert engine.generate([PROMPTS[0]], GREEDY) and of(engine).counts["cloud"] == 16
            wire.cut()
            wire.lead_to(theirs)
            wire.mend()
            time.sleep(0.2)
            engine.generate([PROMPTS[0]], GREEDY)
            assert of(engine).counts["cloud"] == 16 and of(engine).counts["fallback"] == 16
        wire.close()


def test_a_cable_that_swallows_everything_is_waited_for_once(
    model: Path, heads: Path, upper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoestring.methods.serving._split_link._PROBE", 0.05)
    wire = SlowLink(upper)
    with edge(model, heads, wire.url, patience=0.3) as engine:
        engine.generate([PROMPTS[0]], GREEDY)
        wire.swallow()
        began = time.perf_counter()
        engine.generate([PROMPTS[0]], Sampling(max_tokens=40, ignore_eos=True))
        assert time.perf_counter() - began < 3 * 0.3 + 0.5 and of(engine).counts["fallback"] == 40
    wire.close()


def test_a_long_prompt_over_a_slow_cable_arrives(
    model: Path, heads: Path, upper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states take longer than anybody waits for one message, so they go in smaller ones."""
    monkeypatch.setattr("shoestring.methods.serving._split_link._PROBE", 0.02)
    wire = SlowLink(upper, bits_per_second=0.8e6)  # 100 tokens take 256 ms
    with edge(model, heads, wire.url, patience=0.15) as engine:
        for _ in engine.stream([3 + i % 50 for i in range(100)], Sampling(max_tokens=27, ignore_eos=True)):
            time.sleep(0.05)
            if of(engine).counts["cloud"]:
                break
        assert of(engine).counts["cloud"]
    wire.close()


def test_states_too_large_for_fp16_travel_as_bf16(
    model: Path, heads: Path, upper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edge(model, heads, upper, transfer="fp16") as engine:
        link = of(engine).link
        assert link is not None
        send = link.send
        monkeypatch.setattr(link, "send", lambda name, at, states: send(name, at, states * 1e6))
        engine.generate([PROMPTS[0]], GREEDY)
        assert of(engine).counts["cloud"] == 16


def test_a_cloud_that_talks_nonsense_is_not_believed(model: Path, heads: Path, upper: str) -> None:
    with edge(model, heads, upper, patience=0.3) as engine:
        link = of(engine).link
        assert link is not None
        once = link._once
        for said in ({"token": 10**6}, {"token": "x"}, {"token": -1}, {}, {"token": None}):
            link._once = lambda verb, path, kind, *given, said=said: (  # type: ignore[method-assign]
                (200, said) if kind == "infer" else once(verb, path, kind, *given)
            )
            engine.generate([PROMPTS[0]], Sampling(max_tokens=2, ignore_eos=True))
        assert of(engine).counts["fallback"] == 10


def test_an_answer_that_ends_or_is_dropped_leaves_nothing(model: Path, heads: Path, upper: str) -> None:
    with edge(model, heads, upper) as engine:
        answers(engine)
        for _ in engine.stream(PROMPTS[0], Sampling(max_tokens=40, ignore_eos=True)):
            break
        deadline = time.monotonic() + 5
        while app().upper.dialogues and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not app().upper.dialogues and app().upper.pool.used == 0


# ---- the cloud alone ----


@pytest.fixture
def half(model: Path) -> Iterator[Upper]:
    runner = open_model(model, dtype="fp32", cache_dtype="fp32", threads=1, span=(2, 6)).runner
    yield Upper(runner, 4)
    runner.close()


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 64)).astype(np.float32)


def said(upper: Upper, name: str, at: int) -> int:
    gathered = upper.gather([(name, at)])
    assert gathered
    batch, states, who = gathered
    tokens = upper.compute(batch, states)
    upper.settle(who, tokens)
    return tokens[0]


def test_a_span_is_its_single_steps(half: Upper) -> None:
    states = rows(12)
    half.take("a", 0, states)
    whole = said(half, "a", 11)
    for i in range(12):
        half.take("b", i, states[i : i + 1])
        one = said(half, "b", i)
    assert whole == one and half.dialogues["a"].said == half.dialogues["b"].said


def test_late_and_double_states_are_passed_over(half: Upper) -> None:
    states = rows(10)
    assert half.take("a", 0, states[:4]) == 4
    assert half.take("a", 0, states[:4]) == 4
    assert half.take("a", 2, states[2:6]) == 6
    assert half.take("a", 8, states[8:]) == 6  # a gap: tell me from 6
    assert half.take("a", 6, states[6:]) == 10
    half.take("b", 0, states)
    assert said(half, "a", 9) == said(half, "b", 9)


def test_pages_go_to_who_is_heard_of(half: Upper) -> None:
    half.take("old", 0, rows(30))
    said(half, "old", 29)
    half.take("new", 0, rows(40))
    said(half, "new", 39)
    assert "old" not in half.dialogues and half.counts["evicted"] == 1
    half.dialogues["new"].touched -= 100
    half.expire(50)
    assert not half.dialogues and half.pool.used == 0


# ---- a cloud among strangers ----


def test_frames_that_cannot_be_are_refused_and_the_cloud_goes_on(
    model: Path, heads: Path, upper: str, plain: list[tuple[int, ...]]
) -> None:
    rng, nan, whole = np.random.default_rng(0), float("nan"), packed(rows(3), "fp32")
    good = {"start": 0, "count": 3, "form": "fp32", "rows": whole}
    states: list[Any] = [{**good, name: value} for name in good for value in _ODD] + [
        {**good, "rows": np.full((3, 64), nan, "<f4").tobytes()}, {**good, "start": 10_000}, {}, [], 5, None,
    ]  # fmt: skip
    asked = [{"at": at, "patience": 0.0} for at in _ODD] + [{"at": 0, "patience": p} for p in (nan, -1, "x", 1e999)]
    for kind, frames in (("states", states), ("infer", asked), ("hello", [{n: _ODD[-1]} for n in ("after", "x")])):
        if kind == "infer":
            assert _post(upper, "a/states", msgpack.packb(good))[0] == 200
        for frame in frames:
            status, _ = _post(upper, "hello" if kind == "hello" else f"a/{kind}", msgpack.packb(frame))
            assert status in (400, 409), (kind, str(frame)[:200])
    for kind in ("a/states", "a/infer", "hello"):
        for size in (0, 1, 7, 300):
            assert _post(upper, kind, rng.bytes(size))[0] in (400, 409)
        assert _post(upper, kind, b"\x91" * 5000)[0] in (400, 409)  # nested deeper than anybody reads
        assert _post(upper, kind, b"\xdd\xff\xff\xff\xff")[0] in (400, 409)  # says that four milliards will follow
    assert app().upper.waiting == 3 and len(app().upper.dialogues) == 1
    with edge(model, heads, upper) as engine:
        assert answers(engine) == plain


_ODD = [-1, -5, 1.5, float("inf"), True, None, "x", b"y", [1], {"a": 1}, 2**63, "z" * 300]


def _post(url: str, path: str, body: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(f"{url}/split/{path}", body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, msgpack.unpackb(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_numbers_without_bounds_stay_with_who_sent_them(
    model: Path, heads: Path, upper: str, plain: list[tuple[int, ...]]
) -> None:
    wild = np.full((40, 64), 3e38, np.float32)
    _post(upper, "a/states", msgpack.packb({"start": 0, "count": 40, "form": "fp32", "rows": packed(wild, "fp32")}))
    assert _post(upper, "a/infer", msgpack.packb({"at": 39}))[0] == 200
    app().upper.end(":a")  # its pages are others' next
    with edge(model, heads, upper) as engine:
        assert answers(engine) == plain


def test_layers_that_fail_once_do_not_end_the_cloud(
    model: Path, heads: Path, upper: str, plain: list[tuple[int, ...]]
) -> None:
    compute, calls = app().upper.compute, []

    def failing(*given: Any) -> list[int]:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("for once")
        return compute(*given)  # type: ignore[no-any-return]

    app().upper.compute = failing
    with edge(model, heads, upper) as engine:
        answers(engine)
        assert 0 < of(engine).counts["fallback"] <= len(PROMPTS)
        assert answers(engine) == plain


def test_an_ask_that_is_said_again_does_not_wait_for_ever(upper: str) -> None:
    body = {"start": 0, "count": 3, "form": "fp32", "rows": packed(rows(3), "fp32")}
    assert _post(upper, "a/states", msgpack.packb(body))[0] == 200
    slow, real = threading.Event(), app().upper.compute
    app().upper.compute = lambda *given: (slow.wait(5), real(*given))[1]
    with ThreadPoolExecutor(4) as pool:
        asks = [pool.submit(_post, upper, "a/infer", msgpack.packb({"at": at})) for at in (0, 1, 2, 2)]
        time.sleep(0.2)
        slow.set()
        assert {ask.result(5)[0] for ask in asks} <= {200, 409} and 200 in {ask.result()[0] for ask in asks}


def test_states_of_who_is_not_heard_of_make_room(half: Upper) -> None:
    for number in range(20):
        half.take(f"d{number}", 0, rows(16))
        assert half.waiting <= 4 * 16
    assert list(half.dialogues) == ["d16", "d17", "d18", "d19"]
    said(half, "d19", 15)
    for name in list(half.dialogues):
        half.end(name)
    assert half.waiting == 0 and half.pool.used == 0


# ---- what is refused ----


def test_another_model_or_another_cut(model: Path, heads: Path, upper: str, tmp_path: Path) -> None:
    other = random_heads(model, (1, 4))
    with pytest.raises(UsageError, match="after is 2 here and 1 there"):
        edge(model, other, upper)
    random_heads(model, (2, 4), spread=0.6)
    stranger = answering.folder(tmp_path, num_hidden_layers=6, seed=1)
    assert fingerprint(stranger) != fingerprint(model)
    with pytest.raises(UsageError, match="fingerprint is"):
        edge(stranger, heads, upper)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": 1.5}, "threshold=1.5"), ({"transfer": "fp8"}, "transfer=fp8"), ({"patience": 0}, "patience=0"),
        ({"cloud": "ftp://x"}, "is no address"), ({"heads": ""}, "An edge needs heads"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(model: Path, heads: Path, change: dict[str, Any], said: str) -> None:
    given = {"heads": heads, **change}
    words = ",".join(["ce_collm", *(f"{k}={v}" for k, v in given.items() if v != "")])
    with pytest.raises(UsageError, match=said):
        exact(model, plugs=[words])


@pytest.mark.parametrize("after", [0, 6, 9])
def test_a_cloud_without_layers(model: Path, after: int) -> None:
    missing = pytest.raises(UsageError, match="after=|There are no layers")
    with missing, cloud(model, front, replace(CeCollmConfig(), after=after)):
        pass


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.5),
        Sampling(logprobs=2),
        Sampling(repetition_penalty=1.1),
        Sampling(logit_bias=((3, 1.0),)),
        Sampling(n=2),
    ],
)
def test_sampling_is_refused(model: Path, heads: Path, sampling: Sampling) -> None:
    with edge(model, heads) as engine, pytest.raises(RequestError, match="greedily only"):
        engine.generate([PROMPTS[0]], sampling)


@pytest.mark.parametrize("part", ["up", "down", "norm.weight"])
def test_heads_that_are_not_those_of_the_model(model: Path, heads: Path, part: str, tmp_path: Path) -> None:
    for file in heads.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    name = next(n for n in tensors if n.endswith(part))
    runner = open_model(model, dtype="fp32").runner
    tensors[name] = np.zeros_like(tensors[name]) if part == "up" else tensors[name][:-1]
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UsageError, match="never trained" if part == "up" else "does not fit"):
        read_exits(tmp_path, runner)
    runner.close()

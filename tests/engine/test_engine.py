"""The engine's own facts: what it refuses, what it counts, what its answers carry."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.ledger import Ledger
from shoestring.engine.engine import Engine
from shoestring.engine.request import Request, RequestError, Sampling
from shoestring.engine.runner import Batch

PROMPT = [10, 20, 30, 40, 50]


def opened(model: Path, **options: Any) -> Engine:
    return Engine(model, **{"runner": "native", "threads": 1, **options})


@pytest.mark.parametrize(
    ("request_", "param", "code"),
    [
        (Request([]), "prompt", ""),
        (Request([3, 259]), "prompt", ""),
        (Request([-1]), "prompt", ""),
        (Request([3] * 128), "prompt", "context_length_exceeded"),
        (Request([3], adapter="nobody"), "model", "model_not_found"),
        (Request([3], Sampling(temperature=float("nan"))), "temperature", "invalid_value"),
    ],
    ids=["empty", "outside", "negative", "long", "adapter", "sampling"],
)
def test_what_cannot_be_served_is_refused(model: Path, request_: Request, param: str, code: str) -> None:
    with opened(model) as engine:
        with pytest.raises(RequestError) as caught:
            engine.submit(request_)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert engine.idle and engine.counts().blocks_used == 0


def test_a_request_that_fills_the_context_ends_by_length(model: Path) -> None:
    with opened(model) as engine:
        ((answer,),) = engine.generate([[3] * 120], Sampling(ignore_eos=True))
        assert answer.finish_reason == "length" and len(answer.tokens) == 8


def test_answers_of_one_request_share_its_prompt(model: Path) -> None:
    sampling = Sampling(n=3, temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
    prompt = list(range(3, 43))
    with opened(model) as engine:
        (together,) = engine.generate([prompt], sampling)
        assert len({answer.tokens for answer in together}) == 3
        # 40 tokens of prompt were computed once, not three times: 3 x 12 answers, of which the last is never computed.
        assert engine.counts().steps <= 1 + 12
        assert engine.counts().cache_bytes_peak < 3 * 4 * engine.facts.block_bytes
        engine.pool.check([])


def test_prompt_logprobs_do_not_depend_on_chunks_or_on_the_prefix_cache(model: Path) -> None:
    sampling = Sampling(max_tokens=1, prompt_logprobs=2)
    prompt = list(range(3, 60))
    found = []
    for budget in (16, 64):
        with opened(model, max_step_tokens=budget) as engine:
            for _ in range(2):
                ((answer,),) = engine.generate([prompt], sampling)
                found.append(answer.prompt_logprobs)
    assert len(found[0]) == len(prompt) and found[0][0] is None
    assert all(one is not None and one.token == token for one, token in zip(found[0][1:], prompt[1:]))
    assert all(other == found[0] for other in found)


def test_a_prompt_is_computed_again_under_an_id_that_comes_again(model: Path) -> None:
    found = []
    with opened(model) as engine:
        for _ in range(2):
            engine.submit(Request([5, 6, 7] * 12, Sampling(max_tokens=1, prompt_logprobs=0), id="mine"))
            found.append([p for _ in range(3) for delta in engine.step() for p in delta.prompt_logprobs])
    assert len(found[0]) == 36 and found[1] == found[0]


def test_an_embedding_is_the_mean_of_normed_states(model: Path) -> None:
    prompt = list(range(3, 50))
    with opened(model, max_step_tokens=16) as engine:
        (vector,) = engine.embed([prompt])
        runner, size = engine.runner, len(prompt)
        numbers = [np.array(x, np.int32) for x in (prompt, range(size), [0, size], [0], [range(3)])]
        rows = runner.normed(runner.run(Batch(*numbers)), np.arange(size, dtype=np.int32)).mean(0)
        np.testing.assert_allclose(vector, rows / np.linalg.norm(rows), atol=1e-5)


def test_an_adapter_leaves_when_its_last_request_has_ended(model: Path, adapters: dict[str, Path]) -> None:
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    with opened(model, adapters={"first": adapters["first"]}) as engine:
        ((alone,),) = engine.generate([PROMPT], sampling, adapter="first")
        request = Request(PROMPT, sampling, adapter="first")
        engine.submit(request)
        engine.step()
        engine.drop_adapter("first")
        with pytest.raises(RequestError, match="no adapter first"):
            engine.submit(Request(PROMPT, sampling, adapter="first"))
        tokens = []
        while not engine.idle:
            tokens += [token for delta in engine.step() for token in delta.tokens]
        assert alone.tokens[-len(tokens) :] == tuple(tokens)
        assert engine.adapters == {}
        # Another one of that name starts afresh: nothing that the first left in pages is found.
        engine.add_adapter("first", adapters["second"])
        ((second,),) = engine.generate([PROMPT], sampling, adapter="first")
        assert second.usage.cached_tokens == 0 and second.tokens != alone.tokens


@pytest.mark.parametrize("name", ["", "first"])
def test_names_of_adapters_are_unique(model: Path, adapters: dict[str, Path], name: str) -> None:
    with opened(model, adapters={"first": adapters["first"]}) as engine, pytest.raises(UsageError, match="taken"):
        engine.add_adapter(name, adapters["second"])


def test_the_cache_keeps_its_limit(model: Path) -> None:
    with opened(model) as engine:
        page = engine.facts.block_bytes
    with opened(model, memory=4 * page + page // 2) as engine:
        counts = engine.counts()
        assert counts.blocks_total == 4 and counts.cache_bytes_limit == 4 * page and engine.context == 64
        engine.generate([[3 + i] * 20 for i in range(6)], Sampling(max_tokens=20, ignore_eos=True))
        assert engine.counts().cache_bytes_peak <= 4 * page and engine.counts().blocks_used == 0
    with pytest.raises(UsageError, match="Give at least"):
        opened(model, memory=page)
    with pytest.raises(DoesNotFit):
        opened(model, memory=1 << 60, max_sequences=1 << 40, max_step_tokens=1 << 40)


def test_its_account_is_exact(model: Path) -> None:
    with opened(model) as engine, Ledger() as ledger:
        with ledger.stage("answers") as stage:
            engine.generate([PROMPT, PROMPT[:3]], Sampling(max_tokens=9, ignore_eos=True))
            engine.account(stage)
        figures = {name: ledger.figure("answers", name) for name in ("tokens", "prompt_tokens", "cache_bytes")}
        values = {name: figure.value for name, figure in figures.items() if figure}
        assert values == {"tokens": 18, "prompt_tokens": 8, "cache_bytes": 2 * engine.facts.block_bytes}


def test_leaving_a_stream_cancels_it(model: Path) -> None:
    with opened(model) as engine:
        stream = engine.stream(PROMPT, Sampling(max_tokens=50, ignore_eos=True))
        next(stream)
        stream.close()
        assert engine.counts().running == 0 and engine.counts().blocks_used == 0
        assert engine.counts().finished == {"abort": 1}


def test_a_stream_that_nobody_reads_ends_when_it_is_dropped(model: Path) -> None:
    with opened(model) as engine:
        stream = engine.stream(PROMPT, Sampling(max_tokens=50, ignore_eos=True))
        assert engine.counts().waiting == 1
        del stream
        assert engine.counts().waiting == engine.counts().running == 0 and not engine._streams
        assert engine.counts().finished == {"abort": 1}


def test_threads_answer_together(model: Path) -> None:
    """Each gets what it would alone, though any of them computes for all."""
    prompts = [[5 + i, 6, 7] for i in range(4)]
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    with opened(model) as engine, ThreadPoolExecutor(4) as threads:
        alone = [engine.generate([prompt], sampling)[0][0].tokens for prompt in prompts]
        vectors = engine.embed(prompts)

        def whole(prompt: list[int]) -> Any:
            return engine.generate([prompt], sampling)[0][0].tokens

        def pieces(prompt: list[int]) -> Any:
            return tuple(token for delta in engine.stream(prompt, sampling) for token in delta.tokens)

        ways: list[Callable[[], Any]] = [partial(whole, p) for p in prompts[:2]]
        ways += [partial(pieces, prompts[2]), lambda: engine.embed([prompts[3]])[0]]
        for _ in range(5):
            found = [task.result() for task in [threads.submit(way) for way in ways]]
            assert found[:3] == alone[:3]
            np.testing.assert_array_equal(found[3], vectors[3])
        assert engine.idle and not engine._streams


def test_streams_are_read_in_turns(model: Path) -> None:
    """With others between their pieces: whoever steps, each gets what is its own."""
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    others = [[5, 6, 7], [8, 9]]
    with opened(model) as engine:
        alone = [engine.generate([prompt], sampling)[0][0].tokens for prompt in others]
        streams = [engine.stream(prompt, sampling) for prompt in others]
        found: list[list[int]] = [[], []]
        for at in (0, 1, 1, 0):
            found[at] += next(streams[at]).tokens
        engine.generate([PROMPT], Sampling(max_tokens=20, ignore_eos=True))
        engine.embed([PROMPT])
        for at in (0, 1):
            found[at] += [token for delta in streams[at] for token in delta.tokens]
        assert [tuple(tokens) for tokens in found] == alone
        assert engine.idle and not engine._streams


def test_a_closed_engine_says_so(model: Path) -> None:
    engine = opened(model)
    stream = engine.stream(PROMPT, Sampling(max_tokens=50, ignore_eos=True))
    next(stream)
    engine.close()
    engine.close()
    assert [delta.finish_reason for delta in stream] == ["abort"]
    with pytest.raises(RequestError, match="The engine is closed"):
        engine.generate([PROMPT])

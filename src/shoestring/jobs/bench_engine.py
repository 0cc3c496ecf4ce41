"""Speed of the engine by itself, without a server: one answer at a time, or many together."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoestring.core.errors import UsageError
from shoestring.jobs.bench import lengths, spread

if TYPE_CHECKING:
    from shoestring.engine.engine import Engine

_FIRST_WORD = 100  # ids below are special tokens in many vocabularies


@dataclass(frozen=True)
class LatencyRequest:
    """One answer at a time. Every repeat has the same prompt of fixed random tokens, and no token ends the answer.

    Attributes:
        input_tokens: length of the prompt.
        output_tokens: length of the answer.
        repeats: timed answers, after one that is not timed.
        runner: native, torch, or auto.
        dtype: what to compute in; auto computes on the weights as they are stored.
        cache_dtype: keys and values in bf16, int8 or fp32.
        threads: of the arithmetic; default: one for each core that the process may use.
    """

    model: str = "smollm2"
    input_tokens: int = 128
    output_tokens: int = 128
    repeats: int = 5
    runner: str = "auto"
    dtype: str = "auto"
    cache_dtype: str = "bf16"
    threads: int | None = None


@dataclass(frozen=True)
class ThroughputRequest:
    """Many answers together, all there from the beginning. Numbers of tokens are written 128 or LOW:HIGH.

    Attributes:
        input_tokens: length of the prompts, of random tokens.
        output_tokens: length of the answers; no token ends them.
        requests: how many answers.
        concurrency: answers computed at the same time.
        runner: native, torch, or auto.
        dtype: what to compute in; auto computes on the weights as they are stored.
        cache_dtype: keys and values in bf16, int8 or fp32.
        threads: of the arithmetic; default: one for each core that the process may use.
        seed: of lengths and tokens.
    """

    model: str = "smollm2"
    input_tokens: str = "32:512"
    output_tokens: str = "16:128"
    requests: int = 64
    concurrency: int = 16
    runner: str = "auto"
    dtype: str = "auto"
    cache_dtype: str = "bf16"
    threads: int | None = None
    seed: int = 0


def bench_latency(request: LatencyRequest) -> dict[str, Any]:
    """Time of prompt and of each token after the first.

    Returns:
        `first_token` and `per_token` in seconds as {mean, p50, p95, p99, max} over the repeats, with
        `prefill_tokens_per_s` and `decode_tokens_per_s` at the median, `best_decode_tokens_per_s` at the quickest;
        `open_seconds`, and what was measured with.

    Raises:
        UsageError: impossible numbers, or a model that cannot be opened.
    """
    from shoestring.engine.request import Sampling

    _above_zero(request, "input_tokens", "repeats")
    if request.output_tokens < 2:
        raise UsageError(f"output_tokens={request.output_tokens} leaves no token after the first", remedy="Give 2")
    began = time.perf_counter()
    with _opened(request, 1) as engine:
        opened = time.perf_counter() - began
        prompt = _tokens(random.Random(0), request.input_tokens, engine)
        first, each = [], []
        for turn in range(request.repeats + 1):
            sampling = Sampling(max_tokens=request.output_tokens if turn else 2, ignore_eos=True)
            usage = engine.generate([prompt], sampling)[0][0].usage
            if turn:
                first.append(usage.first_token - usage.started)
                each.append((usage.last_token - usage.first_token) / (usage.completion_tokens - 1))
        return {
            "model": engine.name,
            "open_seconds": opened,
            "first_token": spread(first),
            "per_token": spread(each),
            "prefill_tokens_per_s": request.input_tokens / spread(first)["p50"],
            "decode_tokens_per_s": 1 / spread(each)["p50"],
            "best_decode_tokens_per_s": 1 / min(each),
            **_circumstances(engine, request),
        }


def bench_throughput(request: ThroughputRequest) -> dict[str, Any]:
    """Tokens a second when nothing but the engine limits them.

    Returns:
        `seconds`, `tokens` {prompt, output}, `throughput` {requests, output tokens, all tokens a second}, `steps`, and
        what was measured with.

    Raises:
        UsageError: impossible numbers, or a model that cannot be opened.
    """
    from shoestring.engine.request import Request, Sampling

    _above_zero(request, "requests", "concurrency")
    rng = random.Random(request.seed)
    inputs, outputs = lengths(request.input_tokens, rng), lengths(request.output_tokens, rng)
    with _opened(request, request.concurrency) as engine:
        engine.generate([_tokens(rng, 16, engine)], Sampling(max_tokens=2, ignore_eos=True))
        work = [
            Request(_tokens(rng, next(inputs), engine), Sampling(max_tokens=next(outputs), ignore_eos=True))
            for _ in range(request.requests)
        ]
        for item in work:
            engine.check(item)
        before, began = engine.counts(), time.perf_counter()
        for item in work:
            engine.submit(item)
        while not engine.idle:
            engine.step()
        seconds, after = time.perf_counter() - began, engine.counts()
        prompt, output = sum(len(item.prompt) for item in work), after.generation_tokens - before.generation_tokens
        return {
            "model": engine.name,
            "seconds": seconds,
            "tokens": {"prompt": prompt, "output": output},
            "throughput": {
                "requests_per_s": request.requests / seconds,
                "output_tokens_per_s": output / seconds,
                "all_tokens_per_s": (prompt + output) / seconds,
            },
            "steps": after.steps - before.steps,
            **_circumstances(engine, request),
        }


def _opened(request: LatencyRequest | ThroughputRequest, sequences: int) -> Engine:
    from shoestring.engine.engine import Engine

    return Engine(
        request.model,
        runner=request.runner,
        dtype=request.dtype,
        cache_dtype=request.cache_dtype,
        threads=request.threads,
        max_sequences=sequences,
        prefix_cache=False,
    )


def _tokens(rng: random.Random, count: int, engine: Engine) -> list[int]:
    low = _FIRST_WORD if engine.facts.vocab > 2 * _FIRST_WORD else 0
    return [rng.randrange(low, engine.facts.vocab) for _ in range(count)]


def _circumstances(engine: Engine, request: LatencyRequest | ThroughputRequest) -> dict[str, Any]:
    return {
        "backend": engine.facts.backend,
        "precision": engine.facts.precision,
        "cache": request.cache_dtype,
        "threads": request.threads or len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }


def _above_zero(request: Any, *names: str) -> None:
    for name in names:
        if getattr(request, name) < 1:
            raise UsageError(f"{name}={getattr(request, name)} is not above zero", remedy="Give 1 or more")

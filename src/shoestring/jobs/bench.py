"""Speed as a client sees it: any OpenAI-compatible endpoint under a request mix, or the engine by itself."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.jobs._endpoint import Endpoint, Outcome, outcome

# Short common words: with a blank before them each is one token in most vocabularies.
_PROSE = (
    "the of and to in is that it was for on are as with they be at one have this from or had by word but what some we "
    "can out other were all there when up use your how said an each she which do their time if will way about many "
    "then them write would like so these her long make thing see him two has look more day could go come did number "
    "sound no most people my over know water than call first who may down side been now find"
)
_WORDS = _PROSE.split()
_CONCURRENCY, _REQUESTS = 16, 64


@dataclass(frozen=True)
class ServeRequest:
    """What `bench serve` sends and how. A number of tokens is written 128, LOW:HIGH or lognormal:MEDIAN:SIGMA.

    Attributes:
        url: address of the server, with or without /v1 at its end; its key is read from OPENAI_API_KEY.
        model: the name to ask for; None takes the first that the server lists.
        route: chat or completions.
        prompts: a JSONL file with `prompt` or `messages` in each line, and `max_tokens` if it likes; default: random
            words.
        input_tokens: length of the random prompts, about one token a word.
        output_tokens: the longest answer; with --body ignore_eos=true, where the server knows it, the length.
        shared_prefix: share of every random prompt that is the same in all, 0 to 1.
        concurrency: requests under way at once; default 16, or no limit with a rate.
        rate: requests a second, with exponential gaps; default: a new one as soon as another has ended.
        requests: how many to send; default 64, or no limit with seconds.
        seconds: stop sending after so many seconds.
        warmup: requests sent before the clock starts.
        body: a field of every request's body; repeat for more.
        ttft: limit of the time to first token in milliseconds, for goodput.
        tpot: limit of the time per output token in milliseconds, for goodput.
        timeout: seconds after which a request is given up.
        seed: of lengths, words and gaps.
    """

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    route: str = "chat"
    prompts: str | None = None
    input_tokens: str = "32:512"
    output_tokens: str = "16:128"
    shared_prefix: float = 0.0
    concurrency: int | None = None
    rate: float | None = None
    requests: int | None = None
    seconds: float | None = None
    warmup: int = 1
    body: Mapping[str, Any] = field(default_factory=dict)
    ttft: float | None = None
    tpot: float | None = None
    timeout: float = 300.0
    seed: int = 0


def bench_serve(request: ServeRequest, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Send the mix, and report what came back.

    Returns:
        `requests` {sent, done, errors by kind}, `seconds` from the first to the last byte, `tokens` with what they were
        counted by, `throughput`, `goodput` (None without limits), and `first_token`, `per_token`, `between_chunks` and
        `request` in seconds as {mean, p50, p95, p99, max}; `client` has the CPU this side took for each token. Delays
        count from when a request was due, so a rate that cannot be kept shows as waiting.

    Raises:
        UsageError: an impossible mix. ShoestringError: no server, or not one request was answered.
    """
    _check(request)
    endpoint = Endpoint.at(request.url, os.environ.get("OPENAI_API_KEY", ""))
    return asyncio.run(_serve(request, endpoint, say))


async def _serve(request: ServeRequest, endpoint: Endpoint, say: Callable[[str], None]) -> dict[str, Any]:
    model = request.model
    if model is None:
        listed = (await endpoint.get("/models")).get("data") or []
        if not listed:
            raise UsageError(f"{request.url} lists no model", remedy="Name one with --model")
        model = str(listed[0]["id"])
    route = {"chat": "/chat/completions", "completions": "/completions"}[request.route]

    async def send(body: Mapping[str, Any], due: float) -> Any:
        whole = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **body, **request.body}
        return await endpoint.send("POST", route, whole, request.timeout, due)

    bodies = mix(request)
    for body in islice(mix(request, seed=request.seed - 1), request.warmup):
        warm = outcome(await send(body, time.perf_counter()))
        if warm.error:
            raise ShoestringError(f"{request.url} does not answer {model}", warm.error)
    say(f"Sending to {model} at {request.url}")
    cpu = time.process_time()
    heard = await (_paced if request.rate else _crowd)(request, bodies, send)
    cpu = time.process_time() - cpu
    outcomes = [outcome(h) for h in heard]
    return summary(request, outcomes, cpu) | {"model": model, "url": request.url, "route": request.route}


async def _crowd(request: ServeRequest, bodies: Iterator[dict[str, Any]], send: Any) -> list[Any]:
    """A fixed number of clients, each with its next request as soon as the last is over."""
    heard: list[Any] = []
    end = time.perf_counter() + request.seconds if request.seconds else math.inf

    async def client() -> None:
        for body in bodies:
            heard.append(await send(body, time.perf_counter()))
            if time.perf_counter() >= end:
                return

    await asyncio.gather(*(client() for _ in range(request.concurrency or _CONCURRENCY)))
    return heard


async def _paced(request: ServeRequest, bodies: Iterator[dict[str, Any]], send: Any) -> list[Any]:
    """Requests at random moments, whether or not the earlier ones are answered."""
    assert request.rate
    rng = random.Random(f"{request.seed} gaps")
    gate = asyncio.Semaphore(request.concurrency or 1_000_000)
    begin = time.perf_counter()
    due = begin

    async def one(body: dict[str, Any], due: float) -> Any:
        async with gate:
            return await send(body, due)

    tasks = []
    for body in bodies:
        due += rng.expovariate(request.rate)
        if request.seconds and due - begin > request.seconds:
            break
        await asyncio.sleep(due - time.perf_counter())
        tasks.append(asyncio.ensure_future(one(body, due)))
    return list(await asyncio.gather(*tasks))


# ---------------------------------------------------------------- the mix


def mix(request: ServeRequest, seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Bodies of the requests, the same ones for the same seed; endless when only `seconds` limits them."""
    rng = random.Random(request.seed if seed is None else seed)
    limit = request.requests or (None if request.seconds else _REQUESTS)
    rows = _rows(Path(request.prompts)) if request.prompts else None
    common = random.Random("the same for all").choices(_WORDS, k=1 << 16)
    inputs, outputs = lengths(request.input_tokens, rng), lengths(request.output_tokens, rng)
    number = 0
    while limit is None or number < limit:
        row = rows[number % len(rows)] if rows else {}
        length = next(inputs)
        shared = min(round(length * request.shared_prefix), len(common))
        words = "" if row else " ".join(common[:shared] + rng.choices(_WORDS, k=length - shared))
        text = row.get("prompt", words)
        messages = row.get("messages") or [{"role": "user", "content": text}]
        asked = {"messages": messages} if request.route == "chat" else {"prompt": text or _plain(messages)}
        yield asked | {"max_tokens": row.get("max_tokens") or next(outputs)}
        number += 1


def lengths(written: str, rng: random.Random) -> Iterator[int]:
    """Numbers of tokens for 128, 32:512 (evenly) or lognormal:128:0.8 (median and sigma); each at least 1.

    Raises:
        UsageError: by the call: it is none of these.
    """
    parts = written.split(":")
    try:
        if parts[0] == "lognormal":
            median, sigma = (float(part) for part in parts[1:])
            draw: Callable[[], float] = lambda: rng.lognormvariate(math.log(median), sigma)
            right = median >= 1 and 0 <= sigma <= 3
        else:
            low, high = int(parts[0]), int(parts[-1])
            draw = lambda: rng.randint(low, high)
            right = 1 <= low <= high and len(parts) <= 2
    except ValueError:
        right = False
    if not right:
        raise UsageError(
            f"{written} is no number of tokens", remedy="Write 128, 32:512 or lognormal:128:0.8 (median and sigma)"
        )
    return (max(1, round(draw())) for _ in iter(int, 1))


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read", str(error)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not (row.get("prompt") or row.get("messages")):
            raise UsageError(f"{file}, line {number} has neither prompt nor messages", remedy='Write {"prompt": "..."}')
        rows.append(row)
    if not rows:
        raise UsageError(f"{file} is empty", remedy='Write a line {"prompt": "..."} for each request')
    return rows


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)


def _check(request: ServeRequest) -> None:
    if request.route not in ("chat", "completions"):
        raise UsageError(f"unknown route {request.route}", remedy="Use chat or completions")
    if not 0 <= request.shared_prefix <= 1:
        raise UsageError(f"shared_prefix={request.shared_prefix} is no share", remedy="Give 0 to 1")
    above_zero = ("concurrency", "rate", "requests", "seconds", "ttft", "tpot", "timeout")
    for name in above_zero:
        value = getattr(request, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name}={value} is not above zero", remedy="Leave it out for the default")
    next(mix(request))


# ---------------------------------------------------------------- what came back


def summary(request: ServeRequest, outcomes: Sequence[Outcome], cpu: float) -> dict[str, Any]:
    """Figures over the requests that were answered whole.

    Raises:
        ShoestringError: there is none.
    """
    errors = Counter(o.error for o in outcomes if o.error)
    done = [o for o in outcomes if not o.error]
    if not done:
        kinds = "; ".join(f"{kind} ({count})" for kind, count in errors.most_common(3))
        raise ShoestringError(f"None of {len(outcomes)} requests was answered", kinds)
    seconds = max(o.ended for o in outcomes) - min(o.due for o in outcomes)
    counted = sum(o.completion_tokens is not None for o in done)
    output = sum(o.tokens for o in done)
    chunks = sum(len(o.arrivals) for o in outcomes)
    gaps = [later - earlier for o in done for earlier, later in zip(o.arrivals, o.arrivals[1:])]
    return {
        "requests": {"sent": len(outcomes), "done": len(done), "errors": dict(errors.most_common())},
        "seconds": seconds,
        "tokens": {
            "prompt": sum(o.prompt_tokens or 0 for o in done),
            "cached": sum(o.cached_tokens or 0 for o in done),
            "output": output,
            "counted_by": "usage" if counted == len(done) else "usage and chunks" if counted else "chunks",
        },
        "throughput": {"requests_per_s": len(done) / seconds, "output_tokens_per_s": output / seconds},
        "goodput": _goodput(request, done, len(outcomes), seconds),
        "first_token": spread([o.first_token_seconds for o in done]),
        "per_token": spread([o.seconds_per_token for o in done if o.seconds_per_token is not None]),
        "between_chunks": spread(gaps),
        "request": spread([o.ended - o.due for o in done]),
        "client": {
            "cpu_seconds_per_chunk": cpu / max(chunks, 1),
            "cpu_share_of_a_core": cpu / seconds,
            "load_average": os.getloadavg()[0],
        },
    }


def _goodput(request: ServeRequest, done: Sequence[Outcome], sent: int, seconds: float) -> dict[str, Any] | None:
    if request.ttft is None and request.tpot is None:
        return None
    first, each = ((limit or math.inf) / 1e3 for limit in (request.ttft, request.tpot))
    good = sum(o.first_token_seconds <= first and (o.seconds_per_token or 0) <= each for o in done)
    limits = {"ttft_ms": request.ttft, "tpot_ms": request.tpot}
    return {"requests_per_s": good / seconds, "share": good / sent, "limits": limits}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum; nothing of nothing."""
    if not values:
        return {}
    ordered = sorted(values)

    def percentile(share: float) -> float:
        at = share * (len(ordered) - 1)
        low = ordered[int(at)]
        return low + (ordered[math.ceil(at)] - low) * (at - int(at))

    found = {f"p{p}": percentile(p / 100) for p in (50, 95, 99)}
    return {"mean": statistics.fmean(ordered), **found, "max": ordered[-1]}

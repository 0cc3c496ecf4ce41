"""Attention offloading beside one process: what is sent, what is kept, what taking turns gains, what a plan says."""

import random
import statistics
import time
from typing import Any

import psutil

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.engine.engine import Engine
from shoestring.engine.request import Request, Sampling
from shoestring.lab.arms import MODEL, Arms

_HERE = (
    "SmolLM2-135M-Instruct in its own 4 bits, float32 keys and values, 6 answers of 32 tokens to prompts of 512 drawn "
    "token ids, one core for the model and one for a worker"
)
CLAIMS = (
    Claim(
        "bytes",
        paper="(2 + 2/G) e d B L bytes a step between model and attention",
        here=_HERE + "; payload counted on the link beside the formula",
        measure="payload",
        arm="one batch",
        against="formula",
        expect="<= 1.0",
    ),
    Claim(
        "exact",
        paper="no figure; the method changes where attention runs, not what it gives",
        here="as in `identical`, 2 answers with float32 weights and q sent early: sums are merged in another order",
        measure="same",
        arm="float32, early",
        against="float32, one process",
        expect=">= 1.0",
    ),
    Claim(
        "identical",
        paper="no figure; the same operations in another place",
        here=_HERE + "; share of answers that are those of one process, token for token, with q, k and v sent together",
        measure="same",
        arm="one batch",
        against="one process",
        expect=">= 1.0",
    ),
    Claim(
        "memory",
        paper="batch 2.39x larger on average (later version), as the compute device keeps no keys",
        here=_HERE + "; memory that the model's process gains while it answers, beside one process that keeps the keys",
        measure="growth",
        arm="one batch",
        against="one process",
        expect="<= 0.5",
    ),
    Claim(
        "turns",
        paper="rotational staggered pipelining: no bubbles; 1.2 to 1.6 times the throughput is expected of two cores",
        here=_HERE + "; median decoding step with two batches under way beside one",
        measure="step",
        arm="two batches",
        against="one batch",
        expect="<= 0.84",
    ),
    Claim(
        "early",
        paper="no figure alone; q is sent first, so that attention to earlier tokens overlaps with k and v",
        here=_HERE + "; median decoding step with q sent early beside q, k and v together",
        measure="step",
        arm="early",
        against="one batch",
        expect="<= 1.0",
    ),
    Claim(
        "long",
        paper="1.48x-12.1x higher estimated throughput per dollar; later version: 16.1-90.1 % higher throughput at "
        "similar cost",
        here="tokens per dollar by the published figures of H100 and H20 (989 and 148 TFLOPs, 3.35 and 4.0 TB/s, 80 "
        "and 96 GB, 11.06 and 4.63 $/h), a 70B model of 80 layers in 2 bytes at 8,192 tokens; the best pair beside the "
        "best number of H100 alone",
        measure="tokens_per_dollar",
        arm="apart, long",
        against="alone, long",
        expect=">= 1.16",
        cannot="real devices, prices and networks",
    ),
    Claim(
        "short",
        paper="no figure; short contexts of small models leave attention little to do",
        here="the same for a 1B model of 16 layers at 128 tokens: devices of one kind are cheaper",
        measure="tokens_per_dollar",
        arm="apart, short",
        against="alone, short",
        expect="<= 1.0",
        cannot="real devices, prices and networks",
    ),
)

ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "one process": ("auto", ()),
    "one batch": ("auto", ("attention_offloading",)),
    "early": ("auto", ("attention_offloading,early=true",)),
    "two batches": ("auto", ("attention_offloading,batches=2",)),
    "float32, one process": ("fp32", ()),
    "float32, early": ("fp32", ("attention_offloading,early=true",)),
}


def run(arms: Arms) -> None:
    module = catalog.module("attention_offloading")
    answers, prompt, length = arms.size(4, 6), arms.size(64, 512), arms.size(8, 32)
    drawn = random.Random(arms.seed)
    prompts = [[drawn.randrange(100, 40_000) for _ in range(prompt)] for _ in range(answers)]
    told: dict[str, list[tuple[int, ...]]] = {}
    for name, (dtype, plugs) in ARMS.items():
        with arms.arm(name) as stage, _engine(dtype, plugs, answers, prompt + length) as engine:
            before = psutil.Process().memory_info().rss
            asked = prompts if dtype == "auto" else prompts[:2]
            found, steps = _answered(engine, asked, length)
            wanted = told.setdefault(dtype, found)
            stage.record("growth", psutil.Process().memory_info().rss - before, "B", "measured")
            stage.record(
                "same", sum(a == b for a, b in zip(found, wanted, strict=True)) / len(asked), "share", "counted"
            )
            stage.record("step", statistics.median(steps), "s", "measured")
            counts = engine.counts()
            if plugs:
                stage.record("payload", counts.plugged["attention_payload_bytes"], "B", "counted")
        if name == "one batch":
            with arms.arm("formula") as stage:
                tokens = counts.prompt_tokens + counts.generation_tokens - answers
                stage.record("payload", module.bytes_per_step(engine.facts, tokens), "B", "counted")
    _plans(arms, module)


def _engine(dtype: str, plugs: tuple[str, ...], answers: int, context: int) -> Engine:
    return Engine(
        MODEL, dtype=dtype, cache_dtype="fp32", threads=1, max_sequences=answers, context=context, plugs=plugs,
        prefix_cache=False, memory=1 << 31,
    )  # fmt: skip


def _answered(engine: Engine, prompts: list[list[int]], length: int) -> tuple[list[tuple[int, ...]], list[float]]:
    """The answers' tokens, and the seconds of every step in which all of them decode."""
    requests = [Request(prompt, Sampling(max_tokens=length, ignore_eos=True)) for prompt in prompts]
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    steps = []
    while not engine.idle:
        began, deltas = time.perf_counter(), engine.step()
        if sum(len(delta.tokens) for delta in deltas) == len(prompts):
            steps.append(time.perf_counter() - began)
        for delta in deltas:
            tokens[delta.request_id] += delta.tokens
    return [tuple(tokens[request.id]) for request in requests], steps


def _plans(arms: Arms, module: Any) -> None:
    for word, sizes, context in (("long", (70e9, 80, 8192, 1024), 8192), ("short", (1e9, 16, 2048, 512), 128)):
        made = module.plan(sizes, context=context)
        for name, point in (("apart", made.best), ("alone", made.homogeneous)):
            with arms.arm(f"{name}, {word}") as stage:
                stage.record("tokens_per_dollar", point.per_dollar, "token/$", "modelled")

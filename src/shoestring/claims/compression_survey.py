"""Formats side by side: the speed that bytes and bandwidth predict beside the speed of the engine, and what formats
promise transformers."""

from __future__ import annotations

from pathlib import Path

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.step import Step, Work
from shoestring.jobs.bench_engine import LatencyRequest, bench_latency
from shoestring.jobs.recommend import RecommendRequest, recommend
from shoestring.lab.arms import MODEL, Arms
from shoestring.lab.examine import examine
from shoestring.models import resolve

METHODS = ()
_PAPER = "no figure: a survey"
_SPEED = (
    "SmolLM2-135M-Instruct; what `shoestring recommend` predicts of the memory's bandwidth, measured in the same "
    "minute, against the median token of one answer of 64, one thread; "
)
_CONTRACT = (
    "every method of the quantizers room on a two-layer model of random weights; how many of them pass the check "
)
CLAIMS = (
    Claim(
        "bfloat16 not over twice",
        paper=_PAPER,
        here=_SPEED + "as it is",
        measure="tokens_per_s",
        arm="bf16 predicted",
        against="bf16",
        expect="<= 2",
        cannot="the survey's own comparisons of large models, which it takes from the papers that it reviews",
    ),
    Claim(
        "bfloat16 not under half",
        paper=_PAPER,
        here=_SPEED + "as it is",
        measure="tokens_per_s",
        arm="bf16 predicted",
        against="bf16",
        expect=">= 0.5",
    ),
    Claim(
        "eight bits not over twice",
        paper=_PAPER,
        here=_SPEED + "8 bits in groups of 64",
        measure="tokens_per_s",
        arm="int8 predicted",
        against="int8",
        expect="<= 2",
    ),
    Claim(
        "eight bits not under half",
        paper=_PAPER,
        here=_SPEED + "8 bits in groups of 64",
        measure="tokens_per_s",
        arm="int8 predicted",
        against="int8",
        expect=">= 0.5",
    ),
    Claim(
        "four bits not over twice",
        paper=_PAPER,
        here=_SPEED + "4 bits in groups of 64, 8-bit embeddings",
        measure="tokens_per_s",
        arm="int4 predicted",
        against="int4",
        expect="<= 2",
    ),
    Claim(
        "four bits not under half",
        paper=_PAPER,
        here=_SPEED + "4 bits in groups of 64, 8-bit embeddings",
        measure="tokens_per_s",
        arm="int4 predicted",
        against="int4",
        expect=">= 0.5",
    ),
    Claim(
        "bytes",
        paper=_PAPER,
        here="SmolLM2-135M-Instruct in 4 bits; bytes of the folder against those that `shoestring recommend` predicts",
        measure="storage",
        arm="int4",
        against="int4 predicted",
        expect="<= 1.01",
    ),
    Claim(
        "saved and loaded",
        paper="no figure; a format that transformers registers loads what it saved",
        here=_CONTRACT + "that logits are bit-equal once it was saved and loaded",
        measure="passed",
        arm="loaded",
        against="formats",
        expect=">= 1",
    ),
    Claim(
        "without the import",
        paper="no figure; transformers skips a format that it does not know, and loads random weights",
        here=_CONTRACT + "that transformers refuses the folder, with the remedy, while it does not know the format",
        measure="passed",
        arm="refused",
        against="formats",
        expect=">= 1",
    ),
)
_CHECKS = {
    "loaded": "check_loads_what_it_saved_bit_for_bit",
    "refused": "check_refuses_a_reader_that_does_not_know_it",
}


def run(arms: Arms) -> None:
    _speed(arms)
    _contract(arms)


def _speed(arms: Arms) -> None:
    found = {(way["method"], str(way["options"])): way for way in recommend(RecommendRequest(MODEL, threads=1))["ways"]}
    options = {"group_size": 64, "embeddings": 8}
    for name in ("bf16", "int8", "int4"):
        method = "" if name == "bf16" else name
        way = found[method, str(options if method else {})]
        with arms.arm(f"{name} predicted") as stage:
            stage.record("tokens_per_s", way["tokens_per_s"], "token/s", "modelled")
            stage.record("storage", way["storage"], "B", "modelled")
        with arms.arm(name) as stage:
            folder = _packed(arms, method, options) if method else resolve(MODEL)
            request = LatencyRequest(str(folder), 16, arms.size(16, 64), arms.size(1, 5), runner="native", threads=1)
            stage.record("tokens_per_s", bench_latency(request)["decode_tokens_per_s"], "token/s", "measured")
            stage.record("storage", sum(f.stat().st_size for f in folder.iterdir() if f.is_file()), "B", "counted")


def _packed(arms: Arms, method: str, options: dict[str, int]) -> Path:
    folder = arms.folder / method
    work = Work(arms.ledger, arms.folder, seed=arms.seed)
    step = Step("compress", method, options)
    catalog.contract(catalog.get(method).room).apply(catalog.module(method), step, resolve(MODEL), folder, work)
    return folder


def _contract(arms: Arms) -> None:
    names = list(catalog.in_room("quantizers"))[: arms.size(2, 1000)]
    with arms.arm("formats") as stage:
        stage.record("passed", len(names), "methods", "counted")
    for arm, check in _CHECKS.items():
        with arms.arm(arm) as stage:
            outcomes = [outcome for name in names for outcome in examine(name, only=check) if outcome.check == check]
            stage.record("passed", sum(outcome.verdict == "passed" for outcome in outcomes), "methods", "counted")

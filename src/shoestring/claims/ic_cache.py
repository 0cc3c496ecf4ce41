"""IC-Cache: a small model with a large one's answers as examples, between both alone, and beside reusing answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shoestring.claims._country_questions import FORM, RIGHT, Question, asked, checker, grade
from shoestring.claims._large_model import Answers
from shoestring.claims._offload_world import World, burst
from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.lab.arms import Arms

_PAPER = "throughput 1.4-5.9x, latency lower by 28-71 %, without hurting response quality"
_HERE = (
    "small: SmolLM2-135M-Instruct; large: Gemma 3 270M Q4_K_M, a base model behind a fixed header of 4 answered "
    "questions; greedy, answers of at most 32 tokens; 32 new questions over countries, currencies and languages with "
    "one right JSON answer each; the pool holds the large model's answers to 24 earlier ones, popular ones first, "
    "every second one asked without the header and so mostly of no use"
)
_WORLD = (
    "no language model: 12 topics by Zipf, tables of how often each model is right, with and without good examples; "
    "pool, selector, router and load as they serve; a label for every tenth request, late and out of order"
)
CLAIMS = (
    Claim(
        "examples",
        paper=_PAPER,
        here=_HERE + "; share of answers of the right form",
        measure="form",
        arm="ic-cache",
        against="small",
        expect=">= 0.53",
        by="difference",
        cannot="27B and 2B models, 16 A100, millions of requests; that a small model is right where a large one is not",
    ),
    Claim(
        "selection",
        paper="no figure; a second stage by utility, since similar examples are not always helpful ones",
        here=_HERE + "; the pool's answers graded, against selection by similarity alone; form",
        measure="form",
        arm="ic-cache",
        against="similarity",
        expect="> 0",
        by="difference",
    ),
    Claim(
        "reuse",
        paper="returning the nearest answer lowers the win rate from 50 % to 18 %",
        here=_HERE + "; here with right answers in the pool; share of right answers, against returning the answer of "
        "the nearest request",
        measure="right",
        arm="checked",
        against="nearest-answer",
        expect=">= 0.1",
        by="difference",
    ),
    Claim(
        "replay",
        paper="no figure; answers are made again where the gain exceeds the cost",
        here=_HERE + "; share of right answers in the pool after and before the large model answers six of them again, "
        "twice each, the judge taking the better",
        measure="pool_right",
        arm="replayed",
        against="recorded",
        expect="> 0",
        by="difference",
    ),
    Claim(
        "regret",
        paper="no figure; the router learns from feedback on some requests",
        here=_WORLD + "; mean regret against the best model of each topic, last third of 2,400 requests to the first",
        measure="regret",
        arm="late",
        against="early",
        expect="<= 0.7",
    ),
    Claim(
        "routing",
        paper="requests are offloaded without hurting response quality",
        here=_WORLD + "; chance of a right answer over the last 1,600 of 2,400 requests, against random routing of the "
        "same share of requests to the large model",
        measure="accuracy",
        arm="ic-cache-routing",
        against="random",
        expect="> 0",
        by="difference",
    ),
    Claim(
        "burst",
        paper="throughput 1.4-5.9x under load",
        here=_WORLD + "; one request at a time in each model, 1 s and 0.2 s; arrivals 10 times as dense for 30 s; 95th "
        "percentile of latency in the burst with the load bias and without",
        measure="p95_latency",
        arm="bias",
        against="no-bias",
        expect="<= 0.7",
    ),
    Claim(
        "eviction",
        paper="no figure; a knapsack of offloading value over size",
        here=_WORLD + "; every fifth request labelled, room for some 30 examples; share of right answers in the pool "
        "after 800 requests, against dropping the oldest",
        measure="pool_right",
        arm="knapsack",
        against="oldest",
        expect=">= 0.1",
        by="difference",
    ),
    Claim(
        "paper",
        paper=_PAPER + "; over 70 % of requests have semantically similar counterparts",
        here="two models of 135M and 270M parameters on one machine",
        measure="throughput",
        cannot="the paper's models, hardware and traces",
    ),
)


def run(arms: Arms) -> None:
    method = catalog.module("ic_cache")
    _real(arms, method)
    _routed(arms, method)
    _loaded(arms, method)
    _evicted(arms, method)


# --- two real models --------------------------------------------------------------------------------------------------


def _real(arms: Arms, method: Any) -> None:
    stream = list(dict.fromkeys(asked(2000, arms.seed)))
    past, now = stream[: arms.size(2, 24)], stream[arms.size(2, 24) :][: arms.size(2, 32)]
    with Answers() as models:
        with arms.arm("small") as stage:
            _grades(stage, now, models.small([q.text for q in now]))
        whole, bare = past[0::2], past[1::2]
        recorded = dict(zip(whole, models.large([q.text for q in whole])))
        recorded |= dict(zip(bare, models.large([q.text for q in bare], header=())))
        cache, alike = _filled(method, models, recorded), _filled(method, models, recorded)
        for example in list(cache.pool.examples.values()):  # what judging a pool gives: a grade for each example
            cache.pool.write(replace(example, quality=checker(example.request, example.answer)))
        for example in list(alike.pool.examples.values()):
            alike.pool.write(replace(example, quality=1.0))
        with arms.arm("similarity") as stage:
            _grades(stage, now, _answered(method, alike, models, now))
        with arms.arm("ic-cache") as stage:
            _grades(stage, now, _answered(method, cache, models, now))
        with arms.arm("recorded") as stage:
            stage.record("pool_right", _right(alike), "share", "counted")
        with arms.arm("replayed") as stage:
            for _ in range(arms.size(1, 6)):
                if (example := alike.to_replay()) is not None:
                    tries = models.large([example.request] * 2, seed=arms.seed)
                    alike.replayed(example, tries, 2 * example.tokens)
            stage.record("pool_right", _right(alike), "share", "counted")
        checked = _filled(method, models, {q: q.answer for q in past})
        with arms.arm("checked") as stage:
            _grades(stage, now, _answered(method, checked, models, now))
        with arms.arm("nearest-answer") as stage:
            found = [checked.pool.search("a/", models.embed(q.text), 1)[0][0].answer for q in now]
            _grades(stage, now, found)
        for made in (cache, alike, checked):
            made.close()


def _filled(method: Any, models: Answers, recorded: dict[Question, str]) -> Any:
    config = replace(method.example(), small="", large="", judge_share=0.0, unjudged_quality=0.5, try_share=0.0)
    both = [method.Model("small", 0.2, 2048), method.Model("large", 1.0, 2048)]
    cache = method.Cache(config, both, models.embed, "claim", checker=checker)
    for question, answer in recorded.items():
        cache.add("a/", question.text, answer, "large", 0.5)
    return cache


def _answered(method: Any, cache: Any, models: Answers, now: Sequence[Question]) -> list[str]:
    """The small model's answers behind the examples that the cache selects, which learns from their grades."""
    decisions = [cache.decide(method.Asked("a/", q.text, 40, 40), without=("large",)) for q in now]
    answers = models.small([q.text for q in now], [d.turns for d in decisions])
    for question, decision, answer in zip(now, decisions, answers):
        cache.finish(replace(decision, asked=replace(decision.asked, alone=False)), answer, True)
        cache.feedback("a", decision.id, grade(question, answer))
    return answers


def _grades(stage: Any, now: Sequence[Question], answers: Sequence[str]) -> None:
    grades = [grade(q, a) for q, a in zip(now, answers)]
    stage.record("form", statistics.mean(g >= FORM for g in grades), "share", "measured")
    stage.record("right", statistics.mean(g == RIGHT for g in grades), "share", "measured")


def _right(cache: Any) -> float:
    return statistics.mean(checker(e.request, e.answer) == RIGHT for e in cache.pool.examples.values())


# --- a world of tables ------------------------------------------------------------------------------------------------


def _routed(arms: Arms, method: Any) -> None:
    count = arms.size(90, 2400)
    world = World(arms.seed)
    with arms.arm("ic-cache-routing") as stage:
        found = world.outcomes(world.cache(method), method, count)
        settled = found[count // 3 :]
        stage.record("accuracy", statistics.mean(o.chance for o in settled), "share", "measured")
    share = statistics.mean(not o.small for o in settled)
    for arm, part in (("early", found[: count // 3]), ("late", found[-(count // 3) :])):
        with arms.arm(arm) as stage:
            stage.record("regret", statistics.mean(o.regret for o in part), "share", "measured")
    world = World(arms.seed)
    with arms.arm("random") as stage:
        found = world.outcomes(world.cache(method), method, count, at_random=share)[count // 3 :]
        stage.record("accuracy", statistics.mean(o.chance for o in found), "share", "measured")


def _loaded(arms: Arms, method: Any) -> None:
    for arm, gain in (("bias", method.example().load_gain), ("no-bias", 0.0)):
        world = World(arms.seed)
        cache = world.cache(method, load_gain=gain, load_tokens=600)
        world.outcomes(cache, method, arms.size(50, 400))
        with arms.arm(arm) as stage:
            found = burst(world, cache, method, rate=0.5, times=10, seconds=arms.size(30, 90))
            busy = [o.latency for o in found if arms.size(10, 30) <= o.arrival < arms.size(20, 60)]
            stage.record("p95_latency", float(np.percentile(busy, 95)), "s", "modelled")


def _evicted(arms: Arms, method: Any) -> None:
    for arm in ("knapsack", "oldest"):
        world = World(arms.seed)
        cache = world.cache(method, capacity="10kB")
        if arm == "oldest":
            cache.pool.shrink = lambda pool=cache.pool: _drop_oldest(pool)
        with arms.arm(arm) as stage:
            world.outcomes(cache, method, arms.size(80, 800), labelled=0.2)
            right = statistics.mean(e.answer == "right" for e in cache.pool.examples.values())
            stage.record("pool_right", right, "share", "counted")


def _drop_oldest(pool: Any) -> None:
    while pool.bytes > pool.capacity:
        pool.drop(min(pool.examples))

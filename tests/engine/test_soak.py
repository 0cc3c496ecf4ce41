"""The engine under mixed traffic: everything ends, everything is given back, and company changes no answer."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoestring.engine.engine import Engine
from shoestring.engine.hooks import Draft, Hooks, RepeatDrafter, Verified
from shoestring.engine.request import Constraint, Delta, Request, Sampling
from shoestring.engine.sequence import Sequence as Answer

VOCAB = 259
WORDS = range(3, VOCAB)  # token ids that are no special ones: the 256 bytes
CONTEXT = 128


def opened(model: Path, **options: Any) -> Engine:
    return Engine(model, **{"runner": "native", "threads": 1, **options})


@dataclass
class Answers:
    """What came of the requests that were sent."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    ended: dict[str, list[str]] = field(default_factory=dict)
    done: set[tuple[str, int]] = field(default_factory=set)

    def take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            assert (delta.request_id, delta.index) not in self.done, "something comes after the end"
            self.tokens.setdefault((delta.request_id, delta.index), []).extend(delta.tokens)
            if delta.finish_reason:
                self.ended.setdefault(delta.request_id, []).append(delta.finish_reason)
                self.done.add((delta.request_id, delta.index))


def drain(engine: Engine, answers: Answers, steps: int = 20_000) -> None:
    for _ in range(steps):
        if engine.idle:
            return
        answers.take(engine.step())
    raise AssertionError(f"not idle after {steps} steps: {engine.counts()}")


def answered(engine: Engine, requests: list[Request], *, together: bool) -> list[list[int]]:
    """The tokens of each request, one after another or all at once."""
    answers = Answers()
    for request in requests:
        engine.submit(request)
        if not together:
            drain(engine, answers)
    drain(engine, answers)
    return [answers.tokens[request.id, 0] for request in requests]


def prompts(count: int, seed: int = 0, longest: int = 70) -> list[list[int]]:
    """Prompts of all lengths; two of three begin like others."""
    rng = random.Random(seed)
    beginnings = [rng.choices(WORDS, k=60) for _ in range(3)]
    made = []
    for number in range(count):
        begin = rng.choice(beginnings)[: rng.randrange(61)] if number % 3 else []
        made.append(begin + rng.choices(WORDS, k=rng.randrange(1, longest - len(begin))))
    return made


# ---------------------------------------------------------------- a long mixed life


def mixed(rng: random.Random, prompt: list[int], name: str, adapters: list[str]) -> Request:
    """A request of any kind that is allowed."""
    if rng.random() < 0.05:
        return Request(prompt, embed=True, id=name, client=rng.choice("ab"))
    constraint = Constraint("regex", "[a-f]{2,9}") if rng.random() < 0.05 else None
    sampling = Sampling(
        max_tokens=rng.randrange(1, 24),
        temperature=rng.choice([0.0, 0.0, 0.8, 1.5]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        seed=rng.choice([None, 7]),
        stop=rng.choice([(), (), ("ab", "e")]),
        stop_token_ids=rng.choice([(), (11,)]),
        ignore_eos=not constraint and rng.random() < 0.5,
        logprobs=rng.choice([None, None, 3]),
        prompt_logprobs=rng.choice([None] * 9 + [1]),
        n=rng.choice([1, 1, 1, 2, 4]),
        constraint=constraint,
    )
    return Request(
        prompt, sampling, adapter=rng.choice(["", "", *adapters]), client=rng.choice("abc"),
        isolation=rng.choice(["", "x"]), priority=rng.choice([0, 0, 1]), id=name,
    )  # fmt: skip


def life(engine: Engine, requests: int, seed: int, adapters: dict[str, Path]) -> Counter[str]:
    """Requests of all kinds come, a fifth is cancelled at some moment, an adapter goes and comes back."""
    rng = random.Random(seed)
    answers = Answers()
    sent: dict[str, Request] = {}
    cancelled: set[str] = set()
    texts = prompts(requests, seed)
    for number, prompt in enumerate(texts):
        request = mixed(rng, prompt, f"{seed}-{number}", [a for a in engine.adapters if a not in engine._leaving])
        engine.submit(request)
        sent[request.id] = request
        while rng.random() < 0.75 or len(sent) - len(answers.ended) > 40:
            answers.take(engine.step())
        if rng.random() < 0.2:
            name = rng.choice(list(sent)[-12:])
            if name in engine._requests:
                cancelled.add(name)
            engine.cancel(name)
            engine.cancel(name)
        if "second" not in engine.adapters:
            engine.add_adapter("second", adapters["second"])
        elif number % 50 == 25 and "second" not in engine._leaving:
            engine.drop_adapter("second")
    drain(engine, answers)
    for name, request in sent.items():
        wanted = 1 if request.embed else request.sampling.n
        assert 1 <= len(answers.ended[name]) <= wanted
        if name not in cancelled:
            assert len(answers.ended[name]) == wanted and "abort" not in answers.ended[name], name
    assert set(answers.ended) == set(sent)
    if "second" not in engine.adapters:
        engine.add_adapter("second", adapters["second"])
    return Counter(reason for reasons in answers.ended.values() for reason in reasons)


def empty(engine: Engine) -> None:
    counts = engine.counts()
    assert engine.idle and counts.running == counts.waiting == counts.blocks_used == counts.cache_bytes_used == 0
    engine.pool.check([])
    kept = {
        name: value
        for part in (engine, engine.scheduler)
        for name, value in vars(part).items()
        if isinstance(value, dict | list | set) and value and name not in ("adapters", "_totals", "_finished")
    }
    assert set(kept) <= {"_copies"}, kept


@pytest.mark.parametrize("drafter", [None, RepeatDrafter(1, 3)], ids=["plain", "drafts"])
def test_five_hundred_mixed_requests(model: Path, adapters: dict[str, Path], drafter: Any) -> None:
    """On so few pages that answers are often interrupted."""
    probe = opened(model)
    memory = 28 * probe.facts.block_bytes
    probe.close()
    engine = opened(
        model, memory=memory, max_sequences=8, max_step_tokens=48, adapters=adapters, hooks=Hooks(drafter=drafter)
    )
    reasons: Counter[str] = Counter()
    sizes = []
    for seed, requests in enumerate((200, 150, 150)):
        reasons += life(engine, requests, seed, adapters)
        empty(engine)
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)
    assert reasons["stop"] > 50 and reasons["length"] > 50 and reasons["abort"] > 30 and not reasons["error"], reasons
    counts = engine.counts()
    assert counts.preemptions > 10 and counts.prefix_hits > 300
    assert dict(counts.finished) == dict(reasons)
    assert bool(counts.accepted_draft_tokens) == bool(drafter)
    # The first part has brought in what is loaded late; afterwards nothing is added but noise of the allocator.
    assert sizes[2] - sizes[0] < 8 << 20, [f"{size >> 10} KiB" for size in sizes]
    engine.close()


# ---------------------------------------------------------------- company, caches and drafts change no answer


def asked(texts: list[list[int]], **sampling: Any) -> list[Request]:
    """Requests for answers of some length; drawn ones each with a seed of its own."""
    drawn = sampling.get("temperature", 0.0) > 0
    return [
        Request(text, Sampling(**{"max_tokens": 24, "ignore_eos": True, "seed": i if drawn else None, **sampling}))
        for i, text in enumerate(texts)
    ]


DRAWN = dict(temperature=0.9, top_p=0.95, repetition_penalty=1.1)


@pytest.mark.parametrize("sampling", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("cache_dtype", ["bf16", "int8"])
def test_alone_and_among_seven_others(model: Path, cache_dtype: str, sampling: dict[str, Any]) -> None:
    with opened(model, cache_dtype=cache_dtype, prefix_cache=False, max_step_tokens=40) as engine:
        for seed in range(5):
            texts = prompts(8, seed)
            alone = answered(engine, asked(texts, **sampling), together=False)
            assert answered(engine, asked(texts, **sampling), together=True) == alone
            assert len({tuple(tokens) for tokens in alone}) > 4


@pytest.mark.parametrize("sampling", [{}, DRAWN], ids=["greedy", "drawn"])
def test_the_prefix_cache_changes_no_answer(model: Path, sampling: dict[str, Any]) -> None:
    texts = prompts(100)
    said = []
    for cached in (True, False):
        with opened(model, prefix_cache=cached) as engine:
            said.append(answered(engine, asked(texts, **sampling), together=False))
            assert (engine.counts().prefix_hits > 500) == cached
            if cached:  # the whole prompts are known now, but for their last tokens
                said.append(answered(engine, asked(texts, **sampling), together=True))
    assert said[0] == said[1] == said[2]


def test_interruptions_change_no_answer(model: Path) -> None:
    texts = prompts(24, seed=3, longest=62)
    with opened(model) as engine:
        wanted = answered(engine, asked(texts, max_tokens=60), together=True)
        assert not engine.counts().preemptions
    with opened(model, memory=14 * engine.facts.block_bytes, max_step_tokens=32) as engine:
        assert answered(engine, asked(texts, max_tokens=60), together=True) == wanted
        assert engine.counts().preemptions > 5
        empty(engine)


def test_interruptions_change_neither_embeddings_nor_judged_prompts(model: Path) -> None:
    short, long = prompts(7, seed=8, longest=61), [[*range(20 + i, 120 + i)] for i in range(2)]
    found: list[list[Any]] = []
    memory = None
    for tight in (False, True):
        with opened(model, memory=memory, max_step_tokens=9, max_sequences=8) as engine:
            for kind in (dict(embed=True), dict(sampling=Sampling(max_tokens=2, prompt_logprobs=1))):
                for text in short:
                    engine.submit(Request(text[:5], Sampling(max_tokens=90, ignore_eos=True)))
                wanted = [Request(text, **kind) for text in long]  # type: ignore[arg-type]
                for request in wanted:
                    engine.submit(request)
                deltas: dict[str, list[Delta]] = {}
                while not engine.idle:
                    for delta in engine.step():
                        deltas.setdefault(delta.request_id, []).append(delta)
                for request in wanted:
                    last = deltas[request.id][-1].embedding
                    judged = [one for delta in deltas[request.id] for one in delta.prompt_logprobs]
                    found.append([*judged, *(() if last is None else last)])
            assert (engine.counts().preemptions > 2) == tight
            memory = 22 * engine.facts.block_bytes
    assert found[:4] == found[4:] and {len(one) for one in found} == {64, 100}


def test_adapters_do_not_share_pages(model: Path, adapters: dict[str, Path]) -> None:
    text = [5, *range(20, 80)]
    names = ["", "first", "second", "first", "second", ""]
    alone = []
    for name in names:
        with opened(model, adapters=adapters, prefix_cache=False) as engine:
            alone.append(engine.generate(text, Sampling(max_tokens=16, ignore_eos=True), adapter=name)[0][0])
    assert len({answer.tokens for answer in alone}) == 3, "the adapters must differ for this to show anything"
    with opened(model, adapters=adapters) as engine:
        for turn, name in enumerate(names):
            answer = engine.generate(text, Sampling(max_tokens=16, ignore_eos=True), adapter=name)[0][0]
            assert answer.tokens == alone[turn].tokens
            assert (answer.usage.cached_tokens > 0) == (turn > 2)
        # Another adapter of the same name finds nothing of the first one's.
        engine.drop_adapter("first")
        engine.add_adapter("first", adapters["second"])
        answer = engine.generate(text, Sampling(max_tokens=16, ignore_eos=True), adapter="first")[0][0]
        assert answer.tokens == alone[2].tokens and answer.usage.cached_tokens == 0


def test_isolation_words_do_not_share_pages(model: Path) -> None:
    text = [5, *range(20, 80)]
    with opened(model) as engine:
        for turn, word in enumerate(["a", "b", "a", "b", ""]):
            answers: list[Delta] = []
            engine.submit(Request(text, Sampling(max_tokens=2), isolation=word))
            while not engine.idle:
                answers += engine.step()
            assert (answers[-1].usage.cached_tokens > 0) == (turn in (2, 3))


class Branches:
    """Guesses trees whose nodes are right about as often as wrong, from the answers as they were without it."""

    def __init__(self, told: dict[tuple[int, ...], list[int]]) -> None:
        self.told, self.rng, self.accepted = told, random.Random(4), 0

    def propose(self, answer: Answer, limit: int) -> Draft:
        tokens = answer.tokens
        text = next(text for text in self.told if tuple(tokens[: len(text)]) == text)
        truth = self.told[text][len(tokens) - len(text) :]
        nodes: list[int] = []
        parents: list[int] = []
        depths = {-1: 0}
        for node in range(min(limit, self.rng.randrange(9))):
            parent = self.rng.choice([-1, *range(node)])
            depths[node] = depths[parent] + 1
            right = self.rng.random() < 0.6 and depths[parent] < len(truth)
            nodes.append(truth[depths[parent]] if right else self.rng.choice(WORDS))
            parents.append(parent)
        return Draft(tuple(nodes), tuple(parents))

    def observe(self, verified: Sequence[Verified], tokens: int, seconds: float) -> None:
        self.accepted += sum(len(one.accepted) for one in verified)


@pytest.mark.parametrize("sampling", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("cache_dtype", ["bf16", "int8"])
def test_drafts_change_no_answer(model: Path, cache_dtype: str, sampling: dict[str, Any]) -> None:
    texts = prompts(24, seed=6)
    with opened(model, cache_dtype=cache_dtype) as engine:
        wanted = answered(engine, asked(texts, **sampling), together=True)
    drafter = Branches({tuple(text): tokens for text, tokens in zip(texts, wanted)})
    for hooks in (Hooks(drafter=drafter), Hooks(drafter=RepeatDrafter(1, 5))):
        with opened(model, cache_dtype=cache_dtype, hooks=hooks, max_step_tokens=64) as engine:
            assert answered(engine, asked(texts, **sampling), together=True) == wanted
            assert engine.counts().draft_tokens > 0
            empty(engine)
    assert drafter.accepted > 100


@pytest.mark.real
def test_company_cache_and_drafts_with_the_default_model() -> None:
    texts = [f"{start} {subject}" for start in ("Once upon a time", "The capital of") for subject in ("the", "a king")]
    said = []
    for options in (dict(prefix_cache=False), {}, dict(hooks=Hooks(drafter=RepeatDrafter()))):
        with Engine("smollm2", threads=1, context=256, **options) as engine:  # type: ignore[arg-type]
            ids = [
                engine.tokenizer.encode("Answer in one sentence, and be as brief as you can be. " + t) for t in texts
            ]
            said += [answered(engine, asked(ids, max_tokens=16), together=together) for together in (False, True)]
    assert all(tokens == said[0] for tokens in said)

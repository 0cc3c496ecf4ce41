"""The cache without a network: pool, selector, router, and what they make of requests."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.methods.serving import _pool, _router, _selector

ic = catalog.module("ic_cache")
Asked, Model = ic.Asked, ic.Model
WIDTH = 64
SMALL, LARGE = Model("small", 0.2, 2048), Model("large", 1.0, 2048)


def embed(text: str) -> np.ndarray:
    """Words in, direction out: texts with the same words are near."""
    made = np.zeros(WIDTH, np.float32)
    for word in text.lower().split():
        made += np.random.default_rng(zlib.crc32(word.encode())).standard_normal(WIDTH).astype(np.float32)
    return made / np.linalg.norm(made)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def cache(clock: Any = None, checker: Any = None, models: Any = (SMALL, LARGE), made_by: str = "words", **options: Any):
    config = replace(ic.example(), **{"try_share": 0.0, **options})
    return ic.Cache(config, models, embed, made_by, checker=checker, clock=clock or Clock())


def asked(text: str, scope: str = "a/", **more: Any) -> Any:
    return Asked(scope, text, 20, 20, **more)


def exact(request: str, answer: str) -> float:
    """A judge: an answer is right when it repeats the request in capitals."""
    return float(answer == request.upper())


def example(text: str, quality: float = 0.9, answer: str = "", scope: str = "a/", **more: Any) -> _pool.Example:
    return _pool.Example(scope, text, answer or text.upper(), "large", 20, quality, embed(text), **more)


# ---------------------------------------------------------------- demonstrations, never the answer itself


def test_examples_stand_before_the_request_as_turns_and_the_answer_is_the_models_own() -> None:
    made = cache()
    made.add("a/", "codes of Peru", "PE", "large", 0.9)
    made.add("a/", "codes of Chile", "CL", "large", 0.8)
    decision = made.decide(asked("codes of Cuba"), without=("large",))
    assert [t["role"] for t in decision.turns] == ["user", "assistant"] * len(decision.kept.examples)
    assert len(decision.kept.examples) == 2
    assert list(decision.kept.utilities) == sorted(decision.kept.utilities)  # the best next to the request
    assert decision.turns[-2:] == [{"role": "user", "content": "codes of Peru"}, {"role": "assistant", "content": "PE"}]
    again = made.decide(asked("codes of Peru"))  # even for the very same request somebody is asked
    assert again.model in (SMALL, LARGE) and not hasattr(again, "answer")


# ---------------------------------------------------------------- selection in two stages


def selected(found: list[tuple[Any, float]], utilities: list[float], **options: Any) -> list[str]:
    given = dict(threshold=0.3, room=500, context=1000, most=5, redundancy=0.2, length=0.5) | options
    return [e.request for e in _selector.kept(found, utilities, **given).examples]


def test_learned_weights_change_what_is_chosen_at_equal_cosine() -> None:
    made = cache(most=1, redundancy=0.0, admit_quality=0.0)
    made.add("a/", "red green blue one", "ONE", "large", 0.8)
    made.add("a/", "red green blue two", "TWO", "small", 0.8)
    request = asked("red green blue")
    found = made.pool.search("a/", embed(request.text), 5)
    features = {e.producer: made.utility.features(e, 0.8, 20, SMALL, made._cost(e.producer)) for e, _ in found}
    before = made.utility.of(list(features.values()), "small")
    assert before[0] == pytest.approx(before[1]) == pytest.approx(0.64)  # cosine x quality before any feedback
    for _ in range(30):  # what the large model wrote helps, what the small one wrote does not
        made.utility.learn(features["large"], "small", 1.0)
        made.utility.learn(features["small"], "small", 0.0)
    after = dict(zip(features, made.utility.of(list(features.values()), "small")))
    assert after["large"] > 0.9 and after["small"] < 0.1
    chosen = made.decide(request, without=("large",)).kept.examples
    assert [e.producer for e in chosen] == ["large"]
    assert made.utility.of([features["small"]], "another model") == pytest.approx([0.64])  # it has learned nothing


def test_a_long_weak_example_is_dropped_by_its_length() -> None:
    short, long = replace(example("a b", id=1), tokens=20), replace(example("c d", id=2), tokens=400)
    pairs = [(short, 0.5), (long, 0.5)]
    assert selected(pairs, [0.4, 0.4], redundancy=0.0, length=1.5) == ["a b"]
    assert set(selected(pairs, [0.4, 0.4], redundancy=0.0, length=0.0)) == {"a b", "c d"}


def test_redundant_examples_budget_and_count() -> None:
    twins = [(replace(example("a b c", id=i), tokens=100), 0.9) for i in (1, 2, 3)]
    other = (replace(example("x y z", id=4), tokens=100), 0.9)
    assert selected([*twins, other], [0.8, 0.79, 0.78, 0.5], redundancy=0.9) == ["x y z", "a b c"]
    many = [(replace(example(f"w{i} v{i}", id=i), tokens=100), 0.9) for i in range(9)]
    assert len(selected(many, [0.8] * 9, redundancy=0.0)) == 5
    assert len(selected(many, [0.8] * 9, redundancy=0.0, room=250)) == 2
    assert selected(many, [0.8] * 9, threshold=0.8) == []


def test_a_request_may_go_without_examples_when_none_is_worth_it() -> None:
    made = cache(threshold=0.99)
    made.add("a/", "codes of Peru", "PE", "large", 0.5)
    routed = [made.decide(asked("codes of Cuba")) for _ in range(30)]
    assert all(not d.kept.examples for d in routed)
    assert made.decide(asked("codes of Cuba"), without=("large",)).model == SMALL


def test_the_threshold_with_the_best_worth_is_kept() -> None:
    tuned = _selector.Threshold(0.35, 0.5, np.random.default_rng(0))
    tried = [tuned.next() for _ in range(200)]
    assert set(tried) == set(_selector.GRID) and tried.count(0.35) > 90
    for threshold in _selector.GRID:
        for _ in range(3):
            tuned.learn(threshold, 1.0 - abs(threshold - 0.65))
    assert tuned.best == 0.65
    tuned.learn(0.123, 100.0)  # no threshold of the grid
    assert tuned.best == 0.65


# ---------------------------------------------------------------- the index


def test_clusters_follow_the_root_and_a_search_looks_at_few() -> None:
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((40, WIDTH))
    pool = _pool.Pool(":memory:", "x", WIDTH, 10**9, Clock())
    vectors = centres[draw.integers(40, size=2500)] + 0.3 * draw.standard_normal((2500, WIDTH))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    sizes = {}
    with pool.change():
        for i, vector in enumerate(vectors):
            pool._hold(replace(example("x"), request=f"request {i}", vector=vector, id=i + 1))
            index = pool.index("a/")
            assert index is not None
            if len(index) >= _pool.FLAT:
                made_for = index._made_for
                assert index.clusters == round(math.sqrt(made_for)) and len(index) <= 1.2 * made_for + 1
                sizes[made_for] = index.clusters
    assert len(sizes) > 10
    compared = []
    for vector in vectors[:50]:
        assert index.search(vector, 20)[0][1] == pytest.approx(1.0, abs=1e-5)
        compared.append(index.compared)
    assert np.mean(compared) < 6 * math.sqrt(2500)
    index.exact(vectors[0], 20)
    assert index.compared == 2500
    recall = pool.recall("a/", vectors[::100], 20)
    print(f"recall@20 {recall:.3f}, {np.mean(compared):.0f} of 2500 vectors compared")
    assert 0.85 < recall <= 1.0


def test_removed_examples_are_not_found() -> None:
    pool = _pool.Pool(":memory:", "x", WIDTH, 10**9, Clock())
    numbers = [pool.admit(example(f"word{i} other{i}"), 0.95)[0] for i in range(100)]
    pool.drop(numbers[7])
    assert all(e.id != numbers[7] for e, _ in pool.search("a/", embed("word7 other7"), 100))
    for number in numbers:
        pool.drop(number)
    assert pool.search("a/", embed("word7 other7"), 5) == [] and pool.bytes == 0


# ---------------------------------------------------------------- the router


def router(**options: Any) -> _router.Router:
    given = dict(spread=0.2, threshold=0.6, gain=0.6, steepness=3.0, margin=0.05, seed=0) | options
    return _router.Router([SMALL, LARGE], 3, **given)


def context(kind: int) -> np.ndarray:
    return np.array([1.0, float(kind), float(not kind)])


def test_it_learns_from_the_answers_it_got_with_a_twentieth_of_them_judged() -> None:
    good = {("small", 0): 0.2, ("small", 1): 0.95, ("large", 0): 0.8, ("large", 1): 0.7}
    draw, made = np.random.default_rng(0), router()
    regrets = []
    for _ in range(3000):
        kind = int(draw.integers(2))
        name = made.choose({n: context(kind) for n in ("small", "large")}, 0.0).model.name
        before = {n: r.moments.copy() for n, r in made._learned.items()}
        if draw.random() < 0.05:
            assert made.learn(name, context(kind), float(draw.random() < good[name, kind]))
        other = "large" if name == "small" else "small"
        assert (made._learned[other].moments == before[other]).all()
        regrets.append(max(good["small", kind], good["large", kind]) - good[name, kind])
    assert np.mean(regrets[-1000:]) < 0.4 * np.mean(regrets[:500])
    assert made.expected("small", context(1)) > made.expected("small", context(0)) + 0.3


def test_load_moves_the_choice_and_teaches_nothing() -> None:
    made = router(spread=0.0)
    for _ in range(50):
        made.learn("large", context(0), 0.8)
        made.learn("small", context(0), 0.6)
    contexts = {n: context(0) for n in ("small", "large")}
    before = json.dumps(made.to_json())
    names = [made.choose(contexts, load).model.name for load in (0.0, 0.6, 2.0, 0.0)]
    assert names == ["large", "large", "small", "large"]  # back when it falls
    assert json.dumps(made.to_json()) == before
    assert made.bias(LARGE, 0.6) == 0.0 and made.bias(LARGE, 0.5) == 0.0
    assert made.bias(LARGE, 1.0) == pytest.approx(0.6 * math.tanh(3.0 * 0.4))
    assert made.bias(SMALL, 1.0) == pytest.approx(0.2 * made.bias(LARGE, 1.0))


def test_load_is_a_running_mean_of_tokens_under_way() -> None:
    made = cache(load_tokens=100, load_share=0.25)
    decision = made.decide(asked("a b"))
    tokens = made.begin(decision)
    assert tokens == 40 and made.load.level == pytest.approx(0.25 * 0.4)
    made.end(tokens)
    assert made.load.level == pytest.approx(0.75 * 0.25 * 0.4)


def test_close_scores_ask_for_feedback() -> None:
    made = router(spread=0.0, margin=0.1)
    contexts = {n: context(0) for n in ("small", "large")}
    assert not made.choose(contexts, 0.0).close
    for _ in range(100):
        made.learn("large", context(0), 0.5)
        made.learn("small", context(0), 0.5)
    assert made.choose(contexts, 0.0).close


def test_rewards_that_are_not_finite_and_singular_contexts_do_no_harm() -> None:
    made = router()
    before = json.dumps(made.to_json())
    assert not made.learn("small", context(0), float("nan")) and not made.learn("small", context(0), float("inf"))
    assert not made.learn("small", np.array([1.0, np.nan, 0.0]), 1.0)
    assert json.dumps(made.to_json()) == before
    for _ in range(1000):  # one direction only
        made.learn("small", context(0), 1.0)
    assert np.isfinite(made._learned["small"].weights()).all()


def test_the_drawn_score_has_the_posteriors_mean_and_spread() -> None:
    ridge = _router.Ridge([0.0, 0.0])
    for features, target in (([1.0, 0.0], 1.0), ([1.0, 1.0], 0.0), ([0.5, 2.0], 1.0)):
        ridge.learn(np.array(features), target)
    at = np.array([0.3, 0.7])
    draw = np.random.default_rng(0)
    drawn = [ridge.drawn(at, 0.5, draw) for _ in range(4000)]
    inverse = np.linalg.inv(ridge.moments)
    assert np.mean(drawn) == pytest.approx(at @ inverse @ ridge.sums, abs=0.02)
    assert np.std(drawn) == pytest.approx(0.5 * math.sqrt(at @ inverse @ at), rel=0.05)


def test_models_come_and_go_while_running() -> None:
    made = cache()
    made.add("a/", "codes of Peru", "PE", "large", 0.9)
    made.router.learn("small", np.ones(made.router.width), 1.0)
    known = made.router.to_json()["small"]
    made.router.exchange([LARGE, Model("middle", 0.5, 2048)])
    names = {made.decide(asked("codes of Cuba")).model.name for _ in range(60)}
    assert names == {"large", "middle"}
    made.router.exchange([SMALL, LARGE])
    assert made.router.to_json()["small"] == known  # one that returns knows what it knew
    with pytest.raises(UsageError, match="no model nobody"):
        made.decide(asked("codes of Cuba"), only="nobody")
    with pytest.raises(UsageError, match="no model gone"):
        made.router.remove("gone")
    with pytest.raises(UsageError, match="no model middle"):
        made.router.choose({"middle": np.ones(made.router.width)}, 0.0)
    made.router.remove("small")
    with pytest.raises(UsageError, match="only model"):
        made.router.remove("large")


def test_an_empty_pool_is_plain_serving_by_the_large_model() -> None:
    made = cache()
    for i in range(20):
        decision = made.decide(asked(f"request {i}"))
        assert decision.model == LARGE and decision.turns == [] and not decision.wanted
    assert made.decide(asked("one more"), without=("large",)).model == SMALL  # when there is nobody else


# ---------------------------------------------------------------- examples: admission


def test_what_is_admitted_and_what_never_is() -> None:
    made = cache(example_tokens=200)
    for answer, why in (("", "empty"), ("  \n", "empty"), ("...", "empty"), ("fine <|im_start|>system", "template"),
                        ("</s>", "template"), ("word " * 400, "too_large")):  # fmt: skip
        assert made.add("a/", "codes of Peru", answer, "large", 0.9) == 0
        assert made.counters[f"refused_{why}"] >= 1
    assert not made.pool.examples
    assert made.add("a/", "codes of Peru", "PE", "large", 0.6)
    assert made.add("a/", "peru codes of", "PE too", "large", 0.6) == 0  # the same words: as good as the same request
    assert made.counters["refused_duplicate"] == 1
    better = made.add("a/", "codes of Peru", "PER", "large", 0.9)
    assert [e.answer for e in made.pool.examples.values()] == ["PER"] and better in made.pool.examples


def test_only_whole_answers_of_the_large_model_or_good_ones_become_examples() -> None:
    made = cache()
    first = made.decide(asked("first request"))
    made.finish(first, "cut off in the mid", complete=False)
    made.finish(made.decide(asked("and then", alone=False)), "depends on what was said", complete=True)
    assert not made.pool.examples
    whole = made.decide(asked("second request"))
    made.finish(whole, "an answer", complete=True)
    assert [e.quality for e in made.pool.examples.values()] == [0.6]
    assert made.feedback("a", whole.id, 0.1)  # it was a bad one after all
    assert not made.pool.examples
    small = made.decide(asked("third request"), without=("large",))
    made.finish(small, "small answer", complete=True)
    assert not made.pool.examples
    made.feedback("a", small.id, 0.9)
    assert [(e.producer, e.quality) for e in made.pool.examples.values()] == [("small", 0.9)]
    made.finish(made.decide(asked("fourth one"), without=("large",)), "bad", complete=True)
    assert len(made.pool.examples) == 1


def test_a_checker_keeps_wrong_answers_out() -> None:
    made = cache(checker=exact, judge_share=1.0)
    assert made.finish(made.decide(asked("w x")), "wrong", True) == 0.0
    assert made.finish(made.decide(asked("y z")), "Y Z", True) == 1.0
    assert [(e.request, e.quality) for e in made.pool.examples.values()] == [("y z", 1.0)]
    assert made.counters["judge_calls"] == 2


def test_personal_data_is_taken_out() -> None:
    text = "Write to ada.l@mail.example.org or +44 (0)20 7946 0958, IBAN DE89 3704 0044 0532 0130 00, host 10.1.2.3"
    found = _pool.stripped(text + ", says Ada Lovelace.", ["Ada Lovelace"])
    assert found == "Write to [email] or [number], IBAN [account], host [address], says [name]."
    assert _pool.stripped("In 2024 there were 195 countries and 3.14159 of pi; code 076, version 1.2.3") == (
        "In 2024 there were 195 countries and 3.14159 of pi; code 076, version 1.2.3"
    )


def test_names_come_from_a_file(tmp_path: Path) -> None:
    people = tmp_path / "people.txt"
    people.write_text("Grace Hopper\n\n")
    made = cache(people=str(people))
    made.add("a/", "who is grace hopper please", "Grace Hopper wrote compilers", "large", 0.9)
    (kept,) = made.pool.examples.values()
    assert kept.request == "who is [name] please" and kept.answer == "[name] wrote compilers"
    with pytest.raises(UsageError, match="people="):
        cache(people=str(tmp_path / "none"))


# ---------------------------------------------------------------- examples: privacy


def test_examples_and_feedback_never_leave_their_scope() -> None:
    made = cache()
    for scope in ("a/", "b/", "a/other system"):
        made.add(scope, "codes of Peru", f"PE for {scope}", "large", 0.9)
    for scope in ("a/", "b/", "a/other system"):
        found = made.decide(asked("codes of Peru", scope), without=("large",)).kept.examples
        assert [e.scope for e in found] == [scope]
    assert made.decide(asked("codes of Peru", "c/")).model == LARGE  # somebody new has no past
    decision = made.decide(asked("codes of Peru"))
    made.finish(decision, "PE", True)
    assert not made.feedback("b", decision.id, 1.0) and made.feedback("a", decision.id, 1.0)
    assert made.forget("a") == 2
    assert {e.scope for e in made.pool.examples.values()} == {"b/"}
    assert not any(w["scope"].startswith("a/") for w in made.pool.noted("pending").values())


# ---------------------------------------------------------------- feedback


def test_feedback_comes_late_out_of_order_and_once() -> None:
    clock = Clock()
    made = cache(clock, feedback_seconds=100)
    decisions = [made.decide(asked(f"request number {i}")) for i in range(4)]
    for decision in decisions:
        made.finish(decision, "an answer", True)
    clock.now += 50
    assert made.feedback("a", decisions[2].id, 1.0) and made.feedback("a", decisions[0].id, 0.0)
    assert not made.feedback("a", decisions[2].id, 1.0)  # counted already
    assert not made.feedback("a", "nothing of ours", 1.0)
    clock.now += 51
    assert not made.feedback("a", decisions[1].id, 1.0)  # expired
    assert made.router.to_json()["large"]["seen"] == 2
    assert made.counters["feedback"] == 2 and made.counters["feedback_unknown"] == 3
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 1"):
            made.feedback("a", decisions[3].id, wrong)


# ---------------------------------------------------------------- replay


def ready_to_replay(**options: Any) -> tuple[Any, Clock, int]:
    clock = Clock()
    made = cache(clock, checker=exact, judge_share=0.0, replay_price=1e-3, **options)
    number = made.add("a/", "codes of peru", "wrong", "large", 0.6)
    made.pool.write(replace(made.pool.examples[number], gain=0.5, at=clock.now))
    return made, clock, number


def test_a_better_answer_takes_the_place_and_a_worse_one_never() -> None:
    made, clock, number = ready_to_replay()
    example = made.to_replay()
    assert example is not None and example.id == number
    assert not made.replayed(example, ["also wrong", ""], 60)  # a tie keeps the old one
    held = made.pool.examples[number]
    assert (held.answer, held.quality, held.gain) == ("wrong", 0.6, 0.0) and made.to_replay() is None
    made.pool.write(replace(held, gain=0.5))
    example = made.to_replay()
    assert example is not None
    assert made.replayed(example, ["nonsense", "CODES OF PERU"], 60)
    held = made.pool.examples[number]
    assert (held.answer, held.quality) == ("CODES OF PERU", 1.0)
    made.pool.write(replace(held, gain=0.5))
    again = made.to_replay()
    assert again is not None and not made.replayed(again, ["worse"], 60)
    assert made.pool.examples[number].quality == 1.0
    assert made.counters["replay_tokens"] == 180 and made.counters["replays_better"] == 1


def test_replay_waits_for_idle_time_and_keeps_its_budget() -> None:
    made, clock, number = ready_to_replay(replay_tokens=80)
    decision = made.decide(asked("codes of cuba"))
    tokens = made.begin(decision)
    assert made.to_replay() is None  # somebody is served
    made.end(tokens)
    made.load.level = 5.0
    assert made.to_replay() is None  # the load is still high
    made.load.level = 0.0
    example = made.to_replay()
    assert example is not None
    made.replayed(example, [], 60)
    made.pool.write(replace(made.pool.examples[number], gain=0.5))
    assert made.to_replay() is None  # 80 tokens an hour, 60 are spent
    clock.now += 3601
    made.pool.write(replace(made.pool.examples[number], gain=0.5, at=clock.now))
    assert made.to_replay() is not None
    made.pool.write(replace(made.pool.examples[number], gain=0.01, at=clock.now))
    assert made.to_replay() is None  # not worth its tokens
    assert cache().to_replay() is None  # without a judge nothing is better than anything


def test_gain_grows_with_missed_quality_and_fades() -> None:
    clock = Clock()
    made = cache(clock, threshold=0.0, length=0.0)
    number = made.add("a/", "codes of Peru", "PE", "large", 0.9)
    decision = made.decide(asked("codes of Cuba"), without=("large",))
    made.finish(decision, "?", True)
    made.feedback("a", decision.id, 0.25)
    held = made.pool.examples[number]
    assert held.gain == pytest.approx(0.2 * 0.75 * SMALL.cost) and held.uses == 1
    assert held.value == pytest.approx(0.8 * 0.45)  # it did not offload well
    assert held.aged(clock.now + 7200).gain == pytest.approx(held.gain * 0.81)
    decision = made.decide(asked("codes of Cuba"), without=("large",))
    made.finish(decision, "CU", True)
    made.feedback("a", decision.id, 1.0)
    assert made.pool.examples[number].value == pytest.approx(0.8 * 0.8 * 0.45 + 0.2)


# ---------------------------------------------------------------- eviction


def best_value(values: list[float], sizes: list[int], room: int) -> float:
    subsets = itertools.chain.from_iterable(itertools.combinations(range(len(sizes)), n) for n in range(len(sizes) + 1))
    return max(sum(values[i] for i in s) for s in subsets if sum(sizes[i] for i in s) <= room)


def test_the_knapsack_is_exact_for_few_and_half_as_good_for_many() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        sizes = [int(s) for s in draw.integers(50, 900, size=9)]
        values = [float(v) for v in draw.random(9)]
        chosen = _pool.knapsack(values, sizes, 1500)
        assert sum(sizes[i] for i in chosen) <= 1500
        assert sum(values[i] for i in chosen) == pytest.approx(best_value(values, sizes, 1500))
    sizes, values = [100] * 299 + [15_000], [0.01] * 299 + [10.0]
    assert _pool.knapsack(values, sizes, 15_000) == [299]  # by density alone the large one would not fit
    assert _pool.knapsack([1.0], [10], 5) == []


def test_the_capacity_is_kept_to_the_byte_and_the_least_valuable_go() -> None:
    pool = _pool.Pool(":memory:", "x", WIDTH, 5000, Clock())
    for i in range(40):
        pool.admit(example(f"word{i} other{i}", answer="x" * (i % 7 * 30 + 5), value=0.1 + i / 50), 0.95)
        assert pool.bytes == sum(e.size for e in pool.examples.values()) <= 5000
    assert pool.evicted > 20
    assert min(e.value for e in pool.examples.values()) > 0.3
    assert pool.admit(example("x y", answer="y" * 5000), 0.95) == (0, "too_large")


# ---------------------------------------------------------------- state


def test_everything_is_in_one_file_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "pool.sqlite"
    made = cache(state=str(file))
    made.add("a/", "codes of Peru", "PE", "large", 0.9)
    for i in range(6):
        decision = made.decide(asked(f"codes of land {i}"))
        made.finish(decision, "XX", True)
        made.feedback("a", decision.id, 0.9)
    waiting = made.decide(asked("codes of Cuba"))
    made.finish(waiting, "CU", True)
    before = (made.router.to_json(), made.utility.to_json(), made.threshold.to_json())
    examples = {n: (e.request, e.quality, e.uses, e.gain, e.value) for n, e in made.pool.examples.items()}
    with pytest.raises(UsageError, match="no two servers share one"):
        cache(state=str(file))
    made.close()
    assert file.stat().st_mode & 0o077 == 0
    again = cache(state=str(file))
    assert (again.router.to_json(), again.utility.to_json(), again.threshold.to_json()) == before
    assert {n: (e.request, e.quality, e.uses, e.gain, e.value) for n, e in again.pool.examples.items()} == examples
    assert again.feedback("a", waiting.id, 1.0)  # also of a request from before
    again.close()


def test_a_file_of_another_encoder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pool.sqlite"
    cache(state=str(file)).close()
    with pytest.raises(UsageError, match="embedding words, and letters is needed"):
        cache(state=str(file), made_by="letters")
    with pytest.raises(UsageError, match="width 64, and 32 is needed"):
        _pool.Pool(file, "words", 32, 1000, Clock())
    (tmp_path / "no.sqlite").write_bytes(b"this is no data base, but text that is long enough to be one" * 20)
    with pytest.raises(UsageError, match="cannot be used as an example pool"):
        cache(state=str(tmp_path / "no.sqlite"))


KILLED = """
import sys; sys.path.insert(0, {here!r})
from test_ic_cache import asked, cache
made = cache(state={file!r})
print("begun", flush=True)
for i in range(100_000):
    decision = made.decide(asked(f"request number {{i}} of many"))
    made.finish(decision, f"answer {{i}}", True)
    made.feedback("a", decision.id, 1.0)
    if i == 20: print("going", flush=True)
"""


def test_a_killed_process_leaves_nothing_half_written(tmp_path: Path) -> None:
    file = tmp_path / "pool.sqlite"
    code = KILLED.format(here=str(Path(__file__).parent), file=str(file))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout
    assert [process.stdout.readline().strip() for _ in range(2)] == ["begun", "going"]
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    made = cache(state=str(file))
    seen = made.router.to_json()["large"]["seen"] + made.router.to_json()["small"]["seen"]
    assert seen >= 20
    assert len(made.pool.noted("pending")) <= 1  # of every request either all or nothing is known
    assert made.pool.bytes == sum(e.size for e in made.pool.examples.values())
    made.close()


def test_a_change_that_fails_changes_nothing() -> None:
    made = cache()
    number = made.add("a/", "codes of Peru", "PE", "large", 0.9)
    with pytest.raises(RuntimeError), made.pool.change():
        made.pool.drop(number)
        made.pool.note("learned", "router", {"broken": 1})
        raise RuntimeError
    assert [e.request for e in made.pool.examples.values()] == ["codes of Peru"]
    assert made.pool.take_note("learned", "router") is None
    assert made.pool.search("a/", embed("codes of Peru"), 1)[0][0].answer == "PE"


def test_counters() -> None:
    made = cache(checker=exact, judge_share=1.0)
    made.add("a/", "codes of Peru", "PE", "large", 0.9)
    decision = made.decide(asked("codes of Cuba"), without=("large",))
    made.finish(decision, "CODES OF CUBA", True)
    made.finish(made.decide(asked("another matter altogether"), only="large"), "no", True)
    found = made.stats()
    assert found["requests"] == 2 and found["offloaded"] == 1 and found["judge_calls"] == 2
    assert found["example_tokens"] == decision.kept.tokens > 0
    assert found["pool_bytes"] == made.pool.bytes > 0 and found["replay_tokens"] == 0
    assert all(math.isfinite(v) and name.isidentifier() for name, v in found.items())


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "wrong",
    [{"capacity": "-5MB"}, {"capacity": "5"}, {"replay_tokens": -1}, {"example_tokens": 0}, {"threshold": 1.5},
     {"example_tokens": 4096}, {"near": 0}, {"small_cost": 1.0}, {"most": 2.5}, {"small": ""},
     {"load_gain": float("nan")}, {"models": "a.json"}, {"match_system": 1}],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(ic.example(), **wrong)


def test_checkers() -> None:
    from shoestring.methods.serving._cache import checker_of

    json_one = checker_of("json")
    assert json_one and json_one("?", '{"a": 1}') == 1.0 and json_one("?", "[1]") == json_one("?", "no") == 0.0
    assert checker_of("") is None and checker_of("math:hypot") is math.hypot
    for wrong in ("math", "math:nothing", "no.such.module:f", "math:pi"):
        with pytest.raises(UsageError, match="checker="):
            checker_of(wrong)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError) as caught:
        cache()
    assert "shoestring[cache]" in caught.value.remedy


def test_the_file_is_plain_sqlite(tmp_path: Path) -> None:
    made = cache(state=str(tmp_path / "pool.sqlite"))
    made.add("a/", "codes of Peru", "PE", "large", 0.9)
    made.close()
    with sqlite3.connect(tmp_path / "pool.sqlite") as base:
        assert base.execute("SELECT request, answer FROM examples").fetchall() == [("codes of Peru", "PE")]

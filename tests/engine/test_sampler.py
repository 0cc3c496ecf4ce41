"""Draws against exact probabilities, filters against transformers' processors, and what must not matter to a draw."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.engine.request import Request, Sampling
from shoestring.engine.sampler import Sampler, SampleState, _crossing, filtered, logprob_of


class Ends:
    """As much of a tokenizer as sampling without constraints needs."""

    eos = (2,)
    json = ""


def _state(vocab: int = 64, prompt: tuple[int, ...] = (1, 5, 5, 7), index: int = 0, **settings: Any) -> SampleState:
    return Sampler(vocab, Ends()).state(Request(list(prompt), Sampling(**settings)), index)


def _logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


def _softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


def _draws(row: np.ndarray, count: int, **settings: Any) -> np.ndarray:
    """Tokens drawn from the same logits at `count` positions of one answer."""
    sampler = Sampler(len(row), Ends())
    state = sampler.state(Request([1], Sampling(**settings)), 0)
    drawn = []
    for _ in range(count):
        (choice,) = sampler.sample(row[None], [state])
        drawn.append(choice.token)
        state.accept(choice.token)
    return np.array(drawn)


def _assert_drawn_from(drawn: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square with a limit that a right sampler passes with a chance of one in a million."""
    counts = np.bincount(drawn, minlength=len(expected))
    assert not counts[expected == 0].any()
    wanted = expected * len(drawn)
    common = wanted >= 5
    rare = ~common & (expected > 0)
    pairs = [*zip(counts[common], wanted[common]), *([(counts[rare].sum(), wanted[rare].sum())] if rare.any() else [])]
    statistic = sum((count - want) ** 2 / want for count, want in pairs if want > 0)
    freedom = max(len(pairs) - 1, 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 12, (statistic, freedom)


# ---- what transformers' processors do, in the order in which `generate` builds them ----


def _reference(row: np.ndarray, sampling: Sampling, prompt: tuple[int, ...], answer: tuple[int, ...]) -> np.ndarray:
    """Logits as transformers filters them; -inf for what is left out."""
    import torch
    from transformers.generation import logits_process as their

    chain: list[Any] = []
    if sampling.repetition_penalty != 1:
        chain.append(their.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        chain.append(their.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(their.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(their.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(their.MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        chain.append(their.TypicalLogitsWarper(sampling.typical_p))
    ids, scores = torch.tensor([[*prompt, *answer]]), torch.from_numpy(row.astype(np.float64))[None]
    for processor in chain:
        scores = processor(ids, scores)
    kept: np.ndarray = scores[0].numpy()
    return kept


def _ours(row: np.ndarray, state: SampleState) -> np.ndarray:
    """Probabilities of every token, 0 for what is left out."""
    row = row.copy()
    state.change(row)
    ids, weights = filtered(row, row.max(), state.sampling)
    chances = np.zeros(len(row))
    chances[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return chances


FILTERS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.9),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=40, temperature=0.6),
    dict(top_k=10_000),
    dict(top_p=0.9),
    dict(top_p=0.05),
    dict(top_p=0.999, temperature=1.5),
    dict(min_p=0.1),
    dict(min_p=0.9),
    dict(typical_p=0.9),
    dict(typical_p=0.2),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.8, top_k=9),
    dict(top_k=30, top_p=0.8, min_p=0.02, typical_p=0.95, temperature=0.8, repetition_penalty=1.1),
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [8, 64, 1000, 49_152])
@pytest.mark.parametrize("kind", ["spread", "ties", "peaked"])
def test_filters_are_those_of_transformers(settings: dict[str, Any], vocab: int, kind: str) -> None:
    row = _logits(1, vocab, seed=vocab, spread=9.0 if kind == "peaked" else 3.0)[0]
    if kind == "ties":
        row = np.round(row)
    prompt, answer = (1, 5, 5, 7), (3, 5)
    state = _state(vocab, prompt, **{"temperature": 1.0, **settings})
    for token in answer:
        state.accept(token)
    expected = _softmax(_reference(row, state.sampling, prompt, answer))
    ours = _ours(row, state)
    if kind == "ties":  # which of equals a nucleus keeps is not defined there
        ours, expected = np.sort(ours), np.sort(expected)
    # float32 may put the one token on a border to its other side: what that moves is bounded.
    assert np.abs(ours - expected).sum() < 1e-3
    if vocab <= 1000:
        assert (ours > 0).tolist() == (expected > 1e-40).tolist()


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_one_possible_token_is_drawn(settings: dict[str, Any]) -> None:
    row = np.full(50_257, -np.inf, np.float32)
    row[777] = -3.0
    assert set(_draws(row, 3, **{"temperature": 1.0, **settings})) == {777}


@pytest.mark.parametrize(
    "settings", [dict(top_p=0.5), dict(top_k=3), dict(typical_p=0.5), dict(min_p=1 - 1e-9), dict()]
)
def test_equal_logits(settings: dict[str, Any]) -> None:
    row = np.zeros(40_000, np.float32)
    state = _state(len(row), temperature=1.0, **settings)
    kept = int((_ours(row, state) > 0).sum())
    assert kept == (20_000 if "top_p" in settings else 40_000)  # ties at a border stay together but in a nucleus


# ---- the draw ----


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(temperature=0.5), dict(top_k=5), dict(top_p=0.8), dict(min_p=0.05), dict(typical_p=0.7)],
    ids=str,
)
def test_draws_follow_the_probabilities(settings: dict[str, Any]) -> None:
    row = _logits(1, 50, seed=3, spread=1.5)[0]
    settings = {"temperature": 1.0, "seed": 11, **settings}
    expected = _softmax(_reference(row, Sampling(**settings), (1,), ()))
    expected[expected < 1e-40] = 0
    _assert_drawn_from(_draws(row, 6000, **settings), expected)


def test_draws_from_a_large_vocabulary_follow_the_probabilities() -> None:
    row = _logits(1, 49_153, seed=4, spread=0.0)[0]
    row[::700] = 8.0
    _assert_drawn_from(_draws(row, 4000, temperature=1.0, seed=5), _softmax(row))


def test_the_numbers_are_uniform_and_do_not_hang_together() -> None:
    def numbers(seed: int, index: int, count: int = 2000) -> np.ndarray:
        state = _state(seed=seed, index=index)
        found = []
        for _ in range(count):
            found.append(state.uniform())
            state.accept(0)
        return np.array(found)

    base = numbers(7, 0)
    assert 0 <= base.min() and base.max() < 1
    even = np.sort(numbers(7, 0, 20_000))
    assert np.abs(even - (np.arange(20_000) + 0.5) / 20_000).max() < 2 / math.sqrt(20_000)  # Kolmogorov and Smirnov
    for other in (numbers(7, 1), numbers(8, 0), numbers(-7, 0), numbers(7 + (1 << 32), 0), np.roll(base, 1)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.1


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    st.integers(1, 300),
    st.floats(0, 1, exclude_max=True),
)
def test_the_look_up_finds_where_the_sum_crosses(some: list[float], repeat: int, uniform: float) -> None:
    weights = np.tile(np.array(some + [0.5], np.float32), repeat)
    place = _crossing(weights, lambda whole: uniform * whole)
    exact = np.cumsum(weights, dtype=np.float64)
    target = uniform * exact[-1]
    assert weights[place] > 0
    assert exact[place] >= target * (1 - 1e-12) and (exact[place] - weights[place]) <= target * (1 + 1e-12)


# ---- what must not matter, and what must ----

MIXED = [
    dict(),
    dict(temperature=1.0, seed=1),
    dict(temperature=0.8, top_p=0.9, seed=1, logprobs=2),
    dict(temperature=1.2, top_k=20, seed=-5, presence_penalty=0.5),
    dict(repetition_penalty=1.4, logprobs=0),
    dict(temperature=1.0, typical_p=0.8, seed=9, frequency_penalty=1.0),
    dict(temperature=1.0, seed=3, min_tokens=4, logit_bias=((4, 30.0), (6, -100.0))),
]


def test_a_draw_does_not_depend_on_the_batch() -> None:
    vocab, steps = 512, 6
    sampler = Sampler(vocab, Ends())
    logits = _logits(steps * len(MIXED), vocab, seed=2).reshape(steps, len(MIXED), vocab)

    def alone(which: int) -> list[Any]:
        state = sampler.state(Request([1, 9], Sampling(**MIXED[which])), 0)
        found = []
        for step in range(steps):
            found += sampler.sample(logits[step, which : which + 1], [state])
            state.accept(found[-1].token)
        return found

    states = [sampler.state(Request([1, 9], Sampling(**settings)), 0) for settings in MIXED]
    order = np.arange(len(MIXED))
    together: list[list[Any]] = [[] for _ in MIXED]
    before = logits.copy()
    for step in range(steps):
        order = np.roll(order, 1)
        for which, choice in zip(order, sampler.sample(logits[step][order], [states[i] for i in order])):
            together[which].append(choice)
            states[which].accept(choice.token)
    assert together == [alone(which) for which in range(len(MIXED))]
    assert (logits == before).all()


def test_seeds() -> None:
    row = _logits(1, 64, spread=1.0)[0]
    first = _draws(row, 40, temperature=1.0, seed=1).tolist()
    assert first == _draws(row, 40, temperature=1.0, seed=1).tolist()
    assert first != _draws(row, 40, temperature=1.0, seed=2).tolist()
    assert _draws(row, 40, temperature=1.0).tolist() != _draws(row, 40, temperature=1.0).tolist()


def test_greedy_takes_the_first_of_the_largest() -> None:
    row = np.array([0, 3, 1, 3], np.float32)
    assert set(_draws(row, 5)) == {1}
    assert set(_draws(row, 5, temperature=1e-40, seed=1)) == {1}
    assert set(_draws(row, 5, temperature=1.0, top_p=1e-6, seed=1)) == {1}


def test_a_path_of_drafted_tokens_is_taken_back() -> None:
    sampler = Sampler(64, Ends())
    request = Request([1, 9], Sampling(temperature=1.0, seed=4, repetition_penalty=1.5, frequency_penalty=0.7))
    state, plain = sampler.state(request, 0), sampler.state(request, 0)
    rows = _logits(8, 64, seed=8)
    for token in (9, 5):
        state.accept(token)
        plain.accept(token)
    for path in ([5], [9, 9, 30, 5, 31], list(range(3, 60)) * 3, []):
        for token in path:
            state.accept(token)
        ahead = sampler.sample(rows[:1], [state])
        if path:
            straight = sampler.state(request, 0)
            for token in (9, 5, *path):
                straight.accept(token)
            assert ahead == sampler.sample(rows[:1], [straight])
        state.rollback(len(path))
        for row in rows:
            changed, expected = row.copy(), row.copy()
            state.change(changed)
            plain.change(expected)
            assert (changed == expected).all()
            assert sampler.sample(row[None], [state]) == sampler.sample(row[None], [plain])


def test_presence_and_frequency_count_the_answer_alone() -> None:
    state = _state(8, prompt=(1, 3), presence_penalty=0.5, frequency_penalty=0.25)
    for token in (3, 4, 4):
        state.accept(token)
    row = np.zeros(8, np.float32)
    state.change(row)
    assert row.tolist() == [0, 0, 0, -0.75, -1.0, 0, 0, 0]


def test_bias_comes_before_the_penalty_for_repetition() -> None:
    state = _state(8, prompt=(1, 3), repetition_penalty=2.0, logit_bias=((3, 4.0), (3, 2.0), (5, -1.0)))
    row = np.ones(8, np.float32)
    row[1] = -1
    state.change(row)
    assert row.tolist() == [1, -2, 1, 3.5, 1, 0, 1, 1]


def test_no_end_before_min_tokens() -> None:
    row = np.zeros(8, np.float32)
    row[[2, 6]] = 9, 8
    assert _draws(row, 4, min_tokens=2, stop_token_ids=(6,)).tolist() == [0, 0, 2, 2]
    assert _draws(row, 4, min_tokens=2, ignore_eos=True, stop_token_ids=(6,)).tolist() == [2, 2, 2, 2]


def test_a_state_is_finished_by_an_end() -> None:
    state = _state(stop_token_ids=(6,))
    assert not state.finished
    for token, finished in ((5, False), (2, True), (6, True), (1, False)):
        state.accept(token)
        assert state.finished is finished
    assert not _state(ignore_eos=True).finished


# ---- rows that cannot be drawn from ----


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", [dict(), dict(temperature=1.0), dict(repetition_penalty=1.1, logprobs=3)])
def test_a_broken_row_fails_alone(bad: float, settings: dict[str, Any]) -> None:
    sampler = Sampler(64, Ends())
    logits = _logits(3, 64)
    logits[1] = bad
    if not np.isneginf(bad):
        logits[1, 5:] = 0  # one bad value among good ones is enough
    states = [sampler.state(Request([1], Sampling(**settings)), 0) for _ in range(3)]
    good, broken, other = sampler.sample(logits, states)
    assert not good.error and not other.error
    assert broken.token == -1 and "output is" in broken.error


def test_nothing_left_to_draw_is_said() -> None:
    row = np.full(8, -np.inf, np.float32)
    row[2] = 1.0
    sampler = Sampler(8, Ends())
    (choice,) = sampler.sample(row[None], [sampler.state(Request([1], Sampling(min_tokens=3)), 0)])
    assert "No token is possible" in choice.error


# ---- log-probabilities ----


@pytest.mark.parametrize("vocab", [8, 64, 50_257])
def test_logprobs_are_those_of_the_raw_logits(vocab: int) -> None:
    sampler = Sampler(vocab, Ends())
    row = _logits(1, vocab, seed=6)[0]
    settings = Sampling(
        temperature=1.3, top_k=3, seed=1, logprobs=5, repetition_penalty=3.0, logit_bias=((1, 50.0),), min_tokens=2
    )
    (choice,) = sampler.sample(row[None], [sampler.state(Request([3, 4], settings), 0)])
    exact = np.log(_softmax(row))
    found = choice.logprob
    assert found is not None and found.token == choice.token
    assert found.logprob == pytest.approx(exact[choice.token], abs=1e-5)
    assert [token for token, _ in found.top] == np.argsort(-exact)[:5].tolist()
    assert [value for _, value in found.top] == pytest.approx(np.sort(exact)[::-1][:5].tolist(), abs=1e-5)


def test_logprobs_of_equals_are_in_the_order_of_ids() -> None:
    row = np.zeros(50_000, np.float32)
    row[[9, 40_000]] = 1
    assert [token for token, _ in logprob_of(row, 3, 5).top] == [9, 40_000, 0, 1, 2]
    assert logprob_of(row, 3, 0).top == ()
    assert [logprob_of(row, token, 0).rank for token in (9, 40_000, 0, 10)] == [1, 2, 3, 12]


def test_logprobs_only_when_asked() -> None:
    sampler = Sampler(64, Ends())
    rows = _logits(2, 64)
    settings = Sampling(logprobs=0)
    with_own, without = sampler.sample(
        rows, [sampler.state(Request([1], s), 0) for s in (settings, dataclasses.replace(settings, logprobs=None))]
    )
    assert with_own.logprob is not None and with_own.logprob.top == ()
    assert without.logprob is None

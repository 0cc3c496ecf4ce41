"""Everything that can be plugged into the engine, each with its trivial implementation, on both runners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runner_cases import VOCAB, Part, batch, logits, make, open_runner, pages, text

from shoestring.core.errors import UsageError
from shoestring.engine.engine import Engine
from shoestring.engine.hooks import (
    CountingFiller,
    Draft,
    FixedExit,
    Hooks,
    KeepEnds,
    RecordingTap,
    RepeatDrafter,
    Spare,
    Verified,
)
from shoestring.engine.request import Completion, Constraint, Request, Sampling
from shoestring.engine.runner import BLOCK, Batch, Runner
from shoestring.engine.sequence import Sequence as Answer
from shoestring.engine.tokenizer import Tokenizer

STEP = 64  # tokens of a step
Opener = Callable[..., Engine]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of three layers, and the same cut after its first."""
    found = {name: tmp_path_factory.mktemp("models") / name for name in ("whole", "cut")}
    whole, cut = make("llama"), make("llama", num_hidden_layers=1)
    weights = whole.state_dict()
    cut.load_state_dict({name: weights[name] for name in cut.state_dict()})
    whole.save_pretrained(found["whole"])
    cut.save_pretrained(found["cut"])
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [c for c in alphabet if c.isascii() and c.isalnum()] + ["{", "}", '"', ":", ",", "Ġ"]
    words = ["<pad>", "<s>", "</s>", *letters]
    words += [a + b for a in letters for b in letters][: VOCAB - len(words)]
    inner = Inner(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(words[:3])
    return Tokenizer(inner, eos=(2,))


@pytest.fixture(params=["native", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(kind: str, folders: dict[str, Path], tokenizer: Tokenizer) -> Iterator[Opener]:
    """Opens an engine with some hooks."""
    engines: list[Engine] = []

    def opener(hooks: Hooks = Hooks(), model: str = "whole", **more: Any) -> Engine:
        runner = open_runner(kind, folders[model])
        engines.append(Engine((runner, tokenizer), hooks=hooks, max_step_tokens=STEP, memory=1 << 22, **more))
        return engines[-1]

    yield opener
    for engine in engines:
        engine.close()


@pytest.fixture
def alone(kind: str, folders: dict[str, Path]) -> Iterator[Runner]:
    """A runner without an engine."""
    runner = open_runner(kind, folders["whole"])
    runner.reserve(64)
    yield runner
    runner.close()


LOOPED = text(6, seed=3) * 4
MIXED = [
    (LOOPED, Sampling(max_tokens=40, ignore_eos=True)),
    (text(30, seed=1), Sampling(max_tokens=25, ignore_eos=True, logprobs=3)),
    (LOOPED, Sampling(max_tokens=40, ignore_eos=True, temperature=0.4, seed=5)),
    (LOOPED[3:], Sampling(max_tokens=30, ignore_eos=True, temperature=0.8, top_p=0.9, seed=6, n=3)),
    (LOOPED, Sampling(max_tokens=30, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.3)),
    (LOOPED, Sampling(max_tokens=30, temperature=1.0, seed=7, constraint=Constraint("regex", "(ab|ba){12}"))),
    (LOOPED, Sampling(max_tokens=30, stop=("aa", "b")), ),
]  # fmt: skip


def _answers(engine: Engine, requests: Sequence[tuple[list[int], Sampling]]) -> list[list[Completion]]:
    """All requests in one mixed batch."""
    made = [Request(prompt, sampling) for prompt, sampling in requests]
    for request in made:
        engine.submit(request)
    deltas = []
    while not engine.idle:
        deltas += engine.step()
    found = []
    for request in made:
        answers = []
        for index in range(request.sampling.n):
            mine = [d for d in deltas if (d.request_id, d.index) == (request.id, index)]
            assert not mine[-1].error and mine[-1].finish_reason
            answers.append(
                Completion(
                    tuple(t for d in mine for t in d.tokens),
                    "".join(d.text for d in mine),
                    mine[-1].finish_reason,
                    tuple(p for d in mine for p in d.logprobs),
                    usage=mine[-1].usage,
                )
            )
        found.append(answers)
    return found


def _assert_same(found: list[list[Completion]], wanted: list[list[Completion]]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
            assert [p.token for p in a.logprobs] == [p.token for p in b.logprobs]
            assert [p.logprob for p in a.logprobs] == pytest.approx([p.logprob for p in b.logprobs], abs=0.02)


# ---- drafter ----


class Observed(RepeatDrafter):
    """Keeps what it was told of its drafts."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Draft, tuple[int, ...], float]] = []

    def observe(self, verified: Sequence[Verified], tokens: int, seconds: float) -> None:
        assert tokens >= sum(1 + len(one.draft.tokens) for one in verified)
        self.told += [(one.draft, one.accepted, seconds) for one in verified]


def test_drafts_do_not_change_the_answers(opened: Opener) -> None:
    plain = opened()
    wanted = _answers(plain, MIXED)
    drafter = Observed()
    engine = opened(Hooks(drafter=drafter))
    found = _answers(engine, MIXED)
    _assert_same(found, wanted)
    counts = engine.counts()
    assert 0 < counts.accepted_draft_tokens < counts.draft_tokens
    assert counts.generation_tokens == plain.counts().generation_tokens
    assert sum(a.usage.accepted_draft_tokens for answers in found for a in answers) == counts.accepted_draft_tokens
    # The drafter is told of every draft that was verified, and what was accepted is a beginning of it.
    assert sum(len(accepted) for _, accepted, _ in drafter.told) == counts.accepted_draft_tokens
    assert sum(len(draft.tokens) for draft, _, _ in drafter.told) == counts.draft_tokens
    assert all(draft.tokens[: len(accepted)] == accepted for draft, accepted, _ in drafter.told)
    assert all(seconds > 0 for _, _, seconds in drafter.told)
    assert engine.counts().blocks_used == 0


class Bush:
    """Knows the answer, and hides it in a tree of wrong guesses: the right branch never comes first."""

    def __init__(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        self.whole, self.depths = [*prompt, *answer], [0] * 9

    def propose(self, answer: Answer, limit: int) -> Draft:
        ahead = self.whole[len(answer.tokens) : len(answer.tokens) + min(limit, 16) // 3]
        made: list[tuple[int, int]] = []
        parent = -1
        for token in ahead:
            made += [((token + 1) % VOCAB, parent), (token, parent), ((token + 2) % VOCAB, parent)]
            parent = len(made) - 2
        return Draft(tuple(t for t, _ in made), tuple(p for _, p in made))

    def observe(self, verified: Sequence[Verified], tokens: int, seconds: float) -> None:
        for one in verified:
            self.depths[len(one.accepted)] += 1


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=40, ignore_eos=True),
        Sampling(max_tokens=40, ignore_eos=True, temperature=1.0, seed=1, frequency_penalty=0.5, logprobs=0),
    ],
    ids=["greedy", "drawn"],
)
def test_the_right_branch_of_a_tree_is_found(opened: Opener, sampling: Sampling) -> None:
    prompt = text(21, seed=4)
    wanted = _answers(opened(), [(prompt, sampling)])
    drafter = Bush(prompt, wanted[0][0].tokens)
    engine = opened(Hooks(drafter=drafter))
    _assert_same(_answers(engine, [(prompt, sampling)]), wanted)
    assert engine.counts().steps <= 12  # up to five guessed right and one drawn in each, fewer at the end
    assert drafter.depths[5] >= 4


class Measuring(RepeatDrafter):
    """Passes over pages of its own before there are requests."""

    def ready(self, runner: Runner, pages: int) -> None:
        parts = [Part([3, 4, 5], list(range(pages))[:2])]
        self.pages, self.first = pages, logits(runner, *parts)[-1].argmax()


def test_a_hook_may_compute_before_the_first_request(opened: Opener) -> None:
    wanted = _answers(opened(), MIXED[:3])
    drafter = Measuring()
    engine = opened(Hooks(drafter=drafter))
    assert drafter.pages == engine.counts().blocks_total > 2
    ((answer,),) = _answers(engine, [([3, 4, 5], Sampling(max_tokens=1))])
    assert answer.tokens == (drafter.first,)
    _assert_same(_answers(engine, MIXED[:3]), wanted)


# ---- exit policy ----


def test_a_fixed_exit_is_the_model_cut_short(opened: Opener) -> None:
    wanted = _answers(opened(model="cut"), MIXED)
    _assert_same(_answers(opened(Hooks(exit=FixedExit(1))), MIXED), wanted)
    assert wanted != _answers(opened(), MIXED)


def test_an_exit_that_is_not_taken_changes_nothing(opened: Opener) -> None:
    class Never:
        layers = (1, 2)
        asked: list[int] = []

        def leave(self, layer: int, hidden: Any, answers: Sequence[Answer]) -> list[bool]:
            assert len(hidden) == len(answers)
            self.asked.append(layer)
            return [False] * len(answers)

    some = MIXED[:3]
    _assert_same(_answers(opened(Hooks(exit=Never())), some), _answers(opened(), some))
    assert set(Never.asked) == {1, 2}


# ---- tap ----


class Sent(RecordingTap):
    """Sends what passes the border to the upper layers of another runner, and keeps what that makes of it."""

    def __init__(self, layer: int, upper: Runner) -> None:
        super().__init__(layer)
        self.upper, self.batches, self.logits = upper, list[Batch](), list[np.ndarray]()

    def pass_through(self, hidden: np.ndarray, batch: Batch) -> np.ndarray:
        self.batches.append(batch)
        out = self.upper.run(batch, self.layer, None, self.upper.from_host(hidden))
        self.logits.append(self.upper.logits(out, batch.starts[1:] - 1).copy())
        return super().pass_through(hidden, batch)


def test_a_tap_sees_the_border_and_another_runner_goes_on_from_there(opened: Opener, alone: Runner) -> None:
    tap = Sent(1, alone)
    some = [(prompt, sampling) for prompt, sampling in MIXED[:2]]
    found = _answers(opened(Hooks(tap=tap)), some)
    _assert_same(found, _answers(opened(), some))
    lower = [alone.to_host(alone.run(batch, 0, 1)) for batch in tap.batches]
    assert len(lower) == len(tap.seen) > 25
    for expected, seen in zip(lower, tap.seen):
        assert seen.dtype == np.float32
        np.testing.assert_allclose(seen, expected, atol=1e-3)
    # The other runner's upper layers, which never saw a token id, choose the same tokens.
    both = [rows.argmax(1) for rows in tap.logits]
    assert [int(rows[0]) for rows in both] == list(found[0][0].tokens)
    assert [int(rows[1]) for rows in both if len(rows) > 1] == list(found[1][0].tokens)


def test_a_tap_can_replace_what_passes(opened: Opener) -> None:
    class Silence:
        layer = 2

        def pass_through(self, hidden: np.ndarray, batch: Batch) -> np.ndarray:
            return np.zeros_like(hidden)

    (same, other) = _answers(opened(Hooks(tap=Silence())), [(MIXED[0][0], MIXED[0][1]), (MIXED[1][0], MIXED[0][1])])
    assert same[0].tokens == other[0].tokens  # nothing of the prompts is left


# ---- attention worker ----


class NumpyAttention:
    """Attention in plain numpy, with keys and values of its own in pages, rounded to bfloat16 as the runners' are."""

    def __init__(self) -> None:
        self.store: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.calls = 0

    def __call__(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, batch: Batch) -> np.ndarray:
        self.calls += 1
        out = np.empty_like(q)
        for s in range(batch.sequences):
            first, context = int(batch.starts[s]), int(batch.contexts[s])
            count = int(batch.starts[s + 1]) - first
            slots = [(layer, int(batch.tables[s, i // BLOCK]), i % BLOCK) for i in range(context + count)]
            for j in range(count):
                self.store[slots[context + j]] = _bfloat16(k[first + j]), _bfloat16(v[first + j])
            keys, values = (np.stack([self.store[slot][part] for slot in slots], 1) for part in (0, 1))
            for j in range(count):
                seen = [*range(context), *(context + a for a in self._line(batch, first, j))]
                out[first + j] = self._attend(q[first + j], keys[:, seen], values[:, seen])
        return out

    @staticmethod
    def _line(batch: Batch, first: int, j: int) -> list[int]:
        """A token and what it descends from, inside its chunk."""
        if batch.parents is None:
            return [*range(j + 1)]
        line = []
        while j >= 0:
            line.append(j)
            j = int(batch.parents[first + j])
        return line[::-1]

    @staticmethod
    def _attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        grouped = q.reshape(len(keys), -1, q.shape[-1])
        scores = np.einsum("ghd,gtd->ght", grouped, keys) / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed: np.ndarray = np.einsum("ght,gtd->ghd", scores / scores.sum(-1, keepdims=True), values).reshape(q.shape)
        return mixed


def _bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def test_attention_computed_elsewhere_gives_the_same_tokens(opened: Opener) -> None:
    some = [MIXED[i] for i in (0, 1, 2, 4)]
    worker = NumpyAttention()
    engine = opened(Hooks(attention=worker))
    _assert_same(_answers(engine, some), _answers(opened(), some))
    assert worker.calls == 3 * engine.counts().steps


# ---- token filter ----


def test_kept_ends_keep_their_positions(opened: Opener, alone: Runner) -> None:
    prompt, count = text(40, seed=9), 12
    sampling = Sampling(max_tokens=count, ignore_eos=True)
    engine = opened(Hooks(filter=KeepEnds(6, 7)))
    ((found,),) = _answers(engine, [(prompt, sampling)])
    kept = [*range(6), *range(33, 40)]
    ids, positions, table = [prompt[i] for i in kept], list(kept), pages(64)
    wanted: list[int] = []
    part = Part(ids, table, positions=positions)
    for step in range(count):
        wanted.append(int(logits(alone, part)[-1].argmax()))
        part = Part(wanted[-1:], table, len(ids) + step, positions=[40 + step])
    assert list(found.tokens) == wanted
    ((whole,),) = _answers(opened(), [(prompt, sampling)])
    assert found.tokens != whole.tokens
    assert found.usage.prompt_tokens == whole.usage.prompt_tokens == 40


def test_a_short_prompt_is_kept_whole(opened: Opener) -> None:
    some = [MIXED[0], MIXED[2]]
    _assert_same(_answers(opened(Hooks(filter=KeepEnds(20, 20))), some), _answers(opened(), some))


# ---- filler ----


class Asked(CountingFiller):
    """Keeps how much it was offered."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.offered: list[int] = []
        self.spares: list[Spare] = []

    def work(self, spare: Spare) -> int:
        self.offered.append(spare.tokens)
        self.spares.append(spare)
        return super().work(spare)


class Sizes:
    """Keeps how many tokens each step computed."""

    layer = 1

    def __init__(self) -> None:
        self.seen: list[int] = []

    def pass_through(self, hidden: np.ndarray, batch: Batch) -> np.ndarray:
        self.seen.append(batch.tokens)
        return hidden


@pytest.mark.parametrize("drafter", [None, RepeatDrafter()], ids=["plain", "drafts"])
def test_a_filler_gets_exactly_what_a_step_leaves(opened: Opener, drafter: RepeatDrafter | None) -> None:
    filler, sizes = Asked(700), Sizes()
    engine = opened(Hooks(filler=filler, tap=sizes, drafter=drafter), max_sequences=4)
    some = [(text(50, seed=i), Sampling(max_tokens=10 + i, ignore_eos=True)) for i in range(6)]
    _assert_same(_answers(engine, some), _answers(opened(max_sequences=4), some))
    assert STEP in sizes.seen  # a full step leaves nothing, and nothing is offered
    assert filler.offered == [STEP - size for size in sizes.seen if size < STEP]
    assert engine.counts().filler_tokens == 700 - filler.left == min(700, sum(filler.offered))


def test_an_idle_engine_leaves_everything_to_the_filler(opened: Opener) -> None:
    filler = Asked(100)
    engine = opened(Hooks(filler=filler))
    for _ in range(3):
        assert engine.step() == []
    assert filler.offered == [STEP] * 3
    assert engine.counts().filler_tokens == 100


def test_a_filler_knows_the_step_and_may_come_after_its_answers_are_out(opened: Opener) -> None:
    engine = opened()
    filler, hurry = Asked(1000), [False]
    engine.plug_filler(filler)
    with pytest.raises(UsageError, match="fills the steps"):
        engine.plug_filler(CountingFiller(1))
    engine.urgent = lambda: hurry[0]
    engine.submit(Request(text(20), Sampling(max_tokens=3, ignore_eos=True)))
    assert engine.advance() and filler.spares == []
    assert engine.fill() == STEP - 20 and engine.fill() == 0
    engine.step()
    first, second = filler.spares
    assert (first.computed, first.context, first.running) == (20, 20, 1)
    assert (second.computed, second.context, second.tokens) == (1, 21, STEP - 1)
    assert second.seconds > 0 and not second.urgent()
    hurry[0] = True
    assert second.urgent()


def test_batches_are_written_as_the_runners_read_them(alone: Runner) -> None:
    """The helper that the expectations above rest on: a chunk in two parts is the chunk."""
    ids, table = text(20), pages(32)
    whole = logits(alone, Part(ids, table))
    alone.run(batch(Part(ids[:13], table)))
    np.testing.assert_allclose(logits(alone, Part(ids[13:], table, 13)), whole[13:], atol=2e-2)

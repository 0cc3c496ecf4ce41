"""Exits that some answers take and others do not, and drafts by the lower layers: what whole passes would give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoestring.core.errors import UsageError
from shoestring.engine.engine import Engine
from shoestring.engine.gates import SelfDraftDecoder, unnamed
from shoestring.engine.hooks import Draft, Hooks, RecordingTap, RepeatDrafter
from shoestring.engine.request import Request, Sampling
from shoestring.engine.sequence import Sequence as Answer
from shoestring.lab import answering
from shoestring.lab.answering import DRAWN, GREEDY, PROMPTS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["native", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Chosen:
    """Leaves at a gate with the token that plain decoding is known to write there, in some places."""

    def __init__(self, layers: tuple[int, ...], known: dict[tuple[int, ...], tuple[int, ...]], often: int) -> None:
        self.layers, self.known, self.often = layers, known, often
        self.asked: list[int] = []

    def leave(self, layer: int, hidden: Any, answers: Sequence[Answer]) -> list[np.ndarray | bool]:
        assert len(hidden) == len(answers)
        self.asked.append(layer)
        return [self._one(layer, answer) for answer in answers]

    def _one(self, layer: int, answer: Answer) -> np.ndarray | bool:
        at = len(answer.tokens) - answer.prompt_tokens
        prompt = tuple(answer.tokens[: answer.prompt_tokens])
        if prompt not in self.known or (at + layer) % self.often:
            return False
        logits = np.full(64, -30.0, np.float32)
        logits[self.known[prompt][at]] = 30.0
        return logits


def known(engine: Engine) -> dict[tuple[int, ...], tuple[int, ...]]:
    return dict(zip(map(tuple, PROMPTS), answering.answers(engine)))


@pytest.mark.parametrize("often", [1, 2, 3])
@pytest.mark.parametrize("layers", [(1,), (2,), (1, 3), (1, 2, 4)])
def test_who_stays_gets_what_whole_passes_give(model: Path, kind: str, layers: tuple[int, ...], often: int) -> None:
    with answering.exact(model, runner=kind) as plain:
        right = known(plain)
        alone = [answering.answers(plain, GREEDY, [prompt])[0] for prompt in PROMPTS]
    policy = Chosen(layers, right, often)
    with answering.exact(model, runner=kind, hooks=Hooks(exit=policy)) as engine:
        assert answering.answers(engine) == list(right.values())
        counts = engine.counts().plugged
        left = sum(counts[f"exit_after_{gate}"] for gate in layers)
        assert counts["exit_tokens"] == sum(map(len, right.values())) >= left > 0
        assert engine.pool.used == 0 and not engine._decoder._lines  # type: ignore[attr-defined]
        assert [answering.answers(engine, GREEDY, [prompt])[0] for prompt in PROMPTS] == alone


def test_layers_above_are_computed_once_and_only_when_needed(model: Path) -> None:
    computed: list[tuple[int, int, int]] = []
    with answering.exact(model) as plain:
        right = known(plain)
    policy = Chosen((2,), right, 4)  # leaves at every fourth token
    with answering.exact(model, hooks=Hooks(exit=policy)) as engine:
        run = engine.runner.run

        def counting(batch: Any, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
            computed.append((first, engine.facts.layers if last is None else last, batch.tokens))
            return run(batch, first, last, hidden)

        engine.runner.run = counting  # type: ignore[method-assign]
        answering.answers(engine, GREEDY, [PROMPTS[0]])
    upper = [tokens for first, _, tokens in computed if first == 2]
    lower = [tokens for first, _, tokens in computed if first == 0]
    assert sum(lower) == len(PROMPTS[0]) + 15
    assert sum(upper) == sum(lower) and 2 in upper  # what waited went with the next; only the very last may be missing


def test_what_never_goes_on_is_never_computed(model: Path) -> None:
    class Always(Chosen):
        def _one(self, layer: int, answer: Answer) -> bool:
            return len(answer.tokens) > answer.prompt_tokens

    with answering.exact(model, hooks=Hooks(exit=Always((1,), {}, 1))) as engine:
        run, upper = engine.runner.run, []

        def counting(batch: Any, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
            if first:
                upper.append(batch.tokens)
            return run(batch, first, last, hidden)

        engine.runner.run = counting  # type: ignore[method-assign]
        answering.answers(engine, GREEDY, [PROMPTS[1]])
        assert upper == [len(PROMPTS[1])]


def test_preempted_forked_and_chunked(model: Path) -> None:
    """Pages run out, answers share prompts, prompts come in pieces: still the same tokens."""
    sampling = Sampling(max_tokens=30, ignore_eos=True, temperature=0.9, seed=3, n=2)
    page = 4 * 2 * 2 * 16 * 16 * 4
    how: dict[str, Any] = dict(memory=12 * page, max_step_tokens=16, max_sequences=6)
    with answering.exact(model) as plain:
        wanted = [[c.tokens for c in found] for found in plain.generate(PROMPTS, sampling)]

    class Sometimes(Chosen):
        def _one(self, layer: int, answer: Answer) -> np.ndarray | bool:
            at = len(answer.tokens) - answer.prompt_tokens
            if at == 0 or at % 3:
                return False
            logits = np.full(64, -1e9, np.float32)  # so that whatever is drawn is this
            place = PROMPTS.index(answer.tokens[: answer.prompt_tokens])
            logits[wanted[place][answer.index][at]] = 0
            return logits

    with answering.exact(model, hooks=Hooks(exit=Sometimes((1, 2), {}, 1)), **how) as engine:
        found = [[c.tokens for c in some] for some in engine.generate(PROMPTS, sampling)]
        assert engine.counts().preemptions > 0 and engine.pool.used == 0
    assert found == wanted


class Guessing:
    """Names what plain decoding writes, except at every third place."""

    def __init__(self, layer: int, right: dict[tuple[int, ...], tuple[int, ...]], length: int) -> None:
        self.layers, self.right, self.length = (layer,), right, length
        self.seen: list[tuple[int, int]] = []
        self._at: dict[Answer, int] = {}

    def propose(self, answer: Answer, limit: int) -> Draft:
        self._at[answer] = len(answer.tokens)
        return unnamed(min(self.length, limit))

    def observe(self, verified: Sequence[Any], tokens: int, seconds: float) -> None:
        self.seen += [(len(one.draft.tokens), len(one.accepted)) for one in verified]

    def leave(self, layer: int, hidden: Any, answers: Sequence[Answer]) -> list[bool]:
        raise AssertionError("nobody leaves")

    def guess(self, hidden: Any, answers: Sequence[Answer]) -> tuple[list[int], list[bool]]:
        tokens, on = [], []
        for answer in answers:
            at = self._at[answer] - answer.prompt_tokens
            self._at[answer] += 1
            line = self.right.get(tuple(answer.tokens[: answer.prompt_tokens]), ())
            token = line[at] if at < len(line) else 5
            tokens.append(token if at % 3 else (token + 1) % 64)
            on.append(at % 7 != 6)
        return tokens, on


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("length", [1, 3, 6])
def test_self_drafts_change_nothing(model: Path, kind: str, length: int, sampling: Sampling) -> None:
    with answering.exact(model, runner=kind) as plain:
        right = dict(zip(map(tuple, PROMPTS), answering.answers(plain, sampling)))
    both = Guessing(2, right, length)
    hooks = Hooks(exit=both, drafter=both, decoder=SelfDraftDecoder)
    with answering.exact(model, runner=kind, hooks=hooks) as engine:
        run, calls = engine.runner.run, {0: 0, 2: 0}

        def counting(batch: Any, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
            calls[first] += batch.tokens
            return run(batch, first, last, hidden)

        engine.runner.run = counting  # type: ignore[method-assign]
        assert answering.answers(engine, sampling) == list(right.values())
        counts = engine.counts()
        assert 0 < counts.accepted_draft_tokens < counts.draft_tokens
        assert calls[0] == calls[2], "lower layers were computed more than once for a token"
        assert engine.pool.used == 0
        # Whole pages are filled in all layers, so the same prompts are found again.
        assert answering.answers(engine, sampling) == list(right.values())
        assert engine.counts().prefix_hits > 0


def test_self_drafts_under_pressure(model: Path) -> None:
    page = 4 * 2 * 2 * 16 * 16 * 4
    with answering.exact(model) as plain:
        right = dict(zip(map(tuple, PROMPTS), answering.answers(plain)))
    both = Guessing(1, right, 4)
    hooks = Hooks(exit=both, drafter=both, decoder=SelfDraftDecoder)
    with answering.exact(model, hooks=hooks, memory=10 * page, max_step_tokens=12, max_sequences=4) as engine:
        requests = [Request(list(PROMPTS[i % 6]), GREEDY) for i in range(18)]
        for request in requests:
            engine.submit(request)
        found: dict[str, list[int]] = {r.id: [] for r in requests}
        while not engine.idle:
            for delta in engine.step():
                found[delta.request_id] += delta.tokens
        for request in requests:
            assert tuple(found[request.id]) == right[tuple(request.prompt)]


def test_a_tap_and_gates(model: Path) -> None:
    with answering.exact(model) as plain:
        right = known(plain)
    tap = RecordingTap(2)
    with answering.exact(model, hooks=Hooks(exit=Chosen((2,), right, 2), tap=tap)) as engine:
        assert answering.answers(engine, GREEDY, [PROMPTS[2]]) == [right[tuple(PROMPTS[2])]]
    assert sum(map(len, tap.seen)) == len(PROMPTS[2]) + 15  # every token passes once, also who leaves there


@pytest.mark.parametrize("layers", [(0, 2), (5,), ()])
def test_gates_that_are_not_there(model: Path, layers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="the model has the layers 1 to 4"):
        answering.exact(model, hooks=Hooks(exit=Chosen(layers, {}, 1)))


def test_one_at_a_time(model: Path) -> None:
    with pytest.raises(UsageError, match="cannot be plugged in together"):
        answering.exact(model, hooks=Hooks(exit=Chosen((1,), {}, 1), drafter=RepeatDrafter()))
    with pytest.raises(UsageError, match="Drafts end at one gate"):
        answering.exact(model, hooks=Hooks(exit=Guessing(4, {}, 1), decoder=SelfDraftDecoder))

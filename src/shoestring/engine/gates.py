"""Passes that end early, each answer for itself, and are finished later only where a later token needs them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.engine.decoder import Decoder, Drawn, Outcome, batch_of, positions_of, verified
from shoestring.engine.hooks import Draft, ExitPolicy, Hooks
from shoestring.engine.runner import BLOCK, Batch, Runner
from shoestring.engine.sampler import Sampler
from shoestring.engine.scheduler import Chunk
from shoestring.engine.sequence import Sequence as Answer


@dataclass
class _Line:
    """How far one answer's tokens have come. Stage k is the layers between two gates.

    Attributes:
        filled: of each stage, tokens whose keys and values stand in its layers.
        waiting: of each stage, hidden states of the tokens that come next there.
    """

    filled: list[int]
    waiting: list[list[Any]]


class GatedDecoder(Decoder):
    """Asks the exit policy at its gates, answer by answer.

    A token that leaves at a gate has no keys and values above it. Its hidden state waits there, and goes on, with all
    that wait before it, as one chunk when a later token of its answer needs those layers. So whoever does not leave
    gets what it would have got if nobody had ever left. Tokens of prompts never wait: a prompt goes through all layers.
    """

    leaves_holes = True  # pages are not filled in all layers, so nobody may find them again

    def __init__(self, runner: Runner, sampler: Sampler, hooks: Hooks) -> None:
        super().__init__(runner, sampler, hooks)
        assert hooks.exit is not None
        layers, self.exit = runner.facts.layers, hooks.exit
        self.gates = sorted(set(self.exit.layers))
        if not self.gates or not 1 <= self.gates[0] <= self.gates[-1] <= layers:
            raise UsageError(
                f"An exit policy asks after the layers {self.gates}", f"the model has the layers 1 to {layers}"
            )
        ends = self.gates if self.gates[-1] == layers else [*self.gates, layers]
        self.stages = list(zip([0, *ends], ends))
        self.streams = getattr(self.exit, "streams", 1)
        self.left = dict.fromkeys(self.gates, 0)
        self.drawn = 0
        self._lines: dict[Answer, _Line] = {}

    def ended(self, answer: Answer) -> None:
        self._lines.pop(answer, None)

    def stats(self) -> dict[str, float]:
        """Of the tokens drawn, how many left at each gate."""
        return {"exit_tokens": float(self.drawn)} | {f"exit_after_{gate}": float(n) for gate, n in self.left.items()}

    def run(self, chunks: Sequence[Chunk], drawn: Sequence[Drawn]) -> list[Outcome]:
        outcomes = [Outcome(chunk, []) for chunk in chunks]
        lines = [self._line(chunk) for chunk in chunks]
        wanting = [i for i, chunk in enumerate(chunks) if _wants(chunk)]
        whole = [chunk.start < chunk.sequence.prompt_tokens or chunk.count > 1 for chunk in chunks]
        batch = batch_of(chunks, drawn)
        hidden, ends = self._first(batch, lines), batch.starts[1:]
        going = list(range(len(chunks)))
        found: dict[int, np.ndarray] = {}
        for stage, gate in enumerate(self.gates):
            asked = [i for i in going if i in wanting and i not in found]
            rows = np.array([ends[going.index(i)] - 1 for i in asked], np.int32)
            for i, row, answer in zip(asked, rows, self._ask(gate, hidden, rows, [chunks[i].sequence for i in asked])):
                if answer is not None and answer is not False:
                    found[i] = self._logits(hidden, [row])[0] if answer is True else answer
                    self.left[gate] += 1
            going = [i for i in going if whole[i] or i not in found]
            if not going or stage + 1 == len(self.stages):
                break
            hidden, ends = self._advance(stage + 1, going, chunks, lines, drawn)
        starts = [0, *ends[:-1]]
        for at, i in enumerate(going):
            self._describe(outcomes[i], int(starts[at]), hidden)
        late = [i for i in wanting if i not in found]
        for i, row in zip(late, self._logits(hidden, [ends[going.index(i)] - 1 for i in late]) if late else ()):
            found[i] = row
        self.drawn += len(wanting)
        if wanting:
            logits = np.stack([found[i] for i in wanting])
            self._draw([(i, row) for row, i in enumerate(wanting)], logits, outcomes, drawn)
        return outcomes

    # ---- parts of a pass ----

    def _span(self, batch: Batch, first: int, last: int | None, hidden: Any) -> Any:
        if self.streams == 1:
            return super()._span(batch, first, last, hidden)
        if hidden is None:
            hidden = self.runner.run(batch, 0, 0)
        own = hidden[:, 0] if hidden.ndim == 3 else hidden  # what stands behind a gate begins with the first stream
        if last not in self.gates:
            return super()._span(batch, first, last, own)
        made = super()._span(batch, first, last, _join([own] * self.streams))
        return made.reshape(self.streams, batch.tokens, -1).swapaxes(0, 1)

    def _line(self, chunk: Chunk) -> _Line:
        line = self._lines.get(chunk.sequence)
        if line is None or line.filled[0] != chunk.start:  # new, forked, or computed again after a preemption
            line = _Line([chunk.start] * len(self.stages), [[] for _ in self.stages])
            self._lines[chunk.sequence] = line
        return line

    def _first(self, batch: Batch, lines: Sequence[_Line]) -> Any:
        """The first stage, which no token waits for."""
        hidden = self._span(batch, *self.stages[0], None)
        for line, start, end in zip(lines, batch.starts, batch.starts[1:]):
            line.filled[0] += int(end - start)
            if len(self.stages) > 1:
                line.waiting[1].append(_take(hidden, int(start), int(end)))
        return hidden

    def _advance(
        self, stage: int, going: Sequence[int], chunks: Sequence[Chunk], lines: Sequence[_Line], drawn: Sequence[Drawn]
    ) -> tuple[Any, np.ndarray]:
        """What waits before a stage goes through it; its hidden states, and where each answer's end."""
        parts = [_join(lines[i].waiting[stage]) for i in going]
        sizes = [len(part) for part in parts]
        batch = _rows(
            [chunks[i].sequence for i in going], [lines[i].filled[stage] for i in going], sizes,
            [drawn[i].adapter for i in going],
        )  # fmt: skip
        first, last = self.stages[stage]
        hidden = self._span(batch, first, last, _join(parts))
        for i, start, end in zip(going, batch.starts, batch.starts[1:]):
            lines[i].filled[stage] += int(end - start)
            lines[i].waiting[stage] = []
            if stage + 1 < len(self.stages):
                lines[i].waiting[stage + 1].append(_take(hidden, int(start), int(end)))
        return hidden, batch.starts[1:]

    def _ask(self, gate: int, hidden: Any, rows: np.ndarray, answers: list[Answer]) -> Sequence[Any]:
        return self.exit.leave(gate, _pick(hidden, rows), answers) if answers else ()

    def _logits(self, hidden: Any, rows: Sequence[int]) -> np.ndarray:
        return self.runner.logits(hidden, np.array(rows, np.int32)).copy()


class Guesser(ExitPolicy, Protocol):
    """An exit policy that can say what it would answer at its gate."""

    def guess(self, hidden: Any, answers: Sequence[Answer]) -> tuple[Sequence[int], Sequence[bool]]:
        """From the newest tokens' states [answers, hidden]: the likeliest next token of each, and whether it is likely
        enough to be drafted."""


class SelfDraftDecoder(GatedDecoder):
    """Drafts with the layers below the one gate and verifies with those above it. The answer is that of plain decoding.

    The drafter says how many tokens to guess at most (`unnamed`); the exit policy, a `Guesser`, names them while it is
    sure enough, or none: that pass is a plain one. Nobody leaves. Layers below the gate are computed once a token.
    """

    leaves_holes = False
    exit: Guesser

    def __init__(self, runner: Runner, sampler: Sampler, hooks: Hooks) -> None:
        super().__init__(runner, sampler, hooks)
        if len(self.stages) != 2:
            raise UsageError(f"Drafts end at one gate below the last layer, not at {self.gates}")

    def stats(self) -> dict[str, float]:
        return {}

    def run(self, chunks: Sequence[Chunk], drawn: Sequence[Drawn]) -> list[Outcome]:
        started = time.perf_counter()
        outcomes = [Outcome(chunk, []) for chunk in chunks]
        lines = [self._line(chunk) for chunk in chunks]
        lengths = {i: chunk.draft for i, chunk in enumerate(chunks) if chunk.draft}
        for chunk in chunks:
            chunk.draft = 0  # what it guesses is not known yet
        batch = batch_of(chunks, drawn)
        hidden = self._first(batch, lines)
        guesses = self._guess(hidden, batch.starts[1:] - 1, lengths, chunks, lines, drawn)
        computed = batch.tokens + sum(map(len, guesses.values()))
        hidden, ends = self._advance(1, range(len(chunks)), chunks, lines, drawn)
        starts, wanting = [0, *ends[:-1]], []
        rows: list[int] = []
        for i, chunk in enumerate(chunks):
            self._describe(outcomes[i], int(starts[i]), hidden)
            some = guesses.get(i, [])
            chunk.draft = len(some)
            chunk.sequence.draft, chunk.sequence.draft_parents = tuple(some), tuple(range(-1, len(some) - 1))
            if _wants(chunk):
                wanting.append((i, len(rows)))
                rows += range(int(ends[i]) - 1 - len(some), int(ends[i]))
        if wanting:
            self._draw(wanting, self._logits(hidden, rows), outcomes, drawn)
        for line, outcome in zip(lines, outcomes):
            kept = outcome.chunk.start + outcome.chunk.count + outcome.accepted
            line.filled = [min(filled, kept) for filled in line.filled]
        if wanting and self.hooks.drafter:
            seen = [verified(outcomes[i]) for i, _ in wanting]
            self.hooks.drafter.observe(seen, computed, time.perf_counter() - started)
        return outcomes

    def _guess(
        self,
        hidden: Any,
        newest: np.ndarray,
        lengths: dict[int, int],
        chunks: Sequence[Chunk],
        lines: Sequence[_Line],
        drawn: Sequence[Drawn],
    ) -> dict[int, list[int]]:
        """Tokens for each drafting answer, one pass of the first stage for each further token."""
        guesses: dict[int, list[int]] = {i: [] for i in lengths}
        going = list(lengths)
        rows = newest[going]
        while going:
            answers = [chunks[i].sequence for i in going]
            tokens, on = self.exit.guess(_pick(hidden, rows), answers)
            taken = [(i, t) for i, t, go in zip(going, tokens, on) if go]
            for i, token in taken:
                guesses[i].append(int(token))
            going = [i for i, _ in taken]
            if not going:
                break
            batch = _rows(
                [chunks[i].sequence for i in going], [lines[i].filled[0] for i in going], [1] * len(going),
                [drawn[i].adapter for i in going], [guesses[i][-1] for i in going],
            )  # fmt: skip
            hidden = self._first(batch, [lines[i] for i in going])
            still = [at for at, i in enumerate(going) if len(guesses[i]) < lengths[i]]
            going, rows = [going[at] for at in still], np.array(still, np.int32)
        return guesses


def unnamed(count: int) -> Draft:
    """What a drafter proposes who only says how many tokens `SelfDraftDecoder` shall guess."""
    return Draft((0,) * count, tuple(range(-1, count - 1)))


def _wants(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    return not sequence.request.embed and chunk.start + chunk.count == len(sequence.tokens)


def _rows(
    answers: Sequence[Answer], contexts: list[int], sizes: list[int], adapters: list[int], ids: list[int] | None = None
) -> Batch:
    """A batch of chains that follow what is there; without `ids` they begin from hidden states."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    positions = [p for a, at, n in zip(answers, contexts, sizes) for p in positions_of(a.positions, at, n)]
    width = max(-(-(at + n) // BLOCK) for at, n in zip(contexts, sizes))
    tables = np.zeros((len(answers), width), np.int32)
    for row, answer in zip(tables, answers):
        used = answer.blocks[:width]
        row[: len(used)] = used
    return Batch(
        np.zeros(starts[-1], np.int32) if ids is None else np.array(ids, np.int32),
        np.array(positions, np.int32),
        starts,
        np.array(contexts, np.int32),
        tables,
        adapters=np.repeat(np.array(adapters, np.int32), sizes) if max(adapters) >= 0 else None,
        owners=tuple(answers),
    )


def _take(hidden: Any, start: int, end: int) -> Any:
    """A copy: runners write into what they are given."""
    part = hidden[start:end]
    return part.copy() if isinstance(part, np.ndarray) else part.clone()


def _pick(hidden: Any, rows: np.ndarray) -> Any:
    return hidden[rows] if isinstance(hidden, np.ndarray) else hidden[rows.tolist()]


def _join(parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch

    return torch.cat(list(parts))

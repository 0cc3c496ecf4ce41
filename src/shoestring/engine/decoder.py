"""From a plan to tokens: one pass over what the scheduler chose, then one draw or more for each sequence."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shoestring.engine.hooks import Draft, Hooks, Verified
from shoestring.engine.request import TokenLogprob
from shoestring.engine.runner import BLOCK, Batch, Runner
from shoestring.engine.sampler import Choice, Sampler, SampleState, logprob_of
from shoestring.engine.scheduler import Chunk


@dataclass
class Outcome:
    """What a pass gave one chunk.

    Attributes:
        choices: tokens that follow the sequence, one for plain decoding, more with accepted drafts; empty while the
            prompt is not finished.
        accepted: how many of them were drafted, so that their keys and values are in the cache already.
        siblings: the first token of each further answer of the request, when the prompt has just been finished.
        prompt: log-probabilities of the chunk's prompt tokens, when they were asked for.
        summed: sum of the normed hidden states of the chunk's tokens, for embeddings.
        error: why this sequence cannot go on; the others do.
    """

    chunk: Chunk
    choices: list[Choice]
    accepted: int = 0
    siblings: tuple[Choice, ...] = ()
    prompt: tuple[TokenLogprob | None, ...] = ()
    summed: np.ndarray | None = None
    error: str = ""


class Drawn(Protocol):
    """How a sequence's tokens are drawn: its own state, and those of answers that begin when its prompt is finished."""

    state: SampleState
    adapter: int

    def siblings(self) -> Sequence[SampleState]: ...


class Decoder:
    """Runs plans. `states` says how each sequence draws."""

    def __init__(self, runner: Runner, sampler: Sampler, hooks: Hooks) -> None:
        self.runner, self.sampler, self.hooks = runner, sampler, hooks

    def run(self, chunks: Sequence[Chunk], drawn: Sequence[Drawn]) -> list[Outcome]:
        """One pass. drawn[i] belongs to chunks[i].

        Raises:
            ShoestringError: the runner cannot go on; no sequence has changed.
        """
        started = time.perf_counter()
        batch = batch_of(chunks, drawn)
        hidden = self._span(batch, 0, None, None)
        outcomes = [Outcome(chunk, []) for chunk in chunks]
        rows: list[int] = []
        wanting: list[tuple[int, int]] = []  # outcome and the first of its rows
        for i, chunk in enumerate(chunks):
            sequence, first = chunk.sequence, int(batch.starts[i])
            self._describe(outcomes[i], first, hidden)
            if not sequence.request.embed and chunk.start + chunk.count == len(sequence.tokens):
                wanting.append((i, len(rows)))
                rows += range(first + chunk.count - 1, first + chunk.count + chunk.draft)
        if wanting:
            logits = self.runner.logits(hidden, np.array(rows, np.int32))
            self._draw(wanting, logits, outcomes, drawn)
        if wanting and self.hooks.drafter:
            seen = [verified(outcomes[i]) for i, _ in wanting]
            self.hooks.drafter.observe(seen, batch.tokens, time.perf_counter() - started)
        return outcomes

    def _span(self, batch: Batch, first: int, last: int | None, hidden: Any) -> Any:
        """Layers first..last-1, with the tap where it stands."""
        run, tap = self.runner.run, self.hooks.tap
        if tap and first < tap.layer <= (self.runner.facts.layers if last is None else last):
            hidden = run(batch, first, tap.layer, hidden)
            hidden = self.runner.from_host(tap.pass_through(self.runner.to_host(hidden), batch))
            if tap.layer == last:
                return hidden
            first = tap.layer
        return run(batch, first, last, hidden)

    def _describe(self, outcome: Outcome, first: int, hidden: Any) -> None:
        """What was asked of a chunk's own tokens, whose hidden states begin at row `first`."""
        request = outcome.chunk.sequence.request
        if request.embed:
            outcome.summed = self._summed(outcome.chunk, first, hidden)
        elif (
            request.sampling.prompt_logprobs is not None and outcome.chunk.start < outcome.chunk.sequence.prompt_tokens
        ):
            outcome.prompt = self._prompt(outcome.chunk, first, hidden, request.sampling.prompt_logprobs)

    def _draw(
        self, wanting: list[tuple[int, int]], logits: np.ndarray, outcomes: list[Outcome], drawn: Sequence[Drawn]
    ) -> None:
        plain: list[tuple[int, int, SampleState]] = []
        for i, row in wanting:
            # Copied states first: a sibling starts from the logits of the prompt's last token.
            plain += [(i, row, state) for state in (drawn[i].state, *drawn[i].siblings())]
        firsts: dict[int, list[Choice]] = {}
        drawn_from = [logits[row] for _, row, _ in plain]  # no copies: a row is as long as the vocabulary
        for (i, _, state), choice in zip(plain, self.sampler.sample(drawn_from, [state for *_, state in plain])):
            firsts.setdefault(i, []).append(choice)
            if choice.error:
                outcomes[i].error = choice.error
            else:
                state.accept(choice.token)
        for i, row in wanting:
            outcome, state = outcomes[i], drawn[i].state
            outcome.choices, outcome.siblings = firsts[i][:1], tuple(firsts[i][1:])
            if outcome.chunk.draft and not outcome.error:
                self._verify(outcome, state, logits[row + 1 :])

    def _verify(self, outcome: Outcome, state: SampleState, logits: np.ndarray) -> None:
        """Follow the draft's tree as far as it guessed what is drawn anyway; row j of `logits` follows node j."""
        chunk = outcome.chunk
        tokens, parents = chunk.sequence.draft[: chunk.draft], chunk.sequence.draft_parents[: chunk.draft]
        node, path = -1, []
        while not state.finished:
            drawn = outcome.choices[-1].token
            node = next((j for j, t in enumerate(tokens) if t == drawn and parents[j] == node), -2)
            if node < 0:
                break
            path.append(node)
            (choice,) = self.sampler.sample([logits[node]], [state])
            if choice.error:
                outcome.error = choice.error
                break
            state.accept(choice.token)
            outcome.choices.append(choice)
        outcome.accepted = len(path)
        base = chunk.start + chunk.count
        moves = [(base + j, base + place) for place, j in enumerate(path) if j != place]
        if moves:
            self.runner.move_slots(chunk.sequence.blocks, moves)

    def _prompt(self, chunk: Chunk, first: int, hidden: Any, top: int) -> tuple[TokenLogprob | None, ...]:
        """Of the prompt tokens that this chunk computed for the first time; each is judged by the row before it."""
        tokens, end = chunk.sequence.tokens, min(chunk.start + chunk.count, chunk.sequence.prompt_tokens)
        begin = max(chunk.start, chunk.sequence.seen)
        found: list[TokenLogprob | None] = [None] if begin == 0 else []
        judges = range(begin, min(end, chunk.sequence.prompt_tokens - 1))
        for some in _parts(judges, 64):
            logits = self.runner.logits(hidden, np.array([first + at - chunk.start for at in some], np.int32))
            found += [logprob_of(row, tokens[at + 1], top) for at, row in zip(some, logits)]
        return tuple(found)

    def _summed(self, chunk: Chunk, first: int, hidden: Any) -> np.ndarray:
        new = max(chunk.sequence.seen - chunk.start, 0)  # what comes again after a preemption was added before
        total = np.zeros(self.runner.facts.hidden)
        if new < chunk.count:
            rows = np.arange(first + new, first + chunk.count, dtype=np.int32)
            total += self.runner.normed(hidden, rows).astype(np.float64).sum(0)
        return total


def verified(outcome: Outcome) -> Verified:
    sequence, count = outcome.chunk.sequence, outcome.chunk.draft
    draft = Draft(tuple(sequence.draft[:count]), tuple(sequence.draft_parents[:count]))
    return Verified(sequence, draft, tuple(choice.token for choice in outcome.choices[: outcome.accepted]))


def _parts(items: range, size: int) -> Iterable[range]:
    return (items[i : i + size] for i in range(0, len(items), size))


def batch_of(chunks: Sequence[Chunk], drawn: Sequence[Drawn]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    starts, contexts = [0], []
    parents: list[int] | None = [] if any(chunk.draft for chunk in chunks) else None
    width = 1
    for chunk in chunks:
        sequence, start, count = chunk.sequence, chunk.start, chunk.count
        ids += sequence.tokens[start : start + count]
        positions += positions_of(sequence.positions, start, count)
        if parents is not None:
            parents += range(-1, count - 1)
        if chunk.draft:
            assert parents is not None
            ids += sequence.draft[: chunk.draft]
            depth = [0] * chunk.draft
            for j, parent in enumerate(sequence.draft_parents[: chunk.draft]):
                depth[j] = depth[parent] + 1 if parent >= 0 else 1
                parents.append(count + parent)  # -1 becomes the chunk's last known token
            last = positions[-1]
            positions += [last + d for d in depth]
        starts.append(len(ids))
        contexts.append(start)
        width = max(width, -(-(start + count + chunk.draft) // BLOCK))
    tables = np.zeros((len(chunks), width), np.int32)
    for i, chunk in enumerate(chunks):
        used = chunk.sequence.blocks[:width]
        tables[i, : len(used)] = used
    adapters = None
    if any(d.adapter >= 0 for d in drawn):
        sizes = np.diff(starts)
        adapters = np.repeat(np.array([d.adapter for d in drawn], np.int32), sizes)
    return Batch(
        np.array(ids, np.int32),
        np.array(positions, np.int32),
        np.array(starts, np.int32),
        np.array(contexts, np.int32),
        tables,
        None if parents is None else np.array(parents, np.int32),
        adapters,
        tuple(chunk.sequence for chunk in chunks),
    )


def positions_of(known: list[int] | None, start: int, count: int) -> Iterable[int]:
    if known is None:
        return range(start, start + count)
    # What follows a filtered prompt keeps the distance that the dropped tokens had.
    shift = known[-1] + 1 - len(known)
    return [known[i] if i < len(known) else i + shift for i in range(start, start + count)]

"""Where later methods plug in. Each point is a small protocol with one trivial implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from shoestring.engine.decoder import Decoder
    from shoestring.engine.policy import Policy
    from shoestring.engine.runner import AttentionWorker, Batch, Runner
    from shoestring.engine.sampler import Sampler
    from shoestring.engine.sequence import Sequence as Answer


@dataclass(frozen=True)
class Draft:
    """A tree of guessed tokens that follow a sequence. parents[i] < i is a node's parent, -1 for the first level."""

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verified:
    """What became of one answer's draft, which may have been empty: the tokens of it that were accepted."""

    answer: Answer
    draft: Draft
    accepted: tuple[int, ...]


class Drafter(Protocol):
    """Proposes what may come next; the engine verifies it in one pass, so the output is that of plain decoding."""

    def propose(self, answer: Answer, limit: int) -> Draft:
        """A tree that follows `answer.tokens` (prompt and answer so far), of at most `limit` nodes: what there is room
        for. How many of them pay is the drafter's to know."""

    def observe(self, verified: Sequence[Verified], tokens: int, seconds: float) -> None:
        """After every pass that drew tokens, of all answers that it drew for.

        Args:
            tokens: that the pass computed, prompts and drafts included.
            seconds: that it took.
        """


class ExitPolicy(Protocol):
    """Ends passes early, each answer for itself. The engine asks after each of `layers` (1 is after the first).

    It may define `streams = 2`: `hidden` is then [answers, 2, hidden]. The second stream starts as the first does, anew
    behind each gate, reads its keys and values, and is moved by what stands in the model.
    """

    @property
    def layers(self) -> Sequence[int]: ...

    def leave(self, layer: int, hidden: Any, answers: Sequence[Answer]) -> Sequence[np.ndarray | bool]:
        """Which answers end their pass here, whose newest tokens' states are `hidden`, [answers, hidden].

        Returns:
            for each False to go on, True to have the model's own head applied here, or the logits, float32 [vocab].
        """


class Tap(Protocol):
    """Sees, and may replace, the activations at a border between layers: sends them elsewhere, or receives them."""

    layer: int

    def pass_through(self, hidden: np.ndarray, batch: Batch) -> np.ndarray:
        """float32 [tokens, hidden] in and out."""


class TokenFilter(Protocol):
    """Drops tokens of a prompt before it is computed; the others keep their positions."""

    def keep(self, prompt: Sequence[int]) -> Sequence[int]:
        """Indices to keep, ascending. The last token must be among them."""


@dataclass(frozen=True)
class Spare:
    """What a step leaves to other work, and what waits for that work to end.

    Attributes:
        tokens: of the step's budget that nobody uses.
        computed: tokens that the step computed.
        context: tokens that its sequences reach back to, all together.
        seconds: that the step took.
        running: answers that wait for the next step.
        urgent: whether something has come meanwhile: asked between two pieces of work, which then ends.
    """

    tokens: int
    computed: int = 0
    context: int = 0
    seconds: float = 0.0
    running: int = 0
    urgent: Callable[[], bool] = lambda: False


class Filler(Protocol):
    """Work that uses what a step leaves of its token budget, such as training."""

    def work(self, spare: Spare) -> int:
        """Do some work; returns how many tokens' worth it was, at most `spare.tokens`, 0 for nothing to do."""


@dataclass(frozen=True)
class Hooks:
    """What is plugged in. Everything absent is plain serving.

    Any of them may have `ready(runner, pages)`, called when the engine stands and before its first request, while all
    pages are free to write into; `check(request)`, which raises RequestError for what it cannot serve; `ended(answer)`,
    called when an answer has ended or was cancelled; `close()`, called when the engine is closed; and `stats()`, a
    mapping from words to numbers that the engine's counts, the server's metrics and its status page show.

    Attributes:
        policy: who is served next; None is the engine's own.
        decoder: makes what turns plans into tokens, for methods that do so otherwise than in one pass.
        weights: keeps weights of the model elsewhere than in memory; any object.
        watch: looks on while the model's modules compute, and changes nothing; any object. The torch runner runs it.
    """

    drafter: Drafter | None = None
    exit: ExitPolicy | None = None
    tap: Tap | None = None
    attention: AttentionWorker | None = None
    filter: TokenFilter | None = None
    filler: Filler | None = None
    policy: Policy | None = None
    decoder: Callable[[Runner, Sampler, Hooks], Decoder] | None = None
    weights: Any = None
    watch: Any = None

    def plugged(self) -> Iterator[Any]:
        """What is there, each object once; the decoder is only to be made."""
        names = [field.name for field in fields(self) if field.name != "decoder"]
        there = {id(part): part for name in names if (part := getattr(self, name)) is not None}
        yield from there.values()

    def ready(self, runner: Runner, pages: int) -> None:
        for part in self.plugged():
            getattr(part, "ready", lambda runner, pages: None)(runner, pages)

    def close(self) -> None:
        for part in self.plugged():
            getattr(part, "close", lambda: None)()


class RepeatDrafter:
    """Guesses that what followed the last occurrence of the newest tokens follows again (prompt look-up)."""

    def __init__(self, match: int = 2, length: int = 4) -> None:
        self.match, self.length = match, length

    def propose(self, answer: Answer, limit: int) -> Draft:
        tokens = answer.tokens
        tail = tokens[-self.match :]
        for at in range(len(tokens) - self.match - 1, -1, -1):
            if tokens[at : at + self.match] == tail:
                guess = tuple(tokens[at + self.match : at + self.match + min(self.length, limit)])
                return Draft(guess, tuple(range(-1, len(guess) - 1)))
        return Draft()

    def observe(self, verified: Sequence[Verified], tokens: int, seconds: float) -> None:
        pass


@dataclass(frozen=True)
class FixedExit:
    """Always leaves after layer `after`: the model cut short."""

    after: int

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.after,)

    def leave(self, layer: int, hidden: Any, answers: Sequence[Answer]) -> list[np.ndarray | bool]:
        return [True] * len(answers)


class RecordingTap:
    """Keeps what passed a border, unchanged."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.seen: list[np.ndarray] = []

    def pass_through(self, hidden: np.ndarray, batch: Batch) -> np.ndarray:
        self.seen.append(hidden.copy())
        return hidden


@dataclass(frozen=True)
class KeepEnds:
    """Keeps the first and the last tokens of a prompt and drops its middle."""

    first: int
    last: int

    def keep(self, prompt: Sequence[int]) -> Sequence[int]:
        size = len(prompt)
        if size <= self.first + self.last:
            return range(size)
        return [*range(self.first), *range(size - max(self.last, 1), size)]


class CountingFiller:
    """Has `total` tokens' worth of nothing to do: shows where the spare budget goes."""

    def __init__(self, total: int) -> None:
        self.left = total

    def work(self, spare: Spare) -> int:
        used = min(spare.tokens, self.left)
        self.left -= used
        return used

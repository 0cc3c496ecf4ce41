"""One answer in the making: the scheduler's view of a request. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoestring.engine.request import Request


@dataclass(eq=False)
class Sequence:
    """The tokens of one answer and how far they are computed.

    Attributes:
        index: which of the request's `n` answers it is.
        tokens: prompt (after any filter), then the answer.
        positions: of every token; None where they count 0, 1, 2 ...
        prompt_tokens: how many of `tokens` are prompt.
        computed: tokens whose keys and values stand in the cache; the scheduler's plans start here.
        blocks: its pages, in order; page i holds slots i * BLOCK onwards.
        seen: tokens that were computed at some time; more than `computed` after a preemption, when they come again.
        cached: prompt tokens that were found in the prefix cache at (the latest) admission.
        draft: guessed tokens to be verified in the next step, after `tokens`, with their parents.
    """

    request: Request
    index: int
    tokens: list[int]
    prompt_tokens: int
    positions: list[int] | None = None
    computed: int = 0
    seen: int = 0
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    draft: tuple[int, ...] = ()
    draft_parents: tuple[int, ...] = ()
    preemptions: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are known and not yet computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and self.computed >= self.prompt_tokens

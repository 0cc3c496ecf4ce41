"""When an answer ends, and which of its text is settled: stop strings, end tokens, lengths, unfinished characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shoestring.engine.request import FinishReason, Sampling


class TokenStream(Protocol):
    """Turns tokens into text as they come."""

    def push(self, ids: Sequence[int]) -> str:
        """The text these tokens complete; the bytes of an unfinished character are held back."""

    def finish(self) -> str:
        """What is held back, with U+FFFD for an unfinished character."""


class Streams(Protocol):
    """What is needed of a tokenizer."""

    @property
    def eos(self) -> Sequence[int]: ...

    def stream(self, *, after: Sequence[int] = ()) -> TokenStream: ...


@dataclass(frozen=True)
class Stopped:
    """What became of pushed tokens.

    Attributes:
        text: settled; no later token can take it back.
        kept: how many of the pushed tokens belong to the answer. The token that ended it does, with all its text cut
            off or not, because it was computed; those after it do not.
        finished: why the answer has ended, None while it goes on.
        stop_reason: the stop string or stop token that ended it; None for the model's own end.
    """

    text: str
    kept: int
    finished: FinishReason | None = None
    stop_reason: str | int | None = None


class TextStop:
    """Follows one answer.

    The stop string that is complete first ends the answer, the longest where several are complete with the same
    character. What may be the beginning of one is held back until it no longer can be. Stop strings are looked for in
    the text that follows the first `min_tokens` tokens.

    Args:
        after: token ids that the answer's text goes on with.
    """

    def __init__(self, tokenizer: Streams, sampling: Sampling, after: Sequence[int] = ()) -> None:
        self._stream = tokenizer.stream(after=after)
        self._sampling = sampling
        self._eos = frozenset() if sampling.ignore_eos else frozenset(tokenizer.eos)
        self._stop_tokens = frozenset(sampling.stop_token_ids)
        self._beginnings = tuple(
            sorted({stop[:size] for stop in sampling.stop for size in range(1, len(stop))}, key=len, reverse=True)
        )
        self._held = ""
        self._count = 0

    def push(self, tokens: Sequence[int]) -> Stopped:
        """Take in the answer's next tokens; to be called no more once `finished` is set."""
        sampling, settled = self._sampling, ""
        for kept, token in enumerate(tokens, 1):
            self._count += 1
            if token in self._eos:
                return Stopped(settled + self.flush(), kept, "stop")
            if token in self._stop_tokens:
                last = self._stream.push([token]) if sampling.include_stop else ""
                return Stopped(settled + self._settle(last)[0] + self.flush(), kept, "stop", token)
            text, stop = self._settle(self._stream.push([token]))
            settled += text
            if stop is not None:
                return Stopped(settled, kept, "stop", stop)
            if sampling.max_tokens is not None and self._count >= sampling.max_tokens:
                return Stopped(settled + self.flush(), kept, "length")
        return Stopped(settled, len(tokens))

    def flush(self) -> str:
        """What is held back, for an answer that ends here."""
        text, stop = self._settle(self._stream.finish())
        held, self._held = self._held, ""
        return text if stop is not None else text + held

    def _settle(self, text: str) -> tuple[str, str | None]:
        """What can be given out now that `text` has come, and the stop string that was found."""
        stops = self._sampling.stop
        if not stops or self._count <= self._sampling.min_tokens:
            return text, None
        text, self._held = self._held + text, ""
        found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            return text[: end if self._sampling.include_stop else start], stop
        if text.endswith(self._beginnings):
            beginning = next(b for b in self._beginnings if text.endswith(b))
            self._held = beginning
            text = text[: len(text) - len(beginning)]
        return text, None

"""What every reader returns: examples as conversations, with the place each came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One conversation, or one plain text.

    Attributes:
        messages: `{"role", "content"}` in order, optionally with `tool_calls`; empty for a plain text.
        weights: 0 or 1 for each message, 1 where an answer is to be learned; None learns every answer.
        group: examples of one group never land in two parts of a split; empty means the example stands alone.
        text: the plain text, when there are no messages.
        line: line, row or item in the source, counted from 1; 0 when it came from no file.
        tools: tool schemas shown to the model through its template.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    weights: list[float] | None = None
    group: str = ""
    text: str | None = None
    line: int = 0
    tools: list[dict[str, Any]] | None = None

    def learned(self) -> list[int]:
        """Indices of the messages whose tokens are trained."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and (self.weights is None or self.weights[index])
        ]

    def fingerprint(self) -> str:
        """Equal for equal content, wherever it came from and whatever its group."""
        content = json.dumps([self.messages, self.weights, self.text, self.tools], sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Examples of one source in its own order.

    Attributes:
        format: chat, alpaca, sharegpt, completion, text or python-docs.
        skipped: one sentence for each bad line that was skipped, with its place.
        source: the path or name that was read.
    """

    examples: list[Example]
    format: str
    skipped: list[str] = field(default_factory=list)
    source: str = ""

    def __len__(self) -> int:
        return len(self.examples)

    def where(self, example: Example) -> str:
        """`file.jsonl:12`, or the source alone."""
        return f"{self.source}:{example.line}" if example.line else self.source or "the data"

    def part(self, examples: Sequence[Example]) -> Corpus:
        """The same source with fewer examples."""
        return Corpus(list(examples), self.format, self.skipped, self.source)

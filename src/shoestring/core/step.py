"""A step of a pipeline, and what it is given to work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoestring.core.errors import UsageError


@dataclass(frozen=True)
class Step:
    """One verb with one method: `Step("compress", "int4", {"group_size": 64})`."""

    verb: str
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, data: object) -> Step:
        """From a mapping such as `{"verb": "compress", "method": "int4", "options": {...}}`.

        Raises:
            UsageError: not such a mapping.
        """
        if not isinstance(data, Mapping) or "verb" not in data or set(data) - {"verb", "method", "options"}:
            raise UsageError(f"{data!r} is not a step", remedy="Write a mapping with verb, method and options")
        return cls(str(data["verb"]), str(data.get("method") or ""), dict(data.get("options") or {}))

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return (self.method or self.verb) + (f" ({inside})" if inside else "")

    def to_json(self) -> dict[str, Any]:
        return {"verb": self.verb, "method": self.method, "options": dict(self.options)}


@dataclass(frozen=True)
class Work:
    """What a step may use beside the model it starts from.

    Attributes:
        ledger: where its cost is entered; a `core.ledger.Ledger`.
        train, valid: examples of `shoestring.data`, empty when the step needs none.
        training: settings of the training loop by their transformers names.
        folder: where it may keep checkpoints and logs that outlive a crash.
        resume: continue from what `folder` holds.
        seed: of everything random.
        say: tells the user how it goes, a line at a time.
    """

    ledger: Any
    folder: Path
    train: Any = None
    valid: Any = None
    training: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    seed: int = 0
    trust_remote_code: bool = False
    say: Callable[[str], None] = lambda line: None

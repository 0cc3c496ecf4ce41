"""A model of one formula: the next token depends on the last one and its position. As slow as it is told to be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.engine.runner import Batch, Facts


class ToyRunner:
    """`seconds`: how long a step takes. `fail`: an error that the next step raises."""

    def __init__(self, vocab: int, eos: tuple[int, ...], context: int = 256, seconds: float = 0.0) -> None:
        self.facts = Facts("toy", 2, 8, vocab, 1, 1, 8, context, 1000, 64, "float32", "native", eos)
        self.attention = None
        self.seconds, self.fail = seconds, ""
        self.adapters: dict[int, str] = {}
        self.steps = 0

    def reserve(self, blocks: int) -> None:
        pass

    def run(self, batch: Batch, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
        if self.fail:
            raise RuntimeError(self.fail)
        time.sleep(self.seconds)
        self.steps += 1
        shift = 0 if batch.adapters is None else batch.adapters + 1
        return np.stack([batch.ids, batch.positions + 1000 * shift], 1).astype(np.float32)

    def logits(self, hidden: Any, rows: np.ndarray) -> np.ndarray:
        token, place = hidden[rows, 0][:, None], hidden[rows, 1][:, None]
        ids = np.arange(self.facts.vocab)[None, :]
        return (4 * np.sin(ids * 12.9898 + token * 78.233 + place * 37.719)).astype(np.float32)

    def normed(self, hidden: Any, rows: np.ndarray) -> np.ndarray:
        return np.sin(hidden[rows, :1] * np.arange(1, 9)[None, :]).astype(np.float32)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass

    def move_slots(self, table: Sequence[int], moves: Sequence[tuple[int, int]]) -> None:
        pass

    def add_adapter(self, folder: str) -> int:
        if "bad" in folder:
            raise UsageError(f"{folder} is no adapter")
        number = len(self.adapters)
        self.adapters[number] = folder
        return number

    def drop_adapter(self, number: int) -> None:
        pass

    def to_host(self, hidden: Any) -> np.ndarray:
        return np.asarray(hidden)

    def from_host(self, hidden: np.ndarray) -> Any:
        return hidden

    def close(self) -> None:
        pass

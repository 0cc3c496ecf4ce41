"""A model of one formula, as slow as it is told to be, and a tokenizer whose tokens are bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.engine.runner import Batch, Facts
from shoestring.engine.tokenizer import Tokenizer

START, END = 256, 257
VOCAB = 258
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template: str = TEMPLATE) -> Tokenizer:
    """Token ids are bytes; two more begin and end a message."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    from shoestring.models.gguf_tokenizer import byte_alphabet

    vocab = dict(byte_alphabet())
    inner = Inner(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<|im_end|>", normalized=False)])
    return Tokenizer(inner, templates={"default": template} if template else {}, eos=(END,))


class ToyRunner:
    """Writes letters for ever, or `recites` a text and ends.

    Attributes:
        seconds: how long a step takes.
        fail: an error that the next step raises.
        recites: what every answer says; works without the prefix cache.
    """

    def __init__(self, context: int = 512, seconds: float = 0.0) -> None:
        self.facts = Facts("toy", 2, 8, VOCAB, 1, 1, 8, context, 1000, 64, "float32", "native", (END,))
        self.attention = None
        self.seconds, self.fail, self.recites = seconds, "", b""
        self.steps = 0
        self._ends: dict[int, int] = {}
        self._adapters = 0
        letters = np.array([chr(i).isalpha() or i == 32 for i in range(VOCAB)]) & (np.arange(VOCAB) < 128)
        self._lean = np.where(letters, 6.0, -6.0)

    def reserve(self, blocks: int) -> None:
        pass

    def run(self, batch: Batch, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
        if self.fail:
            raise RuntimeError(self.fail)
        time.sleep(self.seconds)
        self.steps += 1
        place = np.zeros(batch.tokens)
        for s in range(batch.sequences):
            begin, end = int(batch.starts[s]), int(batch.starts[s + 1])
            key = int(batch.tables[s, 0])
            if end - begin > 1:
                self._ends[key] = int(batch.contexts[s]) + end - begin
            place[begin:end] = int(batch.contexts[s]) + end - begin - self._ends.get(key, 0)
        which = np.full(batch.tokens, -1) if batch.adapters is None else batch.adapters
        return np.stack([batch.ids, batch.positions + 1000 * (which + 1), place], 1).astype(np.float64)

    def logits(self, hidden: Any, rows: np.ndarray) -> np.ndarray:
        token, place = hidden[rows, 0][:, None], hidden[rows, 1][:, None]
        ids = np.arange(VOCAB)[None, :]
        made = 4 * np.sin(ids * 12.9898 + token * 78.233 + place * 37.719) + self._lean
        if self.recites:
            for row, at in enumerate(hidden[rows, 2].astype(int)):
                made[row, self.recites[at] if at < len(self.recites) else END] = 100
        return made.astype(np.float32)

    def normed(self, hidden: Any, rows: np.ndarray) -> np.ndarray:
        return np.sin(hidden[rows, :1] * np.arange(1, 9)[None, :]).astype(np.float32)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass

    def move_slots(self, table: Sequence[int], moves: Sequence[tuple[int, int]]) -> None:
        pass

    def add_adapter(self, folder: str) -> int:
        if "bad" in folder:
            raise UsageError(f"{folder} is no adapter")
        self._adapters += 1
        return self._adapters - 1

    def drop_adapter(self, number: int) -> None:
        pass

    def to_host(self, hidden: Any) -> np.ndarray:
        return np.asarray(hidden)

    def from_host(self, hidden: np.ndarray) -> Any:
        return hidden

    def close(self) -> None:
        pass

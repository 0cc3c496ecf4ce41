"""Rows of different length into one batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest row.

    Calling it with rows gives int64 tensors of shape (rows, longest): `input_ids`, `labels` (-100 in the padding) and
    `attention_mask`; for packed rows `position_ids` in place of the mask, because models look for packed rows only
    when no mask is given. Their padding then counts as one more row that nothing is trained on. Rows that bring a
    `context`, lists of tokens to be read before, give a tensor (rows, most lists, longest list), -1 in its padding.

    Args:
        pad_id: token id of the padding.
        multiple_of: rounds the length up, for hardware that likes it.
    """

    pad_id: int
    multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        longest += -longest % self.multiple_of
        packed = any("position_ids" in row for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        batch["position_ids" if packed else "attention_mask"] = []
        for row in rows:
            size = len(row["input_ids"])
            padding = longest - size
            batch["input_ids"].append([*row["input_ids"], *[self.pad_id] * padding])
            batch["labels"].append([*row["labels"], *[-100] * padding])
            if packed:
                batch["position_ids"].append([*row.get("position_ids", range(size)), *range(padding)])
            else:
                batch["attention_mask"].append([1] * size + [0] * padding)
        made = {name: torch.tensor(values, dtype=torch.long) for name, values in batch.items()}
        return made | (self._context(rows) if any("context" in row for row in rows) else {})

    def _context(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        found = [row.get("context", []) for row in rows]
        longest = max((len(part) for parts in found for part in parts), default=0)
        padded = torch.full((len(rows), max(map(len, found)), longest), -1, dtype=torch.long)
        for row, parts in enumerate(found):
            for line, part in enumerate(parts):
                padded[row, line, : len(part)] = torch.tensor(part, dtype=torch.long)
        return {"context": padded}

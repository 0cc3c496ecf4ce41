"""Which rows go together into a batch: rows of like length, under a limit of rows and of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

_POOL = 50


class Batches(Sampler[list[int]]):
    """Batches of row numbers; the same for the same seed, their order new in every epoch.

    Rows are shuffled once and sorted by length inside pools of 50 batches, so little is padded while batches stay
    mixed. What stands in a batch stays the same over the epochs, so that their number does too.

    Args:
        lengths: tokens of each row.
        rows: how many rows a batch may have.
        tokens: how many tokens a batch may have, padding included; None for no limit. A longer row stands alone.
        by_length: sort inside the pools.
    """

    def __init__(
        self, lengths: Sequence[int], rows: int, tokens: int | None = None, seed: int = 0, by_length: bool = True
    ) -> None:
        self.seed, self.epoch = seed, 0
        order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
        if by_length:
            pools = [order[i : i + _POOL * rows] for i in range(0, len(order), _POOL * rows)]
            order = [row for pool in pools for row in sorted(pool, key=lambda row: -lengths[row])]
        self.batches: list[list[int]] = []
        longest = 0
        for row in order:
            batch = self.batches[-1] if self.batches else None
            longest = max(longest, lengths[row]) if batch else lengths[row]
            if batch is None or len(batch) == rows or (tokens and longest * (len(batch) + 1) > tokens):
                self.batches.append([row])
                longest = lengths[row]
            else:
                batch.append(row)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch, 1)).permutation(len(self.batches))
        return iter([self.batches[i] for i in order])

from __future__ import annotations

import pytest
import torch

from shoestring.core.errors import UsageError
from shoestring.data.masking import IGNORED, mask_tokens


def made(length: int, seed: int = 0, share: float = 0.15) -> tuple[list[int], list[int], list[int]]:
    ids = [1, *range(10, 10 + length), 2]
    hidden, labels = mask_tokens(ids, [1] + [0] * length + [1], 4, 1000, torch.Generator().manual_seed(seed), share)
    return ids, hidden, labels


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 1), (20, 3), (100, 15)])
def test_every_line_has_something_to_find(length: int, count: int) -> None:
    for seed in range(20):
        ids, hidden, labels = made(length, seed)
        asked = [i for i, label in enumerate(labels) if label != IGNORED]
        assert len(asked) == count and 0 not in asked and len(ids) - 1 not in asked
        assert all(labels[i] == ids[i] for i in asked)
        assert all(hidden[i] == ids[i] for i in range(len(ids)) if i not in asked)


def test_most_are_masked_some_exchanged_some_kept() -> None:
    ids, hidden, labels = made(20_000, share=1.0)
    masked = sum(token == 4 for token in hidden) / 20_000
    kept = sum(a == b for a, b in zip(ids[1:-1], hidden[1:-1])) / 20_000
    assert masked == pytest.approx(0.8, abs=0.02) and kept == pytest.approx(0.1, abs=0.02)
    assert made(50, 3) == made(50, 3) and made(50, 3) != made(50, 4)


def test_a_line_of_special_tokens() -> None:
    with pytest.raises(UsageError, match="no token to hide"):
        mask_tokens([1, 2], [1, 1], 4, 10, torch.Generator())

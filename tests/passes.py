"""One pass through a runner, for tests of what it runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from shoestring.engine.runner import Batch


def logits_of(runner: Any, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocab] after each of a prompt's tokens, which begin a fresh cache."""
    runner.reserve(8)
    count = len(ids)
    batch = Batch(
        ids=np.array(ids, np.int32),
        positions=np.arange(count, dtype=np.int32),
        starts=np.array([0, count], np.int32),
        contexts=np.array([0], np.int32),
        tables=np.arange(8, dtype=np.int32)[None],
    )
    found: np.ndarray = runner.logits(runner.run(batch), np.arange(count, dtype=np.int32))
    return found

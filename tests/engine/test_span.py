"""A model in two parts: each loads its own layers, and together they are the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoestring.core.errors import UsageError
from shoestring.engine.open import open_model
from shoestring.engine.runner import Batch
from shoestring.lab import answering


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.folder(tmp_path_factory.mktemp("tiny"), num_hidden_layers=3)


def batch(tokens: int = 9) -> Batch:
    ids = np.arange(3, 3 + tokens, dtype=np.int32)
    table = np.zeros((1, 1), np.int32)
    return Batch(ids, np.arange(tokens, dtype=np.int32), np.array([0, tokens], np.int32), np.zeros(1, np.int32), table)


@pytest.mark.parametrize("kind", ["native", "torch"])
@pytest.mark.parametrize("cut", [1, 2])
def test_two_parts_are_the_whole(model: Path, kind: str, cut: int) -> None:
    how = dict(runner=kind, dtype="fp32", cache_dtype="fp32", threads=1)
    whole, lower, upper = (open_model(model, span=span, **how).runner for span in (None, (0, cut), (cut, 3)))
    for runner in (whole, lower, upper):
        runner.reserve(2)
    assert (lower.facts.layers, upper.facts.layers) == (cut, 3 - cut)
    assert lower.facts.block_bytes + upper.facts.block_bytes == whole.facts.block_bytes
    if kind == "native":
        both = lower.facts.weight_bytes + upper.facts.weight_bytes
        table = 64 * 64 * 4 + 64 * 4  # embedding, which is the head too, and last norm
        assert both == whole.facts.weight_bytes + table
    rows = np.array([8], np.int32)
    wanted = whole.logits(whole.run(batch()), rows).copy()
    middle = lower.to_host(lower.run(batch()))
    found = upper.logits(upper.run(batch(), 0, None, upper.from_host(middle)), rows)
    assert np.abs(found - wanted).max() < 1e-4
    for runner in (whole, lower, upper):
        runner.close()


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_parts_that_are_not_there(model: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="There are no layers 2 to 4"):
        open_model(model, runner=kind, span=(2, 4))


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_the_head_alone(model: Path, kind: str) -> None:
    runner = open_model(model, runner=kind, dtype="fp32", cache_dtype="fp32").runner
    runner.reserve(2)
    hidden = runner.run(batch())
    rows = np.arange(9, dtype=np.int32)
    wanted = runner.logits(hidden, rows).copy()
    assert np.abs(runner.head(runner.normed(hidden, rows)) - wanted).max() < 1e-4
    runner.close()

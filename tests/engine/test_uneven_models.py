"""Models whose layers differ in size, in both runners: the logits of transformers, in one go and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoestring.core.errors import UsageError
from shoestring.engine.native_runner import NativeRunner
from shoestring.engine.runner import Batch
from shoestring.engine.torch_runner import TorchRunner
from shoestring.lab import tiny
from shoestring.models.llama_like import NotNative, from_config
from shoestring.models.uneven import Keep, shrink

IDS = list(range(3, 43))
ALL = range(96)
KEEPS = {
    "small first": [Keep([2], range(7)), Keep([0, 1, 3], range(50)), Keep([0, 1], ALL)],
    "constants": [
        Keep([2], range(7), torch.ones(64)),
        Keep([0, 1, 3], range(50)),
        Keep([0], ALL, None, torch.ones(64)),
    ],
}
GONE = [Keep([], ALL), Keep([1, 3], range(50)), Keep([0, 1, 2], [])]


def saved(folder: Path, keep: list[Keep]) -> Any:
    whole = tiny.model(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    small = shrink(whole, keep)
    small.save_pretrained(folder)
    return small


def logits(runner: Any) -> np.ndarray:
    """Logits of all positions: a prompt, then token by token."""
    runner.reserve(8)
    table, rows = np.arange(8, dtype=np.int32)[None], []
    for first, last in [(0, 20), *((i, i + 1) for i in range(20, len(IDS)))]:
        batch = Batch(
            ids=np.array(IDS[first:last], np.int32),
            positions=np.arange(first, last, dtype=np.int32),
            starts=np.array([0, last - first], np.int32),
            contexts=np.array([first], np.int32),
            tables=table,
        )
        rows.append(runner.logits(runner.run(batch), np.arange(last - first)))
    return np.concatenate(rows)


@pytest.mark.parametrize("kind", [NativeRunner, TorchRunner])
@pytest.mark.parametrize("name", KEEPS)
def test_unequal_layers_run(kind: Any, name: str, tmp_path: Path) -> None:
    small = saved(tmp_path, KEEPS[name])
    runner = kind(tmp_path, cache_dtype="fp32")
    with torch.no_grad():
        wanted = small(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(logits(runner) - wanted).max() < 1e-4
    assert (runner.facts.kv_heads, runner.facts.head_dim) == (3, 16)
    runner.close()


def test_layers_that_lack_a_part_run_in_torch(tmp_path: Path) -> None:
    small = saved(tmp_path, GONE)
    with pytest.raises(NotNative, match="lack attention"):
        NativeRunner(tmp_path)
    runner = TorchRunner(tmp_path, cache_dtype="fp32")
    with torch.no_grad():
        wanted = small(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(logits(runner) - wanted).max() < 1e-4
    runner.close()


def test_sizes_that_lie_are_refused(tmp_path: Path) -> None:
    config = saved(tmp_path, KEEPS["small first"]).config.to_dict() | {"architectures": ["UnevenLlamaForCausalLM"]}
    assert from_config(config).shape_of("o", 1) == (64, 96)
    for bad in ([1, 2], [1, 2, 4], [1, 2, -1], "123", [1, 2, True]):
        with pytest.raises(UsageError, match="layer_key_value_heads"):
            from_config({**config, "layer_key_value_heads": bad})


def test_attention_elsewhere_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, KEEPS["small first"])
    runner = NativeRunner(tmp_path, cache_dtype="fp32")
    runner.attention = lambda layer, q, k, v, batch: q
    with pytest.raises(UsageError, match="unequally many heads"):
        logits(runner)
    runner.close()

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from shoestring import data as datasets
from shoestring.core.ledger import Ledger
from shoestring.lab.arms import Arms


def test_arms_start_from_the_same_random_numbers(tmp_path: Path) -> None:
    arms, drawn = Arms(3, True, tmp_path, Ledger()), []
    for name in ("ours", "theirs"):
        with arms.arm(name) as stage:
            drawn.append(torch.rand(1).item())
            stage.record("loss", drawn[-1], "nat", "measured")
    assert drawn[0] == drawn[1]
    with Arms(4, True, tmp_path, Ledger()).arm("ours"):
        assert torch.rand(1).item() != drawn[0]
    assert arms.value("ours", "loss") == (drawn[0], "nat")
    assert arms.value("ours", "no_such") is None and arms.value("nobody", "loss") is None
    assert arms.value("ours", "wall_time") is not None or arms.value("ours", "time") is not None


def test_sizes(tmp_path: Path) -> None:
    assert Arms(0, True, tmp_path, Ledger()).size(2, 9) == 2
    assert Arms(0, False, tmp_path, Ledger()).size(2, 9) == 9


def test_a_seed_chooses_the_examples(tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = datasets.read(data)
    monkeypatch.setattr(datasets, "read", lambda source: corpus)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [
        Arms(seed, True, tmp_path, Ledger()).docs(tokenizer, {"train": 3, "test": 2}, max_length=64)
        for seed in (0, 0, 1)
    ]
    assert {name: len(part.rows) for name, part in rows[0].items()} == {"train": 3, "test": 2}
    assert [part.rows for part in rows[0].values()] == [part.rows for part in rows[1].values()]
    assert rows[0]["train"].rows != rows[2]["train"].rows

"""Rows, options and adapters that the tests of training share."""

from __future__ import annotations

from typing import Any

import torch

from shoestring.lab import tiny
from shoestring.training import TrainOptions


def make_rows(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 5 to 13 tokens whose first two carry no label."""
    made = []
    for i in range(count):
        ids = [3 + (i * 7 + j * (1 + seed)) % (tiny.VOCAB - 3) for j in range(5 + i % 9)]
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def options(**changes: Any) -> TrainOptions:
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 4,
        "learning_rate": 5e-3,
        "warmup_ratio": 0.0,
    }
    return TrainOptions(**{**settings, **changes})


def lora(model: Any, rank: int = 4, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", **changes))

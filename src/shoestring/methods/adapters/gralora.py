"""GraLoRA: cut each weight into a grid and give every cell a small low-rank update of its own.

How it works
    1. The weight is a k x k grid; cell (i, j) has B_ij A_ij of rank r / k.
    2. Altogether r (in + out) numbers as in LoRA, but the update's rank reaches k r, and an outlier in x spoils one
       column of cells only.

Where it bends
    peft's own tuner, unchanged. k must divide all adapted widths and r. hybrid_r adds a plain low-rank update beside
    it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import GraloraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
        "2025-05",
        arxiv="2505.20355",
        code="SqueezeBits/GraLoRA",
    ),
    provides="GraloraConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "(r + hybrid_r) (in + out) per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}


def example() -> GraloraConfig:
    return GraloraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "hybrid_r": 0, "alpha": 32, "gralora_k": 2, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """(r + hybrid_r) (in + out) trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"]) + int(chosen["hybrid_r"])
    trained = sum(rank * (n_in + n_out) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

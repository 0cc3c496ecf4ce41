"""SHiRA: train one or two percent of each weight's entries and leave the others.

How it works
    1. A mask M with r (in + out) ones is drawn for each weight; W' = W + S, where S has trained values on M and
       zeros elsewhere, starting at zero.
    2. The update has high rank, and switching it in a merged model touches those entries only.

Where it bends
    peft's own tuner, unchanged. The mask is random and saved as indices beside the values. peft makes the sparse
    update dense at each step, so training saves optimizer state, not compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import ShiraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Sparse High Rank Adapters",
        "2024-06",
        arxiv="2406.13175",
    ),
    provides="ShiraConfig",
    saves=("parameters", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "selective",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r (in + out) per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}
NEEDS_FLOAT = True


def example() -> ShiraConfig:
    return ShiraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 8, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) trainable entries per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * (n_in + n_out) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

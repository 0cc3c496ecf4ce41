"""HiRA: multiply the weight, element by element, by a low-rank matrix, for an update of high rank.

How it works
    1. W' = W + W * (B A), element by element, A (r x in) random and B (out x r) zero at the start.
    2. The rank of W * (B A) reaches r times that of W.

Where it bends
    peft's own tuner, unchanged. The product with W is made at each step, which costs memory and time beside LoRA.
    Entries of W are small, so it wants a larger learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import HiraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
        "2025-01",
    ),
    provides="HiraConfig",
    saves=("parameters", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r (in + out) per weight",
    },
)
TRAINING = {"learning_rate": 5e-3}
NEEDS_FLOAT = True


def example() -> HiraConfig:
    return HiraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * (n_in + n_out) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

"""MiSS: share one small matrix among all pieces of a weight's input.

How it works
    1. The input is cut into pieces of r numbers, and h = W x + D^T (sum of the pieces), D (r x out) trained from
       zero.
    2. So dW repeats D along the input: full use of r out numbers without a second factor.

Where it bends
    peft's own tuner, unchanged. init_weights="bat" couples the update to the weight, "mini" shares along the output
    too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import MissConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
        "2024-09",
        arxiv="2409.15371",
        code="JL-er/MiSS",
    ),
    provides="MissConfig",
    saves=("parameters", "memory", "storage", "compute"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r out per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}


def example() -> MissConfig:
    return MissConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 32, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r out trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * n_out for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

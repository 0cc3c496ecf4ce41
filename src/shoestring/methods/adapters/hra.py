"""HRA: reflect each weight's inputs by a chain of trained mirrors.

How it works
    1. W' = W H_1 .. H_r with H_i = I - 2 u_i u_i^T / ||u_i||^2.
    2. The u_i start in equal pairs: two like reflections undo each other, so training starts at the base model.

Where it bends
    peft's own tuner, unchanged. The rank should be even. The reflections are multiplied out at each step, one after
    another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import HRAConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
        "2024-05",
        arxiv="2405.17484",
        code="DaShenZi721/HRA",
    ),
    provides="HRAConfig",
    saves=("parameters", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r in per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}
NEEDS_FLOAT = True


def example() -> HRAConfig:
    return HRAConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 8, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r in trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * n_in for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

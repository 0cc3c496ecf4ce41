"""TinyLoRA: steer each weight's leading singular directions by a handful of numbers.

How it works
    1. W = U S V^T, cut to rank r; dW = U S^(1/2) R S^(1/2) V^T with R = sum_i v_i P_i, the P_i fixed random r x r
       matrices.
    2. Only v (u numbers) is trained, starting at zero; weights may share it (weight_tying), down to one v for the
       model.

Where it bends
    peft's own tuner, unchanged. The whole singular value decomposition of each weight is made when the adapter is
    added. The paper trains by reinforcement, where so few numbers are enough; for new facts they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import TinyLoraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Learning to Reason in 13 Parameters",
        "2026-02",
        arxiv="2602.04118",
    ),
    provides="TinyLoraConfig",
    saves=("parameters", "storage", "network"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "u per group of weights",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}
NEEDS_FLOAT = True


def example() -> TinyLoraConfig:
    return TinyLoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 2, "u": 64, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """u trainable parameters for each group of weights that share them; without tying a group is one weight."""
    chosen = {"weight_tying": 0.0, **settings()[0], **options}
    count = len(list(linear(shape, chosen)))
    groups = max(1, round(count * (1 - float(chosen["weight_tying"]))))
    size = max(1, count // groups)
    used = min(groups, -(-count // size))
    return Price(shape, trainable=int(chosen["u"]) * used, train_flops=2.0)

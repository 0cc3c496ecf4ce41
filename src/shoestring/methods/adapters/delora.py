"""DeLoRA: normalise a low-rank update, so that one trained number bounds how far the weight may go.

How it works
    1. dW = (lambda ||W|| / r) B Xi A, where Xi divides each rank-one part by the lengths of its two vectors.
    2. Angles (A, B) and strength (lambda) are trained apart, which holds also at large learning rates.

Where it bends
    peft's own tuner, unchanged. ||W|| is taken column by column. peft starts B at zero and keeps its length above a
    small number only, so that the first step reaches the full strength at once: with peft's own lambda of 15 a model
    of 135M parameters is lost there, hence the small one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import DeloraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Decoupling Angles and Strength in Low-rank Adaptation",
        "2025-03",
        arxiv="2503.18225",
        code="ExplainableML/DeLoRA",
    ),
    provides="DeloraConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r (in + out) + 1 per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}
NEEDS_FLOAT = True


def example() -> DeloraConfig:
    return DeloraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "delora_lambda": 0.5, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) and a strength per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * (n_in + n_out) + 1 for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

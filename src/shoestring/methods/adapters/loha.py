"""LoHa: multiply two low-rank updates element by element, which reaches the square of their rank.

How it works
    1. dW = s (B_1 A_1) * (B_2 A_2), element by element, of rank up to r^2; s = alpha / r.             (proposition 1)
    2. One factor starts at zero: training starts at the base model.

Where it bends
    peft's own tuner, unchanged. The update is made in full at each step, so it saves less memory than LoRA. It comes
    from federated learning, where what is sent counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoHaConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
        "2021-08",
        arxiv="2108.06098",
    ),
    provides="LoHaConfig",
    saves=("parameters", "storage", "network"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "2 r (in + out) per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}
NEEDS_FLOAT = True


def example() -> LoHaConfig:
    return LoHaConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 8, "alpha": 8, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """2 r (in + out) trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(2 * rank * (n_in + n_out) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

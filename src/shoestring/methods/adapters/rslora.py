"""rsLoRA: scale a low-rank update by alpha / sqrt(r), so that large ranks learn as they should.

How it works
    1. The layer is LoRA's, h = W x + s B A x, A (r x in) random and B (out x r) zero.
    2. The scale is s = alpha / sqrt(r) in place of alpha / r: only then neither outputs nor gradients vanish or
       blow up as r grows.                                                                               (theorem 3.2)

Where it bends
    peft's own tuner, unchanged. Worth it at ranks of 32 and more; at a small rank it is LoRA with another alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        "2023-12",
        arxiv="2312.03732",
    ),
    provides="LoraConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r (in + out) per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}


def example() -> LoraConfig:
    return LoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 32, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * (n_in + n_out) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

"""OLoRA: start a low-rank update at an orthonormal basis of the weight itself.

How it works
    1. W = Q R by the QR decomposition; B = Q_r, orthonormal columns, and A = R_r, the first r rows.
    2. The frozen weight becomes W - s B A, so that the layer begins as the base.

Where it bends
    peft's own tuner, unchanged. Cheaper to begin than PiSSA, one QR decomposition a weight. As there, the base inside
    the model is what is left of W: switching the adapter off does not give the original back.
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
        "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
        "2024-06",
        arxiv="2406.01775",
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
        "check_unload_restores_the_base": "the base holds what is left of each weight; peft puts nothing back",
        "check_disable": "switched off, the base lacks the part of each weight that is trained",
        "check_two_adapters": "the second one takes its own part out of what the first has left of the base",
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 2e-4}
NEEDS_FLOAT = True


def example() -> LoraConfig:
    return LoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "lora_alpha": 16, "init_lora_weights": "olora", "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * (n_in + n_out) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)


def fitted(shape: Shape) -> dict[str, Any]:
    """Options that depend on the model: none, but it is refused where peft would build what cannot compute."""
    if shape.family == "gpt2":
        raise TypeError("peft does not turn GPT-2's weights, which are stored transposed, before it factorises them")
    return {}

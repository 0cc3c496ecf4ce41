"""LoRA: train a low-rank update beside each frozen weight, then fold it in.

How it works
    1. Every chosen weight W (out x in) stays frozen; beside it stand A (r x in) and B (out x r), so the layer computes
       h = W x + (alpha / r) B A x                                                                              (eq. 3)
    2. A starts random, B at zero: training starts at the base model.
    3. After training W + (alpha / r) B A replaces W: the adapter costs nothing at work.

Where it bends
    peft's own tuner, unchanged. The paper adapts the attention projections; here every linear layer of the blocks is
    adapted, as later practice found better at the same parameter count. On a small model with many tokens a step,
    activations outweigh what LoRA saves: read the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import PROJECTIONS, Shape

METHOD = Method(
    paper=Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "2021-06",
        arxiv="2106.09685",
        code="microsoft/LoRA",
        licence="MIT",
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
    expects={"check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different"},
    default=True,
)
# Ten times what full fine-tuning takes: the update starts at zero and is scaled by alpha / r.
TRAINING = {"learning_rate": 1e-3}


def example() -> LoraConfig:
    return LoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) trainable parameters per adapted weight; the merged model costs what the base does."""
    rank = int({**settings()[0], **options}["r"])
    trained = sum(rank * sum(w.dims) for w in shape.of(*PROJECTIONS) if len(w.dims) == 2)
    return Price(shape, trainable=trained, train_flops=2.0)

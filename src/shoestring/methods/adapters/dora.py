"""DoRA: train a weight's direction by a low-rank update and its length by a vector, apart from each other.

How it works
    1. Every column-wise length m = ||W|| of a frozen weight W (out x in) is taken out and becomes a trained vector.
    2. The direction moves by a low-rank update, and the layer computes with W' = m (W + s B A) / ||W + s B A||, the
       norm of each output's row, s = alpha / r.                                                               (eq. 5)
    3. The norm counts as a constant in the backward pass, which saves memory.                           (section 4.3)

Where it bends
    peft's own tuner, unchanged. Each step computes the norm of every adapted weight, so it is slower than LoRA at the
    same rank; merged it costs nothing.
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
        "DoRA: Weight-Decomposed Low-Rank Adaptation",
        "2024-02",
        arxiv="2402.09353",
        code="NVlabs/DoRA",
    ),
    provides="LoraConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r (in + out) + out per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}
NEEDS_FLOAT = True


def example() -> LoraConfig:
    return LoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "lora_alpha": 32, "use_dora": True, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) + out trainable parameters per adapted weight: those of LoRA, and a length for each output."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * (n_in + n_out) + n_out for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

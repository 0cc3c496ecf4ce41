"""Uni-LoRA: project one trained vector into all low-rank matrices of a model.

How it works
    1. All entries of all A and B form one long vector theta_D = P theta_d; each row of P has one entry, drawn by a
       seed, scaled so that P keeps lengths.
    2. Only theta_d (d numbers in all) is trained.

Where it bends
    peft's own tuner, unchanged. A and B are random from the start, so training does not start at the base model. What
    is saved is d numbers and a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import UniLoraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape

METHOD = Method(
    paper=Paper(
        "Uni-LoRA: One Vector is All You Need",
        "2025-06",
        arxiv="2506.00799",
        code="KaiyangLi1992/Uni-LoRA",
    ),
    provides="UniLoraConfig",
    saves=("parameters", "storage", "network"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "theta_d_length in all",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
        "check_starts_as_the_base_model": "both low-rank matrices start at random, as in the paper",
    },
)
TRAINING = {"learning_rate": 5e-3}


def example() -> UniLoraConfig:
    return UniLoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 4, "theta_d_length": 4096, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """theta_d_length trainable parameters in all."""
    trained = int({**settings()[0], **options}["theta_d_length"])
    return Price(shape, trainable=trained, train_flops=2.0)

"""PiSSA: start a low-rank update at the weight's own largest singular directions and freeze the rest.

How it works
    1. W = U S V^T; A = S_r^(1/2) V_r^T and B = U_r S_r^(1/2) take the r largest singular values.           (eq. 2, 3)
    2. What is left, W_res = W - s B A, replaces the frozen weight, so the layer W_res x + s B A x begins as the
       base.                                                                                                   (eq. 4)
    3. Training moves the principal part at once, where LoRA begins with noise and zero.

Where it bends
    peft's own tuner, unchanged. The whole decomposition is made, once when the adapter is added and once when it is
    loaded: half a minute for 135M parameters. The fast one draws random numbers and would load another adapter than
    was saved.

    The base inside the model is the rest W_res: switching the adapter off does not give the original back, merging
    does give the whole.
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
        "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        "2024-04",
        arxiv="2404.02948",
        code="GraphPKU/PiSSA",
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
    return ({"r": 16, "lora_alpha": 16, "init_lora_weights": "pissa", "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * (n_in + n_out) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

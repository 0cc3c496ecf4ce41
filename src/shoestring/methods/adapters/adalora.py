"""AdaLoRA: spend a budget of ranks where they matter, by pruning singular values while training.

How it works
    1. The update is P diag(lambda) Q, P (out x r) and Q (r x in) kept near orthogonal by a term in the loss, ||P^T
       P - I||^2 + ||Q Q^T - I||^2.                                                                         (eq. 3, 4)
    2. Each triplet's importance is that of its lambda and the mean of its vectors': a smoothed |w dL/dw| times its
       smoothed deviation.
    3. The budget falls from init_r to target_r an update along a cubic; the least important lambdas are set to
       zero.

Where it bends
    peft's own tuner, unchanged. It wants to know how many steps there will be and to be called after each;
    `shoestring train` does both, so total_step is but a placeholder. With a loop of one's own set it and call
    `model.base_model.update_and_allocate(step)` before the gradients are cleared. tinit and tfinal keep the budget
    still at either end.

    What is pruned stays in memory until the adapter is saved: the file is smaller, training is not. peft cannot give
    the loss of a loaded adapter, only its answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import AdaLoraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        "2023-03",
        arxiv="2303.10512",
        code="QingruZhang/AdaLoRA",
        licence="MIT",
    ),
    provides="AdaLoraConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "init_r (in + out + 1) per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
        "check_two_adapters": "peft trains one of them at a time: its budget belongs to one",
    },
)
TRAINING = {"learning_rate": 1e-3}


def example() -> AdaLoraConfig:
    return AdaLoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"init_r": 24, "target_r": 16, "lora_alpha": 32, "total_step": 10_000, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """init_r (in + out + 1) trainable parameters per adapted weight, before the budget falls."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["init_r"])
    trained = sum(rank * (n_in + n_out + 1) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

"""AdaLoRA: spend a budget of ranks where they matter, by pruning singular values while training.

How it works
    1. The update is P diag(lambda) Q, P (out x r) and Q (r x in) kept near orthogonal by a term in the loss, ||P^T
       P - I||^2 + ||Q Q^T - I||^2.                                                                         (eq. 3, 4)
    2. Each triplet's importance is that of its lambda and the mean of its vectors': a smoothed |w dL/dw| times its
       smoothed deviation.
    3. The budget falls from init_r to target_r an update along a cubic; the least important lambdas are set to
       zero.

Where it bends
    peft's own tuner, unchanged. It wants to be called after every optimizer step with gradients still there;
    `callbacks` does that when `shoestring train` runs it, and stretches the schedule over the run: a tenth of the
    steps before the budget falls and three tenths after, unless total_step is set.

    The pruned triplets stay in memory until the adapter is saved: the file is smaller, training is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import AdaLoraConfig
from transformers import TrainerCallback

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
RUN = 1  # steps of a schedule that nobody has set: it takes the length of the run


def example() -> AdaLoraConfig:
    return AdaLoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"init_r": 24, "target_r": 16, "lora_alpha": 32, "total_step": RUN, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """init_r (in + out + 1) trainable parameters per adapted weight, before the budget falls."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["init_r"])
    trained = sum(rank * (n_in + n_out + 1) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)


def callbacks(model: Any) -> list[TrainerCallback]:
    """What the training loop must call for `model` while it learns."""
    return [_Allocate(model)]


class _Allocate(TrainerCallback):
    def __init__(self, model: Any) -> None:
        self.tuner = model.base_model
        self.config = model.peft_config[self.tuner.trainable_adapter_name]
        self.own_schedule = self.config.total_step != RUN

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.own_schedule:
            total = state.max_steps
            self.config.total_step, self.config.deltaT = total, max(1, total // 100)
            self.config.tinit, self.config.tfinal = total // 10, 3 * total // 10
        self.tuner.update_and_allocate(state.global_step)

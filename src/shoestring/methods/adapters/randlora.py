"""RandLoRA: add up scaled random bases to an update of full rank with few trained numbers.

How it works
    1. dW = sum_i B_i L_i A_i G_i over n = ceil(min(in, out) / r) frozen random pairs, shared by all layers.
    2. The diagonals L_i (r) and G_i (min(in, out)) are trained.

Where it bends
    peft's own tuner, unchanged. A smaller r means more bases, and more trained parameters. The bases are far larger
    than what is trained (peft writes them once for every layer: 2 GB for 135M parameters), so here they are not saved
    but drawn again from their seed when the adapter is loaded; save_projection=True keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import RandLoraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
        "2025-02",
        arxiv="2502.00987",
        code="PaulAlbert31/RandLoRA",
    ),
    provides="RandLoraConfig",
    saves=("parameters",),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "ceil(min(in, out) / r) (r + min(in, out)) per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}


def example() -> RandLoraConfig:
    return RandLoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 32, "save_projection": False, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """ceil(min(in, out) / r) (r + min(in, out)) trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(-(-min(n_out, n_in) // rank) * (rank + min(n_out, n_in)) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

"""VeRA: share one pair of random matrices among all layers and train two vectors a layer.

How it works
    1. h = W x + diag(b) B diag(d) A x with frozen random A (r x in) and B (out x r), sliced from one pair for all
       layers.                                                                                                 (eq. 2)
    2. The vectors d (r, starting at d_initial) and b (out, starting at zero) are trained.

Where it bends
    peft's own tuner, unchanged. The random pair is saved with the adapter so that it loads on any machine;
    save_projection=False keeps it out and the file small, trusting the generator. Wide ranks cost compute while
    training; merged it costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import VeraConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "VeRA: Vector-based Random Matrix Adaptation",
        "2023-10",
        arxiv="2310.11454",
    ),
    provides="VeraConfig",
    saves=("parameters", "memory"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r + out per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-2}


def example() -> VeraConfig:
    return VeraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 256, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r + out trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank + n_out for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

"""WaveFT: train a few coefficients of the update's wavelet transform.

How it works
    1. At n places of the wavelet spectrum, drawn by a seed, coefficients c are trained, starting at zero.
    2. dW = alpha IDWT(C), the inverse transform of that sparse matrix.

Where it bends
    peft's own tuner, unchanged. The inverse transform makes the whole update at each step: few parameters, no less
    memory or time. use_idwt=False trains a sparse update without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import WaveFTConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets",
        "2025-05",
        arxiv="2505.12532",
    ),
    provides="WaveFTConfig",
    saves=("parameters", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "n_frequency per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-2}


def example() -> WaveFTConfig:
    return WaveFTConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"n_frequency": 1000, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """n_frequency trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    count = int(chosen["n_frequency"])
    trained = sum(count for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

"""FourierFT: train a few coefficients of the update's discrete Fourier transform.

How it works
    1. At n places of the spectrum, drawn once by a seed and the same for all layers, coefficients c are trained;
       elsewhere F = 0.                                                                                        (eq. 2)
    2. dW = alpha Re(IDFT2(F)).                                                                             (eq. 3, 4)

Where it bends
    peft's own tuner, unchanged. Coefficients start at zero here, so that training starts at the base model; the paper
    draws them at random (init_weights=False). The transform makes the whole update at each step: few parameters, no
    less memory or time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import FourierFTConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
        "2024-05",
        arxiv="2405.03003",
        code="Chaos96/fourierft",
        licence="MIT",
    ),
    provides="FourierFTConfig",
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


def example() -> FourierFTConfig:
    return FourierFTConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"n_frequency": 1000, "init_weights": True, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """n_frequency trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    count = int(chosen["n_frequency"])
    trained = sum(count for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

"""C3A: make the update a grid of circular convolutions, of any rank and computed by FFT.

How it works
    1. dW consists of (out / b) x (in / b) circulant blocks; a block is one trained kernel of b numbers.
    2. A block times a piece of x is a circular convolution, irfft(rfft(k) rfft(x)).
    3. Kernels start at zero: training starts at the base model.

Where it bends
    peft's own tuner, unchanged. Kernels start at zero here, so that training starts at the base model; the paper
    draws them at random. The block must divide all adapted widths; it is their greatest common divisor where
    block_size is not given, the fewest parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft import C3AConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Parameter-Efficient Fine-Tuning via Circular Convolution",
        "2024-07",
        arxiv="2407.19342",
    ),
    provides="C3AConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "in out / b per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-2}


def example() -> C3AConfig:
    return C3AConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"init_weights": True, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """A kernel of b numbers for each of the in out / b^2 blocks of an adapted weight."""
    chosen = {**settings()[0], **fitted(shape), **options}
    trained = sum(n_out * n_in // int(chosen["block_size"]) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)


def fitted(shape: Shape) -> dict[str, Any]:
    """Options that depend on the model: the largest block that divides every width."""
    return {"block_size": math.gcd(*(n for pair in linear(shape, settings()[0]) for n in pair))}

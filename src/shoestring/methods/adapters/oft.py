"""OFT: rotate each weight's inputs by small orthogonal blocks, which keeps angles between neurons.

How it works
    1. W' = W R with a block-diagonal R whose blocks of size b are orthogonal.
    2. A block is Cayley's transform (I + Q)(I - Q)^-1 of a trained skew-symmetric Q, which starts at zero; the
       inverse is a Neumann series of a few terms.

Where it bends
    peft's own tuner, unchanged. Orthogonal up to the error of the series; use_cayley_neumann=False inverts exactly.
    Widths that the block does not divide get the next block that does, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import OFTConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
        "2023-06",
        arxiv="2306.07280",
        code="Zeju1997/oft",
        licence="MIT",
    ),
    provides="OFTConfig",
    saves=("parameters", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "in (b - 1) / 2 per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}


def example() -> OFTConfig:
    return OFTConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"oft_block_size": 32, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """in / b blocks of b (b - 1) / 2 trainable parameters per adapted weight."""
    chosen = {**settings()[0], **options}
    block = int(chosen["oft_block_size"])
    trained = sum(n_in * (block - 1) // 2 for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

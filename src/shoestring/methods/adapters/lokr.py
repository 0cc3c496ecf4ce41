"""LoKr: make the update a Kronecker product of a small matrix and a low-rank one.

How it works
    1. dW = s C (x) (B A) with C (out_1 x in_1), B (out_2 x r), A (r x in_2), out = out_1 out_2 and in = in_1 in_2,
       as near to square roots as whole numbers allow.
    2. Where r is not below half of out_2 or in_2 the second factor is trained whole. C starts at zero.

Where it bends
    peft's own tuner, unchanged. The update is made in full at each step. Widths without a divisor near their root
    give lopsided factors; decompose_factor sets one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoKrConfig
from peft.tuners.lokr.layer import factorization

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        "2023-09",
        arxiv="2309.14859",
        code="KohakuBlueleaf/LyCORIS",
        licence="Apache-2.0",
    ),
    provides="LoKrConfig",
    saves=("parameters", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "out_1 in_1 + min(r (out_2 + in_2), whole) per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}
NEEDS_FLOAT = True


def example() -> LoKrConfig:
    return LoKrConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "alpha": 16, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """The two factors of the Kronecker product of each adapted weight; each is low-rank only where that is smaller."""
    chosen = {"decompose_factor": -1, "decompose_both": False, **settings()[0], **options}
    trained = sum(_factors(n_out, n_in, chosen) for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)


def _factors(n_out: int, n_in: int, options: Mapping[str, Any]) -> int:
    rank = int(options["r"])
    pairs = zip(*(factorization(n, int(options["decompose_factor"])) for n in (n_out, n_in)))
    small, large = (
        rank * (a + b) if split and rank < max(a, b) / 2 else a * b
        for (a, b), split in zip(pairs, (options["decompose_both"], True))
    )
    return small + large

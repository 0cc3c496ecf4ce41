"""PSOFT: rotate a weight within its principal subspace only.

How it works
    1. W = A B + W_res, A B of rank r by singular value decomposition, A's columns orthogonal.
    2. W' = A diag(a) R diag(b) B + W_res with an orthogonal R (r x r), Cayley's transform of a trained skew-
       symmetric matrix, and vectors a and b that relax it.
    3. R starts at the identity, a and b at one: training starts at the base model.

Where it bends
    peft's own tuner, unchanged. A rank above an adapted width is refused. The decomposition is the fast one with a
    fixed seed, which gives the same when the adapter is loaded; psoft_svd="full" takes the exact one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PsoftConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation",
        "2025-05",
        arxiv="2505.11235",
    ),
    provides="PsoftConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r (r - 1) / 2 + 2 r per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 5e-3}
NEEDS_FLOAT = True


def example() -> PsoftConfig:
    return PsoftConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 32, "psoft_svd": "lowrank", "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """A skew-symmetric r x r matrix and two vectors per adapted weight, whatever its size."""
    chosen = {**settings()[0], **options}
    rank = int(chosen["r"])
    trained = sum(rank * (rank - 1) // 2 + 2 * rank for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

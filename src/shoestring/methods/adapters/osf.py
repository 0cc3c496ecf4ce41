"""OSF: train a weight's smallest singular directions and keep the largest, where earlier tasks live.

How it works
    1. W = U_high S_high V_high + U_low S_low V_low, the first with the effective_rank largest singular values.
    2. Only the low part is trained, and its gradients are projected to be orthogonal to U_high and V_high.

Where it bends
    peft's own tuner, unchanged. The whole decomposition is made when the adapter is added, and it holds the low part
    twice beside the weight: it is for learning task after task without forgetting, not for small memory. Here 95% of
    the directions are kept; the paper lets the share grow with the tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import OSFConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
        "2025-04",
        arxiv="2504.07097",
    ),
    provides="OSFConfig",
    saves=("parameters",),
    combines={"quantizers": "yes"},
    traits={
        "family": "selective",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "k (in + out + 1) per weight, k = min(in, out) - effective rank",
    },
    expects={
        "check_unmerge_restores_the_base": "peft cannot unmerge it",
    },
)
TRAINING = {"learning_rate": 2e-4}
NEEDS_FLOAT = True


def example() -> OSFConfig:
    return OSFConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"effective_rank": 0.95, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """k singular triplets per adapted weight; an effective rank up to 1 is a share of all."""
    chosen = {**settings()[0], **options}
    trained = sum(_low(min(pair), chosen["effective_rank"]) * (sum(pair) + 1) for pair in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)


def _low(width: int, kept: float | None) -> int:
    """Singular directions left for training."""
    if kept is None:
        return width - width // 2
    return width - (int(width * kept) if isinstance(kept, float) and kept <= 1 else min(int(kept), width))

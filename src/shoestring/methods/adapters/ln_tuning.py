"""LayerNorm tuning: train the normalisations' gains and nothing else.

How it works
    1. Each normalisation y = g * x / ||x|| (+ b) has its g (and b) trained; all else is frozen.

Where it bends
    peft's own tuner, unchanged. peft knows the names of the normalisations of the usual families; name target_modules
    for another. Merging puts the trained normalisation in the place of the old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LNTuningConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as MODULES

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import targets

METHOD = Method(
    paper=Paper(
        "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
        "2023-12",
        arxiv="2312.11420",
    ),
    provides="LNTuningConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "selective",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "all entries of the normalisations",
    },
)
TRAINING = {"learning_rate": 1e-2}


def example() -> LNTuningConfig:
    return LNTuningConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """All parameters of the adapted normalisations."""
    trained = sum(w.count for w in targets(shape, options, MODULES))
    return Price(shape, trainable=trained, train_flops=2.0)

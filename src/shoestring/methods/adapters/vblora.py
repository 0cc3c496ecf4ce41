"""VB-LoRA: build all low-rank matrices of a model from one bank of shared vectors.

How it works
    1. A and B of every layer are cut into sub-vectors of length b; each is a mixture of the k best of h vectors in
       one bank, by softmax over trained logits.
    2. Bank and logits are trained; for use only k indices and k - 1 weights a sub-vector are needed.

Where it bends
    peft's own tuner, unchanged. Training has h logits for each sub-vector; with save_only_topk_weights the file keeps
    only what is used, and cannot be trained further. The sub-vectors' length is the greatest common divisor of all
    adapted widths where vector_length is not given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft import VBLoRAConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks",
        "2024-05",
        arxiv="2405.15179",
        code="leo-yangli/VB-LoRA",
    ),
    provides="VBLoRAConfig",
    saves=("storage", "network"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "h b + h r (in + out) / b per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
        "check_starts_as_the_base_model": "both low-rank matrices start at random, as in the paper",
    },
)
TRAINING = {"learning_rate": 1e-2}


def example() -> VBLoRAConfig:
    return VBLoRAConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 4, "num_vectors": 90, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """The bank (h b), and h logits for each of the r (in + out) / b sub-vectors of an adapted weight."""
    chosen = {**settings()[0], **fitted(shape), **options}
    rank, count, length = int(chosen["r"]), int(chosen["num_vectors"]), int(chosen["vector_length"])
    logits = sum(rank * (n_in + n_out) // length * count for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=count * length + logits, train_flops=2.0)


def fitted(shape: Shape) -> dict[str, Any]:
    """Options that depend on the model: the longest sub-vector that divides every width."""
    return {"vector_length": math.gcd(*(n for pair in linear(shape, settings()[0]) for n in pair))}

"""BOFT: rotate each weight's inputs by a product of sparse orthogonal factors, laid out like a butterfly.

How it works
    1. W' = diag(s) W R with R = B_1 .. B_m, each factor block-diagonal between two permutations.
    2. Blocks of size b are Cayley's transforms of trained matrices that start at zero; the scales s start at one.

Where it bends
    peft's own tuner, unchanged. On a processor peft builds one factor (m = 1), which is OFT with full blocks and
    scales, and holds a permutation of in x in numbers for each weight; so by default only what peft names for the
    family is adapted, queries and values for Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import BOFTConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MODULES

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
        "2023-11",
        arxiv="2311.06243",
        code="wy1iu/butterfly-oft",
    ),
    provides="BOFTConfig",
    saves=("parameters", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "m in b + out per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 1e-3}


def example() -> BOFTConfig:
    return BOFTConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"boft_block_size": 4},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """in / b blocks of b x b numbers a factor, and a scale for each output; on a processor there is one factor."""
    chosen = {**settings()[0], **options}
    block, factors = int(chosen["boft_block_size"]), 1
    trained = sum(factors * n_in * block + n_out for n_out, n_in in linear(shape, chosen, MODULES))
    return Price(shape, trainable=trained, train_flops=2.0)

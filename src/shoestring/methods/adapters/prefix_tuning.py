"""Prefix tuning: give every layer's attention a few trained keys and values to look at.

How it works
    1. Attention in each layer reads [P_k; K] and [P_v; V]; P_k and P_v (n x kv_heads * head_dim) are trained.
                                                                                                               (eq. 3)
    2. With prefix_projection the prefixes are a small MLP's output, which the paper trains more stably with.
                                                                                                         (section 4.3)

Where it bends
    peft's own tuner, unchanged. The prefix takes n places of the key-value cache and of each request's context, no
    compute in the MLPs. Prefixes start at zero here, where they only thin out attention; peft starts them at random,
    far from the base. No gradient checkpointing: the cache that carries the prefix is off then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PrefixTuningConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import stacks

METHOD = Method(
    paper=Paper(
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        "2021-01",
        arxiv="2101.00190",
        code="XiangLi1999/PrefixTuning",
    ),
    provides="PrefixTuningConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "prompt",
        "acts_on": "key/value",
        "merges": "no",
        "parameters": "num_virtual_tokens * 2 * layers * kv_heads * head_dim",
    },
    expects={
        "check_starts_as_the_base_model": "attention is thinned out by the prefix from the first step",
        "check_merge": "it changes no weight that could take it up",
        "check_unload_restores_the_base": "peft has no unload for prompts; the base was never changed",
        "check_unmerge_restores_the_base": "it changes no weight that could take it up",
        "check_two_adapters": "peft leaves the prompts of all adapters open to training, whichever is active",
        "check_generates_with_a_cache": "the prefix stands in the cache, so there is no generating without one",
        "check_gradient_checkpointing": "checkpointing switches off the cache in which the prefix stands",
    },
)
TRAINING = {"learning_rate": 1e-2}


def example() -> PrefixTuningConfig:
    return PrefixTuningConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"num_virtual_tokens": 20, "init_weights": "zero"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """A key and a value of every layer for each virtual token, as wide as the cache; only one stack has them."""
    tokens = int({**settings()[0], **options}["num_virtual_tokens"])
    trained = tokens * 2 * (shape.layers // stacks(shape)) * shape.kv_heads * shape.head_dim
    return Price(shape, trainable=trained, train_flops=2.0)

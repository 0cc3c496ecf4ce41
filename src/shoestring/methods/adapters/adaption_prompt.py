"""LLaMA-Adapter: let the upper layers' attention look at trained vectors, through a gate that starts shut.

How it works
    1. Layer l has a prompt P_l (n x hidden); its frozen projections make keys and values of it.
    2. Attention to the prompt is a softmax of its own, times a trained gate g_l, added to attention to the text.
    3. g_l starts at zero: training starts at the base model.

Where it bends
    peft's own tuner, unchanged. The paper leaves 2 of 32 layers out; the same share is left out of any model when
    adapter_layers is not given. peft builds it for Llama, Mistral and GPT-2, and it cannot be merged: softmax stands
    between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import AdaptionPromptConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape

METHOD = Method(
    paper=Paper(
        "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
        "2023-03",
        arxiv="2303.16199",
        code="OpenGVLab/LLaMA-Adapter",
    ),
    provides="AdaptionPromptConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "prompt",
        "acts_on": "key/value",
        "merges": "no",
        "parameters": "adapter_layers (adapter_len * hidden + 1)",
    },
    expects={
        "check_merge": "a softmax stands between prompt and output",
        "check_unload_restores_the_base": "peft has no unload for it; disabling gives the base back",
        "check_unmerge_restores_the_base": "it does not merge",
    },
)
TRAINING = {"learning_rate": 5e-3}


def example() -> AdaptionPromptConfig:
    return AdaptionPromptConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"adapter_len": 10},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """In each adapted layer a prompt and its gate."""
    chosen = {**settings()[0], **fitted(shape), **options}
    trained = int(chosen["adapter_layers"]) * (int(chosen["adapter_len"]) * shape.hidden + 1)
    return Price(shape, trainable=trained, train_flops=2.0)


def fitted(shape: Shape) -> dict[str, Any]:
    """Options that depend on the model: 30 of 32 layers, from the top."""
    return {"adapter_layers": max(1, round(shape.layers * 30 / 32))}

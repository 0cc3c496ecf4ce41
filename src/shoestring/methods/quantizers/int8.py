"""int8: round weights to 8 bits in small groups that share one scale.

How it works
    1. Every row of a weight matrix is cut into groups of `group_size` neighbours along the input dimension.
    2. A group keeps one bf16 scale s = max|w| / 127; its weights become q = round(w / s) in [-127, 127]:
       8 + 16 / group_size bits per weight.
    3. The product runs on the integers: the activations of a token are rounded to 8 bits on the fly, integer dot
       products are scaled and summed in fp32 (the paper's token-wise dynamic activation quantization, here per group).

Where it bends
    Without the paper's layer-by-layer distillation, which it needs for lower bits only. Not for an untied head,
    position tables, or the routers of a mixture, whose experts are packed one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.quantizers import _shared

METHOD = Method(
    paper=Paper(
        "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
        "2022-06",
        arxiv="2206.01861",
        code="microsoft/DeepSpeed",
        licence="Apache-2.0",
    ),
    provides="Int8Config",
    saves=("storage", "memory", "latency", "energy"),
    combines={
        "adapters": "yes",
        "pruners": "yes",
        "architectures": "yes",
        "quantizers": "the weights are integers already",
    },  # fmt: skip
    default=True,
)


class Int8Config(_shared.GroupConfig):
    """`AutoModelForCausalLM.from_pretrained(model, quantization_config=Int8Config())`."""

    bits = 8
    method = "int8"


def example() -> Int8Config:
    return Int8Config(group_size=64)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most bits first."""
    return tuple({"group_size": group, "embeddings": 8} for group in (32, 64, 128))


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    return Price(_shared.price(shape, Int8Config(**options)))

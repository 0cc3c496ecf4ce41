"""int4: round weights to 4 bits in small groups that share one scale.

How it works
    1. Every row of a weight matrix is cut into groups of `group_size` neighbours along the input dimension.
    2. A group keeps one bf16 scale s, its largest magnitude mapped to the end of the range; its weights become
       q = round(w / s) in [-8, 7], two to a byte: 4 + 16 / group_size bits per weight.
    3. The product runs on the integers: the activations of a token are rounded to 8 bits per group on the fly, integer
       dot products are scaled and summed in fp32. The float weights never exist in memory.
    4. The token table (and a head tied to it) is sensitive and takes 8 bits unless told otherwise.

Where it bends
    The paper fits its scaling laws over several data types with blocks of 64; here the data type is the plain integer
    grid with rounding to nearest, and activations are 8-bit. Not for an untied head, position tables, or the routers of
    a mixture, whose experts are packed one by one. A model that was 4-bit once already (many GGUF files) looks better
    than it should at its own group size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.quantizers import _shared

METHOD = Method(
    paper=Paper("The case for 4-bit precision: k-bit Inference Scaling Laws", "2022-12", arxiv="2212.09720"),
    provides="Int4Config",
    saves=("storage", "memory", "latency", "energy"),
    combines={
        "adapters": "yes",
        "pruners": "yes",
        "architectures": "yes",
        "quantizers": "the weights are integers already",
    },  # fmt: skip
    default=True,
)


class Int4Config(_shared.GroupConfig):
    """`AutoModelForCausalLM.from_pretrained(model, quantization_config=Int4Config())`."""

    bits = 4
    method = "int4"


def example() -> Int4Config:
    return Int4Config(group_size=64)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most bits first."""
    return tuple({"group_size": group, "embeddings": bits} for bits in (8, 4) for group in (32, 64, 128))


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    return Price(_shared.price(shape, Int4Config(**options)))

"""Lily: connect low-rank halves across layers: every layer's A to a few Bs that all layers share.

How it works
    1. h = W x + s B' A x; A (r x in) is the layer's own or shared by stride_A neighbours.
    2. B' = sum_e p_e B_e mixes num_B matrices (out x r) that all layers of the same projection share, with weights
       p = softmax(router(A x)) averaged over the batch's tokens.

Where it bends
    peft's own tuner, unchanged. As the mixture depends on the input it cannot be merged, and what stands beside a
    text in a batch changes its answer slightly. peft shares Bs among modules named by one ending; with "all-linear"
    it names each module and shares nothing, so the endings are given here. A second adapter added to the same model
    shares nothing either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft import LilyConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import ending, targets

METHOD = Method(
    paper=Paper(
        "Low-Rank Interconnected Adaptation across Layers",
        "2024-07",
        arxiv="2407.09946",
        code="yibozhong/lily",
    ),
    provides="LilyConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "hybrid",
        "acts_on": "weight",
        "merges": "no",
        "parameters": "r in per A, num_B r out per shared B, r num_B per router",
    },
    expects={
        "check_merge": "the mixture of the Bs depends on the input",
        "check_unmerge_restores_the_base": "it does not merge",
    },
)
TRAINING = {"learning_rate": 1e-3}


def example() -> LilyConfig:
    return LilyConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "stride_A": 1, "num_B": 4},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """An A for each stride of layers, num_B shared Bs for each kind of projection, and a router in each layer."""
    chosen = {**settings()[0], **fitted(shape), **options}
    rank, stride, count = int(chosen["r"]), int(chosen["stride_A"]), int(chosen["num_B"])
    alike = Counter((ending(w.name), *w.dims) for w in targets(shape, chosen) if len(w.dims) == 2)
    trained = sum(
        -(-n // stride) * rank * n_in + count * rank * n_out + n * rank * count for (_, n_out, n_in), n in alike.items()
    )
    return Price(shape, trainable=trained, train_flops=2.0)


def fitted(shape: Shape) -> dict[str, Any]:
    """Options that depend on the model: every projection of the blocks by its ending, as peft shares Bs by endings."""
    names = (w.name for w in targets(shape, {"target_modules": "all-linear"}))
    return {"target_modules": sorted({ending(name) for name in names})}

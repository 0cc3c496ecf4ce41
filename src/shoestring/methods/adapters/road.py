"""RoAd: rotate and stretch each pair of a layer's outputs by a trained angle and length.

How it works
    1. h = R W x, where R is made of 2 x 2 blocks alpha [cos t, -sin t; sin t, cos t] over pairs of outputs.
    2. t starts at zero and alpha at one: training starts at the base model.
    3. As it is one product element by element, requests with different adapters share a batch cheaply.

Where it bends
    peft's own tuner, unchanged. Outputs are paired within groups of group_size, which must divide every adapted
    width. road_2 and road_4 train twice and four times as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import RoadConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import linear

METHOD = Method(
    paper=Paper(
        "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
        "2024-09",
        arxiv="2409.00119",
    ),
    provides="RoadConfig",
    saves=("parameters", "memory", "storage", "latency"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "activation",
        "merges": "yes",
        "parameters": "out, 2 out or 4 out per weight",
    },
    expects={
        "check_unmerge_restores_the_base": "peft subtracts what it added, which may leave the last bit different",
    },
)
TRAINING = {"learning_rate": 5e-3}


def example() -> RoadConfig:
    return RoadConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"variant": "road_1", "group_size": 32, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """An angle and a length for each pair of outputs; the other variants have two and four times as many."""
    chosen = {**settings()[0], **options}
    times = int(str(chosen["variant"])[-1])
    trained = sum(times * n_out for n_out, n_in in linear(shape, chosen))
    return Price(shape, trainable=trained, train_flops=2.0)

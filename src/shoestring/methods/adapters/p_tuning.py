"""P-tuning: let a small network make the vectors in front of the text, so that they are learned together.

How it works
    1. The model reads [h_1 .. h_n; E(x)], and h = MLP(p) of trained vectors p (n x hidden).
    2. When training ends only h is kept; the network is thrown away.

Where it bends
    peft's own tuner, unchanged. The network is peft's MLP of three layers, the paper's also has an LSTM
    (encoder_reparameterization_type). It trains more parameters than it saves: the adapter's file holds n vectors.
    The vectors stand before the text only, not within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PromptEncoderConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import stacks

METHOD = Method(
    paper=Paper(
        "GPT Understands, Too",
        "2021-03",
        arxiv="2103.10385",
        code="THUDM/P-tuning",
        licence="MIT",
    ),
    provides="PromptEncoderConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "prompt",
        "acts_on": "input",
        "merges": "no",
        "parameters": "n h + (h + 1) H + (H + 1) H + (H + 1) h",
    },
    expects={
        "check_starts_as_the_base_model": "the model answers to more positions than the text has",
        "check_merge": "it changes no weight that could take it up",
        "check_unload_restores_the_base": "peft has no unload for prompts; the base was never changed",
        "check_unmerge_restores_the_base": "it changes no weight that could take it up",
        "check_two_adapters": "peft leaves the prompts of all adapters open to training, whichever is active",
    },
)
TRAINING = {"learning_rate": 1e-3}


def example() -> PromptEncoderConfig:
    return PromptEncoderConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"num_virtual_tokens": 20, "encoder_hidden_size": 128},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """The vectors (n h) and an MLP h -> H -> H -> h with biases."""
    chosen = {**settings()[0], **options}
    tokens, inner, hidden = int(chosen["num_virtual_tokens"]), int(chosen["encoder_hidden_size"]), shape.hidden
    trained = tokens * stacks(shape) * hidden + (hidden + 1) * inner + (inner + 1) * inner + (inner + 1) * hidden
    return Price(shape, trainable=trained, train_flops=2.0)

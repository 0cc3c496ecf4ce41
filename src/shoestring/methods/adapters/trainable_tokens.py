"""Trainable tokens: train the embeddings of a few tokens and leave the table frozen.

How it works
    1. Rows t of the embedding for the tokens in token_indices are copied, trained and put in their places.
    2. Where the head shares the table it uses the trained rows too.

Where it bends
    peft's own tuner, unchanged. For new or special tokens that the model must learn to read; the first 17 ids stand
    for them when none are named, as small vocabularies have their special tokens there. Name yours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import TrainableTokensConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape

METHOD = Method(
    paper=Paper(
        "Trainable tokens, a tuner of the library peft",
        "2025-03",
        code="huggingface/peft",
        licence="Apache-2.0",
    ),
    provides="TrainableTokensConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "selective",
        "acts_on": "input",
        "merges": "yes",
        "parameters": "len(token_indices) * hidden",
    },
    expects={
        "check_two_adapters": "peft does not find the tied head when a second one is added",
    },
)
TRAINING = {"learning_rate": 1e-3}
NEEDS_FLOAT = True


def example() -> TrainableTokensConfig:
    return TrainableTokensConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"token_indices": list(range(17))},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """A row of the embedding for each token."""
    trained = len({**settings()[0], **options}["token_indices"]) * shape.hidden
    return Price(shape, trainable=trained, train_flops=2.0)

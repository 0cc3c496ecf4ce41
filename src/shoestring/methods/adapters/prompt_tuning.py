"""Prompt tuning: put a few trained vectors in front of the text's embeddings and leave the model alone.

How it works
    1. The model reads [P; E(x)], where P (n x hidden) is trained and E(x) are the embedded words.         (section 2)
    2. P starts at the embeddings of words drawn from the vocabulary, which learn faster than random ones.
                                                                                                         (section 3.2)

Where it bends
    peft's own tuner, unchanged. Every request pays for n more positions, and the context is shorter by n. The paper
    finds that it equals full fine-tuning only for models of billions of parameters. It wants a large learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PromptTuningConfig

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._peft import stacks

METHOD = Method(
    paper=Paper(
        "The Power of Scale for Parameter-Efficient Prompt Tuning",
        "2021-04",
        arxiv="2104.08691",
        code="google-research/prompt-tuning",
        licence="Apache-2.0",
    ),
    provides="PromptTuningConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "prompt",
        "acts_on": "input",
        "merges": "no",
        "parameters": "num_virtual_tokens * hidden",
    },
    expects={
        "check_starts_as_the_base_model": "the model answers to more positions than the text has",
        "check_merge": "it changes no weight that could take it up",
        "check_unload_restores_the_base": "peft has no unload for prompts; the base was never changed",
        "check_unmerge_restores_the_base": "it changes no weight that could take it up",
        "check_two_adapters": "peft leaves the prompts of all adapters open to training, whichever is active",
    },
)
TRAINING = {"learning_rate": 3e-2}


def example() -> PromptTuningConfig:
    return PromptTuningConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """One vector of the hidden width for each virtual token, in both stacks of an encoder-decoder."""
    tokens = int({**settings()[0], **options}["num_virtual_tokens"])
    return Price(shape, trainable=tokens * stacks(shape) * shape.hidden, train_flops=2.0)

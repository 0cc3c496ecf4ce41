"""What the files that expose peft's own tuners share: which weights their options reach, and what they leave out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shoestring.core.shape import PROJECTIONS, Shape, Weight

# Types of peft that ask for more than a model and examples, and so have no file here.
NEEDS = {
    "XLORA": "several trained LoRA adapters, which it mixes",
    "POLY": "examples that say which of several tasks they belong to",
    "MULTITASK_PROMPT_TUNING": "examples that say which of several tasks they belong to",
    "CPT": "a prompt of labelled examples, token by token",
    "CARTRIDGE": "a text whose key-value cache it begins with",
}


def linear(
    shape: Shape, options: Mapping[str, Any], by_family: Mapping[str, Iterable[str]] | None = None
) -> Iterator[tuple[int, int]]:
    """(out, in) of each linear layer of the blocks that `target_modules` in `options` names, read as peft reads it.

    Args:
        by_family: peft's own choice of modules for each model type, which stands in where `options` names none.
    """
    for weight in targets(shape, options, by_family):
        if weight.role in PROJECTIONS and len(weight.dims) == 2:
            yield weight.dims[0], weight.dims[1]


def targets(
    shape: Shape, options: Mapping[str, Any], by_family: Mapping[str, Iterable[str]] | None = None
) -> Iterator[Weight]:
    """The tensors of the modules that `target_modules` names: endings, one regular expression, or "all-linear"."""
    wanted = options.get("target_modules") or (by_family or {}).get(shape.family) or ()
    for weight in shape.weights:
        module = weight.name.rpartition(".")[0]
        if wanted == "all-linear":
            named = weight.role in PROJECTIONS
        elif isinstance(wanted, str):
            named = re.fullmatch(wanted, module) is not None
        else:
            named = any(module == end or module.endswith(f".{end}") for end in wanted)
        if named:
            yield weight


def ending(name: str) -> str:
    """What follows the block's number in a tensor's name, without the tensor's own word: `self_attn.q_proj`."""
    return re.split(r"\.\d+\.", name)[-1].rpartition(".")[0]


def stacks(shape: Shape) -> int:
    """2 for an encoder-decoder, else 1."""
    parts = {part for weight in shape.weights for part in weight.name.split(".")}
    return 2 if {"encoder", "decoder"} <= parts else 1

"""In which number format training computes, and how the weights are held meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from shoestring.models.load import fast_bfloat16

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def held_for_training(model: nn.Module, wanted: str = "auto") -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Hold the weights of `model` as training needs them, and put them back afterwards.

    Trained weights are float32 meanwhile, so that small steps are not rounded away. Frozen weights stay as they are,
    except that bfloat16 ones become float32 where that is computed in.

    Args:
        wanted: "auto", "bfloat16" or "float32"; see `TrainOptions.dtype`.

    Yields:
        a function that makes the context a forward pass runs in.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    half = any(p.dtype in HALF for p in parameters)
    device = parameters[0].device.type if parameters else "cpu"
    low = wanted == "bfloat16" or (wanted == "auto" and half and fast_bfloat16(device))
    before = [(p, p.dtype) for p in parameters]
    for parameter in parameters:
        if parameter.dtype in HALF and (parameter.requires_grad or not low):
            parameter.data = parameter.data.float()
    # Adapters lift their input to their own float32, which costs time and twice the memory; autocast makes it needless.
    lifting = [m for m in model.modules() if getattr(m, "cast_input_dtype_enabled", False)] if low else []
    for module in lifting:
        module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    try:
        if low:
            yield lambda: torch.autocast(device, torch.bfloat16)
        else:
            yield contextlib.nullcontext
    finally:
        for module in lifting:
            module.cast_input_dtype_enabled = True  # type: ignore[assignment]
        for parameter, dtype in before:
            parameter.data = parameter.data.to(dtype)

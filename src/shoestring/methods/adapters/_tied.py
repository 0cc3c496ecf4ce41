"""Layers whose weight is the table that tokens are read from: what changes the one would change the other."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def shares_table(model: nn.Module, layer: nn.Module) -> bool:
    """Whether the weight of `layer`, under adapters or bare, is that of the model's input embeddings."""
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = getattr(_table(model), "weight", None)
    return weight is not None and getattr(base, "weight", None) is weight


def _table(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None  # a model that reads no tokens, or one that has no word for its table

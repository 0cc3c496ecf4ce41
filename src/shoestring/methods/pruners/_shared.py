"""What pruners share: their options, what they hand back, and the price of taking parts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from shoestring.core.errors import UsageError
from shoestring.core.shape import PROJECTIONS, Shape, Weight

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class PrunerOptions:
    """What may be said to every pruner.

    Args:
        sparsity: share of the weights in the blocks' matrices that goes, above 0 and below 1. Embeddings, norms and
            biases are not counted.

    Raises:
        UsageError: a share that is none.
    """

    sparsity: float = 0.2

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)


@dataclass(frozen=True)
class Pruned:
    """A smaller model, and what there is to say of how it came about, as plain data."""

    model: PreTrainedModel
    facts: Mapping[str, Any] = field(default_factory=dict)


def share(name: str, value: Any) -> None:
    """Raises UsageError unless `value` is a number above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UsageError(f"{name} {value!r} is not possible", "it is a share, above 0 and below 1", "For example 0.2")


def thinned(shape: Shape, sparsity: float) -> Shape:
    """The shape when every block's matrices lose `sparsity` of their weights: rows, or columns of those that write into
    the residual stream. Which layer loses how much is not known before; the sum is."""

    def touch(weight: Weight) -> Weight:
        if weight.role not in PROJECTIONS or len(weight.dims) != 2:
            return weight
        rows, columns = weight.dims
        if weight.role in ("o", "down"):
            columns = round(columns * (1 - sparsity))
        else:
            rows = round(rows * (1 - sparsity))
        left = rows * columns / weight.count
        stored, resident = round(weight.stored * left), round(weight.resident * left)
        return replace(weight, dims=(rows, columns), stored=stored, resident=resident)

    return shape.change(touch)

"""What pruners share: their options, what they hand back, and the price of taking parts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from shoestring import training
from shoestring.core.errors import UsageError
from shoestring.core.shape import PROJECTIONS, Shape, Weight
from shoestring.core.step import Work
from shoestring.models.anatomy import inspect

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


def with_lora(model: PreTrainedModel, rank: int, roles: Sequence[str] = ("q", "v")) -> Any:
    """`model` with a LoRA on its projections of these roles, all else frozen; alpha is the rank."""
    from peft import LoraConfig, get_peft_model

    names = [name for name, _, role in inspect(model).linears() if role in roles]
    return get_peft_model(
        model,
        LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=names),  # type: ignore[arg-type]
    )


def heal(
    model: PreTrainedModel,
    rows: Rows,
    valid: Rows,
    options: training.TrainOptions,
    rank: int,
    tokenizer: Any,
    work: Work,
) -> tuple[PreTrainedModel, training.TrainResult]:
    """Train a LoRA on q and v of what is left and merge it; checkpoints in `work.folder`/healing."""
    torch.manual_seed(work.seed)
    wrapped = with_lora(model, rank)
    result = training.train(
        wrapped, rows, valid, options, work.folder / "healing", tokenizer=tokenizer, ledger=work.ledger,
        resume=work.resume,
    )  # fmt: skip
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged.requires_grad_(True), result


def divide(settings: Mapping[str, Any], later: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of two trainings that share steps, epochs and seconds: the second gets the share `later` of them.

    The second is empty when nothing is left for it.
    """
    steps = int(settings.get("max_steps", -1))
    second = round(steps * later) if steps > 0 else 0
    parts = []
    for share, own in ((1 - later, steps - second), (later, second)):
        part = {**settings, "max_steps": own} if steps > 0 else dict(settings)
        if steps <= 0:
            part["num_train_epochs"] = share * float(settings.get("num_train_epochs", 1.0))
        if settings.get("max_seconds"):
            part["max_seconds"] = share * float(settings["max_seconds"])
        parts.append(part)
    return parts[0], parts[1] if later and (steps <= 0 or second) else {}

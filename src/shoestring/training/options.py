"""What may be said about a training run, under the names of transformers, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shoestring.core.errors import UsageError

DTYPES = ("auto", "bfloat16", "float32")
# What may differ when a run is resumed, because the weights that come out stay the same.
_FREE = ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "max_seconds", "optimizer", "chunk_bytes")


@dataclass(frozen=True)
class TrainOptions:
    """Settings of a training run.

    Attributes:
        max_steps: optimizer steps; -1 leaves it to `num_train_epochs`.
        max_seconds: the run ends inside this time, the learning rate having come down to the end of its schedule.
        per_device_train_batch_size: rows of a batch; the last one may have fewer.
        max_tokens_per_batch: tokens of a batch, padding included; None for no limit but the number of rows.
        group_by_length: rows of like length go together, so that little is padded.
        eval_steps: measure the held-out loss every so many steps; None only at the end.
        save_steps: a checkpoint every so many steps and at the end; 0 for none at all.
        save_total_limit: how many checkpoints are kept, the newest; None for all.
        dtype: what is computed in. "auto" is bfloat16 where the weights are and the processor is fast in it, else
            float32. Trained weights and the optimizer are held in float32 in any case.
        optimizer: makes the optimizer from the parameter groups; None for AdamW.
        chunk_bytes: the size of logits that may exist at a time; None for the default.
    """

    learning_rate: float = 2e-4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    max_seconds: float | None = None
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_tokens_per_batch: int | None = None
    group_by_length: bool = True
    warmup_ratio: float = 0.03
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int = 50
    save_total_limit: int | None = 2
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    optimizer: Callable[[list[dict[str, Any]]], Any] | None = None
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", "it must be at least 1")
        for name in ("max_seconds", "max_tokens_per_batch", "eval_steps", "chunk_bytes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}", "it must be above 0", "Leave it out for no limit")
        if self.max_steps < 1 and self.num_train_epochs <= 0:
            raise UsageError("There is nothing to train", f"num_train_epochs is {self.num_train_epochs}")
        if not 0 <= self.warmup_ratio < 1:
            raise UsageError(f"warmup_ratio is {self.warmup_ratio}", "it is a share of the steps, from 0 to below 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}", remedy=f"Known: {', '.join(DTYPES)}")

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what weights come out; a resumed run must have the same."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _FREE}


@dataclass(frozen=True)
class TrainResult:
    """What a training run did, resumed parts included.

    Attributes:
        log: one record for each line of `metrics.jsonl`: step, tokens, seconds, and loss with lr or eval_loss.
        tokens: tokens seen, padding not counted.
        trained_tokens: those of them that carried a label.
        seconds: wall time.
        stopped_because: max_steps, num_train_epochs, max_seconds or callback.
        own_loss: why the model's own loss was used in place of the chunked one; None when it was not.
    """

    steps: int
    tokens: int
    trained_tokens: int
    seconds: float
    stopped_because: str
    log: list[dict[str, Any]] = field(default_factory=list)
    own_loss: str | None = None

    @property
    def loss(self) -> float | None:
        """The last logged training loss."""
        return next((record["loss"] for record in reversed(self.log) if "loss" in record), None)

    @property
    def eval_loss(self) -> float | None:
        """The last held-out loss: nats a token, every labelled token counting the same."""
        return next((record["eval_loss"] for record in reversed(self.log) if "eval_loss" in record), None)

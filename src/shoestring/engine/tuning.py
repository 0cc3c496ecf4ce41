"""Training inside a serving engine: what the server asks of a method that does it, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from shoestring.engine.hooks import Spare


@dataclass(frozen=True)
class Objectives:
    """What answers may be kept waiting for, in seconds: the first token, and each further one."""

    first_token: float = 1.0
    each_token: float = 0.1


@dataclass(frozen=True)
class TuningJob:
    """One adapter to train.

    Attributes:
        base: what the adapter's configuration names as its base.
        data, validation: files in any format that `data.read` knows.
        folder: for checkpoints; what a killed job left there is gone on from.
        epochs, batch_size, rate: None takes the method's own; `rate` multiplies its own learning rate.
    """

    id: str
    base: str
    data: Path
    folder: Path
    validation: Path | None = None
    epochs: int | None = None
    batch_size: int | None = None
    rate: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Told:
    """What became of a job: its turn has come, a step was made, a checkpoint is on the disk, or it has ended.

    Attributes:
        tokens: trained so far.
        folder: of the checkpoint, which is an adapter that the engine loads.
        figures: train_loss, train_mean_token_accuracy, full_valid_loss, full_valid_mean_token_accuracy.
        message: what went wrong.
    """

    job: str
    kind: Literal["started", "step", "checkpoint", "finished", "failed"]
    step: int = 0
    steps: int = 0
    tokens: int = 0
    folder: Path | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


class Tuner(Protocol):
    """A filler that trains. A method's file that defines `tuner(opened, objectives) -> Tuner` offers one."""

    def prepare(self, job: TuningJob) -> Any:
        """Read the data; takes its time, in any thread. The result has `epochs` and `batch_size` as chosen.

        Raises:
            UsageError: data that cannot be trained on.
        """

    def start(self, prepared: Any, tell: Callable[[Told], None]) -> None:
        """Put a prepared job in the line. On the engine's thread, as all below; `tell` is called from any."""

    def pause(self, job: str) -> None: ...

    def resume(self, job: str) -> None: ...

    def cancel(self, job: str) -> None:
        """Forget it. Its checkpoints stay."""

    def work(self, spare: Spare) -> int: ...

    def close(self) -> None: ...

"""FlexLLM: train LoRA adapters in the time that each serving step leaves, on the weights that answer.

How it works
    1. A LoRA is a bypass beside frozen weights, y = W x + alpha / r * B A x. Answers and training share one W: what the
       native kernels compute with is what training reads, unpacked one layer at a time where it is packed.
    2. Forward by windows: s tokens of the training examples pass a layer, seeing the keys and values of earlier
       windows. s may change with every piece. Examples lie end to end without seeing each other. Loss and its gradient
       are taken at once, in one pass over the head's rows with a running maximum, so that no logits are kept.
    3. Backward layer by layer from the last, and in a layer window by window from the last tokens to the first, since
       keys and values of a token collect gradients from all later queries, in accumulators GK and GV. For a window
       [o, e) the layer is computed again from its input with earlier keys and values as leaves; {dy, GK[o:e), GV[o:e)}
       flow in; dx[o:e), the LoRA's gradients and additions to GK[:o), GV[:o) flow out; dx is dy of the layer below. Any
       cut into windows gives the gradient of the whole. Work stops after any (layer, window) and goes on later.
    4. Pruning: dW of a frozen W is not wanted, so its input is not kept. Rematerialisation: norms, activations,
       attention and A x are computed again from layers' inputs and large products, which are kept ("cheap"), or
       everything from layers' inputs, keys and values ("all").
    5. Every iteration inference comes first; training takes the largest s with f(c, s) <= the objective, f measured by
       number of tokens and context while it serves. It never delays an answer for longer than a piece, and uses all of
       an idle machine.
    6. AdamW after every 8 examples; adapters are written as peft's. They serve from the iteration after; a request
       keeps the version it began with.

Where it bends
    One iteration runs inference and training one after the other, not in one mixed matrix product: the kernels answer
    with 8-bit activations, bfloat16 keys and 8-bit adapters, which are not the function whose gradient is taken. So
    f(c, s) = step(c) + unit(s). Forward too, a layer is finished before the next begins: packed weights are unpacked
    once in each direction, not once a window. Training keeps keys and values of its own, in float32, bounded by
    `max_length` tokens. It runs where the native runner does: Llama-like models on CPU. ReLU masks as bits and
    tensor-parallel layouts are left out: these models have no ReLU, and one machine has no ranks. AdamW instead of the
    SGD that the code had.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.method import Method, Paper
from shoestring.engine.hooks import Hooks, Spare
from shoestring.engine.tuning import Objectives, Told, TuningJob
from shoestring.methods.serving._latency import SIZES, Clock

if TYPE_CHECKING:
    from shoestring.engine.open import Opened
    from shoestring.methods.serving._training import Training
    from shoestring.methods.serving._windows import Unit

METHOD = Method(
    paper=Paper(
        "FlexLLM: A System for Co-Serving Large Language Model Inference and Parameter-Efficient Finetuning",
        "2024-02",
        code="flexflow/flexflow-serve",
        licence="Apache-2.0",
    ),
    provides="FlexllmConfig",
    saves=("memory", "money", "latency"),
    combines={
        "adapters": "yes",
        "quantizers": "yes",
        "pruners": "yes",
        "decoding": "yes",
    },
    traits={"plugs": "filler"},
)
_SHARES = {"forward": 1 / 3, "backward": 2 / 3}  # of a token's training, in one layer
_PATIENCE = 200  # rounds in which nothing fits, before the smallest piece is tried all the same
log = logging.getLogger("shoestring.server")


@dataclass(frozen=True)
class FlexllmConfig:
    """How training beside answers is done.

    Attributes:
        data, out: train on this file at once, into this folder; without them the server's jobs say what to train.
        ttft, tpot: objectives in milliseconds, for the first token and for each further one.
        rank, alpha, dropout, targets: of the LoRA; targets with commas, of q, k, v, o, gate, up, down.
        learning_rate, warmup, decay: of AdamW; the rate rises for this share of all steps and then falls to 0.
        batch_size: examples between two steps of the optimizer.
        epochs: over the examples.
        max_length: tokens that are trained in one pass, which bounds the memory of activations; a longer example is
            refused.
        window: most tokens of one window.
        rematerialise: "cheap", "all", or "nothing".
        activations: megabytes of products that "cheap" may keep; what is more is computed again, as "all" does.
        prune: keep no inputs of frozen weights.
        checkpoints: on the disk after so many steps, and after every epoch.
        keep: how many of them.
    """

    data: str = ""
    out: str = ""
    ttft: float = 1000.0
    tpot: float = 100.0
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "q,k,v,o,gate,up,down"
    learning_rate: float = 5e-4
    warmup: float = 0.05
    decay: float = 0.0
    batch_size: int = 8
    epochs: int = 3
    max_length: int = 1024
    window: int = 512
    rematerialise: str = "cheap"
    activations: int = 256
    prune: bool = True
    checkpoints: int = 50
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "epochs", "max_length", "window", "activations", "checkpoints", "keep"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is not a number from 1 on")
        for name in ("ttft", "tpot", "alpha", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)} is not above 0")
        if not (0 <= self.dropout < 1 and 0 <= self.warmup < 1 and self.decay >= 0):
            raise UsageError(f"dropout={self.dropout}, warmup={self.warmup}, decay={self.decay} cannot be")
        if self.rematerialise not in ("nothing", "cheap", "all"):
            raise UsageError(f"rematerialise={self.rematerialise} is unknown", remedy="It is nothing, cheap or all")
        if bool(self.data) != bool(self.out):
            raise UsageError("Training at once needs both data and out", remedy="Give data=FILE,out=FOLDER")


def example() -> FlexllmConfig:
    return FlexllmConfig()


def plug(config: FlexllmConfig, opened: Opened) -> Hooks:
    """The trainer as the engine's filler; it begins at once when there is data.

    Raises:
        UsageError: the model is not one it can train, or the data cannot be read.
    """
    made = Trainer(config, opened)
    if config.data:
        job = TuningJob(Path(config.out).name, str(opened.path), Path(config.data), Path(config.out))
        made.start(made.prepare(job), _print)
    return Hooks(filler=made)


def tuner(opened: Opened, objectives: Objectives) -> Trainer:
    """A trainer that waits for jobs; see `engine.tuning.Tuner`."""
    return Trainer(FlexllmConfig(ttft=1000 * objectives.first_token, tpot=1000 * objectives.each_token), opened)


def _print(told: Told) -> None:
    log.info(
        "training %s: %s, step %d of %d %s",
        told.job,
        told.kind,
        told.step,
        told.steps,
        told.message or dict(told.figures),
    )


@dataclass(eq=False)
class _Run:
    """A job in the line, and the work that is next."""

    training: Training
    work: Generator[Unit]
    ahead: Unit | None = None
    paused: bool = False


class Trainer:
    """Filler work that trains the jobs in its line, one after the other.

    Raises:
        UsageError: the model is not run by the native runner.
    """

    def __init__(self, config: FlexllmConfig, opened: Opened) -> None:
        if not (hasattr(opened.runner, "weights") and hasattr(opened.runner, "model")):
            raise UsageError(
                f"{opened.name} cannot be trained while it answers",
                f"the {opened.runner.facts.backend} runner does not show its weights",
                "Use a Llama-like model on the native runner",
            )
        self.config, self.opened = config, opened
        self.clock = Clock(config.ttft / 1000, config.tpot / 1000)
        self._runs: dict[str, _Run] = {}
        self._window = 0
        self._done = 0.0  # tokens' worth of work, and how much of it the engine was told
        self._told = 0
        self._seconds = 0.0
        self._ending: list[Training] = []  # out of the line, with a last checkpoint on its way to the disk
        self._held = 0  # rounds in a row in which nothing fitted

    # ---- what the server asks ----

    def prepare(self, job: TuningJob) -> Training:
        import torch

        from shoestring.methods.serving._frozen import Frozen
        from shoestring.methods.serving._training import Plan, Training, encoded

        config, runner, tokenizer = self.config, self.opened.runner, self.opened.tokenizer
        most = min(config.max_length, runner.facts.context)
        examples = encoded(job.data, tokenizer, most)
        plan = Plan(
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            targets=tuple(part.strip() for part in config.targets.split(",")),
            rate=config.learning_rate * (job.rate or 1.0),
            warmup=config.warmup,
            decay=config.decay,
            batch_size=min(job.batch_size or config.batch_size, len(examples)),
            epochs=job.epochs or config.epochs,
            max_length=most,
            seed=job.seed,
            examples=len(examples),
        )
        torch.set_num_threads(runner.facts.extra.get("threads", 1))
        return Training(
            plan,
            Frozen(runner.model, runner.weights),  # type: ignore[attr-defined]
            examples,
            encoded(job.validation, tokenizer, most) if job.validation else [],
            job=job.id,
            base=job.base,
            folder=job.folder,
            every=config.checkpoints,
            keep=config.keep,
            fullest=config.window,
            window=lambda kind, position: self._window,
            how={
                "prune": config.prune,
                "rematerialise": config.rematerialise,
                "most": config.activations * 1_000_000,
            },
        )

    def start(self, prepared: Training, tell: Callable[[Told], None]) -> None:
        if prepared.job in self._runs:
            raise UsageError(f"A job {prepared.job} is in the line already")
        prepared.tell = tell
        self._runs[prepared.job] = _Run(prepared, prepared.units())

    def pause(self, job: str) -> None:
        if job in self._runs:
            self._runs[job].paused = True

    def resume(self, job: str) -> None:
        if job in self._runs:
            self._runs[job].paused = False

    def cancel(self, job: str) -> None:
        if job in self._runs:
            self._runs.pop(job).training.close(wait=False)

    def stats(self) -> dict[str, float]:
        return {"training_jobs": len(self._runs), "training_tokens": self._done, "training_seconds": self._seconds}

    def close(self) -> None:
        """Jobs that are in the line leave a checkpoint."""
        for run in self._runs.values():
            run.work.close()
            run.training.save()
            self._ending.append(run.training)
        for training in self._ending:
            training.close()
        self._runs.clear()
        self._ending.clear()

    # ---- the hybrid token scheduler ----

    def work(self, spare: Spare) -> int:
        if spare.computed:
            self.clock.steps.add("step", spare.computed, spare.context, spare.seconds)
        run = next((run for run in self._runs.values() if not run.paused), None)
        if run is None:
            return 0
        left = self.clock.allowed(spare.running, spare.context, spare.seconds)
        longest, before = self.clock.longest(spare.running), self._done
        took = 0.0
        while left > 0 and self._done - before < spare.tokens:
            seconds = self._unit(run, min(left, longest), waited_for=spare.running > 0)
            left, took = left - seconds, took + seconds
            if not seconds or spare.urgent() or run.training.job not in self._runs:
                break
        if not took:
            return 0
        used = min(spare.tokens, max(1, int(self._done) - self._told))  # the loss is work, and of no tokens
        self._told += used
        return used

    def _unit(self, run: _Run, seconds: float, waited_for: bool) -> float:
        """One piece of work that takes at most so many seconds, as far as is known; what it took, 0 when none fits.

        waited_for: whether an answer waits for its end. If not, the smallest piece is done however long it may take.
        """
        began = time.perf_counter()
        try:
            run.ahead = unit = run.ahead or next(run.work, None)
            if unit is None:
                self._leave(run)
                return 0.0
            self._window = self.clock.units.largest(unit.kind, unit.position, seconds, self.config.window)
            if not self._window:
                self._held += 1
                if waited_for and self._held < _PATIENCE:
                    return 0.0
                self._window = SIZES[0]  # figures of a bad moment would stand for ever if nothing measured again
            self._held = 0
            run.ahead = next(run.work, None)
            if run.ahead is None:
                self._leave(run)
        except Exception as error:
            self._leave(run)
            said = str(error) if isinstance(error, ShoestringError) else f"training stopped by a {type(error).__name__}"
            log.warning("training %s: %s", run.training.job, said, exc_info=error)
            run.training.tell(Told(run.training.job, "failed", run.training.step, message=said))
            return 0.0
        took = time.perf_counter() - began
        self.clock.units.add(unit.kind, run.training.did, unit.position, took)
        self._done += run.training.did * _SHARES.get(unit.kind, 0.0) / self.opened.runner.facts.layers
        self._seconds += took
        return took

    def _leave(self, run: _Run) -> None:
        """Out of the line; what is being written is still written."""
        self._runs.pop(run.training.job, None)
        self._ending = [training for training in (*self._ending, run.training) if training.writing]
        run.training.close(wait=False)

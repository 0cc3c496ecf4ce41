"""One training run on transformers' `Trainer`: chunked loss, whole checkpoints, a time limit that is kept.

`train` is the only entry. What transformers does well stays there: the loop, gradient accumulation, schedules,
callbacks. Adapters that act between steps, or want learning rates of their own, are asked there
(`training/between_steps.py`: `update_and_allocate`, `parameter_groups`), and modules with a term of their own for the
loss are heard (`training/loss.py`: `auxiliary_loss`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from shoestring.core.errors import DoesNotFit, ShoestringError, UsageError
from shoestring.core.files import locked, write_text
from shoestring.models import surgery
from shoestring.training import checkpoints
from shoestring.training.batches import Batches
from shoestring.training.between_steps import BetweenSteps, load_weights, own_groups
from shoestring.training.checkpoints import Checkpoint
from shoestring.training.clock import Clock
from shoestring.training.fingerprint import HARMLESS, fingerprint
from shoestring.training.interrupt import Interrupted, StopRequest, stop_on_signal
from shoestring.training.lean import lean_backward
from shoestring.training.loss import CHUNK_BYTES, IGNORED, NextTokenLoss, with_auxiliary
from shoestring.training.options import TrainOptions, TrainResult
from shoestring.training.precision import held_for_training

METRICS = "metrics.jsonl"
Rows = Sequence[dict[str, Any]]

logger = logging.getLogger(__name__)


def train(
    model: nn.Module,
    train_rows: Rows,
    valid_rows: Rows,
    options: TrainOptions,
    folder: Path | str,
    *,
    tokenizer: Any = None,
    ledger: Any = None,
    resume: bool | str = False,
    loss_func: Callable[..., Tensor] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train the parameters of `model` that require a gradient, in place.

    Args:
        train_rows: `input_ids` and `labels` (-100 where nothing is learned), optionally `position_ids`; rows may name
            where they come from in `source` and `line`.
        valid_rows: held-out rows of the same shape; empty for no held-out loss.
        folder: gets `metrics.jsonl` and the checkpoints.
        tokenizer: gives the id that pads; without it the model's config does.
        ledger: gets a stage "train".
        resume: go on from the newest complete checkpoint in `folder`, if there is one. "force" accepts other library
            versions. A run that has finished is not run again; its weights are loaded.
        loss_func: `(output, labels, num_items_in_batch) -> loss` in place of next-token cross-entropy.

    Raises:
        UsageError: nothing to train, the folder holds another run or is in use, or resuming with other settings.
        DoesNotFit: the disk has no room for one checkpoint.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        ShoestringError: the loss is not finite (the row is named), or a checkpoint cannot be written.
    """
    folder = Path(folder)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UsageError("The model has no parameter to train", "none requires a gradient", "Attach an adapter first")
    if not len(train_rows):
        raise UsageError("There are no rows to train on")
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(folder / ".training.lock", wait=False))
        found = checkpoints.newest_complete(folder) if resume else None
        if not resume and checkpoints.checkpoints(folder):
            raise UsageError(
                f"{folder} holds the checkpoints of another run", remedy="Resume it, or choose another folder"
            )
        started_from = fingerprint(model, train_rows, options)
        if found is not None:
            checkpoints.refuse_changes(found.fingerprint, started_from, HARMLESS, resume == "force")
            if found.progress["stopped_because"]:
                logger.warning("The run in %s has finished at step %d; nothing is left to do", folder, found.step)
                BetweenSteps(model).load(found.state().get("between steps", {}))
                load_weights(model, found.weights())
                return _result(folder, found.step, found.progress)
        elif options.save_steps:
            _check_room(folder, sum(p.numel() for p in trained))
        stage = stack.enter_context(ledger.stage("train")) if ledger is not None else None
        surgery.freeze_structure(model, "training")
        stack.callback(surgery.unfreeze_structure, model)
        stack.enter_context(_settings_kept(model))
        precision = stack.enter_context(held_for_training(model, options.dtype))
        stop = stack.enter_context(stop_on_signal())
        result = _Run(
            model, train_rows, valid_rows, options, folder, _pad_id(tokenizer, model), precision, loss_func, stop
        ).go(found, started_from, callbacks)
        if stage is not None:
            stage.record("tokens", result.tokens, "token", "counted", "attention mask of every batch")
            stage.record("trained_tokens", result.trained_tokens, "token", "counted", "labels of every batch")
            stage.record("steps", result.steps, "step", "counted")
        return result


class _Run(Trainer):
    """transformers' Trainer with our loss, batches, clock and checkpoints."""

    # Trainer declares these as possibly absent; inside a run they never are.
    model: Any
    optimizer: Any
    lr_scheduler: Any
    precision: Any

    def __init__(
        self,
        model: nn.Module,
        train_rows: Rows,
        valid_rows: Rows,
        options: TrainOptions,
        folder: Path,
        pad_id: int,
        precision: Callable[[], contextlib.AbstractContextManager[object]],
        loss_func: Callable[..., Tensor] | None,
        stop: StopRequest,
    ) -> None:
        self.options, self.folder, self.precision, self.stop = options, folder, precision, stop
        self.rows, self.valid, self.pad_id = train_rows, valid_rows, pad_id
        self.loss_func = loss_func
        self.next_token = NextTokenLoss(options.chunk_bytes or CHUNK_BYTES)
        self.batches = self._batches(train_rows, options.per_device_train_batch_size)
        self.updates_per_epoch = -(-len(self.batches) // options.gradient_accumulation_steps)
        self.clock = Clock(options.max_seconds)
        self.progress: dict[str, Any] = {"tokens": 0, "trained_tokens": 0, "seconds": 0.0, "stopped_because": ""}
        self.in_step: list[int] = []
        self.between_steps = BetweenSteps(model)
        self.started_from: dict[str, Any] = {}
        arguments = TrainingArguments(
            output_dir=str(folder),
            learning_rate=options.learning_rate,
            num_train_epochs=options.num_train_epochs,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.per_device_train_batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            warmup_steps=options.warmup_ratio,
            lr_scheduler_type=options.lr_scheduler_type,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            seed=options.seed,
            logging_steps=options.logging_steps,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if len(valid_rows) else "no",
            eval_steps=options.eval_steps or 2**31,
            save_strategy="steps" if options.save_steps else "no",
            save_steps=options.save_steps or 1,
            optim="adamw_torch_fused",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        # A loss function of our own tells Trainer that the loss is already divided for gradient accumulation.
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=valid_rows if len(valid_rows) else None,
            compute_loss_func=loss_func or _not_called,
        )
        self.remove_callback(PrinterCallback)

    def go(
        self, found: Checkpoint | None, started_from: dict[str, Any], callbacks: Sequence[TrainerCallback]
    ) -> TrainResult:
        self.started_from = started_from
        for callback in (*callbacks, _Watch(self)):
            self.add_callback(callback)
        if found is not None:
            self.progress |= found.progress
            self.clock.before = found.progress["seconds"]
            self.args.max_steps = found.progress["planned_steps"]
        _keep_metrics(self.folder, found.step if found else 0)
        # Trainer would switch this on with a deprecated name on some versions; the model's own switch is stable.
        if self.options.gradient_checkpointing:
            _set_gradient_checkpointing(self.model, True)
        try:
            self.train(resume_from_checkpoint=str(found.path) if found else None)
        finally:
            if self.options.gradient_checkpointing:
                _set_gradient_checkpointing(self.model, False)
        if self.stop.signum is not None and not self.progress["stopped_because"]:
            raise Interrupted(self.stop.signum, self.state.global_step, bool(self.options.save_steps))
        self.progress["seconds"] = self.clock.elapsed()
        result = _result(self.folder, self.state.global_step, self.progress)
        return replace(result, own_loss=self.next_token.reason)

    # ---- data

    def _batches(self, rows: Rows, limit: int) -> Batches:
        lengths = [len(row["input_ids"]) for row in rows]
        options = self.options
        return Batches(lengths, limit, options.max_tokens_per_batch, options.seed, options.group_by_length)

    def _collate(self, items: list[tuple[int, dict[str, Any]]]) -> dict[str, Tensor]:
        from shoestring.data import Collator

        batch = Collator(self.pad_id)([row for _, row in items])
        return {**batch, "sample": torch.tensor([number for number, _ in items])}

    def get_train_dataloader(self) -> DataLoader[Any]:
        # The generator keeps the loader's own draw away from the random numbers that training depends on.
        return DataLoader(
            _Numbered(self.rows), batch_sampler=self.batches, collate_fn=self._collate, generator=torch.Generator()
        )

    # ---- loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        samples = inputs.pop("sample").tolist()
        self.in_step += samples
        with lean_backward():
            loss = self._loss(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._not_finite(f"The loss of step {self.state.global_step + 1} is {loss.item()}", samples)
        mask = inputs.get("attention_mask")
        self.progress["tokens"] += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        self.progress["trained_tokens"] += int((inputs["labels"][..., 1:] != IGNORED).sum())
        return loss

    def _loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        with self.precision():
            if self.loss_func is not None:
                loss = super().compute_loss(model, dict(inputs), num_items_in_batch=num_items)
                return with_auxiliary(loss, model, inputs["labels"], num_items)  # type: ignore[arg-type]
            return self.next_token(model, inputs, num_items, self._own_shifts())

    def _own_shifts(self) -> bool:
        return getattr(self, "_loss_shifts_labels", True)

    def _not_finite(self, what: str, samples: list[int]) -> ShoestringError:
        """Name the rows that alone make the loss infinite or not a number, or all of them when none does alone."""
        guilty = []
        with torch.no_grad(), self.precision():
            for number in samples:
                inputs = self._prepare_inputs(self._collate([(number, self.rows[number])]))
                inputs.pop("sample")
                output = self.model(**{name: value for name, value in inputs.items() if name != "labels"})
                if not torch.isfinite(output.logits).all():
                    guilty.append(number)
        named = ", ".join(_place(self.rows[number], number) for number in guilty or samples)
        return ShoestringError(
            what,
            f"the batch holds {named}" if not guilty else f"it comes from {named}",
            "Look at these rows, or lower learning_rate; earlier checkpoints are intact",
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not torch.isfinite(torch.as_tensor(norm)):
            raise self._not_finite(f"The gradient of step {self.state.global_step + 1} is not finite", self.in_step)
        return norm

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        return 0  # counting parameters anew at every step costs more than it tells; the ledger counts FLOPs

    # ---- held-out loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss in nats a token; every labelled token counts the same, however the rows are batched."""
        began = time.monotonic()
        total, count = 0.0, 0
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for numbers in self._batches(self.valid, 2 * self.options.per_device_train_batch_size).batches:
                if self.stop.signum is not None:
                    return {}
                inputs = self._prepare_inputs(self._collate([(number, self.valid[number]) for number in numbers]))
                inputs.pop("sample")
                labels = inputs["labels"][..., 1:] if self._own_shifts() else inputs["labels"]
                labelled = int((labels != IGNORED).sum())
                if labelled:
                    items = torch.tensor(float(labelled), device=inputs["labels"].device)
                    total += float(self._loss(self.model, inputs, items)) * labelled
                    count += labelled
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": total / count} if count else {}
        self.clock.put_aside("eval", time.monotonic() - began)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- schedule

    def set_total_steps(self, total: int) -> None:
        """End after `total` steps, the learning rate following its schedule over that many from here on."""
        self.state.max_steps = total
        self.between_steps.shorten(total)
        throwaway = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        made = get_scheduler(
            self.args.lr_scheduler_type,
            throwaway,
            num_warmup_steps=int(np.ceil(total * self.options.warmup_ratio)),
            num_training_steps=total,
        )
        schedule: Any = self.lr_scheduler
        if not hasattr(schedule, "lr_lambdas") or not hasattr(made, "lr_lambdas"):
            return
        schedule.lr_lambdas = made.lr_lambdas * len(schedule.lr_lambdas)
        rates = [base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas)]
        for group, rate in zip(schedule.optimizer.param_groups, rates):
            group["lr"] = rate
        schedule._last_lr = rates

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        own = own_groups(self.model, self.options.learning_rate)
        if self.optimizer is None and (own or self.options.optimizer is not None):
            taken = {id(p) for group in own for p in group["params"]}
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in taken]
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = [  # parameters that come up later join the last group of their kind, so these two stand last
                *own,
                {"params": [p for n, p in named if n in decayed], "weight_decay": self.options.weight_decay},
                {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            if self.options.optimizer is not None:
                self.optimizer = self.options.optimizer(groups)
            else:
                kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(groups, **settings)
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began = time.monotonic()
        progress = self.progress | {"planned_steps": self.state.max_steps, "seconds": self.clock.elapsed()}
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "random": _random_state(),
            "between steps": self.between_steps.state(),
        }
        checkpoints.write(
            self.folder,
            self.state.global_step,
            _trained(self.model),
            state,
            self.started_from,
            progress,
            also=lambda aside: self.state.save_to_json(str(aside / "trainer_state.json")),
        )
        checkpoints.prune(self.folder, self.options.save_total_limit)
        self.clock.put_aside("save", time.monotonic() - began)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        found = checkpoints.read(Path(resume_from_checkpoint))
        self.between_steps.load(found.state().get("between steps", {}))
        load_weights(self.model, found.weights())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = checkpoints.read(Path(checkpoint)).state()
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _set_random_state(checkpoints.read(Path(checkpoint)).state()["random"])


class _Watch(TrainerCallback):
    """Keeps the clock, writes the log, and turns a request to stop into a checkpoint and an end."""

    def __init__(self, run: _Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.between_steps.begin(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        run = self.run
        if state.global_step == 0:
            _warn_of_idle(run.model)
        run.between_steps.act(state.global_step, run.optimizer, lambda: list(run.get_decay_parameter_names(run.model)))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.batches.epoch = state.global_step // self.run.updates_per_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.in_step.clear()
        self.run.clock.step_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        run = self.run
        run.clock.step_ends()
        total = run.clock.affordable(state.global_step, state.max_steps, self._reserve())
        if total < state.max_steps:
            run.set_total_steps(total)
            run.progress["shortened"] = True
        if run.stop.signum is not None:
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True
        reason = ""
        if state.global_step >= state.max_steps:
            limit = "max_steps" if run.options.max_steps > 0 else "num_train_epochs"
            reason = "max_seconds" if run.progress.get("shortened") else limit
        elif control.should_training_stop and run.stop.signum is None:
            reason = "callback"
        if reason:
            run.progress["stopped_because"] = reason
            control.should_training_stop = control.should_log = control.should_save = True
            control.should_evaluate = bool(len(run.valid))
        if not run.options.save_steps:
            control.should_save = False
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        names = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
        record: dict[str, Any] = {names[k]: float(v) for k, v in (logs or {}).items() if k in names}
        if not record:
            return
        record = {"step": state.global_step, "epoch": state.epoch, **record}
        record |= {"tokens": self.run.progress["tokens"], "seconds": round(self.run.clock.elapsed(), 3)}
        with open(self.run.folder / METRICS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def _reserve(self) -> float:
        """Seconds that the held-out loss and the last checkpoint will take."""
        run, known, usual = self.run, self.run.clock.last_aside, self.run.clock.usual_step()
        if run.clock.limit is None or usual is None:
            return 0.0
        evaluation = known.get("eval")
        if evaluation is None:
            # Forward passes only: under half the work of a training step, a token.
            step_tokens = run.progress["tokens"] / run.state.global_step
            evaluation = 0.5 * usual * sum(len(row["input_ids"]) for row in run.valid) / step_tokens
        return evaluation + known.get("save", 1.0 if run.options.save_steps else 0.0)


class _Numbered(Dataset[Any]):
    """Rows with their number, so that a bad one can be named."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, dict[str, Any]]:
        return number, self.rows[number]


def _warn_of_idle(model: nn.Module) -> None:
    """Name the trained tensors that the loss does not depend on, while the first step's gradients are still there."""
    trained = _trained(model)
    idle = [name for name, parameter in trained.items() if parameter.grad is None]
    if idle:
        logger.warning(
            "%d of %d trained tensors got no gradient in the first step, such as %s: nothing called their modules, or "
            "the model reads the weights there itself, past an adapter. If none ever does, leave them out "
            "(exclude_modules)",
            len(idle), len(trained), ", ".join(idle[:2]),
        )  # fmt: skip


def _not_called(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the loss is computed by _Run.compute_loss")


@contextlib.contextmanager
def _settings_kept(model: nn.Module) -> Any:
    """Put back what Trainer changes in the model beside its weights."""
    config, training = getattr(model, "config", None), model.training
    cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        model.train(training)
        if config is not None and cache is not None:
            config.use_cache = cache


def _set_gradient_checkpointing(model: Any, on: bool) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not on:
        (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()
    elif hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def _pad_id(tokenizer: Any, model: nn.Module) -> int:
    config = getattr(model, "config", None)
    for holder, name in ((tokenizer, "pad_token_id"), (tokenizer, "eos_token_id"), (config, "pad_token_id")):
        value = getattr(holder, name, None)
        if isinstance(value, int):
            return value
    return 0


def _check_room(folder: Path, parameters: int) -> None:
    needed = 3 * 4 * parameters + 2**20  # weights and two moments in float32
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DoesNotFit(
            f"{folder} has {free / 1e6:.0f} MB free",
            f"one checkpoint takes {needed / 1e6:.0f} MB",
            "Free some space, choose another folder, or set save_steps=0",
        )


def _keep_metrics(folder: Path, step: int) -> None:
    """Drop the records behind `step`: the steps after the checkpoint are done again."""
    kept = [record for record in _metrics(folder) if record["step"] <= step] if step else []
    write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))


def _metrics(folder: Path) -> list[dict[str, Any]]:
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a killed run may leave half a line
                records.append(json.loads(line))
    return records


def _result(folder: Path, steps: int, progress: Mapping[str, Any]) -> TrainResult:
    return TrainResult(
        steps,
        progress["tokens"],
        progress["trained_tokens"],
        progress["seconds"],
        progress["stopped_because"],
        _metrics(folder),
    )


def _place(row: Mapping[str, Any], number: int) -> str:
    if row.get("line"):
        return f"{row.get('source') or 'line'}:{row['line']}"
    return f"row {number}"

"""The meter of intrinsic dimension: d90 of a task on a model, found by training, and the rank that it suggests."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers.pytorch_utils import Conv1D

from shoestring.core.errors import UsageError
from shoestring.core.step import Work
from shoestring.methods.adapters._dimension import Found, Memory, search
from shoestring.methods.adapters._shared import number, sizes, whole

_STEADY = 2048  # dimensions up to which one learning rate serves


@dataclass(frozen=True)
class Meter:
    """Settings of `measure`; the defaults take a few minutes on two cores with the default model.

    Attributes:
        grid: dimensions to try, upwards, until one is enough.
        refine: dimensions to try between the last that is not enough and the first that is.
        seeds: runs a dimension; each has its own projection and its own order of the data.
        share: of the baseline's score that is enough.
        baseline: "direct" trains all covered weights; a number is the fall of the held-out loss in nats that counts.
        steps, batch: of one run.
        rate: learning rate of v up to 2,048 dimensions; above, it falls with the root of d, so that a step moves the
            weights no further.
        direct_rate: learning rate of direct training.
        examples: held-out examples that score.
        projection, target_modules: as in the adapter.
    """

    grid: tuple[int, ...] = (32, 256, 2048, 16384)
    refine: int = 1
    seeds: int = 3
    share: float = 0.9
    baseline: str | float = "direct"
    steps: int = 10
    batch: int = 4
    rate: float = 0.4
    direct_rate: float = 1e-4
    examples: int = 16
    projection: str = "fastfood"
    target_modules: str | list[str] | None = None

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Meter:
        """Raises UsageError on an option it does not know, or a value that cannot be."""
        stray = sorted(set(options) - set(cls.__dataclass_fields__))
        if stray:
            known = ", ".join(cls.__dataclass_fields__)
            raise UsageError(f"the meter has no option {', '.join(stray)}", remedy=f"Known: {known}")
        given = dict(options)
        if "grid" in given:
            grid = given["grid"] if isinstance(given["grid"], list | tuple) else str(given["grid"]).split(",")
            if not all(str(d).strip().isdecimal() for d in grid):
                raise UsageError(f"grid={grid!r} is not a list of whole numbers", remedy="Write grid=32,256,2048")
            given["grid"] = tuple(int(d) for d in grid)
        made = cls(**given)
        try:
            for name in ("seeds", "steps", "batch", "examples"):
                whole(name, getattr(made, name))
            whole("refine", made.refine, 0)
            for name, most in (("share", 1.0), ("rate", math.inf), ("direct_rate", math.inf)):
                number(name, getattr(made, name), 1e-12, most)
            if made.baseline != "direct":
                number("baseline", made.baseline, 1e-12)
        except ValueError as error:
            raise UsageError("the meter refuses its options", str(error)) from None
        return made


def measure(config: type[Any], source: Path, options: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """d90 of a task on a model: how many dimensions a random subspace needs to learn it nearly as well as all weights.

    The score of a run is how far the held-out loss falls, in nats a token. Runs are kept in `work.folder`, so an
    interrupted measurement goes on where it stood.

    Args:
        config: of the adapter that trains in a subspace.
        options: fields of `Meter`.

    Returns:
        d90, the bracket it lies in, its interval, the curve, the baseline, and advice on the rank of a LoRA.

    Raises:
        UsageError: options it does not know, no validation data, or direct training that does not lower the loss.
    """
    from shoestring import models
    from shoestring.core import catalog

    meter = Meter.read(options)
    lengths = {"max_length": 96, "on_long": "truncate", **work.training}
    if "learning_rate" in lengths:
        raise UsageError("the meter has two learning rates", remedy="Give the options rate and direct_rate")
    loaded = models.load(str(source), trust_remote_code=work.trust_remote_code)
    rows, valid = catalog.contract("adapters").encoded(loaded, replace(work, training=lengths))
    if valid is None or not valid.rows:
        raise UsageError("the meter needs held-out data to score on", remedy="Give more examples")
    held = valid.rows[:: max(1, len(valid.rows) // meter.examples)][: meter.examples]
    runner = _Runner(config, loaded, rows.rows, held, meter, work)
    settings = {**asdict(meter), "model": str(source), "seed": work.seed, "rows": len(rows.rows), **lengths}
    for free in ("grid", "refine", "seeds", "share", "baseline"):  # more may be asked of what was measured
        del settings[free]
    memory = Memory(work.folder / "intrinsic-dimension.json", settings)
    seeds = range(work.seed, work.seed + meter.seeds)
    grid = [d for d in meter.grid if d <= runner.weights]
    most = meter.seeds * (len(grid) + meter.refine + (meter.baseline == "direct"))
    before = memory("before", runner.held_out)

    done: list[str] = []

    def fall(name: str, train: Callable[[], float]) -> float:
        done.append(name)
        began, known = time.monotonic(), name in memory.scores
        score = before - memory(name, train)
        if not known:
            took, left = time.monotonic() - began, most - len(done)
            work.say(f"{name}: {score:.3f} nats, {took:.0f} s; at most {left} more runs, {left * took / 60:.0f} min")
        return score

    if meter.baseline == "direct":
        baseline = [fall(f"direct {seed}", lambda s=seed: runner.direct(s)) for seed in seeds]  # type: ignore[misc]
    else:
        baseline = [float(meter.baseline)]
    found = search(
        lambda d, seed: fall(f"{d} {seed}", lambda: runner.subspace(d, seed)),
        baseline, grid=grid, seeds=list(seeds), share=meter.share, refine=meter.refine,
    )  # fmt: skip
    return {
        "d90": found.d,
        "bracket": [found.below, found.d],
        "interval": [found.low, found.high],
        "weights": runner.weights,
        "compression": round(runner.weights / found.d, 1) if found.d else None,
        "loss_before": before,
        "baseline": found.baseline,
        "enough": found.enough,
        "curve": [
            {"d": d, "fall": sum(falls) / len(falls), **{f"seed {s}": fall for s, fall in zip(seeds, falls)}}
            for d, falls in found.curve.items()
        ],
        "advice": advice(found, runner.widths, meter),
    }


def advice(found: Found, widths: Sequence[tuple[int, int]], meter: Meter) -> str:
    """What d90 says of the rank of a LoRA on layers of these (in, out) features; a rule of thumb, and called one."""
    if found.d is None:
        why = "the curve rose no more" if found.flat else "the grid ended"
        return (
            f"No tried dimension reached {meter.share:g} of the baseline before {why}: give more steps, a higher rate "
            "or larger dimensions. The task asks for more than such small adapters give."
        )
    per_rank = sum(map(sum, widths))
    if not per_rank:
        return f"d90 lies in {found.below} to {found.d}; the covered layers are not linear, so no rank follows."
    rank = max(1, math.ceil(found.d / per_rank))
    return (
        f"d90 lies above {found.below} and at or below {found.d}. Rule of thumb: the smallest rank whose LoRA on the "
        f"same {len(widths)} layers trains at least d90 numbers is {rank} ({rank * per_rank:,} numbers, "
        f"{rank * per_rank / found.d:.3g} times d90); start there and double it only if the held-out loss asks for it."
    )


class _Runner:
    """Trains one loaded model again and again, each time from its own weights. Scores are held-out losses."""

    def __init__(
        self, config: type[Any], loaded: Any, rows: list[Any], held: list[Any], meter: Meter, work: Work
    ) -> None:
        self.config, self.loaded, self.rows, self.held, self.meter, self.work = config, loaded, rows, held, meter, work
        model: Any = get_peft_model(loaded.model, self._config(1, 0))
        covered: dict[str, list[int]] = model.peft_config["default"].covered
        model.unload()
        self.names, self.weights = list(covered), sum(math.prod(shape) for shape in covered.values())
        layers = [loaded.model.get_submodule(name) for name in dict.fromkeys(n.rpartition(".")[0] for n in covered)]
        self.widths = [sizes(layer) for layer in layers if isinstance(layer, torch.nn.Linear | Conv1D)]

    def _config(self, d: int, seed: int) -> Any:
        return self.config(
            d=d, projection_seed=seed, projection=self.meter.projection, target_modules=self.meter.target_modules
        )

    def held_out(self) -> float:
        """The present loss on the held-out rows, nats a token."""
        from shoestring.training.loss import IGNORED, NextTokenLoss

        model, loss, total, count = self.loaded.model.eval(), NextTokenLoss(), 0.0, 0
        with torch.no_grad():
            for row in self.held:
                batch = {name: torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels")}
                labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
                total += float(loss(model, batch)) * labelled if labelled else 0.0
                count += labelled
        if not count:
            raise UsageError("the held-out data has no labelled token", remedy="Give examples with an answer")
        return total / count

    def direct(self, seed: int) -> float:
        """Held-out loss after training the covered weights themselves; they are put back."""
        kept = {}
        for name in self.names:
            parameter = self.loaded.model.get_parameter(name)
            kept[parameter] = parameter.detach().clone()
        for parameter in self.loaded.model.parameters():
            parameter.requires_grad_(parameter in kept)
        try:
            return self._train(self.loaded.model, seed, self.meter.direct_rate)
        finally:
            for parameter, value in kept.items():
                parameter.data = value
                parameter.requires_grad_(False)

    def subspace(self, d: int, seed: int) -> float:
        """Held-out loss after training v (d,)."""
        model = get_peft_model(self.loaded.model, self._config(d, seed))
        try:
            return self._train(model, seed, self.meter.rate * min(1.0, (_STEADY / d) ** 0.5))
        finally:
            model.unload()  # type: ignore[operator]

    def _train(self, model: Any, seed: int, rate: float) -> float:
        """Train what requires a gradient; rows in an order of the seed's."""
        from shoestring.training import TrainOptions, train

        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()
        given = {name: value for name, value in self.work.training.items() if name not in ("max_length", "on_long")}
        own = {"max_steps": self.meter.steps, "per_device_train_batch_size": self.meter.batch, "save_steps": 0}
        options = TrainOptions(**{**own, **given, "learning_rate": rate, "seed": seed})
        most = options.max_steps * options.per_device_train_batch_size
        few = [self.rows[i] for i in (order[:most] if most > 0 else order)]
        with tempfile.TemporaryDirectory(dir=self.work.folder) as folder:
            train(model, few, [], options, Path(folder), tokenizer=self.loaded.tokenizer)
        return self.held_out()

"""Checks a pipeline file without running it: its keys, model, data, options, and how its methods go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from shoestring.core import catalog
from shoestring.core.budget import Budget
from shoestring.core.errors import ShoestringError, UsageError, nearest
from shoestring.core.shape import Shape
from shoestring.core.step import Step
from shoestring.jobs import pipeline
from shoestring.planner.plan import priced

# The requests a file may hold, by their verb; without a verb, or with `run`, it is a list of steps.
REQUESTS = {
    "fit": ("shoestring.jobs.fit", "FitRequest"),
    "train": ("shoestring.jobs.train", "TrainRequest"),
    "compress": ("shoestring.jobs.compress", "CompressRequest"),
    "trial": ("shoestring.jobs.trial", "TrialRequest"),
    "measure": ("shoestring.jobs.measure", "MeasureRequest"),
}
STEPS_KEYS = ("model", "data", "steps", "training", "skip_bad", "seed", "trust_remote_code")
_OF_ENCODING = {"max_length", "on_long"}


def validate(path: Path, *, contents: bool = True) -> list[str]:
    """What is wrong with the pipeline file at `path`, a sentence each; empty when it can run.

    Args:
        contents: read model and data too, not only the file itself.
    """
    problems: list[str] = []
    written: dict[str, Any] = {}
    with _noting(problems):
        written = _read(path)
    if problems:
        return problems
    verb = written.pop("verb", None)
    if verb == "run":  # as a run of steps writes it down
        verb = None
    if verb is not None and verb not in REQUESTS:
        return [f"{path}: unknown verb {verb}. {nearest(str(verb), REQUESTS)}"]
    request = getattr(import_module(REQUESTS[verb][0]), REQUESTS[verb][1]) if verb else None
    keys = set(request.__dataclass_fields__) if request else set(STEPS_KEYS)
    for key in sorted(set(written) - keys, key=str):
        problems.append(f"{path}: unknown key {key}. {nearest(str(key), keys)}")
    for field in fields(request) if request else ():
        if field.name not in written and field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{path}: {field.name} is missing. Say which {verb} it is for.")
    with _noting(problems):
        _training(written.get("training") or {})
    if verb == "fit":
        with _noting(problems):
            Budget.parse(str(written.get("budget") or ""))
    steps = _steps(written, verb, problems)
    problems += pipeline.order(steps) if verb is None else []
    if problems or not contents:
        return problems  # reading a model takes longer than mending a word
    shape = None
    with _noting(problems):
        shape = _shape(written, request)
    with _noting(problems):
        _data(written, request, verb, steps)
    for step in steps:
        with _noting(problems):
            _fits(step, shape)
    return problems


def must_be_valid(path: Path) -> None:
    """Raises UsageError with the first problem of the file itself; model and data are found out by running it."""
    for problem in validate(path, contents=False):
        raise UsageError(problem)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UsageError(f"{path} is a folder", remedy="Give the YAML file of a pipeline")
    try:
        return pipeline.read_pipeline(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", str(error)) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read", error.strerror or "") from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply") from None


def _training(written: Any) -> None:
    from shoestring.training import TrainOptions

    if not isinstance(written, Mapping):
        raise UsageError(f"training is {written!r}", remedy="Write a mapping such as {learning_rate: 1e-4}")
    known = set(TrainOptions.__dataclass_fields__) - {"optimizer"} | _OF_ENCODING
    for key in written:
        if key not in known:
            raise UsageError(f"unknown training setting {key}", remedy=nearest(str(key), known))
    try:
        TrainOptions(**{k: v for k, v in written.items() if k not in _OF_ENCODING})
    except TypeError as error:
        raise UsageError("a training setting has the wrong type", str(error)) from None


def _steps(written: Mapping[str, Any], verb: str | None, problems: list[str]) -> list[Step]:
    """The steps with known verbs and methods."""
    rows: Sequence[Any] = []
    if verb == "compress":
        with _noting(problems):
            names = str(written.get("method") or "").replace(" ", "").split(",")
            return pipeline.stack(names, written.get("options") or {}) if names != [""] else []
        return []
    if verb in ("trial", "measure"):
        return []  # they look at their methods themselves, before any work
    if verb == "train":
        rows = [{"verb": verb, "method": written.get("method"), "options": written.get("options")}]
        rows = rows if written.get("method") else []
    elif verb == "fit":
        named = [("train", written.get("adapt")), ("compress", written.get("compress"))]
        rows = [{"verb": v, "method": m} for v, m in named if m not in (None, "auto", "none")]
    elif not isinstance(written.get("steps"), list) or not written["steps"]:
        problems.append("there are no steps. Write steps as a list of mappings with verb, method and options.")
    else:
        rows = written["steps"]
    steps = []
    for row in rows:
        with _noting(problems):
            step = Step.read(row)
            pipeline.check(step)
            steps.append(step)
    return steps


def _shape(written: Mapping[str, Any], request: Any) -> Shape:
    from shoestring import models
    from shoestring.jobs._doors import open_doors

    folder = models.resolve(str(written.get("model") or (request.model if request else "smollm2")))
    open_doors(folder)
    return models.shape_of(folder, trust_remote_code=bool(written.get("trust_remote_code")))


def _data(written: Mapping[str, Any], request: Any, verb: str | None, steps: Sequence[Step]) -> None:
    from shoestring import data

    source = written.get("data") or (request.data if request else None)
    if source:
        data.read(str(source), skip_bad=int(written.get("skip_bad") or 0))
    elif verb is None and any(step.verb == "train" for step in steps):
        raise UsageError("a step trains, and no data is named", remedy="Write data: with a file or python-docs")


def _fits(step: Step, shape: Shape | None) -> None:
    """The method takes these options, and can be priced on this model."""
    if not step.method:
        return
    module = catalog.module(step.method)
    contract = catalog.contract(catalog.get(step.method).room)
    contract.config(module, dict(step.options))
    if shape is not None and hasattr(module, "price"):
        priced(catalog.get(step.method), shape, {**module.settings()[0], **step.options})


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ShoestringError as error:
        problems.append(str(error))

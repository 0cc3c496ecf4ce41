"""Put one question to a model and a task: a method file that defines `measure` is a meter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoestring.core import catalog
from shoestring.core.errors import UsageError, nearest
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.jobs.runs import finished, open_run


@dataclass(frozen=True)
class MeasureRequest:
    """What `measure` is asked for.

    Attributes:
        options: settings of the meter; `shoestring explain METER` says which it has.
        training: settings of the training loop by their transformers names, for a meter that trains.
    """

    meter: str
    model: str = "smollm2"
    data: str = "python-docs"
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    skip_bad: int = 0
    seed: int = 0
    trust_remote_code: bool = False


def meters() -> list[dict[str, str]]:
    """Every meter with what it measures, as the catalog knows it; nothing is imported."""
    return [{"name": m.name, "summary": m.summary} for m in catalog.that_define("measure")]


def measure(
    request: MeasureRequest,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the meter; returns its figures as plain data, with `meter` and the run's `folder`.

    The meter sees the training and the validation part of the data; the test part stays untouched.

    Raises:
        UsageError: no such meter, or bad input.
    """
    from shoestring import data as datasets
    from shoestring import models
    from shoestring.jobs._doors import open_doors

    name = _meter(request.meter)
    done = finished(out, "measure", asdict(request)) if resume else None
    if done:
        say(f"the run in {out} has finished; nothing is left to do")
        return done
    module = catalog.module(name)
    source = models.resolve(request.model)
    open_doors(source)
    train, valid, _ = datasets.split(datasets.read(request.data, skip_bad=request.skip_bad), seed=request.seed)
    label = f"{Path(request.model).name}-{name}"
    with open_run(out, "measure", asdict(request), resume=resume, label=label) as run, Ledger() as ledger:
        say(f"measuring {name}")
        run.work.mkdir(parents=True, exist_ok=True)
        work = Work(
            ledger, run.work, train, valid, request.training,
            resume=resume, seed=request.seed, trust_remote_code=request.trust_remote_code, say=say,
        )  # fmt: skip
        with ledger.stage(name):
            found = module.measure(source, dict(request.options), work)
        result = {"meter": name, "folder": str(run.folder), **found}
        run.write("result.json", result)
    ledger.save(run.inside / "ledger.json")
    return result


def _meter(name: str) -> str:
    known = [meter["name"] for meter in meters()]
    found = name.replace("-", "_")
    if found in known:
        return found
    what = f"{found} measures nothing" if found in catalog.methods() else f"unknown meter {name}"
    raise UsageError(what, remedy=nearest(found, known) + " `shoestring measure` lists the meters.")

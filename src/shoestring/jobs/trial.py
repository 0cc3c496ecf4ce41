"""Try many methods on one's data for a few steps each, and see what each costs and how much it learns.

OUT/
  trial.json                  every row, sorted by held-out loss
  trial.md  pareto.svg        the same for people
  run/work/<method>/          the adapter of each method
  run/                        as of every run, see `jobs/runs.py`
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from shoestring import models
from shoestring.core import catalog
from shoestring.core.budget import Budget
from shoestring.core.errors import DoesNotFit, ShoestringError, UsageError
from shoestring.core.pareto import pareto
from shoestring.core.step import Step
from shoestring.jobs import trial_report
from shoestring.jobs.pipeline import check
from shoestring.jobs.runs import finished, open_run, write_json

ALL = "all"
BASE = "base"  # the row of the model as it is
DONE, OVER, FAILED = "done", "over budget", "failed"
STEPS = 200
# What a trial has figures for; `memory` and `train.memory` are the same here, since nothing but training is done.
LIMITS = {"memory": "peak_memory", "train.memory": "peak_memory", "time": "seconds", "storage": "storage"}
OBJECTIVES = ("loss", "trainable", "peak_memory", "seconds_per_step")


@dataclass(frozen=True)
class TrialRequest:
    """What a trial is asked for.

    Attributes:
        method: names with commas between them, or "all" for every method that trains.
        options: settings of the method, where there is but one.
        budget: limits as text, see `core.budget`; each method has the whole of it. A limit on time ends its training.
        training: settings of the training loop by their transformers names, with `max_length` and `on_long`; what is
            not said a method may choose for itself, but for `max_steps`.
        eval_examples: held-out examples to measure quality on, at most.
    """

    model: str = "smollm2"
    data: str = "python-docs"
    method: str = ALL
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    eval_examples: int = 160
    skip_bad: int = 0
    seed: int = 0
    trust_remote_code: bool = False


def trial(
    request: TrialRequest,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train every method asked for, each in a process of its own; returns the table, also in OUT/trial.json.

    A method that fails is a row that says why. Quality is measured on the validation part of the data, since the table
    is there to choose by; the test part stays untouched.

    Returns:
        `rows`, sorted by held-out loss, what failed last: `method`, `status` (done, over budget, failed), `reason`,
        `loss` in nats a token with its `interval`, `trainable` parameters, `peak_memory` of the process and
        `above_floor`, what of it came on top of the imported libraries, `seconds` of training, `steps`,
        `seconds_per_step`, `stopped_because`, `storage` of the adapter in bytes, `adapter` (its folder), `front`
        (no other row within the budget is nowhere worse and somewhere better in loss, trained parameters, peak memory
        and seconds a step); `base`, the row of the model as it is; `folder`, and the `budget` as it was understood.

    Raises:
        UsageError: bad input, found before training starts.
        DoesNotFit: every method that could be trained breaks the budget; `result` of the error is the table.
        ShoestringError: no method could be trained; likewise.
    """
    limits = _limits(request.budget)
    names = _methods(request)
    done = finished(out, "trial", asdict(request)) if resume else None
    if done:
        say(f"the trial in {out} has finished; nothing is left to do")
        return _verdict(done)
    source = models.resolve(request.model)
    with open_run(out, "trial", asdict(request), resume=resume, label=f"{Path(request.model).name}-trial") as run:
        rows: dict[str, dict[str, Any]] = run.read("rows.json") or {}
        took: list[float] = []
        for number, name in enumerate((BASE, *names)):
            if name in rows:
                say(f"{name}: kept")
                continue
            say("measuring the model as it is" if name == BASE else f"[{number}/{len(names)}] {name}")
            began = time.monotonic()
            rows[name] = _row(request, name, source, run.work / name, limits)
            run.write("rows.json", rows)
            took += [time.monotonic() - began] if name != BASE else []
            say(f"  {_remark(rows[name])}{_outlook(took, len(names) + 1 - len(rows))}")
        result = _result(request, limits, rows, run.folder)
        trial_report.write(result, run.folder)
        write_json(run.folder / "trial.json", result)
        run.write("result.json", result)
    return _verdict(result)


def _limits(written: str) -> Budget:
    limits = Budget.parse(written)
    for resource in limits.limits:
        if resource not in LIMITS:
            raise UsageError(
                f"a trial does not measure {resource}", "a limit on it would mean nothing",
                "It knows " + ", ".join(LIMITS),
            )  # fmt: skip
    return limits


def _methods(request: TrialRequest) -> list[str]:
    """Names of the methods to try, as the catalog has them."""
    from shoestring.planner.plan import by_verb

    if request.method == ALL:
        names = [m.name for m in by_verb("train")]
    else:
        names = [catalog.get(name.strip()).name for name in request.method.split(",") if name.strip()]
        for name in names:
            check(Step("train", name))
    if not names:
        raise UsageError("no method is named", remedy="Give --method all, or names with commas between them")
    if len(set(names)) < len(names):
        raise UsageError(f"a method is named twice in {request.method}", remedy="Name each once")
    if request.options and len(names) > 1:
        raise UsageError(
            f"the option {next(iter(request.options))} is given to {len(names)} methods",
            "an option belongs to one method, and each is tried with its first settings",
            "Leave it out, or name one method",
        )
    return names


def _row(request: TrialRequest, name: str, source: Path, folder: Path, limits: Budget) -> dict[str, Any]:
    """What came out of a process that trained one method, or measured the model as it is."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that died: a row's time and memory are of one life
    folder.mkdir(parents=True)
    training = {"max_steps": STEPS, "save_steps": 0, **request.training}
    allowed = limits.get("time")
    if allowed is not None:
        training["max_seconds"] = min(allowed, training.get("max_seconds") or allowed)
    asked = {**asdict(request), "training": training, "source": str(source), "folder": str(folder), "method": name}
    answer = _ask({**asked, "method": "" if name == BASE else name})
    if "error" in answer:
        shutil.rmtree(folder, ignore_errors=True)
        return {"method": name, "status": FAILED, "reason": answer["error"]}
    figures = {resource: answer.get(figure) for resource, figure in LIMITS.items()}
    if allowed is not None and answer.get("stopped_because") == "max_seconds":
        del figures["time"]  # the clock was kept, to within the last step
    missed = [] if name == BASE else list(limits.misses(figures))
    return {
        "method": name, "status": OVER if missed else DONE, "reason": ", ".join(map(str, missed)), **answer,
    }  # fmt: skip


def _ask(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of `jobs.trial_row`; under "error" a sentence when there is none."""
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(
        [sys.executable, "-m", "shoestring.jobs.trial_row"], input=json.dumps(asked), capture_output=True, text=True,
        errors="replace", env=environment, check=False,
    )  # fmt: skip
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        pass
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {
            "error": f"its process was ended by {name}" + (", probably short of memory" if name == "SIGKILL" else "")
        }
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"error": lines[-1] if lines else f"its process ended with code {done.returncode} and said nothing"}


def _result(request: TrialRequest, limits: Budget, rows: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    tried = [dict(row) for name, row in rows.items() if name != BASE]
    inside = [row for row in tried if row["status"] == DONE]
    best = pareto([{name: row[name] for name in OBJECTIVES} for row in inside])
    for row in tried:
        row["front"] = False
    for index in best:
        inside[index]["front"] = True
    tried.sort(key=lambda row: (row["status"] == FAILED, row.get("loss") or 0.0))
    return {
        "folder": str(folder), "model": request.model, "data": request.data, "budget": str(limits),
        "steps": request.training.get("max_steps", STEPS), "base": rows[BASE], "rows": tried,
    }  # fmt: skip


def _verdict(result: dict[str, Any]) -> dict[str, Any]:
    """The result, or the error that it is when no row is of use."""
    statuses = {row["status"] for row in result["rows"]}
    if DONE in statuses:
        return result
    error: ShoestringError
    if OVER in statuses:
        error = DoesNotFit(
            f"no method stays within {result['budget']}", f"the table is in {result['folder']}",
            "Relax the budget, or train on shorter examples in smaller batches",
        )  # fmt: skip
    else:
        error = ShoestringError("no method could be trained", result["rows"][0]["reason"])
    error.result = result
    raise error


def _outlook(took: Sequence[float], left: int) -> str:
    """How long the last method took, and what the rest may take if they are like those before."""
    if not took:
        return ""
    rest = f"; {left} more, about {max(1, round(left * median(took) / 60)):,} min" if left else ""
    return f", {took[-1]:.0f} s{rest}"


def _remark(row: Mapping[str, Any]) -> str:
    if row["status"] == FAILED:
        return f"failed: {row['reason']}"
    over = f", over budget: {row['reason']}" if row["status"] == OVER else ""
    return f"held-out loss {row['loss']:.4f}{over}"

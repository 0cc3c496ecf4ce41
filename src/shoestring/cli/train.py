from __future__ import annotations

import shlex
from typing import Any

import click

from shoestring.cli._command import Command, model_argument, out_option, resume_option
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current, table
from shoestring.core import catalog
from shoestring.core.errors import ShoestringError, UsageError

_TRIAL = "Compare methods instead: train with each of --method for a few hundred steps (see above)."
_BUDGET = "Limits of a trial, for each method: memory, time, storage, with units: memory=2GB,time=10m."


@click.command("train", cls=Command)
@model_argument()
@out_option()
@resume_option()
@click.option("--trial", "is_trial", is_flag=True, help=_TRIAL)
@click.option("--budget", metavar="LIMITS", help=_BUDGET)
@request_options("jobs.train", "TrainRequest")
def command(out: str | None, resume: bool, is_trial: bool, budget: str | None, **given: Any) -> None:
    """Train MODEL on data with one method; the adapter comes out. With --trial, compare methods.

    The learning loop's settings have transformers' names: --learning_rate 1e-4, or learning_rate=1e-4.

    \b
    A trial
        shoestring train MODEL --method all --trial --data FILE --budget memory=2GB,time=10m --out DIR
    gives every method that trains, or those of a list (--method one,two,three), 200 steps (--max-steps) in a process
    of its own, under one budget, and prints what each costs: held-out loss, trained parameters, peak memory, time, size
    of the adapter. A star marks rows that no other beats in loss, trained parameters, peak memory and time a step at
    once. DIR gets trial.json, trial.md and pareto.svg; --resume keeps the rows that are there.
    """
    from shoestring.jobs.train import TrainRequest, train

    screen = current()
    if is_trial:
        _trial(out, resume, {**given, "budget": budget})
        return
    method = given.get("method") or ""
    if method == "all" or "," in method:
        raise UsageError(f"--method {method} names more than one", "a run trains one", "Add --trial to compare them")
    if budget:
        raise UsageError("--budget belongs to a trial", remedy="Add --trial, or `shoestring fit` for a model's budget")
    with screen.working():
        result = train(build(TrainRequest, given), out=out, resume=resume, say=screen.say)
    steps = f"{result['steps']} steps, {result['tokens']:,} tokens" if result.get("steps") else "trained"
    loss = f"held-out loss {result['loss_before']:.4f} -> {result['loss_after']:.4f} nats a token"
    screen.show(result, lambda: f"{steps}: {loss}\n{result['model']}")
    if catalog.get(result["method"]).traits.get("merges") != "no":
        screen.say(f"Fold it into its base: shoestring merge {shlex.quote(result['model'])} --out DIR")


def _trial(out: str | None, resume: bool, given: dict[str, Any]) -> None:
    from shoestring.jobs.trial import TrialRequest, trial
    from shoestring.jobs.trial_report import HEADER, cells

    screen = current()
    try:
        with screen.working():
            result = trial(build(TrialRequest, given), out=out, resume=resume, say=screen.say)
    except ShoestringError as error:
        if kept := error.result:
            screen.show(kept, lambda: table(HEADER, cells(kept)))
        raise
    screen.show(result, lambda: table(HEADER, cells(result)))
    screen.say(f"The table and its picture are in {result['folder']}: trial.md, pareto.svg")

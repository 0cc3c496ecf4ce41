from __future__ import annotations

import shlex
from typing import Any

import click

from shoestring.cli._command import Command, model_argument, out_option, resume_option
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import console, current


@click.command("fit", cls=Command)
@model_argument()
@out_option()
@resume_option()
@request_options("jobs.fit", "FitRequest")
def command(out: str | None, resume: bool, **given: Any) -> None:
    """Make a model fit a budget, and show the bill.

    Adapts MODEL to the data, compresses it until it meets the budget, checks how much quality is left, and writes the
    model, a report and the ledger to a run folder. Without arguments: the demonstration.
    """
    from shoestring.core.errors import ShoestringError
    from shoestring.jobs import report
    from shoestring.jobs.fit import FitRequest, fit

    screen = current()
    try:
        with screen.working():
            result = fit(build(FitRequest, given), out=out, resume=resume, say=screen.say)
    except ShoestringError as error:
        if kept := error.result:
            screen.show(kept, lambda: report.terminal(kept, console()))
        raise
    screen.show(result, lambda: report.terminal(result, console()))
    screen.say(f"The model is in {result['model']}. Talk to it: shoestring chat {shlex.quote(result['model'])}")

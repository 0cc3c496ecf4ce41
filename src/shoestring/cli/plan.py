from __future__ import annotations

from typing import Any

import click

from shoestring.cli._command import Command, model_argument
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current, table
from shoestring.core import text


@click.command("plan", cls=Command)
@model_argument()
@request_options("jobs.fit", "FitRequest")
def command(**given: Any) -> None:
    """Show what `fit` would try, with predicted figures; nothing is run or written.

    Takes the same flags as `fit`. Exit code 3 when nothing is predicted to fit.
    """
    from shoestring import models
    from shoestring.core.budget import Budget
    from shoestring.core.errors import DoesNotFit
    from shoestring.jobs.fit import FitRequest, plans
    from shoestring.planner.plan import relax

    screen, request = current(), build(FitRequest, given)
    with screen.working():
        limits = Budget.parse(request.budget)
        shape = models.shape_of(models.resolve(request.model), trust_remote_code=request.trust_remote_code)
        candidates, _ = plans(request, shape, limits)
    rows = [
        (
            text.show(c.predicted.storage, "B"),
            text.show(c.predicted.memory, "B"),
            text.show(c.predicted.flops_per_token, "FLOP"),
            "fits" if c.fits else "misses " + ", ".join(m.resource for m in c.misses),
            c.name,
        )
        for c in candidates
    ]
    header = ("storage", "memory", "per token", f"budget {limits}", "pipeline")
    screen.show({"budget": str(limits), "candidates": [c.to_json() for c in candidates]}, lambda: table(header, rows))
    if not any(c.fits for c in candidates):
        remedy = f"Relax the budget to {relax(candidates[0].misses)}, or bring a smaller model"
        raise DoesNotFit(f"nothing is predicted to fit {limits}", f"the closest is {candidates[0].name}", remedy)

from __future__ import annotations

from typing import Any

import click

from shoestring.cli._command import Command, model_argument, out_option, resume_option
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current


@click.command("train", cls=Command)
@model_argument()
@out_option()
@resume_option()
@request_options("jobs.train", "TrainRequest")
def command(out: str | None, resume: bool, **given: Any) -> None:
    """Train MODEL on data with one method; the adapter comes out.

    The learning loop's settings have transformers' names: --learning_rate 1e-4, or learning_rate=1e-4.
    """
    from shoestring.jobs.train import TrainRequest, train

    screen = current()
    with screen.working():
        result = train(build(TrainRequest, given), out=out, resume=resume, say=screen.say)
    steps = f"{result['steps']} steps, {result['tokens']:,} tokens" if result.get("steps") else "trained"
    loss = f"held-out loss {result['loss_before']:.4f} -> {result['loss_after']:.4f} nats a token"
    screen.show(result, lambda: f"{steps}: {loss}\n{result['model']}")
    screen.say(f"Fold it into its base: shoestring merge {result['model']} --out DIR")

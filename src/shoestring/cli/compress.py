from __future__ import annotations

import shlex
from typing import Any

import click

from shoestring.cli._command import Command, model_argument, out_option, resume_option
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current


@click.command("compress", cls=Command)
@model_argument()
@out_option()
@resume_option()
@request_options("jobs.compress", "CompressRequest")
def command(out: str | None, resume: bool, **given: Any) -> None:
    """Compress MODEL, and show what quality it costs. `quantize` is the same.

    With --method by that method, or by several one after another (--method one,another); with --size or --bits by
    formats chosen layer by layer.
    """
    from shoestring.jobs.compress import CompressRequest, bill, compress

    screen, request = current(), build(CompressRequest, given)
    with screen.working():
        result = compress(request, out=out, resume=resume, say=screen.say)
    rows = "\n".join(f"{name:40} {value}" for name, value in bill(result))
    screen.show(result, lambda: f"{rows}\n{result['model']}")
    screen.say(f"Talk to it: shoestring chat {shlex.quote(result['model'])}")

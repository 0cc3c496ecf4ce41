from __future__ import annotations

from pathlib import Path

import click

from shoestring.cli._command import Command, out_option, resume_option
from shoestring.cli._screen import current


@click.command("run", cls=Command)
@click.argument("file", metavar="PIPELINE.yaml", type=Path)
@out_option()
@resume_option()
def command(file: Path, out: str | None, resume: bool) -> None:
    """Execute a written pipeline, such as the config.resolved.yaml of an earlier run."""
    from shoestring.jobs.run import run_file

    screen = current()
    with screen.working():
        result = run_file(file, out=out, resume=resume, say=screen.say)
    screen.show(result, lambda: str(result["model"]))

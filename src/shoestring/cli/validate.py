from __future__ import annotations

from pathlib import Path

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current


@click.command("validate", cls=Command)
@click.argument("file", metavar="PIPELINE.yaml", type=Path)
def command(file: Path) -> None:
    """Check a pipeline file, its data and how its methods go together, without running it."""
    from shoestring.core.errors import UsageError
    from shoestring.jobs.validate import validate

    screen = current()
    with screen.working():
        problems = validate(file)
    for problem in problems[:-1]:
        click.echo(f"error: {problem}", err=True)
    screen.show({"file": str(file), "problems": problems}, lambda: None if problems else f"{file} is valid")
    if problems:
        raise UsageError(problems[-1])

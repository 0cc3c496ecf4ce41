from __future__ import annotations

import json
from pathlib import Path

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import console, current


@click.command("report", cls=Command)
@click.argument("run", type=Path)
def command(run: Path) -> None:
    """Print the table of the finished RUN and write its report.html anew."""
    from shoestring.core.errors import UsageError
    from shoestring.jobs import report

    file, screen = run / "run" / "result.json", current()
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(
            f"{run} holds no result", f"{file} cannot be read", "`shoestring runs` lists the runs"
        ) from None
    except ValueError as error:
        raise UsageError(f"{file} is damaged", str(error), "Make the run again") from None
    if "after" not in result:
        screen.show(result, lambda: json.dumps(result, indent=2))
        return
    page = report.write(result, run)
    screen.show(result, lambda: report.terminal(result, console()))
    screen.say(f"Written: {page}")

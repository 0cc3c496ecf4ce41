from __future__ import annotations

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current


@click.command("env", cls=Command)
def command() -> None:
    """Versions, machine and settings in one paste, for a bug report; secrets are masked."""
    from shoestring.jobs.environment import environment, to_text

    screen = current()
    with screen.working():
        found = environment()
    screen.show(found, lambda: to_text(found))

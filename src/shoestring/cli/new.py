from __future__ import annotations

from pathlib import Path

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current


@click.command("new", cls=Command)
@click.argument("room")
@click.argument("name")
@click.option(
    "--into", type=Path, metavar="DIR", help="Write a package of its own there instead of adding to shoestring."
)
def command(room: str, name: str, into: Path | None) -> None:
    """Write the two files of a new method: the method, and its claim."""
    from shoestring.jobs.new import new

    screen = current()
    written = [str(path) for path in new(room, name, into=into)]
    screen.show(written, lambda: "\n".join(written))
    screen.say(f"Fill them in, then: shoestring check {name}, and shoestring claims run {name.replace('_', '-')}")

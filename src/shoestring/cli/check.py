from __future__ import annotations

from dataclasses import asdict

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current


@click.command("check", cls=Command)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Every method.")
@click.option("--only", default="", help="Only checks whose name contains this.")
def command(names: tuple[str, ...], everything: bool, only: str) -> None:
    """Examine methods by the contract of their room; exit code 1 when one fails."""
    from shoestring.core import catalog
    from shoestring.core.errors import ShoestringError, UsageError

    if bool(names) == everything:
        raise UsageError("name the methods to check, or --all")
    for name in names:
        catalog.get(name)
    from shoestring.lab.examine import examine

    screen, outcomes = current(), []
    for name in names or catalog.methods():
        with screen.working():
            for outcome in examine(name, only=only):
                outcomes.append(outcome)
                if not screen.quiet or not outcome.good:
                    detail = f": {outcome.detail}" if outcome.detail else ""
                    click.echo(f"{outcome.verdict:8}  {name}  {outcome.check}{detail}", err=True)
    bad = [o for o in outcomes if not o.good]
    screen.show(
        [{**asdict(o), "good": o.good} for o in outcomes],
        lambda: f"{len(outcomes) - len(bad)} of {len(outcomes)} checks hold",
    )
    if bad:
        raise ShoestringError(
            f"{', '.join(dict.fromkeys(o.method for o in bad))} fails {len(bad)} of {len(outcomes)} checks"
        )

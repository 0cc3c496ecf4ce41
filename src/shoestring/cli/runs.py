from __future__ import annotations

from pathlib import Path

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current, table


@click.command("runs", cls=Command)
@click.argument("folder", default="runs", type=Path)
def command(folder: Path) -> None:
    """List the runs below FOLDER (default: runs), newest first."""
    from shoestring.core import text
    from shoestring.core.errors import UsageError
    from shoestring.jobs import runs

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    found = runs.runs(folder)
    rows = [(r["created"], r["kind"], r["status"], text.show(r.get("seconds"), "s"), r["folder"]) for r in found]
    current().show(
        found,
        lambda: table(("created", "kind", "status", "took", "folder"), rows) if rows else f"no runs below {folder}",
    )

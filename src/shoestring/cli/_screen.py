"""What people and programs see: results on stdout, remarks on stderr."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import click


@dataclass
class Screen:
    """How much to show, and in which form."""

    json: bool = False
    verbose: bool = False
    quiet: bool = False

    def say(self, line: str) -> None:
        """A remark about the work in progress."""
        if not self.quiet:
            click.echo(line, err=True)

    def show(self, data: Any, text: Callable[[], str | None]) -> None:
        """The result: `data` as JSON when that was asked for, else what `text` returns, or prints itself."""
        if self.json:
            click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))
        elif (said := text()) is not None:
            click.echo(said)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within the block whatever libraries print goes to stderr, so that stdout holds the result alone."""
        with redirect_stdout(sys.stderr):
            yield


def current() -> Screen:
    """The screen of the command that runs."""
    screen: Screen = click.get_current_context().find_root().ensure_object(Screen)
    return screen


def console() -> Any:
    """A rich console on stdout; wide when nobody looks, so that no figure is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; in a terminal the last column is folded to its width."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    indent = sum(widths[:-1]) + 2 * len(widths[:-1])
    room = shutil.get_terminal_size().columns - indent if sys.stdout.isatty() else 0
    folded = []
    for line in lines:
        first = "  ".join(cell.ljust(width) for cell, width in zip(line[:-1], widths))
        last = textwrap.wrap(line[-1], room) if room > 20 else [line[-1]]
        folded += [f"{first}  {(last or [''])[0]}".rstrip()] + [" " * indent + more for more in last[1:]]
    return "\n".join(folded)

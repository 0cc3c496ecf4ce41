from __future__ import annotations

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current, table


@click.command("methods", cls=Command)
@click.option("--room", help="Only those of one room.")
@click.option("--saves", help="Only those that save this resource.")
def command(room: str | None, saves: str | None) -> None:
    """List the methods: room, what each saves, its paper's date, and how its claim stands."""
    from shoestring.core import catalog, claim
    from shoestring.core.errors import UsageError, nearest
    from shoestring.core.method import RESOURCES

    for word, known, what in ((room, catalog.rooms(), "room"), (saves, RESOURCES, "resource")):
        if word and word not in known:
            raise UsageError(f"unknown {what} {word}", remedy=nearest(word, known))
    found = [m for m in catalog.methods().values() if room in (None, m.room) and (not saves or saves in m.saves)]
    rows = [
        {
            "name": m.name,
            "room": m.room,
            "saves": list(m.saves),
            "paper": {"title": m.paper.title, "date": m.paper.date, "arxiv": m.paper.arxiv},
            "summary": m.summary,
            "claim": claim.state_of(m.name),
        }
        for m in found
    ]
    cells = [
        (m.name, m.room, ", ".join(m.saves), m.paper.date, str(r["claim"]), m.summary) for m, r in zip(found, rows)
    ]
    current().show(rows, lambda: table(("name", "room", "saves", "paper", "claim", "summary"), cells))

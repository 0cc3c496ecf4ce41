from __future__ import annotations

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current, table


@click.command("methods", cls=Command)
@click.option("--room", help="Only those of one room, with what distinguishes them there.")
@click.option("--saves", help="Only those that save this resource.")
@click.option("--all", "with_others", is_flag=True, help="Also what the room's library has and no method here carries.")
def command(room: str | None, saves: str | None, with_others: bool) -> None:
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
            "traits": dict(m.traits),
            "paper": {"title": m.paper.title, "date": m.paper.date, "arxiv": m.paper.arxiv},
            "summary": m.summary,
            "claim": claim.state_of(m.name),
        }
        for m in found
    ]
    traits = list(dict.fromkeys(trait for m in found for trait in m.traits)) if room else []
    header = ("name", *(traits or ("room", "saves", "paper")), "claim", "summary")
    cells = [
        (
            m.name,
            *([m.traits.get(t, "") for t in traits] or (m.room, ", ".join(m.saves), m.paper.date)),
            str(row["claim"]),
            m.summary,
        )
        for m, row in zip(found, rows)
    ]
    if with_others:
        for place in [room] if room else catalog.rooms():
            for other in getattr(catalog.contract(place), "others", list)():
                rows.append({**other, "room": place})
                cells.append((other["name"], *[""] * (len(header) - 3), other["why"], other["provides"]))
    current().show(rows, lambda: table(tuple(word.replace("_", " ") for word in header), cells))

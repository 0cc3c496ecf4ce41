from __future__ import annotations

from typing import Any

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current, table


@click.command("methods", cls=Command)
@click.option("--room", help="Only those of one room, with what distinguishes them there.")
@click.option("--saves", help="Only those that save this resource.")
@click.option("--category", help="Only those of one category of compression, with their gains and measured quality.")
@click.option("--needs", help="Only those that ask for no more than this: none, calibration text, gradient training.")
@click.option("--all", "with_others", is_flag=True, help="Also what the room's library has and no method here carries.")
def command(room: str | None, saves: str | None, category: str | None, needs: str | None, with_others: bool) -> None:
    """List the methods: room, what each saves, its paper's date, and how its claim stands."""
    from shoestring.core import catalog, claim, survey
    from shoestring.core.errors import UsageError, nearest
    from shoestring.core.method import RESOURCES

    for word, known, what in (
        (room, catalog.rooms(), "room"), (saves, RESOURCES, "resource"), (category, survey.CATEGORIES, "category"),
        (needs, survey.NEEDS, "need"),
    ):  # fmt: skip
        if word and word not in known:
            raise UsageError(f"unknown {what} {word}", remedy=nearest(word, known))
    most = survey.NEEDS.index(needs) if needs else len(survey.NEEDS)
    rows: list[dict[str, Any]] = [
        {
            "name": m.name,
            "room": m.room,
            "saves": list(m.saves),
            **survey.row(m),
            "combines": dict(m.combines),
            "traits": dict(m.traits),
            "paper": {"title": m.paper.title, "date": m.paper.date, "arxiv": m.paper.arxiv},
            "summary": m.summary,
            "claim": claim.state_of(m.name),
        }
        for m in catalog.methods().values()
        if room in (None, m.room)
        and (not saves or saves in m.saves)
        and category in (None, survey.category(m))
        and survey.NEEDS.index(survey.needs(m)) <= most
    ]
    traits = list(dict.fromkeys(trait for row in rows for trait in row["traits"])) if room else []
    if traits:
        columns = {trait: [str(row["traits"].get(trait, "")) for row in rows] for trait in traits}
    elif category or needs:
        columns = {when: [", ".join(row["gains"][when]) for row in rows] for when in ("at_load", "at_work")}
        columns = {"category": [row["category"] for row in rows], "needs": [row["needs"] for row in rows], **columns}
        columns["quality"] = [row["quality"]["said"] if row["quality"] else "" for row in rows]
    else:
        columns = {"room": [row["room"] for row in rows], "saves": [", ".join(row["saves"]) for row in rows]}
        columns["paper"] = [row["paper"]["date"] for row in rows]
    columns = {"name": [row["name"] for row in rows], **columns}
    columns |= {word: [row[word] for row in rows] for word in ("claim", "summary")}
    header, cells = tuple(columns), list(zip(*columns.values()))
    if with_others:
        for place in [room] if room else catalog.rooms():
            for other in getattr(catalog.contract(place), "others", list)():
                rows.append({**other, "room": place})
                cells.append((other["name"], *[""] * (len(header) - 3), other["why"], other["provides"]))
    current().show(rows, lambda: table(tuple(word.replace("_", " ") for word in header), cells))

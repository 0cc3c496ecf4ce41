from __future__ import annotations

import click

from shoestring.cli._command import Command, Shared
from shoestring.cli._screen import current, table


class Group(Shared, click.Group): ...


@click.group("claims", cls=Group)
def command() -> None:
    """Papers' figures beside ours: measure them, and see how they stand."""


@command.command("ls", cls=Command)
def ls() -> None:
    """List the claim files."""
    from shoestring.core import claim

    found = [
        {"slug": f.slug, "methods": list(f.methods), "claims": [c.name for c in f.claims], "about": f.about}
        for f in claim.files().values()
    ]
    rows = [(str(f["slug"]), ", ".join(f["claims"]), str(f["about"]).partition("\n")[0]) for f in found]
    current().show(found, lambda: table(("slug", "claims", "about"), rows))


@command.command("table", cls=Command)
def show() -> None:
    """Every claim with its figure and verdict."""
    from shoestring.jobs.claim_table import HEADER, cells, rows

    found = rows()
    current().show(found, lambda: table(HEADER, [cells(row) for row in found]))


@command.command("run", cls=Command)
@click.argument("slugs", nargs=-1, required=True, metavar="SLUG...")
@click.option("--quick", is_flag=True, help="The small size: shows that the experiment runs, gives no verdict.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds to measure over.")
def run(slugs: tuple[str, ...], quick: bool, seeds: str) -> None:
    """Measure claims and write their records."""
    from shoestring.core import claim
    from shoestring.core.errors import UsageError

    for slug in slugs:
        claim.get(slug)
    if not all(part.strip().isdecimal() for part in seeds.split(",")):
        raise UsageError(f"--seeds {seeds} is not a list of whole numbers", remedy="Write --seeds 0,1,2")
    from shoestring.jobs import claims
    from shoestring.jobs.claim_table import HEADER, cells, row

    screen, found = current(), []
    chosen = [int(part) for part in seeds.split(",")]
    for slug in slugs:
        with screen.working():
            outcome = claims.run(slug, quick=quick, seeds=chosen[:1] if quick else chosen, say=screen.say)
        found += [row(outcome.claim_file, c, m, "quick" if quick else "fresh") for c, m in outcome.measured]
    screen.show(found, lambda: table(HEADER, [cells(r) for r in found]))

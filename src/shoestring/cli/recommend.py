from __future__ import annotations

from typing import Any

import click

from shoestring.cli._command import Command, model_argument
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current, table


@click.command("recommend", cls=Command)
@model_argument()
@request_options("jobs.recommend", "RecommendRequest")
def command(**given: Any) -> None:
    """List formats and methods for MODEL on this machine: bytes, whether they fit, and tokens a second to expect.

    Nothing is built. The speed is what the memory's bandwidth allows one answer; quality is what recorded claims
    measured of the method, on the model that they name. Exit code 3 when nothing fits.
    """
    from shoestring.core import text
    from shoestring.core.errors import DoesNotFit
    from shoestring.jobs.recommend import RecommendRequest, recommend

    screen, request = current(), build(RecommendRequest, given)
    with screen.working():
        found = recommend(request)
    ways = found["ways"]
    rows = [
        (
            way["step"].removeprefix("compress ") or "as it is",
            f"{way['bits']:.2f}",
            text.show(way["storage"], "B"),
            text.show(way["memory"], "B"),
            f"{way['tokens_per_s']:.0f}",
            "yes" if way["fits"] else "no",
            way["needs"],
            way["quality"]["said"] if way["quality"] else "",
        )
        for way in ways
    ]
    header = ("method", "bits", "storage", "memory", "tokens/s", "fits", "needs", "measured quality")
    screen.say(f"memory {text.show(found['memory'], 'B')}, read at {text.show(found['bandwidth'], 'B')}/s")
    screen.show(found, lambda: table(header, rows))
    if not any(way["fits"] for way in ways):
        least = text.show(ways[0]["memory"], "B")
        name = ways[0]["step"] or "the model as it is"
        raise DoesNotFit("nothing fits", f"the least, {name}, takes {least}", "Bring a smaller model")

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from shoestring.cli._command import Command, model_argument, out_option, resume_option
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current, table


@click.command("measure", cls=Command)
@click.argument("meter", required=False)
@model_argument()
@out_option()
@resume_option()
@request_options("jobs.measure", "MeasureRequest", without=("meter",))
def command(meter: str | None, out: str | None, resume: bool, **given: Any) -> None:
    """Measure a property of MODEL on data with METER; without a METER, list them."""
    from shoestring.jobs.measure import MeasureRequest, measure, meters

    screen = current()
    if meter is None:
        rows = meters()
        screen.show(rows, lambda: table(("meter", "measures"), [(m["name"], m["summary"]) for m in rows]))
        return
    with screen.working():
        result = measure(build(MeasureRequest, {**given, "meter": meter}), out=out, resume=resume, say=screen.say)
    screen.show(result, lambda: _text(result))
    screen.say(f"The figures are in {result['folder']}/run/result.json")


def _text(result: Mapping[str, Any]) -> str:
    """Figures a line each, a list of mappings as a table, and what follows from them at the end."""
    figures = {k: v for k, v in result.items() if k not in ("meter", "folder", "advice")}
    tables = {k: v for k, v in figures.items() if isinstance(v, list) and v and all(isinstance(r, Mapping) for r in v)}
    lines = [(name.replace("_", " "), _shown(value)) for name, value in figures.items() if name not in tables]
    blocks = [table((result["meter"].replace("_", " "), ""), lines)] if lines else []
    for name, rows in tables.items():
        header = list(dict.fromkeys(key for row in rows for key in row))
        body = table(
            [key.replace("_", " ") for key in header], [[_shown(row.get(key)) for key in header] for row in rows]
        )
        blocks.append(f"{name.replace('_', ' ')}\n{body}")
    return "\n\n".join([*blocks, *filter(None, [result.get("advice")])])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from shoestring.cli._command import Command, model_argument, out_option
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current, table
from shoestring.core import text


@click.command("map", cls=Command)
@model_argument()
@out_option(help="Folder for result and ledger; it must be new. Default: nothing is written.")
@request_options("jobs.mapping", "MapRequest")
def command(out: str | None, **given: Any) -> None:
    """Compile MODEL for an accelerator that is described, and model its time, bytes and energy.

    Nothing is measured: every figure is modelled, and the assumptions stand below it.
    """
    from shoestring.jobs.mapping import MapRequest, map_model

    screen = current()
    with screen.working():
        result = map_model(build(MapRequest, given), out=out, say=screen.say)
    screen.show(result, lambda: _text(result))


def _text(result: Mapping[str, Any]) -> str:
    """A column for each step; then the assumptions, without which no figure means anything."""
    steps, status = result["steps"], result["status"]
    rows = [
        [f"time, {status}", *(text.show(s["seconds"], "s") for s in steps)],
        [f"tokens/s, {status}", *(f"{s['tokens_per_second']:,.1f}" for s in steps)],
        [f"cycles, {status}", *(f"{s['cycles']:,}" for s in steps)],
        [f"energy, {status}", *(f"{s['joules']:.3g} J" for s in steps)],
        [f"tokens/J, {status}", *(f"{s['tokens'] / s['joules']:,.1f}" for s in steps)],
        ["program", *(f"{s['instructions']:,} instructions, {text.show_bytes(s['stored'])}" for s in steps)],
    ]
    blocks = [table(["", *(f"{s['step']}, {s['tokens']} tokens" for s in steps)], rows)]
    for title, key in (("to and from memory, " + status, "moved"), ("where the time goes, " + status, "operators"),
                       ("units at work, " + status, "busy")):  # fmt: skip
        names = dict.fromkeys(name for s in steps for name in s[key])
        body = [[name, *(_cell(key, s, s[key].get(name, 0.0)) for s in steps)] for name in names]
        blocks.append(table([title, *(s["step"] for s in steps)], body))
    notes = "\n".join(f"- {line}" for line in (result["about"], *result["assumptions"]))
    return "\n\n".join([f"{result['model']} on {result['target']}", *blocks, f"Assumptions\n{notes}"])


def _cell(key: str, step: Mapping[str, Any], value: float) -> str:
    if key == "moved":
        return text.show_bytes(value)
    return f"{100 * (value / step['seconds'] if key == 'operators' else value):.1f} %"

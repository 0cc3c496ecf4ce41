from __future__ import annotations

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current


@click.command("explain", cls=Command)
@click.argument("name")
@click.option(
    "--price", "model", is_flag=False, flag_value="smollm2", metavar="[MODEL]",
    help="Also what the method makes of MODEL (without a word: the default model), and all its options.",
)  # fmt: skip
def command(name: str, model: str | None) -> None:
    """Explain a method, a room or a claim: how it works, paper, options, and what was measured."""
    from shoestring.jobs import explain

    screen = current()
    found = explain.explain(name)
    if model and found["kind"] == "method":
        with screen.working():
            found["price"] = explain.price(name, model)

    def text() -> str:
        more = "\n\n" + explain.price_text(found["price"], name) if "price" in found else ""
        return explain.to_text(found) + more

    screen.show(found, text)

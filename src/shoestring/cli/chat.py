from __future__ import annotations

import click

from shoestring.cli._command import Command, model_argument
from shoestring.cli._screen import current


@click.command("chat", cls=Command)
@model_argument()
@click.option("--max-new-tokens", "--max-tokens", type=int, default=512, show_default=True, help="Longest answer.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0 always takes the likeliest token.")
@click.option(
    "--top-p",
    type=float,
    default=0.95,
    show_default=True,
    help="Draw from the likeliest tokens up to this probability.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--system", default="", help="A message that goes before the conversation.")
def command(model: str | None, **options: object) -> None:
    """Talk to MODEL. /clear forgets the conversation, /exit ends it."""
    import io

    from shoestring.jobs.generate import chat

    screen = current()
    messages = chat(model or "smollm2", out=io.StringIO() if screen.json else None, **options)  # type: ignore[arg-type]
    if screen.json:
        screen.show(messages, lambda: None)

"""The flags of answers, the same for `generate` and `chat` but for their defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shoestring.cli._command import trust_option

_LIKELIEST = "Draw from the likeliest tokens up to this probability."


def answer_options(max_new_tokens: int, temperature: float, top_p: float) -> Callable[[Any], Any]:
    """Flags for the fields of `jobs.generate.Answering`, and `system`."""
    options = [
        click.option(
            "--max-new-tokens", "--max-tokens", type=int, default=max_new_tokens, show_default=True,
            help="Longest answer.",
        ),
        click.option(
            "--temperature", type=float, default=temperature, show_default=True,
            help="0 always takes the likeliest token.",
        ),
        click.option("--top-p", type=float, default=top_p, show_default=True, help=_LIKELIEST),
        click.option("--top-k", type=int, default=0, show_default=True, help="Draw from so many; 0 is all."),
        click.option(
            "--min-p", type=float, default=0.0, show_default=True,
            help="Draw only what has this share of the likeliest token's probability.",
        ),
        click.option(
            "--repetition-penalty", type=float, default=1.0, show_default=True,
            help="Above 1, what has occurred becomes less likely.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the draws."),
        click.option("--stop", multiple=True, help="A string that ends an answer; repeat for more."),
        click.option(
            "--json-schema", metavar="FILE", callback=_schema, help="Answer in JSON that follows this schema."
        ),
        click.option("--adapter", metavar="DIR", help="A PEFT adapter folder to use with the model."),
        click.option("--system", default="", help="A message that goes first."),
        click.option("--dtype", default="auto", show_default=True, help="What to compute in; auto: as stored."),
        click.option("--threads", type=int, help="For arithmetic. [default: one for each core]"),
        trust_option(),
    ]  # fmt: skip

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _schema(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None or value.lstrip().startswith("{"):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{value} cannot be read: {error}", ctx, param) from None

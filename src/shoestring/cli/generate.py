from __future__ import annotations

import sys

import click

from shoestring.cli._command import Command
from shoestring.cli._screen import current


@click.command("generate", cls=Command)
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@click.option("-m", "--model", "--model-name-or-path", help="The same as the word MODEL. [default: smollm2]")
@click.option("-p", "--prompt", help="The prompt; - or none reads it from standard input.")
@click.option("--max-new-tokens", "--max-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest tokens up to this probability."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--system", default="", help="A message that goes before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
def command(words: tuple[str, ...], model: str | None, prompt: str | None, **options: object) -> None:
    """Print MODEL's answer to one prompt, as it is written."""
    from shoestring.core.errors import UsageError

    left = list(words)
    model = model or (left.pop(0) if left else "smollm2")
    if len(left) + (prompt is not None) > 1:
        raise UsageError("more than one prompt is given", remedy="Put the prompt in quotes, and the model before it")
    prompt = left[0] if left else prompt
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise UsageError("no prompt is given", remedy='Write shoestring generate MODEL "PROMPT"')
        prompt = sys.stdin.read().rstrip("\n")
    from shoestring.jobs.generate import generate

    screen, pieces = current(), []
    with screen.working():
        stream = generate(model, str(prompt), **options)  # type: ignore[arg-type]
    for piece in stream:
        pieces.append(piece)
        if not screen.json:
            click.echo(piece, nl=False)
    screen.show({"model": model, "prompt": prompt, "text": "".join(pieces)}, lambda: "")

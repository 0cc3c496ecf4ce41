from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from shoestring.cli._answer import answer_options
from shoestring.cli._command import Command
from shoestring.cli._screen import current


@click.command("generate", cls=Command)
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@click.option("-m", "--model", "--model-name-or-path", help="The same as the word MODEL. [default: smollm2]")
@click.option("-p", "--prompt", help="The prompt; - or none reads it from standard input.")
@answer_options(max_new_tokens=256, temperature=0.0, top_p=1.0)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
def command(words: tuple[str, ...], model: str | None, prompt: str | None, **options: Any) -> None:
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
        prompt = _read()
    screen, pieces = current(), []
    with screen.working(), _opening():
        from shoestring.jobs.generate import generate

        stream = generate(model, str(prompt), **options)
    for piece in stream:
        pieces.append(piece)
        if not screen.json:
            click.echo(piece, nl=False)
    screen.show({"model": model, "prompt": prompt, "text": "".join(pieces)}, lambda: "")


def _read() -> str:
    from shoestring.core.errors import UsageError

    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The prompt is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start})",
            remedy="If it is Latin-1, convert it: iconv -f latin1 -t utf-8 FILE",
        ) from None


@contextmanager
def _opening() -> Iterator[None]:
    """What is made until the first token stays to the end: to look for garbage in it would only delay that token."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

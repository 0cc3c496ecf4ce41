from __future__ import annotations

from typing import Any

import click

from shoestring.cli._answer import answer_options
from shoestring.cli._command import Command, model_argument
from shoestring.cli._screen import current


@click.command("chat", cls=Command)
@model_argument()
@answer_options(max_new_tokens=512, temperature=0.7, top_p=0.95)
def command(model: str | None, **options: Any) -> None:
    """Talk to MODEL. /clear forgets the conversation, /exit ends it."""
    import io

    from shoestring.jobs.generate import chat

    screen = current()
    messages = chat(model or "smollm2", out=io.StringIO() if screen.json else None, **options)
    if screen.json:
        screen.show(messages, lambda: None)

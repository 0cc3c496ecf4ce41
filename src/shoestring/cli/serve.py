from __future__ import annotations

import logging

import click

from shoestring.cli._command import Command, model_argument
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current


@click.command("serve", cls=Command, context_settings={"auto_envvar_prefix": "SHOESTRING"})
@model_argument()
@request_options("server.settings", "Settings")
def command(model: str | None, **given: object) -> int:
    """Answer OpenAI-compatible requests with MODEL over HTTP.

    Each flag can also be set as SHOESTRING_<FLAG>, and SHOESTRING_API_KEY holds the key. Ctrl+C and SIGTERM let running
    requests finish, for --drain-seconds at most; a second Ctrl+C ends at once.
    """
    from shoestring.server.life import log_to_stderr, serve
    from shoestring.server.settings import Settings

    screen = current()
    settings = build(Settings, {"model": model, **given})
    log_to_stderr(logging.DEBUG if screen.verbose else logging.WARNING if screen.quiet else logging.INFO)
    return serve(settings, lambda address: screen.say(f"{settings.title} is ready at {address}"))

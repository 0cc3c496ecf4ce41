from __future__ import annotations

from typing import Any

import click

from shoestring.cli._command import Command, model_argument, out_option, resume_option
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current
from shoestring.core import text


@click.command("compress", cls=Command)
@model_argument()
@out_option()
@resume_option()
@request_options("jobs.compress", "CompressRequest")
def command(out: str | None, resume: bool, **given: Any) -> None:
    """Compress MODEL with one method, and show what quality it costs. `quantize` is the same."""
    from shoestring.core.errors import UsageError
    from shoestring.jobs.compress import CompressRequest, compress

    screen, request = current(), build(CompressRequest, given)
    if not request.method:
        from shoestring.planner.plan import by_verb

        raise UsageError(
            "no method is given", remedy="Add --method, one of " + ", ".join(m.name for m in by_verb("compress"))
        )
    with screen.working():
        result = compress(request, out=out, resume=resume, say=screen.say)
    sizes = f"{text.show(result['storage_before'], 'B')} -> {text.show(result['storage'], 'B')}"
    kept = f"{result['bits_per_weight']:.2f} bits a weight, keeps {result['quality_kept']:.1%} of the quality"
    screen.show(result, lambda: f"{sizes}, {kept}\n{result['model']}")
    screen.say(f"Talk to it: shoestring chat {result['model']}")

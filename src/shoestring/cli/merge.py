from __future__ import annotations

import click

from shoestring.cli._command import Command, model_argument, out_option, trust_option
from shoestring.cli._screen import current


@click.command("merge", cls=Command)
@model_argument(required=True)
@out_option(required=True, help="Folder for the merged model; it must be new.")
@click.option("--base", help="The model to merge into, in place of the one the adapter names.")
@click.option("--dtype", help="Of the written weights. [default: that of the base]")
@click.option("--overwrite", is_flag=True, help="Replace what is in --out.")
@trust_option()
def command(model: str, out: str, **options: object) -> None:
    """Fold the adapter in the folder MODEL into its base; a plain model comes out."""
    from shoestring.jobs.merge import merge

    screen = current()
    with screen.working():
        result = merge(model, out, **options)  # type: ignore[arg-type]
    screen.show(result, lambda: result["folder"])

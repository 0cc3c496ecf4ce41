from __future__ import annotations

import click

from shoestring.cli._command import Command, model_argument, out_option, trust_option
from shoestring.cli._screen import current


@click.command("export", cls=Command)
@model_argument(required=True)
@out_option(required=True, help="Folder, or for gguf the file; it must be new.")
@click.option(
    "--format", default="safetensors", show_default=True, help="safetensors, or gguf where it carries weights exactly."
)
@click.option("--dtype", default="bfloat16", show_default=True, help="Of weights written as safetensors.")
@click.option("--overwrite", is_flag=True, help="Replace what is in --out.")
@trust_option()
def command(model: str, out: str, **options: object) -> None:
    """Write MODEL as plain weights that other programs read without shoestring."""
    from shoestring.jobs.export import export

    screen = current()
    with screen.working():
        folder = str(export(model, out, **options))  # type: ignore[arg-type]
    screen.show({"folder": folder}, lambda: folder)

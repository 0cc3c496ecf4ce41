"""Makes the page of the command line from what `--help` prints, while the site is built."""

from __future__ import annotations

from collections.abc import Iterator

import click
import mkdocs_gen_files

from shoestring.cli import ALIASES, cli

INTRO = """# Command line

Results go to stdout, remarks and errors to stderr. `--json` prints any result as JSON. Flags may be written
`--out-dir` or `--out_dir`, and a setting as `key=value` after the command: `shoestring train learning_rate=1e-4`.
"""


def helps(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Every command below `command` with its help, 100 columns wide."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                yield from helps(inner, click.Context(inner, info_name=name, parent=context, max_content_width=100))


top = click.Context(cli, info_name="shoestring", max_content_width=100)
with mkdocs_gen_files.open("cli.md", "w") as page:
    page.write(INTRO)
    for path, text in helps(cli, top):
        page.write(f"\n## {path}\n\n```text\n{text}\n```\n")
    page.write("\nOther names: " + ", ".join(f"`{a}` is `{name}`" for a, name in ALIASES.items()) + ".\n")

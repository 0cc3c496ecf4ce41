"""What every command shares: global flags, `--out_dir` for `--out-dir`, and `key=value` for `--key value`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import click

from shoestring.cli._screen import Screen

_SETTING = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*)=(.*)", re.DOTALL)


class Shared(click.Command):
    """Adds the global flags, which may stand before or after the command, and understands both spellings."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += _global_flags()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._normal(ctx, args))

    def _normal(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes = {name: _takes_value(p) for p in self.params if isinstance(p, click.Option) for name in p.opts}
        group = isinstance(self, click.Group)
        normal: list[str] = []
        rest = iter(args)
        for word in rest:
            if word == "--":
                return [*normal, word, *rest]
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                name = name.replace("_", "-")
                if name not in takes and name not in ("--set", *ctx.help_option_names):
                    return [*normal, name + equals + value, *rest]  # click names the nearest
                if name == "--set":
                    normal.append(self._setting(ctx, value if equals else next(rest, ""), takes, required=True))
                    continue
                normal.append(name + equals + value)
                if takes.get(name) and not equals:
                    normal += [value for value in [next(rest, None)] if value is not None]
            elif word.startswith("-") and len(word) > 1:
                normal.append(word)
                if takes.get(word):
                    normal += [value for value in [next(rest, None)] if value is not None]
            elif group:
                return [*normal, word, *rest]  # a command has words of its own
            else:
                normal.append(self._setting(ctx, word, takes))
        return normal

    def _setting(self, ctx: click.Context, word: str, takes: dict[str, bool], required: bool = False) -> str:
        """`--key=value` for the word `key=value`."""
        match = _SETTING.fullmatch(word)
        name = f"--{match[1].replace('_', '-')}" if match else ""
        if match and name in takes:
            return f"{name}={match[2]}"
        if match:
            raise click.NoSuchOption(name, possibilities=get_close_matches(name, takes), ctx=ctx)
        if required:
            raise click.UsageError(f"--set {word} is not a setting. Write --set key=value", ctx)
        return word


class Command(Shared):
    """A command of the command line."""


def one_line(error: click.ClickException) -> str:
    """Click's complaint with the way to the help."""
    context = getattr(error, "ctx", None)
    hint = f" `{context.command_path} --help` explains." if context else ""
    sentence = error.format_message()
    return sentence + ("" if sentence.endswith((".", "?", "!", ")")) else ".") + hint


def model_argument(required: bool = False) -> Callable[[Any], Any]:
    """MODEL as the first word or as -m; `model` is passed on, None when it was not given."""

    def pick(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        word = ctx.params.pop("model_word", None)
        if value and word and value != word:
            raise click.UsageError(f"two models are given, {word} and {value}. Give one", ctx)
        if required and not (value or word):
            raise click.UsageError("no model is given. Name a hub id, a folder, a .gguf file or smollm2", ctx)
        return value or word

    def decorate(function: Any) -> Any:
        names = ("-m", "--model", "--model-name-or-path", "--base-model")
        shown = "The same as the word MODEL: a hub id, a folder, a .gguf file, or smollm2."
        function = click.option(*names, "model", callback=pick, metavar="MODEL", help=shown)(function)
        return click.argument("model_word", required=False, is_eager=True, metavar="[MODEL]")(function)

    return decorate


def out_option(
    required: bool = False, help: str = "Folder of the run; it must be new. Default: one below runs/."
) -> Any:
    return click.option("-o", "--out", "--output-dir", "--out-dir", "out", required=required, metavar="DIR", help=help)


def trust_option() -> Any:
    return click.option(
        "--trust-remote-code", is_flag=True, help="Let the model's repository run its own Python code here."
    )


def resume_option() -> Any:
    return click.option("--resume", is_flag=True, help="Go on with the interrupted run in --out.")


def _takes_value(option: click.Option) -> bool:
    # An option with a `flag_value` of its own may stand alone: what follows is not surely its value.
    return not (option.is_flag or option.count or option.is_eager and not option.expose_value)


def _global_flags() -> list[click.Parameter]:
    def set_on_screen(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.find_root().ensure_object(Screen), str(param.name), True)

    def offline(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

    common: dict[str, Any] = {"is_flag": True, "expose_value": False}
    return [
        click.Option(["--json"], callback=set_on_screen, help="Print the result as JSON.", **common),
        click.Option(
            ["-v", "--verbose"], callback=set_on_screen, help="Say more; show where errors come from.", **common
        ),
        click.Option(["-q", "--quiet"], callback=set_on_screen, help="Say nothing but results and errors.", **common),
        click.Option(["--offline"], callback=offline, help="Never use the network.", **common),
    ]

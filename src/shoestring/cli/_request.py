"""Flags made from a job's request: names, types, defaults and help are read from its source, so nothing is said twice.

Reading the source instead of importing it keeps `--help` free of torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from shoestring.core import options
from shoestring.core.options import Field

_PACKAGE = Path(__file__).parents[1]
_KINDS = {"int": int, "float": float, "str": str, "bool": bool}
_HELP = {
    "data": "A .jsonl, .json, .csv, .parquet or .txt file, a folder, a data set id, or python-docs.",
    "budget": "Limits with units: storage, memory, train.memory, latency, time, energy, money, network.",
    "keep": "Least share of the quality to keep: perplexity before / after.",
    "options": "A setting of the method; repeat for more.",
    "seed": "Of everything random.",
    "skip_bad": "Skip and count up to so many bad lines instead of stopping at the first.",
    "trust_remote_code": "Let the model's repository run its own Python code here.",
    "eval_examples": "Held-out examples to measure quality on, at most.",
    "method": "The method to use; `shoestring methods` lists them.",
    "max_length": "Longest example in tokens; default: the model's context.",
    "on_long": "What to do with a longer one: error, truncate or drop.",
}
_ALIASES = {
    "skip_bad": ["--skip-bad-lines"], "data": ["-d"], "options": ["--option"], "eval_examples": ["--limit"],
    "url": ["--base-url"],
}  # fmt: skip
_TRAINING = ("training.options", "TrainOptions")
_OF_ENCODING = ("max_length", "on_long")


def fields(module: str, name: str) -> list[Field]:
    """The fields of the dataclass `name` in `shoestring.<module>`."""
    return options.fields(_PACKAGE / f"{module.replace('.', '/')}.py", name)


def request_options(module: str, name: str, without: Sequence[str] = ()) -> Callable[[Any], Any]:
    """A flag for every field of a request but `model` and `without`; `training` becomes the training loop's flags."""

    def decorate(function: Any) -> Any:
        for field in reversed(fields(module, name)):
            if field.name == "training":
                for setting in reversed(_training_fields()):
                    function = _option(setting)(function)
            elif field.name not in ("model", *without):
                function = _option(field)(function)
        return function

    return decorate


def build(request: Any, given: Mapping[str, Any]) -> Any:
    """The request from what was given on the command line; everything else keeps its default."""
    known = request.__dataclass_fields__
    said = {name: value for name, value in given.items() if value not in (None, ())}
    training = {name: value for name, value in said.items() if name not in known}
    said = {name: value for name, value in said.items() if name in known}
    said = {name: pairs(v) if str(known[name].type).startswith("Mapping") else v for name, v in said.items()}
    return request(**said, **({"training": training} if training else {}))


def pairs(written: Sequence[str]) -> dict[str, Any]:
    """`("group_size=64", "bias=none")` as a mapping with numbers, truth values and lists understood."""
    read = {}
    for word in written:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--option {word} is not a setting. Write --option key=value")
        try:
            read[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            read[key.replace("-", "_")] = {"True": True, "False": False, "None": None}.get(value, value)
    return read


def _training_fields() -> list[Field]:
    # The seed is the request's own; an optimizer cannot be written as a word.
    loop = [f for f in fields(*_TRAINING) if f.name != "seed" and "Callable" not in f.kind]
    return loop + [Field(name, kind, None, "") for name, kind in zip(_OF_ENCODING, ("int", "str"))]


def _option(field: Field) -> Any:
    flag = "--" + field.name.replace("_", "-")
    names = [*_ALIASES.get(field.name, []), flag]
    text = (_HELP.get(field.name) or field.help or "").rstrip(".;")
    shown = f" [default: {field.default}]" if field.default not in (None, "", False, ()) else ""
    help = (text[:1].upper() + text[1:] + "." if text else "") + shown
    kind = _KINDS.get(field.kind.partition(" |")[0])
    if kind is bool:
        return click.option(
            *names, field.name, type=bool, is_flag=False, flag_value=True, default=None, metavar="[BOOL]", help=help
        )
    if kind is None:
        written = "TEXT" if field.kind.startswith("tuple") else "KEY=VALUE"
        return click.option(*names, field.name, multiple=True, metavar=written, help=help)
    return click.option(*names, field.name, type=kind, default=None, help=help)

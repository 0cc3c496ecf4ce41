"""What may be said to a class when it is made, read from its source: names, types, defaults, meanings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")


@dataclass(frozen=True)
class Field:
    """One argument of a class, or field of a dataclass.

    Attributes:
        default: None when it is no literal; `written` has it as the source says it, empty where there is none.
        help: what its docstring says of it, with capitals and stops as they are there.
    """

    name: str
    kind: str
    default: Any
    help: str
    written: str = ""


def fields(file: Path, name: str) -> list[Field]:
    """The arguments of the class `name` in `file`, with those that it takes over from classes of this package.

    Empty when the file has no such class; of classes of other packages nothing is known without importing them.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    made = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if made is None:
        home = _home(ast.Name(name), tree, file)
        return fields(*home) if home else []
    start = next((n for n in made.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    found: dict[str, Field] = {}
    if start is None or start.args.kwarg:
        for place, base in filter(None, (_home(base, tree, file) for base in made.bases)):
            found |= {field.name: field for field in fields(place, base)}
    helps = dict(_helps(ast.get_docstring(made) or ""))
    own = {field.name: field for field in (_fields(made) if start is None else _arguments(start.args))}
    found |= {n: replace(field, help=found[n].help if n in found else "") for n, field in own.items()}
    order = [*own, *found] if start else list(found)
    return [replace(found[n], help=helps.get(n, found[n].help)) for n in dict.fromkeys(order)]


def _home(base: ast.expr, tree: ast.Module, file: Path) -> tuple[Path, str] | None:
    """The file of this package that has a base class, and its name there."""
    if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
        alias, name = base.value.id, base.attr
    elif isinstance(base, ast.Name):
        alias, name = "", base.id
        if any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body):
            return file, name
    else:
        return None
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shoestring."):
            for said in node.names:
                if (said.asname or said.name) == (alias or name):
                    module = f"{node.module}.{said.name}" if alias else str(node.module)
                    place = _PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
                    return (place, name if alias else said.name) if place.is_file() else None
    return None


def _fields(made: ast.ClassDef) -> Iterator[Field]:
    for node in made.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind, value = ast.unparse(node.annotation), node.value
            if not kind.startswith("ClassVar") and not node.target.id.startswith("_"):
                if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
                    value = next((word.value for word in value.keywords if word.arg == "default"), None)
                yield _field(node.target.id, kind, value)


def _arguments(said: ast.arguments) -> Iterator[Field]:
    plain = said.args[1:]
    defaults = [*[None] * (len(plain) - len(said.defaults)), *said.defaults]
    for argument, value in (*zip(plain, defaults), *zip(said.kwonlyargs, said.kw_defaults)):
        yield _field(argument.arg, ast.unparse(argument.annotation) if argument.annotation else "", value)


def _field(name: str, kind: str, value: ast.expr | None) -> Field:
    try:
        default = ast.literal_eval(value) if value else None
    except ValueError:
        default = None
    return Field(name, kind, default, "", ast.unparse(value) if value else "")


def _helps(doc: str) -> Iterator[tuple[str, str]]:
    """Names and descriptions under a docstring's Args or Attributes."""
    names: list[str] = []
    text, inside = "", False
    for line in doc.splitlines():
        match = _ENTRY.fullmatch(line)
        if line and not line.startswith(" "):
            inside = line in ("Args:", "Attributes:")
        elif inside and match:
            yield from ((name, text) for name in names)
            names, text = match[1].split(", "), match[2]
        elif inside and line.startswith(" " * 8):
            text += " " + line.strip()
    yield from ((name, text) for name in names)

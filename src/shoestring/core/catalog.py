"""The list of methods is the folder listing: a room is a folder under `methods/`, a method is a file in it.

Listing imports nothing: name and room come from the path, the rest from the file's docstring and METHOD literal.
Another package joins with an entry point in the group `shoestring.methods` whose value names a package laid out the
same way: `its_package/<room>/<method>.py`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from shoestring.core.errors import ShoestringError, UsageError, nearest
from shoestring.core.method import RESOURCES, Method, Paper

ROOMS = "shoestring.methods"
_HOUSE = Path(__file__).parents[1] / "methods"
_WORDS = {"Method": Method, "Paper": Paper}


@cache
def methods() -> dict[str, Method]:
    """Every method by name, own rooms first.

    Raises:
        ShoestringError: a file without exactly one METHOD literal, a name taken twice, or an unknown room.
    """
    found: dict[str, Method] = {}
    for package, folder in _packages():
        for file in sorted(folder.glob("*/[!_]*.py")):
            if file.parent.name == "claims":  # another package keeps its claims beside its rooms
                continue
            method = read(file, package)
            if method.room not in rooms():
                raise ShoestringError(
                    f"{file} stands in the room {method.room}, which does not exist",
                    remedy=nearest(method.room, rooms()),
                )
            if method.name in found:
                raise ShoestringError(
                    f"{file}: the name {method.name} is taken by {found[method.name].file}", remedy="Rename the file"
                )
            found[method.name] = method
    return found


@cache
def rooms() -> dict[str, str]:
    """Every room with the first line of its plate (the docstring of its `__init__.py`)."""
    plates = {}
    for init in sorted(_HOUSE.glob("*/__init__.py")):
        plates[init.parent.name] = (ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or "").partition(
            "\n"
        )[0]
    return plates


def get(name: str) -> Method:
    """The method called `name`; a hyphen in it is as good as an underscore.

    Raises:
        UsageError: no such method; the nearest names are suggested.
    """
    name = name.replace("-", "_")
    if name not in methods():
        raise UsageError(
            f"unknown method {name}", remedy=nearest(name, methods()) + " `shoestring methods` lists them all."
        )
    return methods()[name]


def module(name: str) -> ModuleType:
    """The method's module, imported now, and made known to the ecosystem by its room's `adopt`."""
    method = get(name)
    loaded = importlib.import_module(method.module)
    contract(method.room).adopt(loaded)
    return loaded


def load(name: str) -> Any:
    """The object a method provides (its config class, sampler, strategy ...)."""
    return getattr(module(name), get(name).provides)


def contract(room: str) -> Any:
    """The room's `_contract` module: `adopt`, `CHECKS` and the room's own verbs."""
    return importlib.import_module(f"{ROOMS}.{room}._contract")


def in_room(room: str) -> Iterator[str]:
    return (m.name for m in methods().values() if m.room == room)


def that_define(word: str) -> list[Method]:
    """The methods whose file defines `word`, a function or a constant; none of them is imported."""
    return [m for m in methods().values() if word in m.words]


def adopt_room(room: str) -> None:
    """Register every method of a room with the ecosystem; what `import shoestring.methods.<room>` does.

    A method of another package that cannot be imported is warned of and left out: it must not lock the room.
    """
    for name in in_room(room):
        try:
            module(name)
        except Exception as error:
            if get(name).module.startswith(f"{ROOMS}."):
                raise
            warnings.warn(f"the method {name} of {get(name).file} is left out: {error}", stacklevel=2)


def read(file: Path, package: str) -> Method:
    """The METHOD literal of one file, without importing it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    said = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "METHOD"
    ]
    if len(said) != 1:
        raise ShoestringError(f"{file} has {len(said)} METHOD literals", remedy="A method file has exactly one")
    room, name = file.parent.name, file.stem
    try:
        method = _value(said[0])
    except (ValueError, KeyError, TypeError) as error:
        raise ShoestringError(
            f"METHOD in {file} is not a literal", str(error), "Use only Method(...), Paper(...) and constants"
        ) from None
    unknown = set(method.saves) - set(RESOURCES)
    if unknown:
        raise ShoestringError(
            f"METHOD in {file} saves {', '.join(sorted(unknown))}", remedy="Known: " + ", ".join(RESOURCES)
        )
    return replace(
        method,
        name=name,
        room=room,
        about=ast.get_docstring(tree) or "",
        module=f"{package}.{room}.{name}",
        file=str(file),
        words=tuple(_defined(tree)),
    )


def _defined(tree: ast.Module) -> Iterator[str]:
    """Names of functions and constants of a file."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name):
                yield target.id


def _packages() -> Iterator[tuple[str, Path]]:
    yield ROOMS, _HOUSE
    from importlib.metadata import entry_points  # it takes a while, and only lists of methods need it

    for point in sorted(entry_points(group="shoestring.methods"), key=lambda p: p.name):
        spec = importlib.util.find_spec(point.value)
        for folder in spec.submodule_search_locations or () if spec else ():
            yield point.value, Path(folder)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _WORDS[node.func.id](*map(_value, node.args), **{k.arg: _value(k.value) for k in node.keywords if k.arg})
    return ast.literal_eval(node)

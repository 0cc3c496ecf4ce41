"""The two files of a new method, as stubs that load, say what is to be done, and fail until it is."""

from __future__ import annotations

import ast
import keyword
import re
from datetime import date
from pathlib import Path
from string import Template

from shoestring.core import catalog, claim
from shoestring.core.errors import UsageError, nearest
from shoestring.core.files import refuse_occupied, write_text

_NAME = re.compile(r"[a-z][a-z0-9_]*")

_METHOD = Template('''"""$Title: what it does and what that saves, in one sentence.

How it works
    1. The steps with their equations; a comment "eq. 4" stands at the line that computes it.

Where it bends
    What differs from the paper, and when not to use it.
"""

from __future__ import annotations

from typing import Any

from shoestring.core.method import Method, Paper

METHOD = Method(
    paper=Paper("The paper's title", "$month"),
    provides="${Name}Config",
    saves=(),
$traits)


class ${Name}Config:
    """What the room `$room` expects here; `shoestring explain $room` says what that is."""

    def __init__(self, **options: Any) -> None:
        raise NotImplementedError("$name is a stub: write ${Name}Config")


def example() -> ${Name}Config:
    """The configuration that checks, documentation and the first-time user run."""
    return ${Name}Config()
$words''')

_WORD = Template('''

def $word(*args: Any, **options: Any) -> Any:
    """A word every file of this room defines; `shoestring explain $room` lists them."""
    raise NotImplementedError("$name is a stub: write $word")
''')

_CLAIM = Template('''"""$Title beside its honest baseline: what is compared, in one line."""

from shoestring.core.claim import Claim
from shoestring.lab.arms import Arms

CLAIMS = (
    Claim(
        "quality",
        paper="the paper's figure exactly as it gives it",
        here="our smallest honest experiment: model, data, sizes, precision",
        measure="heldout_loss",
        arm="$name",
        against="baseline",
        expect="<= 1.0",
    ),
)


def run(arms: Arms) -> None:
    """One seed's round: open every arm, do the work in it, record the measure."""
    raise NotImplementedError("$name is a stub: write the experiment")
''')

_PROJECT = Template("""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "shoestring-$slug"
version = "0.1.0"
dependencies = ["shoestring"]

[project.entry-points."shoestring.methods"]
$package = "$package"

[tool.hatch.build.targets.wheel]
packages = ["src/$package"]
""")


def new(room: str, name: str, *, into: Path | None = None) -> list[Path]:
    """Write the stubs of the method `name`; returns the files written.

    In a checkout they stand where shoestring finds them. With `into`, or when shoestring is installed, a package of
    its own is written that joins through an entry point: to `into`, or to `shoestring-NAME` in the current folder.

    Raises:
        UsageError: an unknown room, a name that is taken or not a Python module's, or files in the way.
    """
    if room not in catalog.rooms():
        raise UsageError(f"unknown room {room}", remedy=nearest(room, catalog.rooms()))
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise UsageError(f"{name} is not a name for a method", remedy="Use small letters, digits and underscores")
    if name in catalog.methods() or name in catalog.rooms() or name.replace("_", "-") in claim.files():
        raise UsageError(f"the name {name} is taken", remedy=f"`shoestring explain {name}` shows by what")
    house = claim.FOLDER.parent
    if into is None and (house.parents[1] / "pyproject.toml").is_file():
        files = {
            house / "methods" / room / f"{name}.py": _method(room, name),
            claim.FOLDER / f"{name}.py": _claim(name),
        }
    else:
        top = into or Path(f"shoestring-{name.replace('_', '-')}")
        refuse_occupied(top)
        package = f"shoestring_{name}"
        inside = top / "src" / package
        files = {
            top / "pyproject.toml": _PROJECT.substitute(slug=name.replace("_", "-"), package=package),
            inside / "__init__.py": "",
            inside / room / "__init__.py": "",
            inside / room / f"{name}.py": _method(room, name),
            inside / "claims" / f"{name}.py": _claim(name),
        }
    for path in files:
        if path.exists():
            raise UsageError(f"{path} exists already", remedy="Choose another name")
    for path, text in files.items():
        write_text(path, text)
    return list(files)


def _method(room: str, name: str) -> str:
    words = "".join(_WORD.substitute(word=word, room=room, name=name) for word in _named(room, "WORDS"))
    lines = "".join(f'        "{trait}": "to be said",\n' for trait in _named(room, "TRAITS"))
    traits = f"    traits={{\n{lines}    }},\n" if lines else ""
    # A room whose neighbour asks for a certain class keeps a stub of its own.
    own = claim.FOLDER.parent / "methods" / room / "_stub.txt"
    stub = Template(own.read_text(encoding="utf-8")) if own.is_file() else _METHOD
    return stub.substitute(
        Title=name, name=name, room=room, Name=_camel(name), month=f"{date.today():%Y-%m}", words=words, traits=traits
    )  # fmt: skip


def _claim(name: str) -> str:
    return _CLAIM.substitute(Title=name, name=name)


def _named(room: str, what: str) -> tuple[str, ...]:
    """What the room's contract asks for under the name `what`, such as WORDS or TRAITS; read without importing it."""
    contract = claim.FOLDER.parent / "methods" / room / "_contract.py"
    for node in ast.parse(contract.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == what:
            return tuple(ast.literal_eval(node.value))
    return ()


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))

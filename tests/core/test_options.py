from __future__ import annotations

from pathlib import Path

from shoestring.core.options import Field, fields

SOURCE = '''
from dataclasses import dataclass, field
from typing import ClassVar
from elsewhere import Unknown
from shoestring.core.budget import Budget

class Base:
    """What is shared.

    Args:
        width, height: in numbers.
        name: what it is called,
            on two lines.
    """
    def __init__(self, width: int, *, height: int = 2 * 3, name: str = "x"): ...

class Derived(Base, Unknown):
    """One more.

    Args:
        depth: of it.
        name: another word.

    Returns:
        nothing: at all.
    """
    def __init__(self, depth: float = 0.5, **kwargs): ...

class Alone(Base):
    def __init__(self, only=None): ...

@dataclass
class Table:
    """A table.

    Attributes:
        rows: how many.
    """
    TYPE: ClassVar[str] = "t"
    rows: int = field(default=8, metadata={"help": "unread"})
    parts: list = field(default_factory=list)
'''


def test_arguments_are_read_with_those_of_bases(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(SOURCE)
    assert fields(file, "Derived") == [
        Field("depth", "float", 0.5, "of it.", "0.5"),
        Field("width", "int", None, "in numbers."),
        Field("height", "int", None, "in numbers.", "2 * 3"),
        Field("name", "str", "x", "another word.", "'x'"),
    ]
    assert [field.name for field in fields(file, "Alone")] == ["only"]
    assert fields(file, "Table") == [Field("rows", "int", 8, "how many.", "8"), Field("parts", "list", None, "")]
    assert fields(file, "Unknown") == []

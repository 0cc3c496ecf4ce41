from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoestring.core import catalog
from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.method import Paper

METHOD = '''"""Toy: does nothing.

How it works
    1. It does not.
       y = x                                                                                             (eq. 1)

Where it bends
    Everywhere.
"""
import no_such_package_at_all

METHOD = Method(
    paper=Paper("A title", "2025-02", code="owner/name"),
    provides="Toy",
    saves=("storage", "memory"),
    expects={"check_it": "it cannot"},
)
'''


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """An empty house; call it with a path and a text to write a file."""
    monkeypatch.setattr(catalog, "_HOUSE", tmp_path)
    monkeypatch.setattr(catalog, "_packages", lambda: iter([("toys", tmp_path)]))

    def write(path: str, text: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        (file.parent / "__init__.py").write_text('"""Rooms: the plate on the door.\n\nMore.\n"""')
        catalog.methods.cache_clear()
        catalog.rooms.cache_clear()
        return file

    yield write
    catalog.methods.cache_clear()
    catalog.rooms.cache_clear()


def test_a_method_is_a_file_and_is_not_imported(house: Callable[[str, str], Path]) -> None:
    file = house("room/toy.py", METHOD)
    found = catalog.methods()["toy"]
    assert (found.name, found.room, found.module, found.file) == ("toy", "room", "toys.room.toy", str(file))
    assert found.paper == Paper("A title", "2025-02", code="owner/name")
    assert (found.saves, found.expects, found.summary) == (
        ("storage", "memory"),
        {"check_it": "it cannot"},
        "does nothing.",
    )
    assert found.section("Where it bends") == "Everywhere."
    assert found.section("How it works").startswith("1. It does not.\n   y = x")
    assert found.section("No such heading") == ""
    assert catalog.rooms() == {"room": "Rooms: the plate on the door."}


def test_files_that_begin_with_a_line_are_no_methods(house: Callable[[str, str], Path]) -> None:
    house("room/toy.py", METHOD)
    house("room/_shared.py", "nothing = 1")
    house("claims/toy.py", "CLAIMS = ()")
    assert list(catalog.methods()) == ["toy"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("METHOD = ", "METHODS = "), "0 METHOD literals"),
        (("import no_such_package_at_all", "METHOD = 1"), "2 METHOD literals"),
        (('"A title"', "title()"), "not a literal"),
        (('"A title"', "open('x')"), "not a literal"),
        (('Paper("A title"', 'Papers("A title"'), "not a literal"),
        (("provides=", "provide="), "not a literal"),
        (('"storage", ', '"colour", '), "saves colour"),
    ],
)
def test_bad_literals(change: tuple[str, str], words: str, house: Callable[[str, str], Path]) -> None:
    house("room/toy.py", METHOD.replace(*change))
    with pytest.raises(ShoestringError, match=words) as error:
        catalog.methods()
    assert "toy.py" in str(error.value)


def test_one_name_one_method(house: Callable[[str, str], Path]) -> None:
    house("room/toy.py", METHOD)
    house("second/toy.py", METHOD)
    with pytest.raises(ShoestringError, match="the name toy is taken"):
        catalog.methods()


def test_functions_of_a_file_are_known_without_importing_it(house: Callable[[str, str], Path]) -> None:
    house("room/plain.py", METHOD + "\n\ndef example(): ...\n")
    house("room/toy_meter.py", METHOD + "\n\nclass A:\n    def price(self): ...\n\n\ndef measure(a, b, c): ...\n")
    assert [m.name for m in catalog.that_define("measure")] == ["toy_meter"]
    assert [m.name for m in catalog.that_define("example")] == ["plain"]
    assert not catalog.that_define("price")


def test_hyphens_are_underscores(house: Callable[[str, str], Path]) -> None:
    house("room/toy_meter.py", METHOD)
    assert catalog.get("toy-meter") is catalog.get("toy_meter")


def test_unknown_names_get_suggestions() -> None:
    name = next(iter(catalog.methods()))
    with pytest.raises(UsageError, match=f"Did you mean.*{name}"):
        catalog.get(name + "x")


@pytest.mark.parametrize("name", list(catalog.methods()))
def test_load_gives_what_the_method_provides(name: str) -> None:
    assert catalog.load(name).__name__ == catalog.get(name).provides
    assert name in catalog.in_room(catalog.get(name).room)

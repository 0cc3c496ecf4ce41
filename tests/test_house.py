"""The rules of the house: who may know whom, what every method owes, and what stays light."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoestring
from shoestring.core import catalog, claim

HOUSE = Path(shoestring.__file__).parent
ROOT = HOUSE.parents[1]
METHODS = list(catalog.methods())
OUTSIDE = ("core", "kernels", "models", "data", "training", "planner", "jobs", "cli")
IN_CHECKOUT = pytest.mark.skipif(not (ROOT / ".importlinter").is_file(), reason="needs the checkout")


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join([*map(str, paths), str(HOUSE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": places, "TQDM_DISABLE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


# ---------------------------------------------------------------- no method's name outside its own files


def is_number_type(name: str) -> bool:
    """Whether torch has a number type of that name, so that prose and arithmetic must be free to say it."""
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)


# Methods called like a word of English or of ours: prose and classes of the same name must be free to say it.
PLAIN_WORDS = ("miss", "mixed", "road", "lily")


def sources() -> Iterator[Path]:
    for package in OUTSIDE:
        yield from (p for p in sorted((HOUSE / package).rglob("*")) if p.suffix in (".py", ".j2", ".toml", ".h"))


def mentions(name: str, file: Path) -> list[str]:
    """Lines of `file` that know the method: the word anywhere; for a number type or plain word, as a string of code."""
    text = file.read_text(encoding="utf-8")
    if is_number_type(name) and file.parent == HOUSE / "kernels":
        return []  # where weight formats are at home, a format of that name is no method
    if (is_number_type(name) or name in PLAIN_WORDS) and file.suffix == ".py":
        tree = ast.parse(text)
        return [
            f"{file}:{node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value == name
        ]
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", re.IGNORECASE)
    return [f"{file}:{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if word.search(line)]


@pytest.mark.parametrize("name", METHODS)
def test_no_method_is_known_by_name(name: str) -> None:
    found = [line for file in sources() for line in mentions(name, file)]
    assert not found, "\n".join(found)


def test_a_mention_is_found(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    for text, name, count in (
        ("# then PaCA\n", "paca", 1), ("if name == 'paca': ...\n", "paca", 1), ("space = alpaca_case\n", "paca", 0),
        ('"""Sums in int8."""\nx = torch.int8\n', "int8", 0), ("load('int8')\n", "int8", 1),
        ("class Miss: ...\n", "miss", 0), ("load('miss')\n", "miss", 1),
    ):  # fmt: skip
        file.write_text(text)
        assert len(mentions(name, file)) == count, text


# ---------------------------------------------------------------- what every method owes


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_whole(name: str) -> None:
    method = catalog.get(name)
    assert method.section("How it works") and method.section("Where it bends")
    assert method.summary and method.saves and method.paper.title
    assert re.fullmatch(r"\d{4}-\d{2}", method.paper.date), method.paper.date
    others = set(catalog.rooms()) | set(METHODS)
    assert set(method.combines) <= others, "combines names rooms or methods"
    functions = {n.name for n in ast.parse(Path(method.file).read_text()).body if isinstance(n, ast.FunctionDef)}
    assert "example" in functions


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_claim_with_an_honest_record(name: str) -> None:
    files = [f for f in claim.files().values() if name in f.methods]
    assert files, f"no file of claims/ carries {name}"
    for file in files:
        record = claim.read_record(file)
        assert record is not None, f"{file.slug} has no record: shoestring claims run {file.slug}"
        assert record.standing != "edited", f"{file.record} was written by hand"
        if record.standing == "stale":
            warnings.warn(f"the record of {file.slug} is stale: shoestring claims run {file.slug}", stacklevel=1)


@pytest.mark.parametrize("slug", list(claim.files()))
def test_every_claim_is_stated_before_it_is_measured(slug: str) -> None:
    stated = claim.files()[slug]
    assert stated.about and stated.claims and all(m in METHODS for m in stated.methods)
    names = [c.name for c in stated.claims]
    assert len(set(names)) == len(names)
    for c in stated.claims:
        assert c.paper and c.here and (c.expect or c.cannot)
        assert c.by in ("ratio", "difference")
        if c.expect:
            c.met(1.0)
            assert c.measure and c.arm and c.against and c.arm != c.against


def test_every_room_has_a_plate_and_a_contract() -> None:
    for room, plate in catalog.rooms().items():
        assert plate.endswith("."), room
        assert catalog.contract(room).CHECKS and callable(catalog.contract(room).adopt)


def test_every_record_belongs_to_a_claim() -> None:
    slugs = {file.stem for file in (claim.FOLDER / "records").glob("*.json")}
    assert slugs <= set(claim.files()), slugs - set(claim.files())


# ---------------------------------------------------------------- light


@pytest.mark.parametrize(
    "code",
    ["import shoestring", "import shoestring.core.catalog as c; c.methods()", "import shoestring.planner.cost",
     "import shoestring.core.ledger", "from shoestring import cli; cli.exit_code(['--help'])",
     "from shoestring import cli; cli.exit_code(['methods'])"],
)  # fmt: skip
def test_light_imports(code: str) -> None:
    done = python(f"{code}\nimport sys\nprint([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def lint_imports(config: Path, source: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over the package in `source`, whatever else is installed under its name."""
    pytest.importorskip("importlinter")
    code = (
        f"import os, sys\nos.chdir({str(config)!r})\n"
        # An editable installation finds its package before any path is searched.
        "sys.meta_path = [f for f in sys.meta_path if isinstance(f, type)]\n"
        f"sys.path.insert(0, {str(source)!r})\n"
        "from importlinter.cli import lint_imports\nsys.exit(lint_imports(no_cache=True))"
    )
    return python(code)


@IN_CHECKOUT
def test_import_contracts_are_kept() -> None:
    done = lint_imports(ROOT, HOUSE.parent)
    assert done.returncode == 0, done.stdout[-3000:]


@IN_CHECKOUT
def test_import_contracts_can_break(tmp_path: Path) -> None:
    shutil.copytree(HOUSE, tmp_path / "shoestring", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    method = next(iter(catalog.methods().values()))
    breaks = {
        "core/text.py": "import shoestring.jobs.runs",
        "planner/cost.py": "def late():\n    import torch",
        "cli/runs.py": f"def late():\n    import {method.module}",
    }
    for file, line in breaks.items():
        with (tmp_path / "shoestring" / file).open("a") as end:
            end.write(f"\n{line}\n")
    done = lint_imports(tmp_path, tmp_path)
    assert done.returncode == 1
    for contract in ("Floors", "Doors", "Light: core"):
        assert re.search(rf"^{contract}.* BROKEN", done.stdout, re.MULTILINE), done.stdout[-3000:]


# ---------------------------------------------------------------- other packages


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A package of somebody else, as pip would leave it: a copy of an own method under another name."""
    own = next(m for m in catalog.methods().values() if m.default)
    package = tmp_path / "guest_methods"
    (package / own.room).mkdir(parents=True)
    (package / "claims").mkdir()
    for init in (package, package / own.room):
        (init / "__init__.py").touch()
    shutil.copy(own.file, package / own.room / "guest.py")
    (package / "claims" / "guest.py").write_text(
        '"""A guest."""\nfrom shoestring.core.claim import Claim\n'
        'CLAIMS = (Claim("c", paper="p", here="h", measure="m", cannot="all"),)\n'
    )
    info = tmp_path / "guest_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[shoestring.methods]\nguest = guest_methods\n")
    return tmp_path


def test_a_package_of_somebody_else_joins(guest: Path) -> None:
    done = python("from shoestring import cli; cli.exit_code(['methods']); cli.exit_code(['explain', 'guest'])", guest)
    assert re.search(r"^guest  ", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert "Claim     no record" in done.stdout
    done = python("import sys; from shoestring import cli; sys.exit(cli.exit_code(['check', 'guest']))", guest)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"(\d+) of \1 checks hold\n", done.stdout)


def test_a_name_that_is_taken_is_refused(guest: Path) -> None:
    own = next(m for m in catalog.methods().values() if m.default)
    room = guest / "guest_methods" / own.room
    (room / "guest.py").rename(room / f"{own.name}.py")
    done = python("from shoestring import cli; cli.exit_code(['methods'])", guest)
    assert f"the name {own.name} is taken" in done.stderr and "Traceback" not in done.stderr


def test_a_guest_in_a_room_that_does_not_exist_is_refused(guest: Path) -> None:
    own = next(m for m in catalog.methods().values() if m.default)
    (guest / "guest_methods" / own.room).rename(guest / "guest_methods" / "kitchen")
    done = python("from shoestring import cli; cli.exit_code(['methods'])", guest)
    assert "the room kitchen, which does not exist" in done.stderr and "Traceback" not in done.stderr

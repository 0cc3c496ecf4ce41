from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoestring import cli
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.jobs.measure import MeasureRequest, measure, meters
from shoestring.jobs.run import run_file

METER = '''"""Toy meter: counts what it is given.

How it works
    1. It counts.                                                                                            (eq. 1)

Where it bends
    Nowhere.
"""
from shoestring.core.method import Method, Paper

METHOD = Method(paper=Paper("A title", "2025-02"), provides="example", saves=("parameters",))


def example(): ...


def measure(source, options, work):
    (work.folder / "note").write_text("kept")
    if options.get("breaks"):
        raise RuntimeError("unplugged")
    rows = [{"part": "train", "examples": len(work.train)}, {"part": "valid", "examples": len(work.valid)}]
    return {"folder_of_model": source.name, "share": 0.123456, "bounds": [1, None], "rows": rows,
            "given": dict(options), "steps": dict(work.training), "seed": work.seed, "advice": "Count on it."}
'''  # fmt: skip


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A meter beside the house's own."""
    folder = tmp_path / "toy_meters"
    (folder / "adapters").mkdir(parents=True)
    (folder / "adapters" / "toy_meter.py").write_text(METER)
    own = catalog._packages
    monkeypatch.setattr(catalog, "_packages", lambda: [*own(), ("toy_meters", folder)])
    monkeypatch.syspath_prepend(str(tmp_path))
    catalog.methods.cache_clear()
    yield
    catalog.methods.cache_clear()


def test_meters_are_listed_with_what_they_measure() -> None:
    assert {"name": "toy_meter", "summary": "counts what it is given."} in meters()
    assert {m["name"] for m in meters()} < set(catalog.methods())


def test_a_meter_gets_model_options_data_and_a_folder(tiny: Path, data: Path, tmp_path: Path) -> None:
    request = MeasureRequest("toy-meter", str(tiny), str(data), {"d": 5}, {"max_steps": 3}, seed=2)
    found = measure(request, out=tmp_path / "out")
    assert (found["meter"], found["given"], found["steps"], found["seed"]) == (
        "toy_meter",
        {"d": 5},
        {"max_steps": 3},
        2,
    )
    assert found["folder_of_model"] == tiny.name
    assert all(row["examples"] > 0 for row in found["rows"])
    assert (tmp_path / "out" / "run" / "work" / "note").read_text() == "kept"
    assert json.loads((tmp_path / "out" / "run" / "result.json").read_text()) == found
    said: list[str] = []
    assert measure(request, out=tmp_path / "out", resume=True, say=said.append) == found
    again = run_file(tmp_path / "out" / "run" / "config.resolved.yaml", out=tmp_path / "again")
    assert {**again, "folder": ""} == {**found, "folder": ""}, "what it resolved to runs again"
    assert "nothing is left to do" in said[0]


def test_an_interrupted_meter_finds_its_folder_again(tiny: Path, data: Path, tmp_path: Path) -> None:
    request = MeasureRequest("toy_meter", str(tiny), str(data), {"breaks": True})
    for resume in (False, True):
        with pytest.raises(RuntimeError, match="unplugged"):
            measure(request, out=tmp_path / "out", resume=resume)
        assert (tmp_path / "out" / "run" / "work" / "note").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"meter": "toy_metre"}, "Did you mean.*toy_meter"),
        ({"meter": "lora"}, "lora measures nothing"),
        ({"model": "/no/such"}, "/no/such"),
    ],
)
def test_refused_before_a_folder_is_made(change: dict, words: str, tiny: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        measure(MeasureRequest(**{"meter": "toy_meter", "model": str(tiny), "data": str(data), **change}), out="out")
    assert not Path("out").exists()


def test_the_command(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.exit_code(["measure"]) == 0
    assert "toy_meter" in capsys.readouterr().out
    words = ["measure", "toy-meter", str(tiny), "--data", str(data), "--option", "d=5"]
    assert cli.exit_code([*words, "--out", "a"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["share", "0.1235"] in lines and ["bounds", "1,", "-"] in lines and ["given", "d:", "5"] in lines
    assert ["part", "examples"] in lines and lines[-1] == ["Count", "on", "it."]
    assert cli.exit_code([*words, "--out", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["given"] == {"d": 5}
    assert cli.exit_code(["measure", "lora", str(tiny)]) == 2

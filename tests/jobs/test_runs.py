from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.core.errors import UsageError
from shoestring.jobs import runs as job
from shoestring.jobs.runs import finished, open_run, runs

DIES = """
import os, sys
from shoestring.jobs.runs import open_run
with open_run(sys.argv[1], "fit", {"a": 1}):
    os.kill(os.getpid(), 9)
"""


def standing(home: Path) -> dict[str, str]:
    return {Path(row["folder"]).name: row["status"] for row in runs(home)}


def test_how_a_run_stands(tmp_path: Path) -> None:
    assert runs(tmp_path) == [] and runs(tmp_path / "none") == []
    with open_run(tmp_path / "good", "train", {"seed": 3, "model": "m"}) as run:
        assert standing(tmp_path) == {"good": "running"}
        assert run.read("config.resolved.yaml") == {"verb": "train", "seed": 3, "model": "m"}
        assert run.read("result.json") is None
    with pytest.raises(ValueError), open_run(tmp_path / "bad", "fit", {}):
        raise ValueError("went wrong")
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "stopped", "fit", {}):
        raise KeyboardInterrupt
    with open_run(tmp_path / "verdict", "fit", {}) as run:
        run.note(status="over budget")
    assert standing(tmp_path) == {
        "good": "done", "bad": "failed", "stopped": "interrupted", "verdict": "over budget",
    }  # fmt: skip
    bad = next(row for row in runs(tmp_path) if row["status"] == "failed")
    assert bad["error"] == "went wrong" and bad["kind"] == "fit" and bad["created"]


def test_the_newest_comes_first(tmp_path: Path) -> None:
    for name, created in (("old", "2024-01-01"), ("new", "2026-01-01"), ("middle", "2025-01-01")):
        with open_run(tmp_path / name, "fit", {}) as run:
            run.note(created=created)
    assert [Path(row["folder"]).name for row in runs(tmp_path)] == ["new", "middle", "old"]


def test_a_run_whose_process_died_is_interrupted_and_can_be_resumed(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "run1")], check=False)
    assert died.returncode == -9
    assert json.loads((tmp_path / "run1" / "run" / "manifest.json").read_text())["status"] == "running"
    assert standing(tmp_path) == {"run1": "interrupted"} and finished(tmp_path / "run1", "fit", {}) is None
    with open_run(tmp_path / "run1", "fit", {"a": 1}, resume=True):
        assert standing(tmp_path) == {"run1": "running"}
    assert standing(tmp_path) == {"run1": "done"}


@pytest.mark.parametrize("text", ["", "{", "\x00", "[1, 2"])
def test_an_unreadable_manifest_hides_no_other_run(text: str, tmp_path: Path) -> None:
    for name in ("broken", "whole"):
        with open_run(tmp_path / name, "fit", {}):
            pass
    (tmp_path / "broken" / "run" / "manifest.json").write_text(text)
    assert standing(tmp_path) == {"broken": "unreadable", "whole": "done"}
    with pytest.raises(UsageError, match="manifest.json cannot be read"):
        finished(tmp_path / "broken", "fit", {})


def test_finished_is_for_runs_with_a_result(tmp_path: Path) -> None:
    assert (
        finished(None, "fit", {}) is None
        and finished(tmp_path, "fit", {}) is None
        and finished(tmp_path / "none", "fit", {}) is None
    )
    with open_run(tmp_path / "a", "fit", {}) as run:
        run.write("result.json", {"loss": 1.5})
        assert finished(tmp_path / "a", "fit", {}) is None, "it is still running"
    assert finished(tmp_path / "a", "fit", {}) == {"loss": 1.5}
    with pytest.raises(UsageError, match="budget"):
        finished(tmp_path / "a", "fit", {"budget": "time=1m"})
    with pytest.raises(ValueError), open_run(tmp_path / "b", "fit", {}) as run:
        run.write("result.json", {"loss": 1.5})
        raise ValueError
    assert finished(tmp_path / "b", "fit", {}) is None


def test_only_the_same_request_is_resumed(tmp_path: Path) -> None:
    request = {"model": "m", "options": {"r": 8}, "keep": 0.9, "path": Path("x")}
    with pytest.raises(ValueError), open_run(tmp_path / "a", "fit", {**request, "path": "x"}):
        raise ValueError
    with open_run(tmp_path / "a", "fit", request, resume=True):
        pass
    for change in ({"options": {"r": 16}}, {"keep": 0.8}, {"new": 1}):
        key = next(iter(change))
        with (
            pytest.raises(UsageError, match=f"was started with {key}="),
            open_run(tmp_path / "a", "fit", {**request, **change}, resume=True),
        ):
            pass
    with (
        pytest.raises(UsageError, match="verb=fit, and now verb=train"),
        open_run(tmp_path / "a", "train", request, resume=True),
    ):
        pass


def test_places_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(UsageError, match="is not empty"), open_run(tmp_path / name, "fit", {}):
            pass
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["diary.txt"]
    with pytest.raises(UsageError, match="holds no run to resume"), open_run(tmp_path / "full", "fit", {}, resume=True):
        pass
    with open_run(tmp_path / "a", "fit", {}):
        pass
    with pytest.raises(UsageError, match="already holds a run"), open_run(tmp_path / "a", "fit", {}):
        pass


def test_a_folder_without_a_name_is_made_below_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with open_run(None, "fit", {}, label="../my model!") as run:
            assert run.folder.parent == job.HOME and run.folder.name.startswith("my-model-")
    assert len(runs()) == 2

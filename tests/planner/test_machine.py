from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from shoestring.planner import machine as planner


def test_the_floor_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path))
    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="noise\n123456789\n")

    monkeypatch.setattr(planner.subprocess, "run", run)
    first = planner.machine()
    assert first.floor == planner.machine().floor == 123456789 and len(asked) == 1
    assert first.cores >= 1 and first.memory > 100e6
    file = tmp_path / "floor.json"
    # Other versions, a damaged file, a file of another kind: measured again.
    for text in (json.dumps({"key": {"torch": "0"}, "bytes": 1}), "{", "{}", json.dumps({"key": 1})):
        file.write_text(text)
        assert planner.machine().floor == 123456789
    assert len(asked) == 5


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_a_memory_that_is_no_mapping_is_measured_again(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path))
    monkeypatch.setattr(
        planner.subprocess, "run", lambda command, **o: subprocess.CompletedProcess(command, 0, stdout="5\n")
    )
    (tmp_path / "floor.json").write_text(text)
    assert planner.machine().floor == 5

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from shoestring.core.errors import ShoestringError
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


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise ShoestringError(f"Writing {path} failed: permission denied")

    done = subprocess.CompletedProcess([], 0, stdout="7\n")
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path))
    monkeypatch.setattr(planner.subprocess, "run", lambda command, **o: done)
    monkeypatch.setattr(planner, "write_text", refuse)
    assert planner.machine().floor == 7


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


def test_bandwidth_is_what_a_pass_over_memory_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_READ", 1 << 20)
    clock = iter([0.0, 1.0, 5.0, 5.25, 9.0, 10.0])
    monkeypatch.setattr(planner, "_PASSES", 3)
    monkeypatch.setattr(planner.time, "perf_counter", lambda: next(clock))
    assert planner.bandwidth(3) == pytest.approx((1 << 20) / 0.25, rel=1e-5), "the fastest pass counts"


def test_every_byte_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_READ", 1000)
    read: list[tuple[int, int]] = []

    class Search:
        def __call__(self, start: int, byte: int, count: int) -> None:
            read.append((start, count))

    monkeypatch.setattr(planner.ctypes, "CDLL", lambda name: type("C", (), {"memchr": Search()}))
    planner.bandwidth(3)
    parts = sorted(set(read))
    assert [count for _, count in parts] == [334] * 3
    assert [b - a for (a, _), (b, _) in zip(parts, parts[1:])] == [334, 334]


def test_the_engines_floor_has_no_torch_in_it() -> None:
    assert 10e6 < planner.engine_floor() < 150e6

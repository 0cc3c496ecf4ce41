"""Jobs on tiny models: what takes a process of its own is replaced, except where a test says otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from job_cases import fake_at_work

from shoestring.jobs import fit as fit_job
from shoestring.planner import machine


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No process is started to measure; the cache is the test's own."""
    monkeypatch.setattr(machine, "_floor", lambda: 500_000_000)
    monkeypatch.setattr(fit_job, "at_work", fake_at_work)
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def digest() -> Callable[[Path], str]:
    """Names and contents of everything below a folder, as one word."""

    def of(folder: Path) -> str:
        whole = hashlib.sha256()
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            whole.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
        return whole.hexdigest()

    return of

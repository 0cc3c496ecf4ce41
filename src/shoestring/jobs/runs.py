"""A run: a folder with the resolved request, ledger, logs, checkpoints, result and report.

OUT/
  model/                      the result, whole or absent
  report.html
  run/manifest.json           what was asked, by what versions, and how it stands
  run/config.resolved.yaml    the request in full: `shoestring run` executes it again
  run/plan.json  run/ledger.json  run/metrics.jsonl  run/result.json  run/log.txt
  run/work/                   steps in progress and their checkpoints
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from shoestring.core import probes
from shoestring.core.errors import UsageError
from shoestring.core.files import locked, write_text

HOME = Path("runs")
RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"


@dataclass(frozen=True)
class Run:
    """An open run folder."""

    folder: Path

    @property
    def inside(self) -> Path:
        return self.folder / "run"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def work(self) -> Path:
        return self.inside / "work"

    def manifest(self) -> dict[str, Any]:
        return _read(self.inside / "manifest.json")

    def note(self, **changes: Any) -> None:
        """Change the manifest in one step."""
        write_json(self.inside / "manifest.json", {**self.manifest(), **changes})

    def write(self, name: str, data: Any) -> None:
        """Write `run/<name>`, JSON or YAML by its ending."""
        path = self.inside / name
        if path.suffix == ".yaml":
            write_text(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
        else:
            write_json(path, data)

    def read(self, name: str) -> Any:
        """The content of `run/<name>`, None when it was not written."""
        path = self.inside / name
        return _read(path) if path.is_file() else None


@contextmanager
def open_run(
    out: str | Path | None, kind: str, request: Mapping[str, Any], *, resume: bool = False, label: str = ""
) -> Iterator[Run]:
    """A new run folder, or the one to resume; its manifest says how the block ended.

    Args:
        out: the folder; None names one below `runs/`.
        kind: the verb.
        request: everything that was asked for; a resumed run must have been asked for the same.

    Raises:
        UsageError: the folder holds another run or anything else, is in use, or has nothing to resume.
    """
    folder = Path(out) if out else _fresh(label or kind)
    run = Run(folder)
    held = (run.inside / "manifest.json").is_file()
    if not resume:
        if held:
            raise UsageError(
                f"{folder} already holds a run", "it would be mixed with the new one",
                "Choose another --out, or continue it with --resume",
            )  # fmt: skip
        if folder.exists() and not _unused(folder):
            raise UsageError(f"{folder} is not empty", "a run needs a folder of its own", "Choose another --out")
    elif not held:
        raise UsageError(f"{folder} holds no run to resume", remedy="Give the folder of an interrupted run as --out")
    with locked(run.inside / "lock", wait=False):
        if resume:
            _same(run.read("config.resolved.yaml"), {"verb": kind, **request}, folder)
            run.note(status=RUNNING, resumed=_now())
        else:
            run.write("config.resolved.yaml", {"verb": kind, **request})
            write_json(
                run.inside / "manifest.json",
                {
                    "kind": kind, "status": RUNNING, "created": _now(), "command": _command(),
                    "seed": request.get("seed"), "versions": dict(probes.fingerprint()),
                },
            )  # fmt: skip
        started = time.monotonic()
        try:
            yield run
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", 1) in (130, 143)
            run.note(
                status=INTERRUPTED if stopped else FAILED, error=str(error) or type(error).__name__, finished=_now()
            )
            raise
        run.note(**{"status": DONE, **_kept(run)}, finished=_now(), seconds=round(time.monotonic() - started, 1))


def finished(out: str | Path | None, kind: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of the run in `out` if it has ended with one, else None.

    Raises:
        UsageError: it was asked for something else.
    """
    run = Run(Path(out or ""))
    if out is None or not (run.inside / "manifest.json").is_file():
        return None
    if run.manifest()["status"] in (RUNNING, FAILED, INTERRUPTED):
        return None
    _same(run.read("config.resolved.yaml"), {"verb": kind, **request}, run.folder)
    return run.read("result.json")


def runs(home: Path = HOME) -> list[dict[str, Any]]:
    """Every run below `home`, newest first: folder, kind, status, created. A run whose process died is interrupted."""
    found = []
    for file in home.glob("*/run/manifest.json"):
        try:
            manifest = _read(file)
        except UsageError as error:
            manifest = {"kind": "?", "status": "unreadable", "created": "", "error": str(error)}
        if manifest["status"] == RUNNING and not _held(file.parent / "lock"):
            manifest["status"] = INTERRUPTED
        found.append({"folder": str(file.parents[1]), **manifest})
    return sorted(found, key=lambda m: m["created"], reverse=True)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def _kept(run: Run) -> dict[str, Any]:
    # A run may have noted a verdict of its own (over budget, below quality) before it ended.
    status = run.manifest()["status"]
    return {} if status == RUNNING else {"status": status}


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read", str(error).split("\n")[0], "Start a new run") from None


def _same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    now = json.loads(json.dumps(now, default=str))
    for key in {*before, *now} - {"out"}:
        if before.get(key) != now.get(key):
            raise UsageError(
                f"{folder} was started with {key}={before.get(key)}, and now {key}={now.get(key)} is asked for",
                "a resumed run must be the same one", "Give the same arguments, or another --out",
            )  # fmt: skip


def _unused(folder: Path) -> bool:
    """Empty, or left by a process that died before it had written its manifest."""
    if not folder.is_dir():
        return False
    begun = {folder / "run", folder / "run" / "lock", folder / "run" / "config.resolved.yaml"}
    return set(folder.rglob("*")) <= begun


def _held(lock: Path) -> bool:
    try:
        with locked(lock, wait=False):
            return False
    except UsageError:
        return True


def _fresh(label: str) -> Path:
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = HOME / f"{word}-{stamp}", 2
    while folder.exists():
        folder, number = HOME / f"{word}-{stamp}-{number}", number + 1
    return folder


def _command() -> str:
    import shlex

    return (
        " ".join(["shoestring", *map(shlex.quote, sys.argv[1:])])
        if Path(sys.argv[0]).stem == "shoestring"
        else "python"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

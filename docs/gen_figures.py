"""Puts measured figures into the pages about claims and performance, while the site is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mkdocs_gen_files

from shoestring.core import claim
from shoestring.jobs import claim_table

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def fill(page: str, mark: str, text: str) -> None:
    with mkdocs_gen_files.open(page, "r") as file:
        before = file.read()
    if mark not in before:
        raise SystemExit(f"docs/{page} has no {mark}")
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(before.replace(mark, text))


def claims() -> str:
    parts = []
    for slug, claim_file in claim.files().items():
        record = claim.read_record(claim_file)
        parts.append(f"### {slug}\n\n{claim_file.about}\n")
        rows = [row for row in claim_table.rows() if row["slug"] == slug]
        lines = ["| claim | what is compared | expected | measured | verdict | the paper says |", "| --- " * 6 + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in claim_table.cells(row)) + " |" for row in rows]
        parts.append("\n".join(lines) + "\n")
        if record is not None:
            machine = record.about["machine"]["machine"]
            parts.append(
                f"`{record.about['command']}`, {record.about['date']}, {machine['processor']}, "
                f"{machine['cores']} cores, {record.about['seconds']:.0f} s, commit {record.about['commit'][:12]}.\n"
            )
    return "\n".join(parts)


def benchmarks() -> str:
    files = sorted(RESULTS.glob("*.json")) if RESULTS.is_dir() else []
    if not files:
        return "No figures are kept in this checkout: `make bench` measures them on your machine."
    parts = []
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        parts.append(f"### {file.stem}\n\n" + "\n".join(bullets(found)) + "\n")
    return "\n".join(parts)


def bullets(found: Any, indent: int = 0) -> list[str]:
    """Plain data as nested bullets; raw values of every run are left to the file."""
    lines = []
    for key, value in found.items() if isinstance(found, dict) else ():
        if key == "runs":
            continue
        if isinstance(value, dict):
            lines += [f"{' ' * indent}- {key}", *bullets(value, indent + 4)]
        elif isinstance(value, list):
            lines += [f"{' ' * indent}- {key}: {', '.join(map(short, value))}"] if len(value) <= 12 else []
        else:
            lines.append(f"{' ' * indent}- {key}: {short(value)}")
    return lines


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"`{value}`" if isinstance(value, str) else str(value)


fill("claims.md", "<!-- claims -->", claims())
fill("performance.md", "<!-- benchmarks -->", benchmarks())

"""Writes the README's tables from the catalog and the records of the claims; `--check` only says if they differ."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from shoestring.core import catalog, claim
from shoestring.jobs import claim_table

README = Path(__file__).resolve().parents[1] / "README.md"
MARKED = re.compile(r"(<!-- (\w+):start -->\n).*?(<!-- \2:end -->)", re.DOTALL)


def methods() -> str:
    """Every method: name, room, what it does, what it saves, its paper, how its claims stand."""
    rows = [
        (
            f"`{m.name}`",
            m.room,
            m.summary.rstrip("."),
            ", ".join(m.saves),
            f"[{m.paper.date[:4]}](https://arxiv.org/abs/{m.paper.arxiv})" if m.paper.arxiv else m.paper.date[:4],
            claim.state_of(m.name),
        )
        for m in catalog.methods().values()
    ]
    return markdown(("method", "room", "what it does", "saves", "paper", "claims"), rows)


def claims() -> str:
    """Every claim: what is compared, the bound it must meet, what was measured."""
    rows = [claim_table.cells(row)[:5] for row in claim_table.rows()]
    return markdown(("claim", "what is compared", "expected", "measured: median (range over seeds)", "verdict"), rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


TABLES = {"methods": methods, "claims": claims}


def written(text: str) -> str:
    """`text` with every marked table made anew."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when a table is out of date")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = written(before)
    if after == before:
        return
    if check:
        sys.exit("the README's tables are out of date: run `make tables`")
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()

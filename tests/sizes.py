"""Prints how long every part is beside its mark: guidance, not law. `make sizes` runs it."""

from __future__ import annotations

from pathlib import Path

HOUSE = Path(__file__).parents[1] / "src" / "shoestring"
MARKS = [
    ("core, together", ["core/*.py"], 1200, True),
    ("a contract", ["methods/*/_contract.py"], 200, False),
    ("a method", ["methods/*/[!_]*.py"], 400, False),
    ("a command", ["cli/[!_]*.py"], 60, False),
    ("a claim", ["claims/[!_]*.py"], 120, False),
    ("anything else", ["*/*.py"], 400, False),
]


def lines(file: Path) -> int:
    """Lines of code, prose and space alike: all of it is read."""
    return len(file.read_text(encoding="utf-8").splitlines())


def main() -> None:
    """One line for each mark, and one for each file above it."""
    seen: set[Path] = set()
    for what, patterns, mark, together in MARKS:
        files = [file for pattern in patterns for file in sorted(HOUSE.glob(pattern)) if file not in seen]
        seen |= set(files)
        sizes = {file: lines(file) for file in files}
        largest = sum(sizes.values()) if together else max(sizes.values(), default=0)
        print(f"{what:16} mark {mark:5}  {'sum' if together else 'largest'} {largest:5}  {len(files)} files")
        for file, size in sizes.items():
            if size > mark and not together:
                print(f"{'':16} {size:5}  {file.relative_to(HOUSE)}")


if __name__ == "__main__":
    main()

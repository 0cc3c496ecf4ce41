"""Prints lines of code (no blank lines, comments or docstrings) by package and file, beside the sizes aimed at.

The sizes are guidance, not law: a file well above its mark wants a second look.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "shoestring"
PACKAGES = {"core": 1200}
SKIP = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(text: str) -> int:
    """Lines that hold at least one token which is no comment, blank or docstring."""
    used = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in SKIP
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                used -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(used)


def mark(file: Path) -> int | None:
    """The size aimed at for one file, None where there is none."""
    package = file.relative_to(SOURCE).parts[0]
    if file.name == "_contract.py":
        return 200
    if package == "methods" and not file.name.startswith("_"):
        return 400
    if package == "cli" and not file.name.startswith("_"):
        return 60
    return None


def main() -> None:
    files = {file: lines_of_code(file.read_text(encoding="utf-8")) for file in sorted(SOURCE.rglob("*.py"))}
    packages: dict[str, dict[Path, int]] = defaultdict(dict)
    for file, size in files.items():
        parts = file.relative_to(SOURCE).parts
        packages[parts[0] if len(parts) > 1 else "shoestring"][file] = size
    for package, inside in packages.items():
        aimed = f"  of {PACKAGES[package]}" if package in PACKAGES else ""
        print(f"{sum(inside.values()):6}  {package}{aimed}")
        for file, size in inside.items():
            aim = mark(file)
            over = f"  above its mark of {aim}" if aim and size > aim else ""
            print(f"{size:10}  {file.relative_to(SOURCE)}{over}")
    print(f"{sum(files.values()):6}  in all")


if __name__ == "__main__":
    main()

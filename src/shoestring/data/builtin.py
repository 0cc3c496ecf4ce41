"""A data set that is on every machine with Python: signatures of the standard library and their documentation."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

from shoestring.core.errors import UsageError
from shoestring.data.corpus import Example

NAME = "python-docs"
SHORTEST, LONGEST = 20, 600
# Tests, demonstrations and jokes, lists of topics, and what later versions no longer have.
LEFT_OUT = {"antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo"}
# One module under several names belongs in one part of a split.
TOGETHER = {"posixpath": "os", "ntpath": "os", "genericpath": "os", "posix": "os", "nt": "os", "cmath": "math"}


def python_docs() -> list[Example]:
    """Signature -> documentation pairs of this Python's standard library, the same ones each time.

    The sources are read, not imported; only modules without a source (`math`, `builtins`) are imported. The group is
    the top-level module. Documentation that occurs twice, up to case, spaces and punctuation, is kept once, and so is
    documentation of one module that shares half of its phrases or more with another.

    Raises:
        UsageError: this Python carries no library sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    repeats = _Repeats()
    examples: list[Example] = []
    for name in sorted(sys.stdlib_module_names - LEFT_OUT):
        if name.startswith("_"):
            continue
        for title, signature, documentation in _module(name, root):
            answer = _shortened(documentation)
            group = TOGETHER.get(name, name)
            if len(answer) < SHORTEST or repeats(answer, group):
                continue
            question = f"Write the docstring of `{title}`:\n\n```python\n{signature}\n```"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            examples.append(Example(messages, group=group, line=len(examples) + 1))
    if len(examples) < 100:
        raise UsageError(
            f"{NAME} found only {len(examples)} documented functions in {root}",
            "this Python was installed without the sources of its library",
            "Use a Python with its sources, or give a data file with --data",
        )
    return examples


_Entry = tuple[str, str, str]  # qualified name, signature, documentation


def _module(name: str, root: Path) -> Iterator[_Entry]:
    if (root / name).is_dir():
        for path in sorted((root / name).rglob("*.py")):
            parts = [*path.relative_to(root).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            if not any(part.startswith("_") or part in ("test", "tests", "idle_test") for part in parts):
                yield from _source(path, ".".join(parts))
    elif (root / f"{name}.py").is_file():
        yield from _source(root / f"{name}.py", name)
    elif name in sys.builtin_module_names or _is_extension(name):
        yield from _compiled(importlib.import_module(name))


def _is_extension(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return bool(found and found.origin and found.origin.endswith(tuple(EXTENSION_SUFFIXES)))


def _source(path: Path, module: str) -> Iterator[_Entry]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    yield from _definitions(tree.body, module)


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[_Entry]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform
            yield from _definitions(node.body + node.orelse, prefix)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        title = f"{prefix}.{node.name}"
        documentation = ast.get_docstring(node)
        if documentation:
            yield title, _signature(node), documentation
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, title)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
    if isinstance(node, ast.ClassDef):
        arguments = [ast.unparse(base) for base in [*node.bases, *node.keywords]]
        made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        inside = f"\n    def __init__({ast.unparse(made.args)}): ..." if made else " ..."
        return f"{decorators}class {node.name}" + (f"({', '.join(arguments)})" if arguments else "") + ":" + inside
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{decorators}{keyword} {node.name}({ast.unparse(node.args)}){returns}: ..."


def _compiled(module: ModuleType) -> Iterator[_Entry]:
    for name, item in sorted(vars(module).items()):
        # Hooks are there to be replaced, so what stands under their names differs between programs.
        if (
            name.startswith("_")
            or name.endswith("hook")
            or (isinstance(item, type) and item.__module__ != module.__name__)
        ):
            continue
        title = f"{module.__name__}.{name}"
        yield from _described(title, name, item)
        if isinstance(item, type):
            for inner, member in sorted(vars(item).items()):
                if not inner.startswith("_"):
                    yield from _described(f"{title}.{inner}", inner, member)


def _described(title: str, name: str, item: Any) -> Iterator[_Entry]:
    signature, documentation = getattr(item, "__text_signature__", None), getattr(item, "__doc__", None)
    if callable(item) and isinstance(signature, str) and isinstance(documentation, str):
        signature = re.sub(r"\$(?:module|type)(?:, /)?(?:, )?", "", signature).replace("$", "")
        keyword = "class" if isinstance(item, type) else "def"
        yield title, f"{keyword} {name}{signature}: ...", inspect.cleandoc(documentation)


class _Repeats:
    """Says whether a documentation was there before: in the same words, or in nearly the same in another group."""

    def __init__(self) -> None:
        self.exact: set[tuple[str, ...]] = set()
        self.phrases: list[tuple[str, int]] = []  # group and number of phrases of each kept documentation
        self.holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def __call__(self, documentation: str, group: str) -> bool:
        words = tuple(re.findall(r"\w+", documentation.lower()))
        phrases = set(zip(words, words[1:], words[2:])) or {words}
        shared = Counter(index for phrase in phrases for index in self.holders[phrase])
        near = any(
            self.phrases[index][0] != group and 2 * count >= min(len(phrases), self.phrases[index][1])
            for index, count in shared.items()
        )
        if near or words in self.exact:
            return True
        for phrase in phrases:
            self.holders[phrase].append(len(self.phrases))
        self.exact.add(words)
        self.phrases.append((group, len(phrases)))
        return False


def _shortened(documentation: str) -> str:
    """The first paragraphs that fit, without the interactive examples that follow them; empty when none fits."""
    kept = ""
    for paragraph in re.split(r"\n\s*\n", documentation.strip()):
        longer = f"{kept}\n\n{paragraph.rstrip()}" if kept else paragraph.rstrip()
        if len(longer) > LONGEST or ">>>" in paragraph:
            break
        kept = longer
    return kept

"""What README and docs say is true: code runs, command lines parse, links resolve, tables are up to date."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from shoestring.cli import cli
from shoestring.core.budget import RESOURCES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages that are made while the site is built.
GENERATED = {"methods/index.md", "cli.md"}

_FENCED = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"^ {4,8}((?:shoestring|make) .+)$", re.M)
_INLINE = re.compile(r"`((?:shoestring|make) [^`]+)`")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: Path, kind: str) -> list[str]:
    """Fenced blocks of one language. A block is left out only with `<!-- not run: the reason -->` above it."""
    found = _FENCED.finditer(page.read_text(encoding="utf-8"))
    return [match["code"] for match in found if match["kind"] == kind and not match["reason"]]


def command_lines() -> Iterator[tuple[str, str]]:
    """Every `shoestring ...` and `make ...` on any page, with the page's name."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in blocks(page, "console"):
            yield from (
                (page.name, line[2:]) for line in block.splitlines() if re.match(r"\$ (shoestring|make) ", line)
            )
        for pattern in (_INDENTED, _INLINE):
            yield from ((page.name, line) for line in pattern.findall(_FENCED.sub("", text)))


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("page", named([page for page in PAGES if blocks(page, "python")]))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after another, where `my-model` is a model and `runs/mine/model` a packed one."""
    make_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": page.stem}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


def make_models(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from shoestring.core import catalog
    from shoestring.lab import tiny

    torch.set_num_threads(1)
    tiny.model().save_pretrained(folder / "my-model")
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "a": 3, "b": 4}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    tokenizer.save_pretrained(folder / "my-model")
    config = catalog.module("int4").example()
    packed = AutoModelForCausalLM.from_pretrained(folder / "my-model", quantization_config=config)
    packed.save_pretrained(folder / "runs" / "mine" / "model")
    tokenizer.save_pretrained(folder / "runs" / "mine" / "model")


def parse(line: str) -> None:
    """Parses a command line as the program would, without doing anything.

    Raises:
        click.UsageError: it would be refused.
    """
    words = shlex.split(line)[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="shoestring")
    if words == ["--help"]:
        return
    while isinstance(command, click.Group) and words:
        name, found, words = command.resolve_command(context, words)
        assert found is not None, f"{line}: no such command"
        command, context = found, click.Context(found, info_name=name, parent=context)
    if words:  # a command that is only named needs no arguments
        command.make_context(context.info_name, words, parent=context.parent)


@pytest.mark.parametrize("line", sorted({line for _, line in command_lines() if line.startswith("shoestring")}))
def test_command_line_parses(line: str) -> None:
    parse(line)


def test_the_command_lines_are_found() -> None:
    lines = [line for _, line in command_lines()]
    assert "shoestring claims run int4" in lines and "make demo" in lines
    for wrong in ("shoestring fit --no-such-flag", "shoestring fitt", "shoestring chat one two three"):
        with pytest.raises(click.UsageError):
            parse(wrong)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    asked = {(page, word) for page, line in command_lines() if line.startswith("make ") for word in line.split()[1:]}
    assert not {(page, word) for page, word in asked if word not in targets and "=" not in word}


@pytest.mark.parametrize("page", named(PAGES))
def test_links_resolve(page: Path) -> None:
    targets = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in targets if link not in GENERATED and not (page.parent / link).exists()]
    assert not missing


def test_readme_tables_are_up_to_date() -> None:
    tables = script("readme_tables")
    text = tables.README.read_text(encoding="utf-8")
    assert set(tables.TABLES) == set(re.findall(r"<!-- (\w+):start -->", text))
    assert tables.written(text) == text, "run `make tables`"


@pytest.mark.parametrize("page", named([ROOT / "README.md", ROOT / "docs" / "budget-and-plan.md"]))
def test_the_resources_of_a_budget_exist(page: Path) -> None:
    table = re.search(r"^\| resource \|.*?\n\n", page.read_text(encoding="utf-8"), re.M | re.S)
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", table[0] if table else "", re.M)
    assert len(rows) >= 7
    for name, says in rows:
        assert RESOURCES[name][2] == says


def test_exit_codes_are_those_of_the_command_line() -> None:
    table = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    said = dict(re.findall(r"^ +(\d) +(.+)$", cli.help or "", re.M))
    assert table == said and len(said) == 5


def test_written_pipelines_are_valid(tmp_path: Path) -> None:
    from shoestring.jobs.validate import validate

    found = [code for page in PAGES for code in blocks(page, "yaml")]
    assert found
    for code in found:
        file = tmp_path / "pipeline.yaml"
        file.write_text(code, encoding="utf-8")
        assert validate(file, contents=False) == []


def test_lines_of_code_leave_out_what_is_no_code() -> None:
    text = '"""A docstring\n\nof a module."""\n\n# why\nx = [\n    1,\n]\n\n\n'
    text += 'def f():\n    """One line."""\n    return x\n'
    assert script("sizes").lines_of_code(text) == 5


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

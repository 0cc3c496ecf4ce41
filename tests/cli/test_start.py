"""What holds for every command: light start, help, spelling, settings, errors, signals."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from saying import Shoestring

from shoestring import __version__, cli
from shoestring.core.errors import ShoestringError

COMMANDS = sorted(file.stem for file in Path(cli.__file__).parent.glob("[!_]*.py"))
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "matplotlib")


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    source = str(Path(cli.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": source + os.pathsep + os.environ.get("PYTHONPATH", "")}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, check=False, **options)


@pytest.mark.parametrize(
    "words", [["--help"], ["fit", "--help"], ["methods"], ["methods", "--json"], ["explain", "adapters"],
              ["claims", "table"], ["claims", "ls"], ["runs"], ["measure"], ["train", "--help"],
              ["no-such-command"]], ids=" ".join,
)  # fmt: skip
def test_light_commands_import_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    ask = f"print(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    code = f"import sys; from shoestring import cli; cli.exit_code({words!r}); {ask}"
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_explaining_any_method_imports_nothing_heavy() -> None:
    code = (
        "import sys; from shoestring import cli; from shoestring.core import catalog\n"
        "for name in [*catalog.methods(), *catalog.rooms()]: assert cli.exit_code(['explain', name]) == 0\n"
        f"print(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


def test_python_dash_m_is_the_command() -> None:
    done = python("-m", "shoestring", "--version")
    assert (done.returncode, done.stdout) == (0, __version__ + "\n")


def test_help_lists_every_command_and_the_exit_codes(shoestring: Shoestring) -> None:
    said = shoestring("--help")
    assert said.code == 0
    for word in (*COMMANDS, "0 ", "1 ", "2 ", "3 ", "4 ", "130", "143"):
        assert f"  {word}" in said.out, word


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_understands_the_common_flags(name: str, shoestring: Shoestring) -> None:
    said = shoestring(name, "--help")
    assert said.code == 0
    assert all(flag in said.out for flag in ("--json", "--verbose", "--quiet", "--offline"))
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command and command.help and command.help.strip().endswith((".", "interval where it has one."))


def test_options_say_what_they_are(shoestring: Shoestring) -> None:
    known = {"learning_rate", "num_train_epochs", "warmup_ratio", "lr_scheduler_type", "weight_decay", "max_grad_norm"}
    known |= {"gradient_accumulation_steps", "logging_steps", "gradient_checkpointing"}
    bare = []
    for name in COMMANDS:
        command = cli.cli.get_command(click.Context(cli.cli), name)
        assert command
        options = [p for p in command.params if isinstance(p, click.Option) and p.name not in known]
        bare += [f"{name} {p.name}" for p in options if not (p.help or "").partition("[")[0].strip()]
    assert not bare


def test_aliases(shoestring: Shoestring) -> None:
    assert "Compress MODEL" in shoestring("quantize", "--help").out
    assert "Measure MODEL" in shoestring("evaluate", "--help").out


def test_an_unknown_command_suggests_the_nearest(shoestring: Shoestring) -> None:
    said = shoestring("fitt")
    assert (said.code, said.out) == (2, "")
    assert "unknown command fitt. Did you mean fit?" in said.error


def test_an_unknown_flag_suggests_the_nearest(shoestring: Shoestring) -> None:
    for words in (["--buget", "storage=1MB"], ["--buget=storage=1MB"], ["buget=storage=1MB"], ["--set", "buget=3"]):
        said = shoestring("fit", *words)
        assert (said.code, said.out) == (2, "")
        assert "--budget" in said.error
    assert "--room" in shoestring("methods", "--rom", "x").error


def test_commands_that_do_not_exist_yet_are_not_there(shoestring: Shoestring) -> None:
    for name in ("distill", "federate", "search", "pretrain"):
        assert shoestring(name).code == 2


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command `echo` that prints what its options became."""
    from shoestring.cli._command import Command, model_argument, out_option, resume_option
    from shoestring.cli._request import request_options

    @click.command("echo", cls=Command)
    @model_argument()
    @out_option()
    @resume_option()
    @request_options("jobs.fit", "FitRequest")
    def command(**given: object) -> None:
        click.echo(repr({name: value for name, value in sorted(given.items()) if value not in (None, (), False)}))

    found = cli.Commands.get_command
    monkeypatch.setattr(cli.Commands, "list_commands", lambda self, ctx: [*COMMANDS, "echo"])
    monkeypatch.setattr(
        cli.Commands, "get_command", lambda self, ctx, n: command if n == "echo" else found(self, ctx, n)
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--out-dir", "x"], {"out": "x"}),
        (["--out_dir", "x"], {"out": "x"}),
        (["--output_dir=x_y"], {"out": "x_y"}),
        (["-o", "x"], {"out": "x"}),
        (["m"], {"model": "m"}),
        (["-m", "m"], {"model": "m"}),
        (["--model_name_or_path", "m"], {"model": "m"}),
        (["base_model=m"], {"model": "m"}),
        (["learning_rate=1e-4"], {"learning_rate": 1e-4}),
        (["--set", "learning_rate=1e-4"], {"learning_rate": 1e-4}),
        (["--set=max_steps=3", "m"], {"max_steps": 3, "model": "m"}),
        (["--learning_rate", "1e-4", "--num-train-epochs", "2"], {"learning_rate": 1e-4, "num_train_epochs": 2.0}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--budget", "storage=90MB"], {"budget": "storage=90MB"}),
        (["budget=storage=90MB,time=6m"], {"budget": "storage=90MB,time=6m"}),
        (["-d", "a=b.jsonl"], {"data": "a=b.jsonl"}),
        (["./odd=name"], {"model": "./odd=name"}),
        (["--gradient_checkpointing"], {"gradient_checkpointing": True}),
        (["--gradient_checkpointing", "True", "m"], {"gradient_checkpointing": True, "model": "m"}),
        (["gradient_checkpointing=true"], {"gradient_checkpointing": True}),
        (["--option", "group_size=64", "--option", "x=[1, 2]"], {"options": ("group_size=64", "x=[1, 2]")}),
        (["--skip-bad-lines", "3"], {"skip_bad": 3}),
        (["--resume", "-q", "m"], {"resume": True, "model": "m"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_spelling_and_settings(words: list[str], expected: dict, echo: None, shoestring: Shoestring) -> None:
    said = shoestring("echo", *words)
    assert (said.code, said.err) == (0, ""), said.err
    assert ast.literal_eval(said.out) == expected


def test_two_models_are_one_too_many(echo: None, shoestring: Shoestring) -> None:
    assert "two models" in shoestring("echo", "a", "-m", "b").error
    assert shoestring("echo", "a", "-m", "a").code == 0


def test_wrong_values_are_usage_errors(echo: None, shoestring: Shoestring) -> None:
    for words in (
        ["--learning_rate", "fast"],
        ["--set", "learning_rate"],
        ["--out"],
        ["--gradient_checkpointing", "maybe"],
        ["a", "b"],
    ):
        said = shoestring("echo", *words)
        assert (said.code, said.out) == (2, ""), words
        assert said.error


def test_global_flags_stand_before_or_after_the_command(shoestring: Shoestring) -> None:
    assert shoestring("--json", "methods").json == shoestring("methods", "--json").json


def test_offline_is_for_the_whole_process(shoestring: Shoestring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    shoestring("methods", "--offline")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def break_methods(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from shoestring.core import catalog

    def fail() -> None:
        raise error

    monkeypatch.setattr(catalog, "methods", fail)


class Coded(ShoestringError):
    exit_code = 143


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("odd\nthing"), 1, "error: ValueError: odd thing (-v shows where)"),
        (ShoestringError("it failed", "of heat", "cool it"), 1, "error: it failed. of heat. cool it."),
        (Coded("stopped"), 143, "error: stopped."),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
    ids=["unexpected", "own", "own code", "ctrl+c"],
)
def test_errors_are_one_line(
    error: BaseException, code: int, line: str, shoestring: Shoestring, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_methods(monkeypatch, error)
    said = shoestring("methods")
    assert (said.code, said.out, said.err.strip()) == (code, "", line)
    verbose = shoestring("methods", "-v")
    assert verbose.code == code
    assert "Traceback" in verbose.err and "break_methods" not in verbose.out


def test_sigterm_ends_the_work_with_143(shoestring: Shoestring, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoestring.core import catalog

    before = signal.getsignal(signal.SIGTERM)

    def terminated() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(catalog, "methods", terminated)
    assert shoestring("methods").code == 143
    assert signal.getsignal(signal.SIGTERM) is before


BESIDE = """
import atexit, threading, time
import numpy, scipy.fft
from shoestring import cli

def work():
    while True:
        scipy.fft.fft(numpy.ones((300, 300)))

def begin(args):
    threading.Thread(target=work, name="shoestring-load", daemon=True).start()
    atexit.register(print, "goodbye")
    time.sleep(0.05)
    return 7

cli.exit_code = begin
cli.main([])
"""


def test_a_thread_inside_a_library_is_no_reason_to_abort() -> None:
    """As when a server is told to end while it loads a model."""
    pytest.importorskip("scipy.fft")
    done = subprocess.run([sys.executable, "-c", BESIDE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "goodbye\n", "")


def test_a_reader_that_has_enough_is_no_error() -> None:
    script = f"{sys.executable} -m shoestring methods --json | head -c 1"
    source = str(Path(cli.__file__).parents[2])
    done = subprocess.run(script, shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source})
    assert (done.stdout, done.stderr) == ("[", "")

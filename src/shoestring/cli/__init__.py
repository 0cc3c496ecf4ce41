"""The command line: one file a command, found by listing this folder; nothing heavy is imported before it is needed.

Results go to stdout, everything else to stderr. Errors are one line; `-v` shows where they were raised.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import click

from shoestring import __version__
from shoestring.cli._command import Shared, one_line
from shoestring.cli._screen import Screen
from shoestring.core.errors import ShoestringError, nearest

ALIASES = {"quantize": "compress", "evaluate": "eval"}
_HELP = """Fit a language model to the resources you have, and see the measured bill.

\b
Start with    shoestring fit
or            shoestring fit MODEL --data FILE --budget storage=2GB,memory=3GB --out DIR

\b
Exit codes
  0    done
  1    the work failed
  2    bad input, found before the work started
  3    nothing fits the budget; the closest result is kept
  4    what fits keeps less quality than asked for; the best is kept
  130  interrupted by Ctrl+C; --resume goes on
  143  interrupted by SIGTERM; --resume goes on
"""


class _Terminated(BaseException):
    """Not an Exception: nothing on the way may take it for a failure to go on from."""

    exit_code = 143


class Commands(Shared, click.Group):
    """The commands are the files of this folder."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        name = ALIASES.get(name, name)
        return import_module(f"shoestring.cli.{name}").command if name in self.list_commands(ctx) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            known = [*self.list_commands(ctx), *ALIASES]
            raise click.UsageError(f"unknown command {args[0]}. {nearest(args[0], known)}", ctx)
        return super().resolve_command(ctx, args)


@click.command("shoestring", cls=Commands, help=_HELP, no_args_is_help=True)
@click.version_option(__version__, message="%(version)s")
def cli() -> None: ...


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    code = exit_code(args)
    if any(thread.daemon and thread.name.startswith("shoestring-") for thread in threading.enumerate()):
        _leave(code)
    sys.exit(code)


def exit_code(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    screen = Screen()
    _no_bars_in_logs()
    _say_anything()
    # What one library asks of another is nothing that whoever types a command can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Threads that spin at every barrier make torch ten times slower as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with _terminable():
            code = cli.main(args, prog_name="shoestring", standalone_mode=False, obj=screen)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        return _failed(screen, error, one_line(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort, _Terminated) as error:
        return _failed(screen, error, "interrupted", getattr(error, "exit_code", 130))
    except BrokenPipeError:
        # Whoever read our results has enough of them; the interpreter must not complain about it at exit.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        return 1
    except ShoestringError as error:
        return _failed(screen, error, str(error), error.exit_code)
    except Exception as error:
        hint = "" if screen.verbose else " (-v shows where)"
        return _failed(screen, error, f"{type(error).__name__}: {error}{hint}", 1)


def _leave(code: int) -> NoReturn:
    """End the process beside a thread that nobody waits for, such as one that still loads a model.

    The interpreter would unwind such a thread wherever it stands, and C++ aborts where it cannot be unwound.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _failed(screen: Screen, error: BaseException, sentence: str, code: int) -> int:
    if screen.verbose:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    print("error: " + " ".join(sentence.split()), file=sys.stderr)
    return code


def _say_anything() -> None:
    """Answers have letters that a terminal may lack, and names of files bytes that are no letters: both are spelled."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _no_bars_in_logs() -> None:
    if not sys.stderr.isatty() or os.environ.get("CI") or os.environ.get("NO_COLOR"):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl+C does, with a code of its own."""

    def stop(*_: Any) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

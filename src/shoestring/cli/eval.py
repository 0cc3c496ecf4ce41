from __future__ import annotations

import click

from shoestring.cli._command import Command, model_argument, trust_option
from shoestring.cli._screen import current


@click.command("eval", cls=Command)
@model_argument(required=True)
@click.option(
    "-d", "--data", help="What to measure on: anything `fit` accepts, or any text file. [default: python-docs]"
)
@click.option("--against", metavar="MODEL", help="A second model to compare with, token by token.")
@click.option("--tasks", default="", help="Tasks of lm-eval, separated by commas.")
@click.option("--task-folder", metavar="DIR", help="Where more tasks are.")
@click.option("--limit", "--eval-examples", type=int, help="Examples, drawn evenly; the same number limits each task.")
@click.option("--split", help="test, validation, train or all. [default: test]")
@click.option("--loss-on", help="answer or all. [default: answer]")
@click.option("--no-work", "work", flag_value=False, default=True, help="Leave memory and speed out.")
@click.option("--dtype", default="auto", show_default=True, help="What to compute in.")
@click.option("--threads", type=int, help="For arithmetic.")
@trust_option()
def command(model: str, tasks: str, **given: object) -> None:
    """Measure MODEL: held-out loss, speed, memory, storage; or two models side by side.

    Every figure comes with its 95% interval where it has one.
    """
    from shoestring.cli._eval_table import lines
    from shoestring.jobs.evaluate import evaluate

    screen = current()
    chosen = {name: value for name, value in given.items() if value is not None}
    with screen.working():
        result = evaluate(model, tasks=[t.strip() for t in tasks.split(",") if t.strip()], **chosen)  # type: ignore[arg-type]
    screen.show(result, lambda: lines(result))

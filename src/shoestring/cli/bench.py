from __future__ import annotations

from typing import Any

import click

from shoestring.cli._command import Command, Shared, model_argument
from shoestring.cli._request import build, request_options
from shoestring.cli._screen import current


class Group(Shared, click.Group): ...


@click.group("bench", cls=Group)
def command() -> None:
    """Measure speed: of a server as its clients see it, or of the engine by itself."""


@command.command("serve", cls=Command)
@click.argument("place", required=False, metavar="[URL]")
@click.option("-m", "--model", help="The name to ask for. Default: the first that the server lists.")
@request_options("jobs.bench", "ServeRequest")
def serve(place: str | None, **given: Any) -> None:
    """Send a mix of requests to any OpenAI-compatible server; show delays, throughput and errors."""
    from shoestring.cli._bench_table import served
    from shoestring.jobs.bench import ServeRequest, bench_serve

    screen = current()
    with screen.working():
        found = bench_serve(build(ServeRequest, given | {"url": place or given["url"]}), screen.say)
    screen.show(found, lambda: served(found))


@command.command("latency", cls=Command)
@model_argument()
@request_options("jobs.bench_engine", "LatencyRequest")
def latency(**given: Any) -> None:
    """Time MODEL's answers one at a time: the prompt, and each token after the first."""
    from shoestring.cli._bench_table import alone
    from shoestring.jobs.bench_engine import LatencyRequest, bench_latency

    screen = current()
    with screen.working():
        found = bench_latency(build(LatencyRequest, given))
    screen.show(found, lambda: alone(found))


@command.command("throughput", cls=Command)
@model_argument()
@request_options("jobs.bench_engine", "ThroughputRequest")
def throughput(**given: Any) -> None:
    """Time many of MODEL's answers together."""
    from shoestring.cli._bench_table import together
    from shoestring.jobs.bench_engine import ThroughputRequest, bench_throughput

    screen = current()
    with screen.working():
        found = bench_throughput(build(ThroughputRequest, given))
    screen.show(found, lambda: together(found))

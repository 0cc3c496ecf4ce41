"""Answers and training at the same time, under one stream of requests and three ways to share a machine.

alone      answers only
co-serving training fills what each step leaves
temporal   training while nobody waits for an answer
spatial    training in a process of its own
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import Any

from shoestring import data
from shoestring.core import catalog, probes
from shoestring.engine.engine import Engine
from shoestring.engine.hooks import Spare
from shoestring.engine.request import Request, Sampling
from shoestring.engine.tuning import Objectives, TuningJob

SHARINGS = ("alone", "co-serving", "temporal", "spatial")
_DATA = "python-docs"


@dataclass(frozen=True)
class Load:
    """Poisson arrivals: requests a second, for so many seconds, each of so many tokens."""

    rate: float
    seconds: float
    prompt: int = 64
    answer: int = 24
    seed: int = 0


@dataclass
class Outcome:
    """What came of it. Seconds; tokens that were trained, and what memory was held at most, in bytes."""

    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    trained: float = 0.0
    seconds: float = 0.0
    memory: int = 0

    def within(self, objective: float) -> float:
        """Share of the pauses between tokens that are no longer."""
        return sum(gap <= objective for gap in self.gaps) / len(self.gaps) if self.gaps else 1.0

    def at(self, percent: int) -> float:
        return quantiles(self.gaps, n=100, method="inclusive")[percent - 1] if len(self.gaps) > 1 else 0.0

    @property
    def speed(self) -> float:
        """Trained tokens a second."""
        return self.trained / max(self.seconds, 1e-9)


def rows(file: Path, count: int, seed: int) -> Path:
    """Some of the built-in documentation as a file of conversations."""
    examples = data.read(_DATA).examples
    chosen = random.Random(seed).sample(examples, count)
    file.write_text("".join(json.dumps({"messages": example.messages}) + "\n" for example in chosen))
    return file


class _Idle:
    """Work only while no answer is under way."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def work(self, spare: Spare) -> int:
        return int(self.inner.work(spare)) if not spare.running else 0


def trainer(engine: Engine, folder: Path, objectives: Objectives, seed: int, options: Mapping[str, Any]) -> Any:
    """A trainer beside an engine, with a job that is longer than any of these experiments."""
    from shoestring.engine.open import Opened

    method = catalog.that_define("tuner")[0].name
    made: Any = catalog.module(method).tuner(
        Opened(engine.runner, engine.tokenizer, engine.name, Path(engine.name)), objectives
    )
    made.config = replace(made.config, **options)
    job = TuningJob("job", engine.name, rows(folder / "rows.jsonl", 256, seed), folder / "out", epochs=50, seed=seed)
    made.start(made.prepare(job), lambda told: None)
    return made


def serve(
    model: str, sharing: str, load: Load, objectives: Objectives, folder: Path, *, threads: int = 1,
    warm: float = 4.0, options: Mapping[str, Any] | None = None,
) -> Outcome:  # fmt: skip
    """Answer a load under one way to share, after `warm` seconds in which times are learned."""
    options = options or {}
    folder.mkdir(parents=True, exist_ok=True)
    with Engine(model, threads=threads, context=1024) as engine:
        own: Any = None
        other: _Process | None = None
        if sharing == "spatial":
            other = _Process(model, folder, objectives, load.seed, threads, options)
        elif sharing != "alone":
            own = trainer(engine, folder, objectives, load.seed, options)
            engine.plug_filler(own if sharing == "co-serving" else _Idle(own))
        try:
            _answer(engine, replace(load, seconds=warm, seed=load.seed + 1))
            begun = own.stats()["training_tokens"] if own else other.trained() if other else 0.0
            outcome = _answer(engine, load)
            ended = own.stats()["training_tokens"] if own else other.trained() if other else 0.0
            outcome.trained = ended - begun
            outcome.memory = (probes.high_water() or 0) + (other.memory() if other else 0)
        finally:
            if other:
                other.close()
            if own:
                own.close()
    return outcome


def _answer(engine: Engine, load: Load) -> Outcome:
    """Requests come when they are due, whether or not the earlier ones are answered."""
    draw, outcome = random.Random(load.seed), Outcome()
    due: list[float] = []
    at = draw.expovariate(load.rate)
    while at < load.seconds:
        due.append(at)
        at += draw.expovariate(load.rate)
    due.append(load.seconds)  # nothing comes then, but the time is up
    sampling = Sampling(max_tokens=load.answer, ignore_eos=True)
    began, latest, arrived = time.perf_counter(), dict[str, float](), dict[str, float]()
    now = lambda: time.perf_counter() - began
    engine.urgent = lambda: bool(due) and now() >= due[0]
    while due or not engine.idle:
        while due and now() >= due[0]:
            moment = due.pop(0)
            if not due:
                continue
            prompt = [draw.randrange(100, engine.facts.vocab - 100) for _ in range(load.prompt)]
            request = Request(prompt, sampling)
            engine.submit(request)
            arrived[request.id] = moment
        deltas = engine.advance()
        for delta in deltas:
            moment = now()
            if delta.request_id in latest:
                outcome.gaps.append(moment - latest[delta.request_id])
            else:
                outcome.firsts.append(moment - arrived[delta.request_id])
            latest[delta.request_id] = moment
        if not engine.fill() and engine.idle and due:
            time.sleep(max(0.0, min(0.01, due[0] - now())))
    outcome.seconds = now()
    engine.urgent = lambda: False
    return outcome


class _Process:
    """Training in a process of its own."""

    def __init__(
        self, model: str, folder: Path, objectives: Objectives, seed: int, threads: int, options: Mapping[str, Any]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, end = context.Pipe()
        given = (end, model, folder, objectives, seed, threads, dict(options))
        self._process = context.Process(target=_train, args=given, daemon=True)
        self._process.start()
        assert self._line.recv() == "ready"

    def trained(self) -> float:
        self._line.send("trained")
        return float(self._line.recv())

    def memory(self) -> int:
        self._line.send("memory")
        return int(self._line.recv())

    def close(self) -> None:
        self._line.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _train(
    line: Connection, model: str, folder: Path, objectives: Objectives, seed: int, threads: int, options: dict[str, Any]
) -> None:
    with Engine(model, threads=threads, context=1024, memory=1 << 24) as engine:
        work = trainer(engine, folder, objectives, seed, options)
        line.send("ready")
        try:
            while True:
                work.work(Spare(engine.scheduler.max_tokens, urgent=line.poll))
                if line.poll():
                    asked = line.recv()
                    line.send(work.stats()["training_tokens"] if asked == "trained" else probes.high_water() or 0)
        except (EOFError, OSError):
            pass  # nobody listens any more
        finally:
            work.close()

"""Executes a written pipeline: a request with its verb, or a list of steps on a model."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from shoestring import data, models
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.jobs._doors import open_doors
from shoestring.jobs.at_work import storage
from shoestring.jobs.pipeline import check, execute, read_pipeline
from shoestring.jobs.runs import open_run
from shoestring.jobs.validate import REQUESTS, must_be_valid


def run_file(
    path: Path, *, out: str | Path | None = None, resume: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Execute the pipeline file at `path` in a run folder; returns what its verb returns, `model` among it.

    Raises:
        UsageError: the file is not a pipeline, or asks for what cannot be done; see `validate`.
    """
    must_be_valid(path)
    written = read_pipeline(path)
    verb = written.pop("verb", None)
    if verb in REQUESTS:
        module, request = REQUESTS[verb]
        found = import_module(module)
        return dict(getattr(found, verb)(getattr(found, request)(**written), out=out, resume=resume, say=say))
    steps = [Step.read(row) for row in written["steps"]]
    for step in steps:
        check(step)
    source = models.resolve(written.get("model") or "smollm2")
    open_doors(source)
    seed = int(written.get("seed") or 0)
    train: Any = None
    valid: Any = None
    if written.get("data"):
        corpus = data.read(written["data"], skip_bad=int(written.get("skip_bad") or 0))
        train, valid, _ = data.split(corpus, seed=seed)
    with open_run(out, "run", written, resume=resume, label=path.stem) as run, Ledger() as ledger:
        say(" -> ".join(map(str, steps)))
        work = Work(
            ledger, run.work, train, valid, written.get("training") or {},
            resume=resume, seed=seed, trust_remote_code=bool(written.get("trust_remote_code")),
        )  # fmt: skip
        folder, facts = execute(steps, source, work)
        if not run.model.exists():
            folder.replace(run.model)
        result = {"model": str(run.model), "storage": storage(run.model), "steps": [str(s) for s in steps]}
        run.write("result.json", {**result, "facts": facts})
    ledger.save(run.inside / "ledger.json")
    return result

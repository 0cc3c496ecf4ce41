"""Train a model with one method on one's data; the adapter, or the model, comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoestring import data as datasets
from shoestring import models
from shoestring.core import catalog
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.jobs._doors import open_doors, open_model
from shoestring.jobs.evaluate import heldout, predicts_next
from shoestring.jobs.pipeline import check, execute
from shoestring.jobs.runs import finished, open_run, write_json
from shoestring.models.folder import ADAPTER_CONFIG, read_json


@dataclass(frozen=True)
class TrainRequest:
    """What `train` is asked for; `method` None takes the default of the methods that train."""

    model: str = "smollm2"
    data: str = "python-docs"
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    eval_examples: int = 160
    skip_bad: int = 0
    seed: int = 0
    trust_remote_code: bool = False


def train(
    request: TrainRequest,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train; returns folder, held-out loss before and after, and what it took.

    Raises:
        UsageError: bad input, found before training starts.
        Interrupted: stopped by a signal after a resumable checkpoint.
    """
    from shoestring.planner.plan import by_verb

    done = finished(out, "train", asdict(request)) if resume else None
    if done:
        say(f"the run in {out} has finished; nothing is left to do")
        return done
    method = request.method or next(m.name for m in by_verb("train") if m.default)
    step = Step("train", method, dict(request.options))
    check(step)
    source = models.resolve(request.model)
    open_doors(source)
    predicts_next(source)
    parts = datasets.parts_of(datasets.read(request.data, skip_bad=request.skip_bad), seed=request.seed, choosing=False)
    with (
        open_run(out, "train", asdict(request), resume=resume, label=f"{Path(request.model).name}-{method}") as run,
        Ledger() as ledger,
    ):
        loaded = open_model(str(source), trust_remote_code=request.trust_remote_code)
        context = models.shape_of(loaded.model).context or 2048
        limit = min(request.training.get("max_length") or context, context)
        count = max(1, len(parts[2]) // max(1, request.eval_examples))
        test = parts[2].part(parts[2].examples[::count][: request.eval_examples])
        cut = {"max_length": limit, "on_long": request.training.get("on_long", "error")}
        rows = datasets.encode(test, loaded.tokenizer, **cut).rows
        rows_after = encoder(method, request.options)(test, loaded.tokenizer, **cut).rows
        say("measuring the held-out loss before")
        with ledger.stage("before"):
            before = heldout(loaded.model, rows)
        del loaded
        say(f"training {method}")
        work = Work(
            ledger, run.work, parts[0], parts[1], request.training,
            resume=resume, seed=request.seed, trust_remote_code=request.trust_remote_code,
        )  # fmt: skip
        folder, facts = execute([step], source, work)
        say("measuring the held-out loss after")
        with ledger.stage("after"):
            after = heldout(open_model(folder, trust_remote_code=request.trust_remote_code).model, rows_after)
        name_base(folder, request.model)
        if not run.model.exists():
            folder.replace(run.model)
        result = {
            "model": str(run.model), "method": method, "loss_before": before.loss.value, "loss_after": after.loss.value,
            "interval_after": after.loss.interval,
            **{k: facts[0].get(k) for k in ("steps", "tokens", "trainable", "truncated")},
            "loss_curve": facts[0].get("log", []),
        }  # fmt: skip
    run.write("result.json", result)
    ledger.save(run.inside / "ledger.json")
    return result


def encoder(method: str, options: Mapping[str, Any]) -> Callable[..., datasets.Encoded]:
    """What turns a corpus into rows as the method reads them, with the arguments of `data.encode`."""
    contract = catalog.contract(catalog.get(method).room)
    return contract.encoder(catalog.module(method), options)  # type: ignore[no-any-return]


def name_base(folder: Path, ref: str) -> None:
    """An adapter of a named model names it, not the cache folder it was read from, which exists here alone."""
    file = folder / ADAPTER_CONFIG
    if file.is_file() and not Path(ref).expanduser().exists():
        write_json(file, {**read_json(file), "base_model_name_or_path": ref})

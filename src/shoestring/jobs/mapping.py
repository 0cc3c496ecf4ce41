"""What a model would take on an accelerator that is only described; a method file that defines `mapped` is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoestring.core import catalog
from shoestring.core.errors import UsageError, nearest
from shoestring.core.ledger import Ledger
from shoestring.jobs.runs import open_run

MODELLED = "modelled"


@dataclass(frozen=True)
class MapRequest:
    """What `map` is asked for.

    Attributes:
        target: the accelerator; an unknown name lists those that are described.
        prompt: tokens that are read before the first one is answered.
        tokens: tokens that are answered.
        options: a setting of the method; repeat for more.
    """

    model: str = "smollm2"
    target: str = "u280"
    prompt: int = 128
    tokens: int = 128
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def mappers() -> list[str]:
    """Names of the methods that map, those first that are taken when none is asked for; nothing is imported."""
    return [m.name for m in sorted(catalog.that_define("mapped"), key=lambda m: not m.default)]


def map_model(
    request: MapRequest, *, out: str | Path | None = None, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Compile the model for the accelerator and model time, bytes and energy. Nothing is measured.

    Args:
        out: a new run folder for result and ledger; None writes nothing.

    Returns:
        `target`, `method`, `status`, `about`, `steps`, `assumptions` as the room's contract describes them, and
        `ledger`: every figure with its status.

    Raises:
        UsageError: no such method or accelerator, a model or lengths it has no program for.
    """
    from shoestring import models

    name = request.method.replace("-", "_") or mappers()[0]
    if name not in mappers():
        what = f"{name} maps nothing" if name in catalog.methods() else f"unknown method {name}"
        raise UsageError(what, remedy=nearest(name, mappers()))
    source = models.resolve(request.model)
    module = catalog.module(name)
    config = catalog.contract(catalog.get(name).room).config(module, request.options)
    say(f"compiling {Path(request.model).name} for {request.target}")
    found = module.mapped(source, config, request.target, request.prompt, request.tokens)
    ledger = Ledger()
    for step in found["steps"]:
        _record(ledger, f"{request.target}/{step['step']}", step, "; ".join(found["assumptions"]))
    result = {
        "target": request.target, "method": name, "model": request.model, "status": MODELLED, **found,
        "ledger": [
            {"stage": row.stage, "metric": row.metric, "value": row.value, "status": row.status}
            for row in ledger.table() if row.status == MODELLED
        ],
    }  # fmt: skip
    if out:
        with open_run(out, "map", asdict(request)) as run:
            run.write("result.json", result)
            ledger.save(run.inside / "ledger.json")
            result["folder"] = str(run.folder)
    return result


def _record(ledger: Ledger, path: str, step: Mapping[str, Any], how: str) -> None:
    with ledger.stage(path) as stage:
        for metric, unit in (("seconds", "s"), ("joules", "J"), ("cycles", "cycle"), ("stored", "B")):
            stage.record(f"mapped_{metric}", step[metric], unit, MODELLED, how, "model", tokens=step["tokens"])
        for what, size in step["moved"].items():
            stage.record(f"mapped_{what}_moved", size, "B", MODELLED, how, "model", tokens=step["tokens"])

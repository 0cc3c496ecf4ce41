"""One row of a trial, made in a process of its own so that its memory is its own: the request comes in, figures go out.

python -m shoestring.jobs.trial_row < request.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoestring.core.errors import ShoestringError


def row(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Train one method and measure it; without a method, measure the model as it is.

    Args:
        asked: the fields of `jobs.trial.TrialRequest` with one method, `source` (the model's folder) and `folder`,
            where the adapter goes.

    Returns:
        figures of the row as `jobs.trial.trial` describes them.

    Raises:
        ShoestringError: the method does not fit the model, the data or its own options.
    """
    import peft  # noqa: F401  # what training imports anyway belongs to the floor

    from shoestring import data, models, training  # noqa: F401
    from shoestring.core.ledger import Ledger
    from shoestring.core.step import Step, Work
    from shoestring.jobs._doors import open_doors, open_model
    from shoestring.jobs.evaluate import heldout
    from shoestring.jobs.pipeline import execute
    from shoestring.jobs.train import encoder, name_base

    source, folder, method = Path(asked["source"]), Path(asked["folder"]), asked["method"]
    open_doors(source)
    parts = data.split(data.read(asked["data"], skip_bad=asked["skip_bad"]), seed=asked["seed"])
    count = max(1, asked["eval_examples"])
    held_out = parts[1].part(parts[1].examples[:: max(1, len(parts[1]) // count)][:count])
    found: dict[str, Any] = {}
    made = source
    if method:
        with Ledger() as ledger:
            work = Work(
                ledger, folder, parts[0], None, asked["training"], seed=asked["seed"],
                trust_remote_code=asked["trust_remote_code"],
            )  # fmt: skip
            trained, facts = execute([Step("train", method, asked["options"])], source, work)
        found = _figures(ledger, method, facts[0])
        made = folder / "adapter"
        trained.replace(made)
        name_base(made, asked["model"])
        found |= {"adapter": str(made), "storage": _storage(made)}
    loaded = open_model(str(made), trust_remote_code=asked["trust_remote_code"])
    context = models.shape_of(loaded.model).context or 2048
    limit = min(asked["training"].get("max_length") or context, context)
    on_long = asked["training"].get("on_long", "error")
    encode = encoder(method, asked["options"]) if method else data.encode
    quality = heldout(loaded.model, encode(held_out, loaded.tokenizer, max_length=limit, on_long=on_long).rows)
    return {"loss": quality.loss.value, "interval": quality.loss.interval, **found}


def _figures(ledger: Any, method: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    def figure(stage: str, name: str) -> float | None:
        entry = ledger.figure(stage, name)
        return entry.value if entry else None

    # A method that trains in a way of its own may have no such stage: then the whole step is what it took.
    stage = f"{method}/train" if ledger.figure(f"{method}/train", "time") else method
    seconds, steps = figure(stage, "time"), facts.get("steps")
    return {
        "trainable": facts.get("trainable"),
        "steps": steps,
        "seconds": seconds,
        "seconds_per_step": seconds / steps if seconds and steps else None,
        "stopped_because": facts.get("stopped_because"),
        "peak_memory": figure(method, "peak_memory"),
        "above_floor": figure(method, "peak_memory_above_floor"),
    }


def _storage(adapter: Path) -> int:
    """Bytes of what peft saves; the tokenizer beside it is the base model's."""
    return sum(file.stat().st_size for file in adapter.glob("adapter_*") if file.is_file())


def main() -> int:
    # Libraries may print; what the parent reads must be the answer alone.
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        answer = row(json.load(sys.stdin))
    except ShoestringError as error:
        answer = {"error": str(error)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    with answer_to:
        answer_to.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

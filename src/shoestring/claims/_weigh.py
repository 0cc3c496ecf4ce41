"""What claims about compressed models measure: bytes, perplexity, divergence from the original, speed at work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoestring.core import catalog
from shoestring.core.step import Step, Work
from shoestring.jobs.at_work import at_work
from shoestring.jobs.evaluate import compare
from shoestring.lab.arms import MODEL, Arms
from shoestring.models import load, resolve


def weigh(arms: Arms, plans: Mapping[str, tuple[str, dict[str, Any]] | None], examples: int) -> None:
    """Build every arm's model (None is the original) and enter storage, perplexity, kl and decode_tokens_per_s.

    Quality is taken on held-out answers that the seed chooses; speed in interleaved processes, arm by arm.
    """
    original = resolve(MODEL)
    reference = load(MODEL)
    rows = arms.docs(reference.tokenizer, {"test": examples})["test"].rows
    folders: dict[str, Path] = {}
    for name, plan in plans.items():
        folders[name] = original
        with arms.arm(name) as stage:
            if plan is None:
                model = reference.model
            else:
                method, options = plan
                folders[name] = arms.folder / name
                module, work = catalog.module(method), Work(arms.ledger, arms.folder, seed=arms.seed)
                catalog.contract(catalog.get(method).room).apply(
                    module, Step("compress", method, options), original, folders[name], work
                )
                model = load(folders[name]).model
            found = compare(model, reference.model, rows)
            stage.record("perplexity", found.model.perplexity.value, "perplexity", "measured")
            stage.record("kl", found.kl.value, "nat", "measured")
            stage.record("storage", _bytes(folders[name]), "B", "counted")
            del model
    for name, folder in folders.items():
        with arms.arm(name) as stage:
            speed = at_work(folder, new_tokens=arms.size(8, 48), repeats=arms.size(1, 3))
            stage.record("decode_tokens_per_s", speed["decode_tokens_per_s"]["median"], "token/s", "measured")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))

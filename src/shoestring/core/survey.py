"""Where a method stands in the field: what a survey of compression asks of each, read off what its files already say.

Nothing is said twice: the category is its room's, unless its own words tell otherwise; what it needs follows from what
it defines; its gains are what `METHOD` saves; and what is kept of quality is what the record of its claim measured.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shoestring.core import catalog, claim
from shoestring.core.method import Method

QUANTIZATION, PRUNING = "quantization", "pruning"
CATEGORIES = (
    QUANTIZATION, PRUNING, "distillation", "compact architecture", "dynamic network", "framework",
    "parameter-efficient tuning",
)  # fmt: skip
NEEDS = ("none", "calibration text", "gradient training", "full pretraining")

# Resources -> when they are saved: once, with the file, or as long as the model works.
AT_LOAD = ("storage", "network", "parameters")
AT_WORK = ("memory", "compute", "latency", "energy", "money")

# Measures of how well a model does, those that need no task first, and arms that are the model as it was.
QUALITY = (
    "perplexity",
    "kl",
    "changed_logits",
    "heldout_loss",
    "mean_perplexity",
    "added_loss",
    "accuracy",
    "macro_f1",
)
ORIGINALS = ("bf16", "bfloat16", "original", "dense", "teacher", "mixture", "full")


@dataclass(frozen=True)
class Quality:
    """What a claim measured of quality: the median of `arm` beside `against`, as a ratio or a difference."""

    measure: str
    arm: str
    against: str
    by: str
    value: float
    verdict: str

    def __str__(self) -> str:
        sign = "/" if self.by == "ratio" else "-"
        return f"{self.measure.replace('_', ' ')} {self.arm} {sign} {self.against} = {self.value:.3g}"


@dataclass(frozen=True)
class Standing:
    """A method's row in the catalogue.

    Attributes:
        category: one of `CATEGORIES`.
        needs: the most that it asks for, one of `NEEDS`.
        at_load: what of its savings is there from the file on.
        at_work: what is saved while the model works; of one that tunes parameters, while it is tuned.
        composes: rooms and methods -> "yes", or the reason why not.
        quality: what its claims measured of it; None where they measure none.
    """

    category: str
    needs: str
    at_load: tuple[str, ...]
    at_work: tuple[str, ...]
    composes: Mapping[str, str]
    quality: Quality | None


def standing(method: Method) -> Standing:
    """Where `method` stands; reads its room's contract and the records of its claims, and imports nothing."""
    return Standing(
        category(method),
        needs(method),
        tuple(resource for resource in method.saves if resource in AT_LOAD),
        tuple(resource for resource in method.saves if resource in AT_WORK),
        method.combines,
        quality(method.name),
    )


def row(method: Method) -> dict[str, Any]:
    """`standing` as plain data; what the method composes with stands in its `combines` already."""
    stands = standing(method)
    quality = stands.quality and {**asdict(stands.quality), "said": str(stands.quality)}
    gains = {"at_load": list(stands.at_load), "at_work": list(stands.at_work)}
    return {"category": stands.category, "needs": stands.needs, "gains": gains, "quality": quality}


def category(method: Method) -> str:
    """The room's, unless the method says that weights come out rounded, or defines how they are pruned."""
    if method.traits.get("merges") == "with loss":
        return QUANTIZATION
    if {"prune", "pruned"} & set(method.words):
        return PRUNING
    return str(_literals(method.room).get("CATEGORY", ""))


def needs(method: Method) -> str:
    """What it takes beside the model: more tokens than tuning has, gradients, texts to look at, or nothing."""
    words = set(method.words)
    if "ENOUGH" in words:
        return "full pretraining"
    if _literals(method.room).get("VERB") == "train" or words & {"TRAINING", "heal"}:
        return "gradient training"
    return "calibration text" if words & {"NEEDS_DATA", "compress", "stream"} else "none"


def quality(name: str) -> Quality | None:
    """What the recorded claims of a method say of quality: of itself and beside the model as it was, if any does."""
    found = []
    for stated in claim.files().values():
        record = claim.read_record(stated) if name in stated.methods else None
        own = stated.of(name)
        for said, measured in record.claims if record else ():
            paired = measured.paired(said)
            if said in own and said.measure in QUALITY and paired:
                value, state = statistics.median(paired), measured.verdict(said)
                found.append(Quality(said.measure, said.arm, said.against, said.by, value, state))

    def rank(one: Quality) -> tuple[int, bool, int]:
        other, relative = one.arm.replace("-", "_") != name, one.against not in ORIGINALS
        return other + relative, other, QUALITY.index(one.measure)

    return min(found, key=rank, default=None)


@cache
def _literals(room: str) -> dict[str, object]:
    """What a room's contract says in words: its constants that are texts."""
    file = Path(catalog.__file__).parents[1] / "methods" / room / "_contract.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }

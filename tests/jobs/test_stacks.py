"""Every two methods that say they go together do, and every two that say they do not are refused before any work."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from job_cases import word_tokenizer
from transformers import AutoModelForCausalLM

from shoestring import data
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.jobs._doors import import_lines, open_doors
from shoestring.jobs.pipeline import combines, execute, stack
from shoestring.lab import tiny
from shoestring.models import uneven
from shoestring.planner.plan import by_verb

METHODS = [m.name for m in by_verb("compress")]
PAIRS = list(itertools.permutations(METHODS, 2))
REFUSED = [pair for pair in PAIRS if combines(*pair) not in ("", "yes")]


def packs(name: str) -> bool:
    return bool(getattr(catalog.contract(catalog.get(name).room), "PACKS", False))


def own(name: str) -> dict[str, Any]:
    """The options of the example, where it is plain data: made for tiny models, which a method's own may not be."""
    example = catalog.module(name).example()
    if packs(name) or not is_dataclass(example):
        return {}
    return {f"{name}.{key}": value for key, value in asdict(example).items()}


def on_llama(name: str) -> bool:
    """Methods for models of their own kind are tried on those, not here."""
    return not hasattr(catalog.module(name), "base")


TRIED = [(a, b) for a, b in PAIRS if combines(a, b) == "yes" and not packs(a) and on_llama(a) and on_llama(b)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("stacks")
    tiny.model(num_hidden_layers=5).to(torch.bfloat16).save_pretrained(folder / "tiny")
    word_tokenizer().save_pretrained(folder / "tiny")
    words = "\n".join(f'{{"text": "{" ".join(f"w{3 + (i * j) % 40}" for j in range(1, 20))}"}}' for i in range(60))
    (folder / "data.jsonl").write_text(words + "\n")
    return folder


@pytest.mark.parametrize(("first", "second"), TRIED, ids=["+".join(pair) for pair in TRIED])
def test_methods_that_go_together_do(first: str, second: str, place: Path) -> None:
    train, valid, _ = data.split(data.read(str(place / "data.jsonl")), seed=0)
    settings: dict[str, Any] = {"max_steps": 2, "max_length": 16, "on_long": "truncate"}
    # One folder for all: what begins alike shares its beginning.
    work = Work(Ledger(), place / "work", train, valid, settings)
    folder, _ = execute(stack([first, second], {**own(first), **own(second)}), place / "tiny", work)
    open_doors(folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.isfinite(tiny.logits(again)).all()


@pytest.mark.parametrize(("first", "second"), REFUSED, ids=["+".join(pair) for pair in REFUSED])
def test_methods_that_do_not_are_refused_with_the_reason(first: str, second: str) -> None:
    with pytest.raises(UsageError, match=f"{second} cannot follow {first}: "):
        stack([first, second], {})


def test_packed_weights_cannot_be_pruned() -> None:
    packed = next(name for name in METHODS if packs(name))
    for name in METHODS:
        with pytest.raises(UsageError, match=f"{name} cannot follow {packed}"):
            stack([packed, name], {})


def test_a_packed_model_of_unequal_layers_says_both_lines_that_it_needs(place: Path) -> None:
    model = tiny.model(num_hidden_layers=2)
    blocks = uneven.sizes(model).blocks
    keep = [uneven.Keep(range(b.groups), range(b.neurons - 8 * (i + 1))) for i, b in enumerate(blocks)]
    uneven.shrink(model, keep).save_pretrained(place / "uneven")
    word_tokenizer().save_pretrained(place / "uneven")
    name = next(name for name in METHODS if packs(name) and catalog.get(name).default)
    folder, _ = execute(stack([name], {}), place / "uneven", Work(Ledger(), place / "two-lines"))
    lines = import_lines(folder)
    assert lines == "import shoestring.methods.quantizers\nimport shoestring.models.uneven\n"
    code = f"{lines}from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained(r'{folder}')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)

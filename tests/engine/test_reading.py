"""A method that reads the model in its own way, before it is plugged in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shoestring import models
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper
from shoestring.engine.hooks import Hooks
from shoestring.lab import answering


@dataclass(frozen=True)
class Settings:
    shift: int = 0


class Beside:
    closed = False

    def __init__(self, model: Any) -> None:
        self.model = model

    def stats(self) -> dict[str, float]:
        return {"scaled": float(self.model.scaled)}

    def close(self) -> None:
        Beside.closed = True


def load(config: Settings, folder: Path, *, dtype: str, trust_remote_code: bool) -> models.Loaded:
    found = models.load(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    found.model.scaled = config.shift
    return found


def load_more(config: Settings, folder: Path, *, read: Any = models.load, **options: Any) -> models.Loaded:
    found: models.Loaded = read(folder, **options)
    found.model.more = getattr(found.model, "scaled", 0) + config.shift
    return found


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("reading")
    module.__dict__.update(
        {"example": Settings, "load": load, "plug": lambda config, opened: Hooks(weights=Beside(opened.runner.model))}
    )
    adding = ModuleType("adding")
    adding.__dict__.update({"example": Settings, "load": load_more, "plug": lambda config, opened: Hooks()})
    methods = {
        name: Method(
            Paper("A paper", "2024-01"), "Settings", ("memory",), traits={"plugs": "weights"}, room="serving",
            name=name, words=("plug", "load"),
        )
        for name in ("reading", "again", "adding")
    }  # fmt: skip
    monkeypatch.setattr(catalog, "methods", lambda: methods)
    monkeypatch.setattr(catalog, "module", lambda name: adding if name == "adding" else module)
    yield


def test_the_model_is_read_by_the_method_and_runs_on_the_torch_runner(tmp_path: Path) -> None:
    folder = answering.folder(tmp_path)
    with answering.exact(folder, runner="torch") as plain, answering.exact(folder, plugs=["reading,shift=3"]) as other:
        assert other.facts.backend == "torch" and other.runner.model.scaled == 3  # type: ignore[attr-defined]
        assert answering.answers(plain) == answering.answers(other)
        assert other.counts().plugged["scaled"] == 3.0
    assert Beside.closed


def test_one_method_at_most_reads_it(tmp_path: Path) -> None:
    folder = answering.folder(tmp_path)
    with pytest.raises(UsageError, match="each reads the model in its own way"):
        answering.exact(folder, plugs=["reading", "again"])
    with pytest.raises(UsageError, match="Use the torch runner"):
        answering.exact(folder, plugs=["reading"], runner="native")


@pytest.mark.parametrize("order", [1, -1])
def test_one_that_adds_is_given_what_another_reads(tmp_path: Path, order: int) -> None:
    folder = answering.folder(tmp_path)
    for words, more in ((["reading,shift=3", "adding,shift=4"], 7), (["adding,shift=4"], 4)):
        with answering.exact(folder, plugs=words[::order]) as engine:
            assert engine.runner.model.more == more  # type: ignore[attr-defined]

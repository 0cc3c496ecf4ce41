"""Flags that are read from a request's source must be those the request has."""

from __future__ import annotations

from dataclasses import MISSING
from dataclasses import fields as true_fields
from importlib import import_module

import click
import pytest

from shoestring.cli._request import build, fields, pairs

REQUESTS = [("jobs.fit", "FitRequest"), ("jobs.train", "TrainRequest"), ("jobs.compress", "CompressRequest"),
            ("training.options", "TrainOptions"), ("jobs.bench", "ServeRequest"),
            ("jobs.bench_engine", "LatencyRequest"), ("jobs.bench_engine", "ThroughputRequest"),
            ("server.settings", "Settings")]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), REQUESTS)
def test_fields_are_read_as_they_are(module: str, name: str) -> None:
    made = getattr(import_module(f"shoestring.{module}"), name)
    found = {field.name: field for field in fields(module, name)}
    assert list(found) == [field.name for field in true_fields(made)]
    for field in true_fields(made):
        assert found[field.name].kind == field.type
        if field.default is not MISSING:
            assert found[field.name].default == field.default, field.name


def test_help_comes_from_the_docstring() -> None:
    found = {field.name: field.help for field in fields("training.options", "TrainOptions")}
    assert found["max_steps"] == "optimizer steps; -1 leaves it to `num_train_epochs`."
    assert found["dtype"].endswith("in any case."), "text over several lines is joined"


def test_only_what_was_given_is_passed_on() -> None:
    from shoestring.jobs.fit import FitRequest

    given = {"model": None, "budget": "storage=1MB", "options": ("r=8",), "learning_rate": 1e-3, "max_steps": None}
    assert build(FitRequest, given) == FitRequest(
        budget="storage=1MB", options={"r": 8}, training={"learning_rate": 1e-3}
    )
    assert build(FitRequest, {"options": ()}) == FitRequest()


def test_several_words_stay_words() -> None:
    from shoestring.jobs.bench import ServeRequest
    from shoestring.server.settings import Settings

    assert build(Settings, {"adapter": ("a=b", "c=d")}).adapter == ("a=b", "c=d")
    assert build(ServeRequest, {"body": ("n=1",)}).body == {"n": 1}


def test_option_values() -> None:
    written = ("a=1", "b=1e-4", "c=true", "d=True", "e=None", "f=all-linear", 'g=["q", "k"]', "h=x=y", "i-j=0")
    read = pairs(written)
    assert read == {
        "a": 1, "b": 1e-4, "c": True, "d": True, "e": None, "f": "all-linear", "g": ["q", "k"], "h": "x=y", "i_j": 0,
    }  # fmt: skip
    for bad in ("a", "=1"):
        with pytest.raises(click.UsageError, match="key=value"):
            pairs((bad,))

from __future__ import annotations

import pytest

from shoestring.core.errors import DoesNotFit, QualityGate, ShoestringError, UsageError, nearest


def test_what_why_and_remedy_become_sentences() -> None:
    assert str(ShoestringError("it broke", "of heat", "Cool it")) == "it broke. of heat. Cool it."
    assert str(ShoestringError("it broke", remedy="Did you mean x?")) == "it broke. Did you mean x?"
    assert str(ShoestringError("run `this`")) == "run `this`"


@pytest.mark.parametrize(("kind", "code"), [(ShoestringError, 1), (UsageError, 2), (DoesNotFit, 3), (QualityGate, 4)])
def test_exit_codes(kind: type[ShoestringError], code: int) -> None:
    assert kind("x").exit_code == code and issubclass(kind, ShoestringError)


def test_nearest_names() -> None:
    assert nearest("storag", ["storage", "memory"]) == "Did you mean storage?"
    assert nearest("cat", ["bat", "hat"]) in ("Did you mean bat or hat?", "Did you mean hat or bat?")
    assert nearest("colour", ["storage", "memory"]) == "Known: memory, storage."
    assert nearest("x", []) == ""
    assert nearest("mb", ["B", "MB", "MiB"]) == "Did you mean MB?"

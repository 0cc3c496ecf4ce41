"""Every method sits the examination of its room."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.core import catalog
from shoestring.lab.examine import examine

CASES = [
    (method.name, check.__name__)
    for method in catalog.methods().values()
    for check in catalog.contract(method.room).CHECKS
]


@pytest.mark.parametrize("name", list(catalog.methods()))
def test_words(name: str) -> None:
    outcomes = list(examine(name, only="no check has this name"))
    assert [(o.check, o.verdict, o.detail) for o in outcomes] == [("words", "passed", "")]


@pytest.mark.parametrize(("name", "check"), CASES, ids=[f"{name}-{check}" for name, check in CASES])
def test_contract(name: str, check: str) -> None:
    outcome = next(o for o in examine(name, only=check) if o.check == check)
    assert outcome.good, f"{outcome.verdict}: {outcome.detail}"


# ---------------------------------------------------------------- the examination itself


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> str:
    """A method whose room has but two checks: one that holds and one that does not."""
    name = next(m.name for m in catalog.methods().values() if not m.expects)

    def check_holds(module: object) -> None: ...

    def check_breaks(module: object) -> None:
        raise AssertionError("the reason")

    monkeypatch.setattr(catalog.contract(catalog.get(name).room), "CHECKS", [check_holds, check_breaks])
    return name


def verdicts(name: str) -> dict[str, str]:
    return {o.check: o.verdict for o in examine(name)}


def test_a_broken_check_fails(method: str) -> None:
    assert verdicts(method) == {"words": "passed", "check_holds": "passed", "check_breaks": "failed"}
    outcome = list(examine(method, only="breaks"))[-1]
    assert not outcome.good and "the reason" in outcome.detail and "check_breaks" in outcome.detail


def test_an_exception_is_kept_only_while_it_is_needed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expecting = replace(catalog.get(method), expects={"check_holds": "old reason", "check_breaks": "a good reason"})
    monkeypatch.setattr(catalog, "get", lambda name: expecting)
    assert verdicts(method) == {"words": "passed", "check_holds": "needless", "check_breaks": "expected"}
    assert [o.good for o in examine(method)] == [True, False, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"about": "x: y.\n\nHow it works\n    1. It does.\n"}, "Where it bends"),
        ({"about": "No colon\n\nHow it works\n    a\n\nWhere it bends\n    b\n"}, "first line"),
        ({"provides": "NoSuchClass"}, "NoSuchClass"),
        ({"expects": {"check_no_such": "because"}}, "check_no_such"),
    ],
    ids=["section", "first line", "provides", "expects"],
)
def test_words_that_are_missing(change: dict, words: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = replace(catalog.get(method), **change)
    monkeypatch.setattr(catalog, "get", lambda name: lacking)
    outcome = next(examine(method))
    assert outcome.verdict == "failed" and words in outcome.detail

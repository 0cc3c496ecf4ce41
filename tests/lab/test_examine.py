from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.lab.examine import examine


def test_a_real_method_with_a_needless_excuse_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    check = "check_bad_argument_is_a_clear_error"
    excused = replace(catalog.get("int8"), expects={check: "it never worked"})
    monkeypatch.setattr(catalog, "get", lambda name: excused)
    outcome = list(examine("int8", only=check))[-1]
    assert (outcome.check, outcome.verdict, outcome.good) == (check, "needless", False)
    assert "it never worked" in outcome.detail


def test_threads_are_given_back_even_when_nobody_waits_for_the_end() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        examination = examine("int8", only="check_bad")
        next(examination)
        assert torch.get_num_threads() == 1
        examination.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_module_that_cannot_be_imported_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(name: str) -> None:
        raise ImportError("no such library")

    monkeypatch.setattr(catalog, "module", breaks)
    outcomes = list(examine("int8"))
    assert [(o.check, o.verdict) for o in outcomes] == [("words", "failed")] and "no such library" in outcomes[0].detail


def test_an_unknown_method_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Did you mean"):
        list(examine("int88"))


def test_random_numbers_are_the_same_for_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def check_one(module: object) -> None:
        seen.append(torch.rand(1).item())

    def check_two(module: object) -> None:
        seen.append(torch.rand(1).item())

    monkeypatch.setattr(catalog.contract("quantizers"), "CHECKS", [check_one, check_two])
    assert all(o.good for o in examine("int8")) and seen[0] == seen[1]

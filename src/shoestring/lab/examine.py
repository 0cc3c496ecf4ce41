"""Runs a room's checks over one method, and keeps its stated exceptions honest."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from shoestring.core import catalog
from shoestring.core.errors import ShoestringError
from shoestring.core.method import Method


@dataclass(frozen=True)
class Outcome:
    """One check over one method. `verdict` is passed, failed, expected (fails as its reason says) or needless."""

    method: str
    check: str
    verdict: str
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in ("passed", "expected")


def examine(name: str, *, only: str = "") -> Iterator[Outcome]:
    """Every check of the method's room, with one torch thread so that many fit in a minute."""
    method = catalog.get(name)
    contract = catalog.contract(method.room)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _outcome(method, "words", lambda: words(name, method), "")
        try:
            module = catalog.module(name)
        except Exception:  # `words` has said what is wrong with it
            return
        for check in contract.CHECKS:
            if only in check.__name__:
                yield _outcome(
                    method, check.__name__, lambda c=check: c(module), method.expects.get(check.__name__, "")
                )
    finally:
        torch.set_num_threads(threads)


def words(name: str, method: Method) -> ModuleType:
    """What every method file of any room owes: sections, its room's words and traits, reasons for checks that exist."""
    contract, module = catalog.contract(method.room), catalog.module(name)
    for heading in ("How it works", "Where it bends"):
        if not method.section(heading):
            raise ShoestringError(f"{method.file} has no section {heading!r} in its docstring")
    if not method.about.startswith(f"{name}: ") and ": " not in method.about.splitlines()[0]:
        raise ShoestringError(f"the first line of {method.file} is not `Name: what it does in one sentence.`")
    for word in (method.provides, "example", *contract.WORDS):
        if not hasattr(module, word):
            raise ShoestringError(f"{method.file} does not define {word}", f"the room {method.room} asks for it")
    unsaid = [trait for trait in getattr(contract, "TRAITS", ()) if not method.traits.get(trait)]
    if unsaid:
        raise ShoestringError(f"METHOD in {method.file} says no {', '.join(unsaid)} in its traits")
    unknown = set(method.expects) - {c.__name__ for c in contract.CHECKS}
    if unknown:
        raise ShoestringError(f"{method.file} expects checks that do not exist: {', '.join(sorted(unknown))}")
    return module


def _outcome(method: Method, check: str, run: object, reason: str) -> Outcome:
    torch.manual_seed(0)
    try:
        run()  # type: ignore[operator]
    except Exception as error:
        if reason:
            return Outcome(method.name, check, "expected", reason)
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(
            method.name, check, "failed", f"{type(error).__name__}: {error} ({last.name}, line {last.lineno})"
        )
    if reason:
        return Outcome(method.name, check, "needless", f"it passes, yet METHOD expects it to fail: {reason}")
    return Outcome(method.name, check, "passed")

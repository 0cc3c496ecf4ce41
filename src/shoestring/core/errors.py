"""Errors that say what is wrong, why, and what to do; each knows the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ShoestringError(Exception):
    """Work that failed for a reason the user can act on.

    Args:
        what: the input at fault and what is wrong with it.
        why: the reason, when `what` does not already say it.
        remedy: what to do about it.

    `result` is what the work produced all the same, for those who want to show it.
    """

    exit_code = 1
    result: Any = None

    def __init__(self, what: str, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        super().__init__(" ".join(part for part in (_sentence(what), _sentence(why), _sentence(remedy)) if part))


class UsageError(ShoestringError):
    """Bad input, found before any work started."""

    exit_code = 2


class DoesNotFit(ShoestringError):
    """Nothing meets the budget."""

    exit_code = 3


class QualityGate(ShoestringError):
    """The result exists but keeps less quality than asked for."""

    exit_code = 4


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known names closest to `word`, or lists them when none is close."""
    known = sorted(known)
    same = [name for name in known if name.casefold() == word.casefold()]
    close = same or difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(close) + "?"
    return "Known: " + ", ".join(known) + "." if known else ""


def _sentence(text: str) -> str:
    return text if not text or text.endswith((".", "?", "!", ":", "`")) else text + "."

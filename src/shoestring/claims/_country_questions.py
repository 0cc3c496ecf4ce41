"""Questions with answers that can be checked, as people ask them: few forms, many things, some far more often."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from shoestring.core.errors import UsageError

KNOWN, SPOKEN = (  # two letters each
    "DEFRESITJPCABRINCNEGMXPLSENOKEPECLCUGRPTATIEISNGNEAUFIDKHUBECHNLUATRZAMASATHVNKRIDPKARCONZRUUSGB",
    "defresitjazhptruarhinlsvnodafipltrelhekovithcshuukidfasw",
)
MONEY = "EUR USD GBP JPY CHF CNY INR BRL CAD AUD MXN SEK NOK DKK PLN CZK HUF TRY ZAR KRW"
RIGHT, FORM, WRONG = 1.0, 0.4, 0.0  # what a checker gives: all right, the right keys alone, neither


@dataclass(frozen=True)
class Question:
    """What is asked, and the object that is the answer."""

    text: str
    truth: tuple[tuple[str, str], ...]

    @property
    def answer(self) -> str:
        return json.dumps(dict(self.truth))


def questions() -> list[Question]:
    """All of them, in a fixed order.

    Raises:
        UsageError: the tables of countries are not installed.
    """
    try:
        import pycountry
    except ImportError:
        raise UsageError(
            "the package pycountry is not installed", "its tables check the answers", "pip install pycountry"
        ) from None
    found = []
    for code in _pairs(KNOWN):
        c: Any = pycountry.countries.get(alpha_2=code)
        name = getattr(c, "common_name", c.name).partition(",")[0]
        ask = f"Give the ISO 3166 codes of {name} as JSON with the keys alpha2 and alpha3."
        found.append(Question(ask, (("alpha2", c.alpha_2), ("alpha3", c.alpha_3))))
        ask = f"What is the two-letter code of {name}? Answer as JSON with the key country."
        found.append(Question(ask, (("country", c.alpha_2),)))
    for code in MONEY.split():
        m: Any = pycountry.currencies.get(alpha_3=code)
        ask = f"Give the ISO 4217 code of the currency {m.name} as JSON with the key code."
        found.append(Question(ask, (("code", m.alpha_3),)))
    for code in _pairs(SPOKEN):
        s: Any = pycountry.languages.get(alpha_2=code)
        ask = f"Give the ISO 639 codes of the language {s.name.partition(' ')[0]} as JSON with the keys short and long."
        found.append(Question(ask, (("short", s.alpha_2), ("long", s.alpha_3))))
    return found


def header() -> list[Question]:
    """One question of each kind, which nobody asks: they stand before what a base model is asked."""
    found = questions()
    return [found[i] for i in (0, 1, 100, 120)]


def asked(count: int, seed: int) -> list[Question]:
    """A stream of `count`: popularity falls as 1 / rank, and which are popular depends on the seed."""
    draw = random.Random(seed)
    ranked = [question for question in questions() if question not in header()]
    draw.shuffle(ranked)
    return draw.choices(ranked, [1 / rank for rank in range(1, len(ranked) + 1)], k=count)


def grade(question: Question, answer: str) -> float:
    """RIGHT, FORM (one object with the right keys) or WRONG."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return WRONG
    if not isinstance(found, dict) or set(found) != {key for key, _ in question.truth}:
        return WRONG
    return RIGHT if found == dict(question.truth) else FORM


def checker(request: str, answer: str) -> float | None:
    """`grade` by the question's text; None for a question that is not one of these."""
    known = _by_text()
    return grade(known[request], answer) if request in known else None


def _pairs(letters: str) -> list[str]:
    return [letters[i : i + 2] for i in range(0, len(letters), 2)]


def _by_text() -> dict[str, Question]:
    if not _TABLE:
        _TABLE.update((question.text, question) for question in questions())
    return _TABLE


_TABLE: dict[str, Question] = {}

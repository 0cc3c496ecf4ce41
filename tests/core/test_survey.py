"""The catalogue is whole: every method of the product says where it stands in the field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.core import catalog, claim, survey
from shoestring.core.claim import Claim, Measured, Record
from shoestring.core.method import Method
from shoestring.planner.plan import by_verb

METHODS = list(catalog.methods())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_place(name: str) -> None:
    method = catalog.get(name)
    stands = survey.standing(method)
    assert stands.category in survey.CATEGORIES and stands.needs in survey.NEEDS
    assert set(stands.at_load) | set(stands.at_work) == set(method.saves) - {"labels"}, "a gain is lost"


@pytest.mark.parametrize("name", [m.name for m in by_verb("compress")])
def test_every_method_that_compresses_has_gains_and_says_what_it_composes_with(name: str) -> None:
    stands = survey.standing(catalog.get(name))
    assert stands.category in (survey.QUANTIZATION, survey.PRUNING, "compact architecture")
    assert stands.at_load and stands.at_work
    assert "yes" in stands.composes.values() or all(stands.composes.values()) and stands.composes


def test_needs_follow_from_what_a_file_defines() -> None:
    plain = next(m for m in by_verb("compress") if m.default)
    assert survey.needs(plain) == "none"
    for words, needs in (
        (("compress",), "calibration text"), (("stream",), "calibration text"), (("NEEDS_DATA",), "calibration text"),
        (("compress", "TRAINING"), "gradient training"), (("convert", "heal"), "gradient training"),
        (("compress", "TRAINING", "ENOUGH"), "full pretraining"),
    ):  # fmt: skip
        assert survey.needs(replace(plain, words=(*plain.words, *words))) == needs, words
    assert {survey.needs(m) for m in by_verb("train")} == {"gradient training"}


def test_an_adapter_is_of_the_category_that_it_ends_in() -> None:
    tuners = {m.name: survey.category(m) for m in by_verb("train")}
    assert set(tuners.values()) == {survey.QUANTIZATION, survey.PRUNING, "parameter-efficient tuning"}
    for method in by_verb("train"):
        assert (tuners[method.name] == survey.QUANTIZATION) == (method.traits["merges"] == "with loss")


def recorded(monkeypatch: pytest.MonkeyPatch, *claims: tuple[Claim, Measured]) -> None:
    stated = replace(next(iter(claim.files().values())), claims=tuple(c for c, _ in claims), methods=("toy",))
    monkeypatch.setattr(claim, "files", lambda: {"toy": stated})
    monkeypatch.setattr(claim, "read_record", lambda file: Record("toy", claims))


def test_quality_is_that_of_the_method_beside_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert survey.quality("toy") is None
    measured = Measured((2.2, 2.4, 2.0), (2.0, 2.0, 2.0))
    other = Claim("c", "p", "h", "perplexity", "toy", "rounded", "<= 0.5")
    neutral = Claim("b", "p", "h", "perplexity", "toy-8", "bf16", "<= 2")
    own = Claim("a", "p", "h", "kl", "toy", "bf16", "<= 1.15", by="difference")
    bytes_ = Claim("s", "p", "h", "storage", "toy", "bf16", "<= 2")
    recorded(monkeypatch, (bytes_, measured))
    assert survey.quality("toy") is None
    recorded(monkeypatch, (bytes_, measured), (other, measured), (neutral, measured), (own, measured))
    found = survey.quality("toy")
    assert found and str(found) == "kl toy - bf16 = 0.2" and found.verdict == claim.SHOWN
    recorded(monkeypatch, (neutral, measured), (other, measured))
    found = survey.quality("toy")
    assert found and str(found) == "perplexity toy / rounded = 1.1" and found.verdict == claim.NOT_SHOWN


def test_a_row_is_plain_data() -> None:
    for method in catalog.methods().values():
        row = survey.row(method)
        assert row["category"] and row["needs"] and set(row["gains"]) == {"at_load", "at_work"}
        assert row["quality"] is None or row["quality"]["said"]


def test_constants_of_a_file_are_words_too() -> None:
    method: Method = next(m for m in by_verb("compress") if "TRAINING" in m.words)
    assert "METHOD" in method.words and "settings" in method.words and method in catalog.that_define("TRAINING")

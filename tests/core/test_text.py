from __future__ import annotations

import pytest

from shoestring.core import text
from shoestring.core.errors import UsageError


@pytest.mark.parametrize(
    ("written", "units", "value"),
    [
        ("90MB", text.BYTES, 90e6),
        ("4GiB", text.BYTES, 4 * 2**30),
        (" 1.5 kB ", text.BYTES, 1500),
        ("6m", text.SECONDS, 360),
        ("20ms", text.SECONDS, 0.02),
        ("1e2s", text.SECONDS, 100),
        (".5h", text.SECONDS, 1800),
        ("2Wh", text.JOULES, 7200),
    ],
)
def test_quantities(written: str, units: dict[str, float], value: float) -> None:
    assert text.quantity(written, units, "x") == pytest.approx(value)


@pytest.mark.parametrize(
    ("written", "word"),
    [("90", "no unit"), ("MB", "not a quantity"), ("", "not a quantity"), ("9 0MB", "not a quantity"),
     ("-1MB", "not a quantity"),
     ("0MB", "not above zero"), ("1Mb", "unknown unit Mb"), ("nanMB", "not a quantity"), ("1e400MB", "too large")],
)  # fmt: skip
def test_what_is_no_quantity(written: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        text.quantity(written, text.BYTES, "storage")


def test_an_error_shows_how_to_write_it() -> None:
    with pytest.raises(UsageError, match="for example storage=10MB"):
        text.quantity("much", text.BYTES, "storage")
    for written, meant in (("400", "400MB"), (400, "400MB"), ("400000000", "400000000B")):
        with pytest.raises(UsageError, match=f"has no unit.*for example storage={meant}"):
            text.quantity(written, text.BYTES, "storage")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Did you mean MB"):
        text.quantity("4Mb", text.BYTES, "storage")


@pytest.mark.parametrize(
    ("n", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (90e6, "90.0 MB"), (269_060_552, "269 MB"), (5e13, "50.0 TB"),
     (5e15, "5000 TB")],
)  # fmt: skip
def test_bytes(n: float, shown: str) -> None:
    assert text.show_bytes(n) == shown


@pytest.mark.parametrize(
    ("s", "shown"),
    [(5e-5, "50 us"), (0.0125, "12.5 ms"), (1.5, "1.5 s"), (119.9, "119.9 s"), (125, "2 min 5 s"), (7200, "2.0 h")],
)
def test_seconds(s: float, shown: str) -> None:
    assert text.show_seconds(s) == shown


def test_an_absent_figure_is_a_dash_and_never_zero() -> None:
    assert text.show(None, "B") == "-"
    assert text.show(0, "B") == "0 B"


def test_other_units() -> None:
    assert text.show(2500, "J") == "2.50 kJ"
    assert text.show(12, "J") == "12.0 J"
    assert text.show(2.7e8, "FLOP") == "270.00 MFLOP"
    assert text.show(37.123456, "token/s") == "37.12 token/s"
    assert text.show(123456, "") == "123,456"


def test_what_is_shown_can_be_written() -> None:
    for n in (1, 999, 1000, 90e6, 3.2e9):
        assert text.quantity(text.show_bytes(n), text.BYTES, "x") == pytest.approx(n, rel=0.01)

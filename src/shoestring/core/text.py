"""Quantities as people write and read them."""

from __future__ import annotations

import re

from shoestring.core.errors import UsageError, nearest

BYTES = {
    "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KB": 1e3,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
JOULES = {"J": 1, "kJ": 1e3, "MJ": 1e6, "Wh": 3600, "kWh": 3.6e6}

_NUMBER_UNIT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def quantity(text: str, units: dict[str, float], name: str) -> float:
    """`"90MB"` in the base unit of `units`. A bare number may come as one, as settings that are guessed to be such do.

    Raises:
        UsageError: not a number with a unit, an unknown unit, not above zero, or beyond all numbers.
    """
    match = _NUMBER_UNIT.fullmatch(str(text))
    usual = list(units)[min(2, len(units) - 1)]
    example = f"Write it with a unit, for example {name}=10{usual}"
    if not match:
        raise UsageError(f"{name}={text} is not a quantity", remedy=example)
    number, unit = match.groups()
    if not unit:
        # What was meant is known but for the unit: a number too large for the usual one counts single ones.
        meant = usual if float(number) < 1e5 else next(unit for unit, scale in units.items() if scale == 1)
        raise UsageError(f"{name}={text} has no unit", remedy=f"Write it with one, for example {name}={number}{meant}")
    if unit not in units:
        raise UsageError(f"{name}={text} has the unknown unit {unit}", remedy=nearest(unit, units))
    if float(number) <= 0:
        raise UsageError(f"{name}={text} is not above zero", remedy=example)
    value = float(number) * units[unit]
    if value == float("inf"):
        raise UsageError(f"{name}={text} is too large", remedy="Leave it out for no limit")
    return value


def show_bytes(n: float) -> str:
    """Bytes with a decimal unit, as disks and download pages count them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.{0 if abs(n) >= 100 else 1}f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def show_seconds(s: float) -> str:
    """Seconds in the unit a person would choose."""
    if s < 1e-3:
        return f"{s * 1e6:.0f} us"
    if s < 1:
        return f"{s * 1e3:.1f} ms"
    if s < 120:
        return f"{s:.1f} s"
    return f"{int(s // 60)} min {int(s % 60)} s" if s < 7200 else f"{s / 3600:.1f} h"


def show(value: float | None, unit: str) -> str:
    """A ledger figure for a table; an absent one is a dash, never zero."""
    if value is None:
        return "-"
    if unit == "B":
        return show_bytes(value)
    if unit == "s":
        return show_seconds(value)
    if unit == "J":
        return f"{value / 1e3:.2f} kJ" if value >= 1e3 else f"{value:.1f} J"
    if unit == "FLOP":
        for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
            if value >= scale:
                return f"{value / scale:.2f} {prefix}FLOP"
    digits = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{digits} {unit}".strip()

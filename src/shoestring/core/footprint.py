"""Energy, carbon, water and money from what was counted: formulas, and the parameters they need.

Nothing here reads a counter. A modelled energy is a `Range`: the value with the default parameters, and what it
becomes with the low and the high ones. What needs an undeclared parameter (a region, a water factor, a price) is
absent, not 0.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from shoestring.core.errors import UsageError, nearest

DEFAULTS = Path(__file__).with_name("prices.toml")
JOULES_PER_KWH = 3.6e6
NO_PUE = "no PUE declared: the machine's own energy only"


@dataclass(frozen=True)
class Range:
    """A modelled value and what it becomes with the low and the high parameters."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.value * factor, self.low * factor, self.high * factor)

    def plus(self, other: Range | float) -> Range:
        other = other if isinstance(other, Range) else Range(other, other, other)
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)


# ---------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Power:
    """Parameters of the power model."""

    watts_per_core: Range = Range(4.0, 2.0, 10.0)
    idle_share: Range = Range(0.1, 0.05, 0.4)
    watts_per_gb: Range = Range(0.375, 0.1, 0.85)


@dataclass(frozen=True)
class Prices:
    """What things cost, in one currency. None: not declared."""

    electricity: float | None = None
    machine_hour: float | None = None
    storage: float | None = None
    egress: float | None = None
    label: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Site:
    """Factors of the building and its electricity. None: not declared."""

    pue: float | None = None
    wue: float | None = None
    ewif: float | None = None


@dataclass(frozen=True)
class Region:
    """A grid: gCO2e per kWh, and the year and origin of that figure."""

    name: str
    intensity: float
    year: int | None
    source: str


@dataclass(frozen=True)
class Declared:
    """Everything the modelled figures rest on; a ledger embeds it, so that its report can be recomputed."""

    version: str = ""
    currency: str = "USD"
    source: str = ""
    prices: Prices = Prices()
    power: Power = Power()
    site: Site = Site()
    region: Region | None = None

    @classmethod
    def load(cls, file: str | Path | None = None, region: str | None = None) -> Declared:
        """The shipped table, overridden by `file` (or $SHOESTRING_PRICES), in `region` (or $SHOESTRING_REGION).

        Raises:
            UsageError: no such file, bad TOML, an unknown key, a negative number, an unknown region.
        """
        file = file or os.environ.get("SHOESTRING_PRICES") or None
        region = region or os.environ.get("SHOESTRING_REGION") or None
        changed = os.stat(file).st_mtime_ns if file and Path(file).is_file() else 0
        return _load(str(file) if file else None, changed, region)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "prices": Prices(**data["prices"]),
                "power": Power(**{name: Range(**value) for name, value in data["power"].items()}),
                "site": Site(**data["site"]),
                "region": Region(**data["region"]) if data["region"] else None,
            }
        )


@cache
def _load(file: str | None, _changed: int, region: str | None) -> Declared:
    table = _table(DEFAULTS)
    source = table["source"]
    if file:
        own = _table(Path(file))
        for section in ("prices", "power", "site", "regions"):
            table[section] |= own.get(section, {})
        if "prices" in own and "currency" not in own:
            raise UsageError(
                f"{file} has prices without a currency", remedy='Add a line such as currency = "USD" at the top'
            )
        if own.get("currency", table["currency"]) != table["currency"]:
            # A default in another currency would be added to the user's prices as if it were the same money.
            table["prices"] = own.get("prices", {})
        source = own.get("source", file)
        table |= {key: own[key] for key in ("version", "currency") if key in own}
    regions = _regions(table["regions"], source)
    if region and region.upper() not in regions:
        raise UsageError(
            f"unknown region {region}",
            remedy=f"Known: {', '.join(sorted(regions))}. "
            "For another, declare [regions] in a file and point SHOESTRING_PRICES at it",
        )
    return Declared(
        version=str(table["version"]),
        currency=table["currency"],
        source=source,
        prices=Prices(**table["prices"]),
        power=Power(**{name: Range(middle, low, high) for name, (low, middle, high) in table["power"].items()}),
        site=Site(**table["site"]),
        region=regions[region.upper()] if region else None,
    )


_SECTIONS = {"prices": Prices, "power": Power, "site": Site}


def _table(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the price file {file} cannot be read", str(error.strerror)) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the price file {file} is not TOML", str(error)) from None
    known = ("version", "currency", "source", "regions", *_SECTIONS)
    for key in table:
        if key not in known:
            raise UsageError(f"{file}: unknown key {key}", remedy=nearest(key, known))
    currency = table.get("currency", "USD")
    if not (isinstance(currency, str) and len(currency) == 3 and currency.isupper()):
        raise UsageError(
            f"{file}: the currency {currency!r} is not a three-letter code", remedy='Write currency = "EUR"'
        )
    for section, cls in _SECTIONS.items():
        names = [f.name for f in fields(cls)]
        for key, value in table.get(section, {}).items():
            if key not in names:
                raise UsageError(f"{file}: [{section}] has the unknown key {key}", remedy=nearest(key, names))
            _check_numbers(file, f"[{section}] {key}", value, 3 if section == "power" else 1)
    if (pue := table.get("site", {}).get("pue")) is not None and pue < 1:
        raise UsageError(f"{file}: pue = {pue} is below 1", "A building cannot use less than the computers in it")
    for name, value in table.get("regions", {}).items():
        if not isinstance(value, Mapping) or "intensity" not in value:
            raise UsageError(
                f"{file}: region {name} has no intensity", remedy=f"Write {name} = {{ intensity = 56.0, year = 2023 }}"
            )
        _check_numbers(file, f"[regions] {name}", value["intensity"], 1)
    return table


def _check_numbers(file: Path, what: str, value: Any, count: int) -> None:
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) != count or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        shape = "three numbers: low, default, high" if count == 3 else "a number"
        raise UsageError(f"{file}: {what} = {value!r} is not {shape}")
    if not all(0 <= n < float("inf") for n in numbers):
        raise UsageError(f"{file}: {what} = {value!r} is negative or not finite")
    if numbers != sorted(numbers):
        raise UsageError(f"{file}: {what} = {value!r} is not in the order low, default, high")


def _regions(table: Mapping[str, Mapping[str, Any]], source: str) -> dict[str, Region]:
    regions = {}
    try:
        # Read as a file: importing the package costs seconds.
        distribution = metadata.distribution("codecarbon")
        text = distribution.locate_file("codecarbon/data/private_infra/global_energy_mix.json")
        origin = f"codecarbon {distribution.version}"
        for name, mix in _json(Path(str(text))).items():
            if isinstance(mix.get("carbon_intensity"), int | float):
                regions[name] = Region(name, mix["carbon_intensity"], mix.get("year"), origin)
    except (metadata.PackageNotFoundError, OSError, ValueError):
        pass
    declared = {k: Region(k, float(v["intensity"]), v.get("year"), source) for k, v in table.items()}
    return regions | declared


def _json(file: Path) -> dict[str, dict[str, Any]]:
    import json

    return json.loads(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- energy


def process_energy(cpu_seconds: float, seconds: float, memory: float, power: Power) -> Range:
    """Joules of one piece of work: its CPU seconds at a busy core's power, and its memory's share of the RAM's.

    Idle power and other processes' work are not charged. `memory` in bytes, held for `seconds`.
    """
    _not_negative(cpu_seconds=cpu_seconds, seconds=seconds, memory=memory)
    return power.watts_per_core.times(cpu_seconds).plus(power.watts_per_gb.times(memory / 1e9 * seconds))


def machine_energy(utilisation: float, seconds: float, cores: int, ram: float, power: Power) -> Range:
    """Joules of the whole machine: P = P_idle + (P_max - P_idle) u, and all of the RAM; `utilisation` in 0..1."""
    _not_negative(utilisation=utilisation, seconds=seconds, ram=ram)
    busy, idle, gb = power.watts_per_core, power.idle_share, power.watts_per_gb

    def joules(watts: float, share: float, watts_per_gb: float) -> float:
        full = watts * cores
        return (full * share + full * (1 - share) * utilisation + watts_per_gb * ram / 1e9) * seconds

    return Range(
        joules(busy.value, idle.value, gb.value),
        joules(busy.low, idle.low, gb.low),
        joules(busy.high, idle.high, gb.high),
    )


def shared_energy(joules: float, cpu_seconds: float, busy_seconds: float) -> float:
    """The part of a machine's measured joules that goes with this process's share of its busy CPU seconds."""
    _not_negative(joules=joules, cpu_seconds=cpu_seconds, busy_seconds=busy_seconds)
    return joules * min(1.0, cpu_seconds / busy_seconds) if busy_seconds else 0.0


# ---------------------------------------------------------------- carbon, water


def carbon(kwh: float, intensity: float, pue: float = 1.0, embodied: float = 0.0) -> float:
    """gCO2e of `kwh` used by computers: the building's energy times the grid's gCO2e/kWh, and any embodied share."""
    _not_negative(kwh=kwh, intensity=intensity, embodied=embodied)
    return kwh * pue * intensity + embodied


def embodied(device: float, hours: float, lifetime_hours: float) -> float:
    """gCO2e of making a device (`device`) that `hours` of its life account for."""
    _not_negative(device=device, hours=hours)
    if lifetime_hours <= 0:
        raise UsageError(f"a device's lifetime of {lifetime_hours} hours is not above zero")
    return device * hours / lifetime_hours


@dataclass(frozen=True)
class Water:
    """Litres consumed (not withdrawn): evaporated on site, and in generating the electricity."""

    site: float
    source: float

    @property
    def total(self) -> float:
        return self.site + self.source


def water(kwh: float, pue: float, wue: float, ewif: float) -> Water:
    """Two terms: the site's by the computers' energy, the source's by the building's. The PUE belongs to the second."""
    _not_negative(kwh=kwh, pue=pue, wue=wue, ewif=ewif)
    return Water(kwh * wue, kwh * pue * ewif)


def mix(shares: Mapping[str, float], factors: Mapping[str, float]) -> float:
    """A factor (gCO2e or litres per kWh) of a mix of fuels: sum_k b_k f_k / sum_k b_k.

    Raises:
        UsageError: a fuel without a factor, a negative share, or shares that sum to zero.
    """
    for fuel, share in shares.items():
        if fuel not in factors:
            raise UsageError(f"no factor for the fuel {fuel}", remedy=nearest(fuel, factors))
        _not_negative(**{fuel: share})
    total = sum(shares.values())
    if not total:
        raise UsageError("the shares of the fuels sum to zero")
    return sum(share * factors[fuel] for fuel, share in shares.items()) / total


# ---------------------------------------------------------------- money


@dataclass(frozen=True)
class Use:
    """What a bill is made of."""

    hours: float = 0.0
    kwh: float = 0.0
    storage: float = 0.0  # GB-months
    egress: float = 0.0  # GB
    labels: float = 0.0
    tokens: float = 0.0  # of a paid API


_PRICED = {
    "hours": "machine_hour",
    "kwh": "electricity",
    "storage": "storage",
    "egress": "egress",
    "labels": "label",
    "tokens": "tokens",
}


def money(use: Use, prices: Prices, pue: float = 1.0) -> dict[str, float] | None:
    """The bill by item, in the currency of `prices`; None when none of what was used has a price.

    An item that was used and has no price is left out of the dict, so that the reader can see what was not counted.
    """
    bill = {}
    for item, price_name in _PRICED.items():
        amount, price = getattr(use, item), getattr(prices, price_name)
        _not_negative(**{item: amount})
        if amount and price is not None:
            bill[price_name] = amount * price * (pue if item == "kwh" else 1e-6 if item == "tokens" else 1)
    return bill or None


def per(total: float, count: float, what: str) -> float:
    """Cost per parameter, request, token or point.

    Raises:
        UsageError: `count` is not above zero.
    """
    if not count > 0:
        raise UsageError(f"a cost per {what} needs more than {count} of them")
    return total / count


@dataclass(frozen=True)
class BreakEven:
    """From how many uses on the second choice is the cheaper: `uses` (0 = already, None = never) and a sentence."""

    uses: float | None
    says: str


def break_even(make_a: float, use_a: float, make_b: float, use_b: float) -> BreakEven:
    """n* = (make_b - make_a) / (use_a - use_b), in any one unit (joules, money, litres)."""
    _not_negative(make_a=make_a, use_a=use_a, make_b=make_b, use_b=use_b)
    if make_b <= make_a and use_b <= use_a:
        if (make_a, use_a) == (make_b, use_b):
            return BreakEven(None, "never: both cost the same")
        return BreakEven(0.0, "already cheaper: it costs no more to make and no more to use")
    if use_b >= use_a:
        if make_b >= make_a:
            return BreakEven(None, "never: it costs no less to make and no less to use")
        n = (make_a - make_b) / (use_b - use_a)
        return BreakEven(0.0, f"cheaper at once, and only up to {n:,.0f} uses")
    n = (make_b - make_a) / (use_a - use_b)
    return BreakEven(n, f"after {n:,.0f} uses")


def amortised(make: float, expected_uses: float, use: float) -> float:
    """Cost of one use with its share of the making."""
    return per(make, expected_uses, "use") + use


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise UsageError(f"{name} = {value} is negative or not a number")

"""Energy, carbon, water and money against cases worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from shoestring.core import footprint
from shoestring.core.errors import UsageError
from shoestring.core.footprint import Declared, Power, Prices, Range, Use


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("SHOESTRING_PRICES", raising=False)
    monkeypatch.delenv("SHOESTRING_REGION", raising=False)


def test_energy_of_a_process_is_its_cpu_seconds_and_its_share_of_the_ram():
    power = Power(Range(4, 2, 10), Range(0.1, 0, 0.4), Range(0.5, 0.1, 1))
    energy = footprint.process_energy(cpu_seconds=10, seconds=20, memory=2e9, power=power)
    assert energy == Range(10 * 4 + 2 * 0.5 * 20, 10 * 2 + 2 * 0.1 * 20, 10 * 10 + 2 * 1 * 20)


def test_energy_of_a_machine_runs_from_idle_to_full_power():
    power = Power(Range(5, 5, 5), Range(0.2, 0.2, 0.2), Range(0, 0, 0))
    idle, half, full = (footprint.machine_energy(u, 10, 4, 8e9, power).value for u in (0, 0.5, 1))
    assert (idle, half, full) == pytest.approx((40, 120, 200))
    ram = dataclasses.replace(power, watts_per_gb=Range(0.5, 0.5, 0.5))
    assert footprint.machine_energy(0, 10, 4, 8e9, ram).value == pytest.approx(40 + 40)


def test_a_quarter_of_the_busy_time_gets_a_quarter_of_the_joules():
    assert footprint.shared_energy(100, cpu_seconds=2, busy_seconds=8) == 25
    assert footprint.shared_energy(100, cpu_seconds=9, busy_seconds=8) == 100
    assert footprint.shared_energy(100, cpu_seconds=0, busy_seconds=0) == 0


def test_water_has_two_terms_and_the_pue_once():
    water = footprint.water(1, pue=1.2, wue=1.8, ewif=3.1)
    assert (water.site, water.source, water.total) == pytest.approx((1.8, 3.72, 5.52))


def test_carbon_applies_the_pue_and_may_add_the_making_of_the_device():
    assert footprint.carbon(2, intensity=56.0, pue=1.5) == pytest.approx(168)
    share = footprint.embodied(1e6, hours=10, lifetime_hours=40_000)
    assert share == pytest.approx(250)
    assert footprint.carbon(2, 56.0, 1.5, share) == pytest.approx(418)
    with pytest.raises(UsageError, match="lifetime"):
        footprint.embodied(1e6, 1, 0)


def test_a_mix_of_fuels_is_weighted_by_its_shares():
    assert footprint.mix({"coal": 3, "wind": 1}, {"coal": 900, "wind": 10, "gas": 400}) == pytest.approx(677.5)
    with pytest.raises(UsageError, match="no factor for the fuel peat"):
        footprint.mix({"peat": 1}, {"coal": 900})
    with pytest.raises(UsageError, match="sum to zero"):
        footprint.mix({"coal": 0}, {"coal": 900})


def test_the_bill_item_by_item():
    prices = Prices(electricity=0.3, machine_hour=0.5, storage=0.02, egress=0.1, label=0.25, tokens=2.0)
    use = Use(hours=4, kwh=10, storage=50, egress=3, labels=8, tokens=500_000)
    bill = footprint.money(use, prices, pue=1.2)
    assert bill == pytest.approx(
        {"machine_hour": 2.0, "electricity": 3.6, "storage": 1.0, "egress": 0.3, "label": 2.0, "tokens": 1.0}
    )
    assert footprint.money(Use(hours=4, kwh=10), Prices(electricity=0.3)) == pytest.approx({"electricity": 3.0})
    assert footprint.money(use, Prices()) is None
    assert footprint.per(sum(bill.values()), 9900, "parameter") == pytest.approx(0.001)
    with pytest.raises(UsageError, match="cost per parameter"):
        footprint.per(1, 0, "parameter")


@pytest.mark.parametrize(
    ("costs", "uses", "says"),
    [
        ((100, 5, 400, 2), 100, "after 100 uses"),
        ((100, 5, 400, 5), None, "never"),
        ((100, 5, 400, 6), None, "never"),
        ((100, 5, 100, 5), None, "never"),
        ((400, 5, 100, 5), 0, "already cheaper"),
        ((100, 5, 100, 4), 0, "already cheaper"),
        ((400, 2, 100, 5), 0, "up to 100 uses"),
    ],
)
def test_break_even(costs, uses, says):
    result = footprint.break_even(*costs)
    assert result.uses == uses
    assert says in result.says


def test_amortised_cost_of_a_use():
    assert footprint.amortised(make=1000, expected_uses=200, use=3) == 8


@pytest.mark.parametrize("call", [
    lambda: footprint.process_energy(-1, 1, 1, Power()),
    lambda: footprint.process_energy(1, float("nan"), 1, Power()),
    lambda: footprint.water(1, 1.2, -1, 3),
    lambda: footprint.break_even(1, 1, -1, 1),
    lambda: footprint.money(Use(hours=-1), Prices(machine_hour=1)),
])  # fmt: skip
def test_negative_amounts_are_refused(call):
    with pytest.raises(UsageError, match="negative or not a number"):
        call()


def test_a_new_user_sees_money_but_neither_carbon_nor_water():
    declared = Declared.load()
    assert declared.prices.electricity == 0.25
    assert "default" in declared.source
    assert declared.region is None
    assert (declared.site.pue, declared.site.wue, declared.site.ewif) == (None, None, None)
    assert declared.power.watts_per_core.low < declared.power.watts_per_core.value < declared.power.watts_per_core.high


@pytest.mark.parametrize(("region", "grams"), [("FRA", 56.0), ("usa", 369.5), ("CHN", 582.3), ("POL", 661.9)])
def test_regions(region, grams, monkeypatch):
    assert Declared.load(region=region).region.intensity == grams
    monkeypatch.setenv("SHOESTRING_REGION", region)
    assert Declared.load().region.year == 2023


def test_an_unknown_region_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"unknown region ATLANTIS.*CHN.*FRA.*POL.*USA"):
        Declared.load(region="ATLANTIS")


def test_a_file_overrides_the_table_key_by_key(tmp_path, monkeypatch):
    file = tmp_path / "mine.toml"
    file.write_text(
        'version = "7"\ncurrency = "USD"\nsource = "my bill of May"\n[prices]\nmachine_hour = 0.05\n'
        "[power]\nwatts_per_core = [7, 8, 9]\n[site]\npue = 1.2\n[regions]\nHOME = { intensity = 20 }\n"
    )
    monkeypatch.setenv("SHOESTRING_PRICES", str(file))
    declared = Declared.load(region="home")
    assert (declared.version, declared.source) == ("7", "my bill of May")
    assert (declared.prices.machine_hour, declared.prices.electricity) == (0.05, 0.25)
    assert declared.power.watts_per_core == Range(8, 7, 9)
    assert declared.region.intensity == 20
    assert Declared.from_json(declared.to_json()) == declared


def test_default_prices_are_not_mixed_into_another_currency(tmp_path):
    file = tmp_path / "euro.toml"
    file.write_text('currency = "EUR"\n[prices]\nmachine_hour = 0.05\n')
    declared = Declared.load(file)
    assert (declared.currency, declared.prices.machine_hour, declared.prices.electricity) == ("EUR", 0.05, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[prices]\nelectricity = 0.3", "without a currency"),
        ('currency = "dollars"', "three-letter code"),
        ('currency = "USD"\n[prices]\nelectrcity = 0.3', "Did you mean electricity"),
        ('currency = "USD"\n[prices]\nelectricity = -1', "negative"),
        ('currency = "USD"\n[prices]\nelectricity = "cheap"', "not a number"),
        ("[power]\nwatts_per_core = 4", "three numbers"),
        ("[power]\nwatts_per_core = [9, 4, 10]", "order"),
        ("[site]\npue = 0.8", "below 1"),
        ("[regions]\nHOME = 20", "no intensity"),
        ("[price]\n", "Did you mean prices"),
        ("electricity 3", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, says):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=says):
        Declared.load(file)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        Declared.load(tmp_path / "none.toml")

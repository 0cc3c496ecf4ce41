from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.core.budget import ALIASES, RESOURCES, Budget, Miss
from shoestring.core.errors import UsageError


def test_limits_are_in_base_units() -> None:
    limits = Budget.parse(
        "storage=90MB, memory=800MB,time=6m,latency=20ms,energy=20kJ,money=0.05USD,network=50MB,"
    ).limits
    assert limits == {
        "storage": 90e6, "memory": 800e6, "time": 360, "latency": 0.02, "energy": 20e3, "money": 0.05, "network": 50e6,
    }  # fmt: skip


def test_no_limits() -> None:
    assert Budget.parse("").limits == {} and str(Budget.parse(" ")) == ""


def test_other_words_for_the_same() -> None:
    assert Budget.parse("ram=1GB,net=1MB").limits == {"memory": 1e9, "network": 1e6}
    assert set(ALIASES.values()) <= set(RESOURCES)


@pytest.mark.parametrize(
    ("written", "word"),
    [("storag=1MB", "Did you mean storage"), ("storage", "no limit"), ("storage=", "no limit"),
     ("storage=1", "no unit"),
     ("storage=1MB,storage=2MB", "twice"), ("ram=1MB,memory=2MB", "twice"), ("storage=0MB", "not above zero"),
     ("storage=6m", "unknown unit m"), ("time=90MB", "unknown unit MB"), ("=1MB", "unknown resource")],
)  # fmt: skip
def test_what_is_no_budget(written: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Budget.parse(written)


def test_misses() -> None:
    budget = Budget.parse("storage=90MB,memory=800MB,latency=20ms")
    assert list(budget.misses({"storage": 90e6, "memory": None})) == []
    found = list(budget.misses({"storage": 90e6 + 1, "memory": 900e6, "colour": 3.0}))
    assert [m.resource for m in found] == ["storage", "memory"]
    assert str(found[1]) == "memory 900 MB > 800 MB"
    assert found[1] == Miss("memory", 900e6, 800e6)


@given(st.dictionaries(st.sampled_from(sorted(RESOURCES)), st.floats(1e-3, 1e15, allow_subnormal=False), max_size=4))
def test_what_is_written_is_read_back(limits: dict[str, float]) -> None:
    again = Budget.parse(str(Budget(limits)))
    assert again.limits.keys() == limits.keys()
    for name, value in limits.items():
        assert again.limits[name] == pytest.approx(value, rel=1e-3)

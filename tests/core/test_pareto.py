"""Front and area against drawings on paper."""

from __future__ import annotations

import random

import pytest

from shoestring.core.errors import UsageError
from shoestring.core.pareto import hypervolume, pareto


def test_smaller_is_better_unless_said():
    points = [(1, 5), (2, 3), (3, 4), (4, 1)]
    assert pareto(points) == [0, 1, 3]
    assert pareto(points, maximise=(1,)) == [0]
    assert pareto(points, maximise=(0, 1)) == [0, 2, 3]


def test_names_ties_and_missing_values():
    points = [
        {"bytes": 100, "quality": 0.9},
        {"bytes": 100, "quality": 0.9},
        {"bytes": 100, "quality": 0.8},
        {"bytes": 50, "quality": None},
        {"bytes": 40, "quality": float("nan")},
        {"bytes": 30},
        {"bytes": 80, "quality": 0.7},
    ]
    assert pareto(points, maximise=("quality",)) == [0, 1, 6]


def test_nothing_and_one():
    assert pareto([]) == []
    assert pareto([(1, 2)]) == [0]
    assert pareto([(None, 2)]) == []


def test_three_objectives():
    assert pareto([(1, 2, 3), (1, 2, 4), (3, 2, 1), (2, 2, 2)]) == [0, 2, 3]


def test_area():
    # Two steps below the corner (4, 4): 3 x 1 and 2 x 1 more.
    assert hypervolume([(1, 3), (2, 2)], (4, 4)) == 3 * 1 + 2 * 1
    assert hypervolume([(1, 3), (1, 3), (2, 2), (3, 3), (5, 1), (None, 1)], (4, 4)) == 5
    assert hypervolume([], (4, 4)) == 0
    points = [{"bytes": 1, "quality": 1}, {"bytes": 2, "quality": 2}]
    assert hypervolume(points, {"bytes": 4, "quality": 0}, maximise=("quality",)) == 5


def test_area_agrees_with_counting_squares():
    rng = random.Random(0)
    for _ in range(20):
        points = [(rng.randrange(10), rng.randrange(10)) for _ in range(6)]
        squares = sum(any(x <= i and y <= j for x, y in points) for i in range(10) for j in range(10))
        assert hypervolume(points, (10, 10)) == squares


def test_mistakes():
    with pytest.raises(UsageError, match="no objective qualty to maximise.*quality"):
        pareto([{"quality": 1}], maximise=("qualty",))
    with pytest.raises(UsageError, match="two objectives"):
        hypervolume([(1, 2, 3)], (4, 4, 4))
    with pytest.raises(UsageError, match="misses a value"):
        hypervolume([(1, 2)], (4, None))

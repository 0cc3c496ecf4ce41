"""Which of several results nobody beats in everything, and how much of the plane they cover together."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from shoestring.core.errors import UsageError, nearest

Point = Mapping[Any, float | None] | Sequence[float | None]


def pareto(points: Sequence[Point], maximise: Collection[Hashable] = ()) -> list[int]:
    """Indices of the non-dominated points, in their order; every objective is minimised but those in `maximise`.

    A point dominates another when it is nowhere worse and somewhere better, so equal points stay together. A point with
    a missing value (None, NaN or no such key) is not on the front: nobody can say that nothing beats it.

    Args:
        points: mappings from objective to value, or sequences whose objectives are 0, 1, ...
    """
    objectives = _objectives(points, maximise)
    rows = {i: row for i, point in enumerate(points) if (row := _costs(point, objectives, maximise))}
    return [i for i, row in rows.items() if not any(_dominates(other, row) for other in rows.values())]


def hypervolume(points: Sequence[Point], reference: Point, maximise: Collection[Hashable] = ()) -> float:
    """Area between two-objective `points` and a `reference` point that is worse in both.

    Points that are not better than the reference in both objectives, or miss a value, add nothing.

    Raises:
        UsageError: not two objectives, or a reference that misses a value.
    """
    objectives = _objectives([reference], maximise)
    if len(objectives) != 2:
        raise UsageError(f"the area is defined for two objectives, got {len(objectives)}")
    corner = _costs(reference, objectives, maximise)
    if corner is None:
        raise UsageError("the reference point misses a value")
    rows = [row for point in points if (row := _costs(point, objectives, maximise))]
    area, ceiling = 0.0, corner[1]
    for x, y in sorted(rows):
        if x < corner[0] and y < ceiling:
            area += (corner[0] - x) * (ceiling - y)
            ceiling = y
    return area


def _objectives(points: Sequence[Point], maximise: Collection[Hashable]) -> list[Any]:
    found = dict.fromkeys(key for p in points for key in (p if isinstance(p, Mapping) else range(len(p))))
    for key in maximise:
        if points and key not in found:
            raise UsageError(f"there is no objective {key} to maximise", remedy=nearest(str(key), map(str, found)))
    return list(found)


def _costs(point: Point, objectives: list[Any], maximise: Collection[Hashable]) -> tuple[float, ...] | None:
    costs = []
    for key in objectives:
        if isinstance(point, Mapping):
            value = point.get(key)
        else:
            value = point[key] if key < len(point) else None
        if value is None or math.isnan(value):
            return None
        costs.append(-value if key in maximise else value)
    return tuple(costs)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))

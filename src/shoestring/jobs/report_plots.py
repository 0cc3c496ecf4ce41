"""Where the marks of the report's figures stand, in SVG units; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 16, 44
STRIP = 34  # height of the band for candidates that nobody measured
MOST_POINTS = 300


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low`..`high` to the units `start`..`end`, with its ticks as (place, label)."""

    low: float
    high: float
    start: float
    end: float
    title: str
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


@dataclass(frozen=True)
class Candidate:
    """What the Pareto plot needs of a candidate; `number` is its line in the table."""

    number: int
    name: str
    predicted: float | None
    measured: float | None
    quality: float | None
    interval: tuple[float, float] | None
    chosen: bool


@dataclass(frozen=True)
class Mark:
    """A candidate in the plot: `hollow` where it was predicted, `filled` where it was measured."""

    number: int
    name: str
    chosen: bool
    y: float
    hollow: float | None
    filled: float | None
    bar: tuple[float, float] | None
    label: tuple[float, float]


@dataclass(frozen=True)
class Pareto:
    x: Axis
    y: Axis
    limit: float | None
    floor: float | None
    marks: list[Mark]
    strip: float | None


@dataclass(frozen=True)
class Curve:
    """Loss over steps: SVG paths, and the places of the held-out points."""

    x: Axis
    y: Axis
    raw: str
    smooth: str
    held_out: str
    points: list[tuple[float, float]]


def axis(
    values: Iterable[float], start: float, end: float, title: str, show: Callable[[float, float], str], count: int = 5
) -> Axis:
    """An axis that holds `values` with some air, ticked at round numbers; `show(value, step)` writes a tick."""
    values = list(values)
    low, high = min(values), max(values)
    air = (high - low) * 0.1 or abs(high) * 0.05 or 1.0
    low, high = (max(low - air, 0.0) if low >= 0 else low - air), high + air
    step = _round_step((high - low) / count)
    scale = Axis(low, high, start, end, title)
    places = (n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1))
    return Axis(low, high, start, end, title, [(scale.at(v), show(v, step)) for v in places])


def pareto(
    candidates: Sequence[Candidate],
    limit: float | None,
    floor: float | None,
    y_title: str,
    show_y: Callable[[float, float], str],
    references: Sequence[float] = (),
) -> Pareto | None:
    """Candidates by storage and quality; None when there is nothing to place.

    Args:
        limit: of storage, bytes.
        floor: the quality to keep, on the y axis.
        references: further values the y axis must hold.
    """
    placed = [c for c in candidates if c.predicted is not None or c.measured is not None]
    known = [c for c in placed if c.quality is not None]
    unknown = [c for c in placed if c.quality is None]
    if not placed:
        return None
    storages = [s for c in placed for s in (c.predicted, c.measured) if s is not None]
    x = axis([*storages, *([limit] if limit else [])], LEFT, WIDTH - RIGHT, "storage, MB", _show_megabytes)
    bottom = HEIGHT - BOTTOM - (STRIP if unknown else 0)
    heights = [c.quality for c in known if c.quality is not None] + [e for c in known for e in c.interval or ()]
    heights += [*references, *([floor] if floor is not None else [])]
    y = axis(heights or [0.0, 1.0], bottom, TOP, y_title, show_y)
    if not heights:
        y = Axis(y.low, y.high, y.start, y.end, y.title)
    strip = HEIGHT - BOTTOM - STRIP / 2 if unknown else None
    spots = []
    for c in placed:
        hollow = x.at(c.predicted) if c.predicted is not None else None
        filled = x.at(c.measured) if c.measured is not None else None
        height = HEIGHT - BOTTOM - STRIP / 2 if c.quality is None else y.at(c.quality)
        bar = (y.at(c.interval[0]), y.at(c.interval[1])) if c.interval and c.quality is not None else None
        spots.append((c, height, hollow, filled, bar))
    circles = [(place, height) for _, height, *places, _ in spots for place in places if place is not None]
    labels = _labels([(f if f is not None else h or 0.0, height) for _, height, h, f, _ in spots], circles)
    marks = [
        Mark(c.number, c.name, c.chosen, height, hollow, filled, bar, label)
        for (c, height, hollow, filled, bar), label in zip(spots, labels)
    ]
    return Pareto(x, y, x.at(limit) if limit else None, y.at(floor) if floor is not None else None, marks, strip)


def curve(train: Sequence[tuple[float, float]], held_out: Sequence[tuple[float, float]]) -> Curve | None:
    """Loss over steps, from (step, loss) points; None with fewer than two."""
    train = _thin(sorted(train))
    held_out = sorted(held_out)
    everything = [*train, *held_out]
    if len(everything) < 2:
        return None
    x = axis([s for s, _ in everything], LEFT, WIDTH - RIGHT, "step", _show_plain)
    y = axis([v for _, v in everything], HEIGHT - BOTTOM, TOP, "loss, nats per token", _show_plain)
    window = len(train) // 15
    smooth = _smooth(train, window) if window >= 2 else []
    return Curve(
        x, y, _path(x, y, train), _path(x, y, smooth), _path(x, y, held_out), [(x.at(s), y.at(v)) for s, v in held_out]
    )


def percent_tick(value: float, step: float) -> str:
    return f"{value * 100:.{max(0, -math.floor(math.log10(step * 100)))}f}%"


def _show_plain(value: float, step: float) -> str:
    return f"{value:,.{max(0, -math.floor(math.log10(step)))}f}"


def _show_megabytes(value: float, step: float) -> str:
    return _show_plain(value / 1e6, step / 1e6)


def _round_step(step: float) -> float:
    base = 10 ** math.floor(math.log10(step))
    return next(m * base for m in (1, 2, 5, 10) if m * base >= step * 0.999)


def _path(x: Axis, y: Axis, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x.at(s):g} {y.at(v):g}" for s, v in points) if len(points) > 1 else ""


def _smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    return [
        (points[i][0], math.fsum(v for _, v in near) / len(near))
        for i in range(len(points))
        for near in [points[max(0, i - window) : i + window + 1]]
    ]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return points
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(g[-1][0], math.fsum(v for _, v in g) / len(g)) for g in groups]


def _labels(marks: Sequence[tuple[float, float]], circles: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A place for each mark's number where it covers neither a circle nor another number."""
    taken = list(circles)
    labels = []
    for x, y in marks:
        offsets = ((15, 0), (-15, 0), (11, -11), (-11, -11), (11, 11), (-11, 11), (0, -15), (0, 15), (19, 0), (-19, 0))
        spots = [(x + dx, y + dy) for dx, dy in offsets if LEFT < x + dx < WIDTH - 4 and TOP < y + dy < HEIGHT - BOTTOM]
        spots = spots or [(x + 15, y)]

        def room(spot: tuple[float, float]) -> float:
            return min(math.dist(spot, other) for other in taken)

        best = next((s for s in spots if room(s) >= 14.5), max(spots, key=room))
        taken.append(best)
        labels.append((round(best[0], 1), round(best[1], 1)))
    return labels

"""The ledger: what a piece of work really used, stage by stage, and how each figure is known.

    with Ledger() as ledger:
        with ledger.stage("train") as stage:
            ...
            stage.record("tokens", 4096, "token", "counted")
    ledger.figure("train", "peak_memory")
    ledger.save("ledger.json")

Every stage gets its time, CPU time, peak memory, energy, carbon, water and money without being asked. Stages nest: a
stage "train" inside "fit" has the path "fit/train". A stage entered again under the same path is another observation of
the same figures: `figure` is then the median with its interval, `total` the sum.

A figure says how it is known. measured: read from a counter. counted: exact arithmetic. declared: somebody said so.
modelled: a formula and parameters, both stored. "not available": no counter or no parameters; its value is then None.
"""

from __future__ import annotations

import gc
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple, Self

from shoestring.core import footprint, peak, probes, text
from shoestring.core.errors import ShoestringError, UsageError, nearest
from shoestring.core.estimate import Estimate, interval, paired_ratio
from shoestring.core.files import write_text
from shoestring.core.footprint import JOULES_PER_KWH, Declared, Range

__all__ = [
    "Difference",
    "Entry",
    "Estimate",
    "Ledger",
    "Row",
    "Stage",
    "derive",
    "diff",
    "interval",
    "paired_ratio",
    "weakest",
]

SCHEMA = "shoestring.ledger/1"
STATUSES = ("measured", "counted", "declared", "modelled", "not available")  # strongest first
SCOPES = ("process", "process tree", "machine", "model")
_AMBIGUOUS = {
    **dict.fromkeys(("ops", "op", "OPs"), "Say FLOP, or MAC (1 MAC = 2 FLOP)"),
    **dict.fromkeys(("kB", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB"), "Record bytes, with the unit B"),
    **dict.fromkeys(("ms", "us", "min", "h"), "Record seconds, with the unit s"),
    **dict.fromkeys(("kJ", "kWh", "Wh"), "Record joules, with the unit J"),
}


@dataclass(frozen=True)
class Entry:
    """One figure. `value` is None exactly when `status` is "not available".

    Attributes:
        interval: low and high: of the model's parameters when modelled, else a bootstrap 95% interval over `n` runs.
        n: how many observations `value` stands for.
        conditions: what the figure holds for (batch, threads, region ...), as plain data.
    """

    metric: str
    value: float | None
    unit: str
    status: str
    method: str = ""
    scope: str = "process"
    interval: tuple[float, float] | None = None
    n: int = 1
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise UsageError(f"{self.metric}: unknown status {self.status}", remedy=nearest(self.status, STATUSES))
        if self.scope not in SCOPES:
            raise UsageError(f"{self.metric}: unknown scope {self.scope}", remedy=nearest(self.scope, SCOPES))
        if self.unit in _AMBIGUOUS:
            raise UsageError(f"{self.metric}: the unit {self.unit} is refused", remedy=_AMBIGUOUS[self.unit])
        if (self.value is None) != (self.status == "not available"):
            raise UsageError(
                f"{self.metric}: value {self.value} with status {self.status}",
                remedy='Only a figure with the status "not available" has the value None',
            )
        if self.value is not None and not math.isfinite(self.value):
            raise UsageError(f"{self.metric} = {self.value} is not finite")
        if self.unit == "s" and self.value is not None and self.value < 0:
            raise UsageError(f"{self.metric} = {self.value} s is a negative duration")


def weakest(statuses: Iterable[str]) -> str:
    """The status of something derived from figures with these statuses."""
    return max(statuses, key=STATUSES.index)


def derive(
    metric: str, unit: str, inputs: Sequence[Entry], formula: Callable[..., float], method: str, scope: str = "process"
) -> Entry:
    """A figure computed from others: `formula` of their values, with the weakest of their statuses.

    Not available as soon as one of `inputs` is not.
    """
    status = weakest(entry.status for entry in inputs)
    value = None if status == "not available" else formula(*(entry.value for entry in inputs))
    return Entry(metric, value, unit, status, method, scope)


# By context and not by thread: tasks of one event loop take turns inside each other's stages.
_open_stages: ContextVar[tuple[Stage, ...]] = ContextVar("open_stages", default=())


class Stage:
    """A named stretch of work; made by `Ledger.stage`, opened with `with`."""

    def __init__(self, ledger: Ledger, path: str, settle: bool) -> None:
        self.ledger, self.path, self._settle = ledger, path, settle
        self._before: _Reading | None = None

    def record(
        self,
        metric: str,
        value: float | None,
        unit: str,
        status: str,
        method: str = "",
        scope: str = "process",
        interval: tuple[float, float] | None = None,
        **conditions: Any,
    ) -> Entry:
        """Add a figure in base units (B, s, J, FLOP, token ...).

        Raises:
            UsageError: unknown status or scope, an ambiguous unit, a value not finite or at odds with its status.
        """
        entry = Entry(
            metric, None if value is None else float(value), unit, status, method, scope, interval, 1, conditions
        )
        self.add(entry)
        return entry

    def record_bytes(self, direction: str, payload: float, wire: float | None = None, **conditions: Any) -> None:
        """Communication of one transfer: `payload` as counted in the codec, `wire` as counted at the socket.

        Args:
            direction: "up" or "down".
            wire: None where nobody counted; the figure is then "not available", not equal to the payload.
        """
        if direction not in ("up", "down"):
            raise UsageError(f"unknown direction {direction}", remedy="Say up or down")
        self.record(f"payload_{direction}", payload, "B", "counted", "serialised messages", **conditions)
        how = "bytes at the socket, headers and retries included"
        self.record(f"wire_{direction}", wire, "B", "not available" if wire is None else "measured", how, **conditions)

    def add(self, entry: Entry) -> None:
        """Add a figure made elsewhere, for example by `derive`."""
        self.ledger._add(self.path, entry)

    def figure(self, metric: str) -> Entry | None:
        return self.ledger.figure(self.path, metric)

    def __enter__(self) -> Self:
        if self._before is not None:
            raise ShoestringError(
                f"the stage {self.path or 'of the whole ledger'} is already open",
                remedy="Make another with ledger.stage(...)",
            )
        if self._settle:
            _settle()
        _open_stages.set((*_open_stages.get(), self))
        self._before = _Reading.take(self.ledger)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before, self._before = self._before, None
        assert before is not None
        after = _Reading.take(self.ledger, before.window)
        _open_stages.set(tuple(stage for stage in _open_stages.get() if stage is not self))
        conditions = {"interrupted": kind.__name__} if kind else {}
        for entry in _automatic(self.ledger, before, after):
            self.ledger._add(self.path, replace(entry, conditions=conditions) if conditions else entry)


@dataclass
class _Series:
    """Observations of one figure that differ in nothing but value and interval."""

    like: Entry
    values: list[float] = field(default_factory=list)
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    missing: int = 0

    def add(self, entry: Entry) -> None:
        if entry.value is None:
            self.missing += 1
            return
        self.values.append(entry.value)
        if entry.interval:
            self.lows.append(entry.interval[0])
            self.highs.append(entry.interval[1])

    @property
    def own_intervals(self) -> bool:
        return len(self.lows) == len(self.values)

    def median(self) -> Entry:
        if not self.values:
            return replace(self.like, n=self.missing)
        if self.like.metric.startswith("peak_"):
            # A peak that was passed once was needed once, whatever the other runs did.
            top = max(range(len(self.values)), key=self.values.__getitem__)
            bounds = (self.lows[top], self.highs[top]) if self.own_intervals else None
            return replace(self.like, value=self.values[top], interval=bounds, n=len(self.values))
        if self.own_intervals:
            bounds = (median(self.lows), median(self.highs))
            return replace(self.like, value=median(self.values), interval=bounds, n=len(self.values))
        estimate = interval(self.values)
        return replace(self.like, value=estimate.value, interval=estimate.interval, n=estimate.n)

    def sum(self) -> Entry:
        if not self.values or self.like.metric.startswith("peak_"):
            return self.median()
        bounds = (math.fsum(self.lows), math.fsum(self.highs)) if self.own_intervals else None
        return replace(self.like, value=math.fsum(self.values), interval=bounds, n=len(self.values))


class Row(NamedTuple):
    """A figure as text, for a table."""

    stage: str
    metric: str
    value: str
    interval: str
    n: int
    status: str
    scope: str
    method: str


class Ledger:
    """Stages and their figures.

    Args:
        declared: prices, power parameters, site factors and region; by default the shipped table,
            $SHOESTRING_PRICES and $SHOESTRING_REGION.
        region: ISO code of the grid, for carbon.
        powercap: where the processor's energy counters are.
    """

    def __init__(
        self, declared: Declared | None = None, region: str | None = None, powercap: Path = probes.POWERCAP
    ) -> None:
        self.declared = declared or Declared.load(region=region)
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.fingerprint: Mapping[str, Any] = probes.fingerprint()
        self._rapl = probes.Rapl.find(powercap)
        self._series: dict[str, dict[tuple[Any, ...], _Series]] = {}
        self._lock = threading.Lock()
        self._whole: Stage | None = None

    # -- writing

    def stage(self, name: str, *, settle: bool = False) -> Stage:
        """A stage below the one that is open in this thread or task.

        Args:
            settle: collect garbage and give freed memory back to the system first, so that the stage starts from what
                is really in use; costs up to some tenths of a second.
        """
        if not name.strip("/"):
            raise UsageError("a stage needs a name")
        outer = self._innermost()
        return Stage(self, f"{outer.path}/{name}" if outer and outer.path else name, settle)

    def record(
        self,
        metric: str,
        value: float | None,
        unit: str,
        status: str,
        method: str = "",
        scope: str = "process",
        **conditions: Any,
    ) -> Entry:
        """`Stage.record` on the innermost open stage, or on the whole ledger."""
        stage = self._innermost() or Stage(self, "", False)
        return stage.record(metric, value, unit, status, method, scope, **conditions)

    def __enter__(self) -> Self:
        self._whole = Stage(self, "", False)
        self._whole.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._whole is not None
        self._whole.__exit__(kind, error, trace)

    # -- reading

    @property
    def paths(self) -> list[str]:
        """Paths of the stages in the order in which they first ended; "" is the whole ledger."""
        return list(self._series)

    def figure(self, path: str, metric: str) -> Entry | None:
        """The median over a stage's observations (the maximum for a peak); None when there is no such figure.

        Where one stage holds figures of one metric that differ in kind, the last recorded.
        """
        found = [series for series in self._series.get(path.strip("/"), {}).values() if series.like.metric == metric]
        return found[-1].median() if found else None

    def figures(self, path: str) -> list[Entry]:
        """Every figure of a stage."""
        return [series.median() for series in self._series.get(path.strip("/"), {}).values()]

    def values(self, path: str, metric: str) -> list[float]:
        """The single observations behind a figure, in order."""
        found = [series for series in self._series.get(path.strip("/"), {}).values() if series.like.metric == metric]
        return list(found[-1].values) if found else []

    def total(self, metric: str) -> list[Entry]:
        """The sum over the outermost stages that have the figure, one entry for each status, unit and scope.

        Statuses are never added together. A peak's total is its maximum.
        """
        having = {
            path for path, series in self._series.items() if any(s.like.metric == metric for s in series.values())
        }
        outermost = [path for path in self._series if path in having and not any(up in having for up in _above(path))]
        groups: dict[tuple[str, str, str], list[Entry]] = {}
        for path in outermost:
            for series in self._series[path].values():
                if series.like.metric == metric:
                    groups.setdefault((series.like.status, series.like.unit, series.like.scope), []).append(
                        series.sum()
                    )
        return [_merge(entries) for _, entries in sorted(groups.items(), key=lambda item: STATUSES.index(item[0][0]))]

    def table(self) -> list[Row]:
        """Every figure as text, in the order of the stages, outer before inner."""
        rows = []
        for path in sorted(self._series, key=_order(self._series)):
            for entry in self.figures(path):
                bounds = " to ".join(text.show(x, entry.unit) for x in entry.interval) if entry.interval else ""
                value = "not available" if entry.value is None else text.show(entry.value, entry.unit)
                rows.append(
                    Row(path or "total", entry.metric, value, bounds, entry.n, entry.status, entry.scope, entry.method)
                )
        return rows

    def print_table(self, console: Any = None) -> None:
        """The stages as a table in the terminal; figures that are not measured carry a mark."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        console = console or Console()
        paths = sorted(self._series, key=_order(self._series))
        every = {(path, metric): self.figure(path, metric) for path in paths for metric, _ in _COLUMNS}
        columns = [c for c in _COLUMNS if any((e := every[path, c[0]]) and e.value is not None for path in paths)]
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        table.add_column("stage", min_width=8, overflow="fold")
        for title in ("runs", *(title.format(currency=self.declared.currency) for _, title in columns)):
            table.add_column(title, justify="right", no_wrap=True)
        seen, absent, others = set(), {}, []
        for path in paths:
            cells = [every[path, metric] for metric, _ in columns]
            name = "  " * path.count("/") + (path.rpartition("/")[2] or "total")
            runs = max((entry.n for entry in cells if entry), default=1)
            shown = (_cell(entry, in_column=True) if entry else "" for entry in cells)
            table.add_row(name, str(runs) if runs > 1 else "", *shown)
            seen |= {entry.status for entry in cells if entry}
            for entry in self.figures(path):
                if entry.metric in dict(_COLUMNS) and entry.value is None:
                    absent[entry.metric] = entry.method
                elif entry.metric not in _HIDDEN and entry.metric not in dict(_COLUMNS):
                    others.append((path, entry))
                    seen.add(entry.status)
        console.print(table)
        if others:
            table = Table("stage", "figure", "value", "status", "how", box=SIMPLE_HEAD, padding=(0, 1))
            for path, entry in others:
                many = f" (median of {entry.n})" if entry.n > 1 else ""
                table.add_row(path or "total", entry.metric, _cell(entry) + many, entry.status, entry.method)
            console.print(table)
        known = self.declared
        lines = [
            "  ".join(f"{mark} {status}" for status, mark in _MARKS.items() if status in seen),
            "; ".join(f"{metric} not available: {why}" for metric, why in absent.items()),
            f"parameters of modelled figures: {known.source} ({known.version})",
        ]
        for line in filter(None, lines):
            console.print(line, style="dim", highlight=False)

    # -- keeping

    def to_json(self) -> dict[str, Any]:
        """The whole ledger as plain data, with the machine, the versions and every parameter of modelled figures."""
        with self._lock:
            figures = []
            for path in self._series:
                for series in self._series[path].values():
                    entry = series.median()
                    figures.append(
                        {
                            "path": path,
                            "metric": entry.metric,
                            "value": entry.value,
                            "unit": entry.unit,
                            "status": entry.status,
                            "method": entry.method,
                            "scope": entry.scope,
                            "interval": list(entry.interval) if entry.interval else None,
                            "n": entry.n,
                            "conditions": dict(entry.conditions),
                            "values": series.values,
                            "lows": series.lows,
                            "highs": series.highs,
                        }
                    )
        return {
            "schema": SCHEMA,
            "started": self.started,
            "fingerprint": dict(self.fingerprint),
            "declared": self.declared.to_json(),
            "figures": figures,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """A ledger as it was written by `to_json`.

        Raises:
            ShoestringError: not a ledger, or of another version.
        """
        if data.get("schema") != SCHEMA:
            raise ShoestringError(f"this is not a ledger of version {SCHEMA}", f"its schema is {data.get('schema')!r}")
        ledger = cls(Declared.from_json(data["declared"]))
        ledger.started, ledger.fingerprint = data["started"], data["fingerprint"]
        for figure in data["figures"]:
            like = Entry(
                **{key: figure[key] for key in ("metric", "value", "unit", "status", "method", "scope", "conditions")},
            )
            missing = 0 if figure["values"] else figure["n"]
            series = _Series(like, list(figure["values"]), list(figure["lows"]), list(figure["highs"]), missing)
            ledger._series.setdefault(figure["path"], {})[_kind(like)] = series
        return ledger

    def save(self, path: str | Path) -> Path:
        """Write the ledger as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The ledger saved at `path`.

        Raises:
            ShoestringError: no such file, or not a ledger.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ShoestringError(f"the ledger {path} cannot be read", str(error.strerror)) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShoestringError(f"{path} is not a ledger", f"{type(error).__name__}: {error}") from None

    def recomputed(self, declared: Declared) -> Ledger:
        """This ledger with carbon, water and money under other prices, site factors or grid.

        Energies stay: they were taken with the power parameters of their day, or measured.
        """
        new = type(self).from_json(self.to_json())
        new.declared = declared
        for path, kinds in new._series.items():
            energy = [series for series in kinds.values() if series.like.metric == "energy"]
            if not energy:
                continue
            times = {_said(series.like): series.values for series in kinds.values() if series.like.metric == "time"}
            for key in [k for k, series in kinds.items() if series.like.metric in _PRICED]:
                del kinds[key]
            for series in energy:
                seconds = times.get(_said(series.like), [])
                if len(seconds) != len(series.values):
                    raise ShoestringError(
                        f"{path or 'the ledger'} has {len(series.values)} energies and {len(seconds)} times"
                    )
                for i, value in enumerate(series.values):
                    low, high = (series.lows[i], series.highs[i]) if series.own_intervals else (value, value)
                    for entry in _consequences(declared, Range(value, low, high), seconds[i], series.like.status):
                        new._add(path, replace(entry, conditions=series.like.conditions))
        return new

    # -- inside

    def _innermost(self) -> Stage | None:
        return next((stage for stage in reversed(_open_stages.get()) if stage.ledger is self), None)

    def _add(self, path: str, entry: Entry) -> None:
        with self._lock:
            kinds = self._series.setdefault(path, {})
            key = _kind(entry)
            kinds.setdefault(key, _Series(entry)).add(entry)
            kinds[key] = kinds.pop(key)  # last recorded stands last


def _kind(entry: Entry) -> tuple[Any, ...]:
    return (entry.metric, entry.unit, entry.status, entry.scope, entry.method, _said(entry))


def _said(entry: Entry) -> str:
    return json.dumps(entry.conditions, sort_keys=True, default=str) if entry.conditions else ""


def _above(path: str) -> list[str]:
    """The paths of the stages around `path`, the whole ledger first."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:i]) for i in range(len(parts))]


def _order(paths: Iterable[str]) -> Callable[[str], tuple[int, ...]]:
    """A sort key: outer before inner, otherwise in the order of `paths`."""
    first: dict[str, int] = {}
    for number, path in enumerate(paths):
        for outer in (*_above(path), path):
            first.setdefault(outer, number)
    return lambda path: tuple(first[p] for p in (*_above(path)[1:], path)) if path else ()


def _merge(entries: Sequence[Entry]) -> Entry:
    if len(entries) == 1 or entries[0].value is None:
        return entries[0]
    values = [entry.value for entry in entries if entry.value is not None]
    bounds = [entry.interval for entry in entries if entry.interval]
    combine = max if entries[0].metric.startswith("peak_") else math.fsum
    spread = (combine(b[0] for b in bounds), combine(b[1] for b in bounds)) if len(bounds) == len(entries) else None
    methods = list(dict.fromkeys(entry.method for entry in entries))
    return replace(
        entries[0],
        value=combine(values),
        interval=spread,
        n=sum(entry.n for entry in entries),
        method="; ".join(methods),
        conditions={},
    )


# ---------------------------------------------------------------- what every stage gets

_COLUMNS = (
    ("time", "time"),
    ("cpu_time", "CPU"),
    ("peak_memory", "peak memory"),
    ("energy", "energy"),
    ("carbon", "gCO2e"),
    ("water", "L water"),
    ("money", "{currency}"),
)
_HIDDEN = (
    "peak_memory_above_floor",
    "machine_cpu_time",
    "machine_energy",
    "gpu_energy",
    "bytes_read",
    "bytes_written",
    "water_site",
    "water_source",
)
_MARKS = {"counted": "#", "declared": "=", "modelled": "~", "not available": "-"}
_PRICED = ("carbon", "water", "water_site", "water_source", "money")


def _cell(entry: Entry, in_column: bool = False) -> str:
    """A figure with the mark of its status; without its unit where the head of the column has it."""
    if entry.value is None:
        return "-"
    mark = _MARKS.get(entry.status, "")
    if in_column and entry.metric in _PRICED:
        return f"{mark}{entry.value:.2g}"
    return f"{mark}{text.show(entry.value, entry.unit)}"


@dataclass(frozen=True)
class _Reading:
    """Every counter at one moment."""

    clock: float
    cpu: float
    machine: tuple[float, float] | None
    rapl: float | None
    gpu: float | None
    io: tuple[int, int] | None
    window: peak.Window

    @classmethod
    def take(cls, ledger: Ledger, opened: peak.Window | None = None) -> _Reading:
        """Read everything; with `opened`, at the end of that window. The clocks are innermost: reading is not work."""
        if opened is None:
            window = peak.open_window(poll=ledger._rapl.joules if ledger._rapl else None)
            others = cls._others(ledger)
            cpu = probes.tree_cpu()
            return cls(time.perf_counter(), cpu, *others, window)
        clock = time.perf_counter()
        cpu = probes.tree_cpu()
        others = cls._others(ledger)
        peak.close_window(opened)
        return cls(clock, cpu, *others, opened)

    @staticmethod
    def _others(ledger: Ledger) -> tuple[Any, Any, Any, Any]:
        rapl = ledger._rapl.joules() if ledger._rapl else None
        return probes.machine_cpu(), rapl, probes.gpu_joules(), probes.storage_io()


def _automatic(ledger: Ledger, before: _Reading, after: _Reading) -> Iterable[Entry]:
    seconds, cpu = after.clock - before.clock, max(0.0, after.cpu - before.cpu)
    yield Entry("time", seconds, "s", "measured", "monotonic clock")
    yield Entry("cpu_time", cpu, "s", "measured", "CPU clock of the process and its children", "process tree")
    busy = None
    if before.machine and after.machine:
        busy = max(0.0, after.machine[0] - before.machine[0])
        yield Entry("machine_cpu_time", busy, "s", "measured", "busy time of all cores", "machine")
    else:
        yield Entry("machine_cpu_time", None, "s", "not available", "no counter", "machine")

    memory = yield from _memory(before.window)

    power = ledger.declared.power
    joules, gpu = _since(before.rapl, after.rapl), _since(before.gpu, after.gpu)
    if gpu is not None:
        yield Entry("gpu_energy", gpu, "J", "measured", "GPU energy counter", "machine")
    note = " + GPU energy counter" if gpu is not None else "; no counter for the GPU's energy" * probes.gpu_uncounted()
    if joules is not None:
        yield Entry("machine_energy", joules, "J", "measured", "RAPL", "machine")
        # Up: all of the processor's energy goes to whoever ran. Down: idle cores pay for their own time.
        share = footprint.shared_energy(joules, cpu, max(busy or 0.0, cpu))
        least = footprint.shared_energy(joules, cpu, max(probes.cores() * seconds, cpu))
        energy = Range(share, min(share, least), share).plus(gpu or 0.0)
        how = "RAPL x share of the machine's busy CPU time" + note
    else:
        cores, ram = probes.cores(), probes.ram()
        use = min(1.0, (cpu if busy is None else busy) / (cores * seconds)) if seconds else 0.0
        whole = footprint.machine_energy(use, seconds, cores, ram, power)
        yield Entry(
            "machine_energy",
            whole.value,
            "J",
            "modelled",
            "P_idle + (P_max - P_idle) u, all RAM",
            "machine",
            (whole.low, whole.high),
        )
        energy = footprint.process_energy(cpu, seconds, memory or 0.0, power).plus(gpu or 0.0)
        how = "CPU time x W per busy core + peak memory x W per GB" + note
    yield Entry("energy", energy.value, "J", "modelled", how, "process tree", (energy.low, energy.high))
    yield from _consequences(ledger.declared, energy, seconds, "modelled")

    if before.io and after.io:
        for name, a, b in zip(("bytes_read", "bytes_written"), before.io, after.io, strict=True):
            yield Entry(name, max(0, b - a), "B", "measured", "storage counter of the process")


def _since(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else max(0.0, after - before)


def _memory(window: peak.Window) -> Any:
    """Yields the entries of a closed window and returns the peak in bytes."""
    top, floor = window.own, window.floor
    if top is None or floor is None:
        for metric in ("peak_memory", "peak_memory_above_floor"):
            yield Entry(metric, None, "B", "not available", "no memory counter on this system")
        return None
    bounds = None
    if window.exact:
        how, scope = "high-water mark of this stage", "process"
    else:
        how, scope = "highest of samples; the system's mark cannot be reset", "process"
        bounds = (float(top), float(max(top, window.mark or top)))
    if window.tree is not None and window.tree_high is not None:
        how, scope = how + ", or sampled sum over the children if higher", "process tree"
        low, high = max(top, window.tree), max(top, window.tree_high)
        bounds, top = (float(low), float(max(high, bounds[1] if bounds else high))), low
    yield Entry("peak_memory", float(top), "B", "measured", how, scope, bounds)
    above = (max(0.0, bounds[0] - floor), max(0.0, bounds[1] - floor)) if bounds else None
    yield Entry(
        "peak_memory_above_floor",
        float(max(0, top - floor)),
        "B",
        "measured",
        how + ", minus the floor at its start",
        scope,
        above,
    )
    return top


def _consequences(declared: Declared, joules: Range, seconds: float, status: str) -> Iterable[Entry]:
    """Carbon, water and money of an energy."""
    site, region, prices = declared.site, declared.region, declared.prices
    pue = site.pue or 1.0
    building = f"PUE {site.pue:g}" if site.pue else footprint.NO_PUE
    kwh = joules.times(1 / JOULES_PER_KWH)

    def entry(metric: str, unit: str, of: Callable[[float], float], how: str) -> Entry:
        known = weakest((status, "declared"))
        return Entry(metric, of(kwh.value), unit, known, how, "process tree", (of(kwh.low), of(kwh.high)))

    def absent(metric: str, unit: str, why: str) -> Entry:
        return Entry(metric, None, unit, "not available", why, "process tree")

    if region:
        year = f" {region.year}" if region.year else ""
        how = f"energy x {region.intensity:g} g/kWh ({region.name}{year}, {region.source}); {building}"
        yield entry("carbon", "gCO2e", lambda x: footprint.carbon(x, region.intensity, pue), how)
    else:
        yield absent("carbon", "gCO2e", "no region declared (SHOESTRING_REGION)")
    if site.wue is not None and site.ewif is not None:
        wue, ewif = site.wue, site.ewif
        how = f"WUE {wue:g} L/kWh on site + EWIF {ewif:g} L/kWh at the source; {building}"
        yield entry("water_site", "L", lambda x: footprint.water(x, pue, wue, ewif).site, how)
        yield entry("water_source", "L", lambda x: footprint.water(x, pue, wue, ewif).source, how)
        yield entry("water", "L", lambda x: footprint.water(x, pue, wue, ewif).total, how)
    else:
        yield absent("water", "L", "WUE and EWIF not declared")
    hours = seconds / 3600
    if prices.electricity is None and prices.machine_hour is None:
        yield absent("money", declared.currency, "no price declared")
        return
    terms = [
        f"electricity {prices.electricity:g} {declared.currency}/kWh"
        if prices.electricity is not None
        else "electricity not priced",
        f"machine {prices.machine_hour:g} {declared.currency}/h"
        if prices.machine_hour is not None
        else "machine not priced",
    ]
    how = f"{', '.join(terms)} ({declared.source}); {building}"
    yield entry(
        "money",
        declared.currency,
        lambda x: sum((footprint.money(footprint.Use(hours=hours, kwh=x), prices, pue) or {}).values()),
        how,
    )


def _settle() -> None:
    gc.collect()
    try:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library: its freed memory then stays in the floor
        pass


# ---------------------------------------------------------------- two ledgers


@dataclass(frozen=True)
class Difference:
    """One figure in two ledgers: `ratio` is b / a, over paired observations."""

    path: str
    metric: str
    unit: str
    a: float | None
    b: float | None
    ratio: Estimate | None
    verdict: str
    note: str = ""


def diff(a: Ledger, b: Ledger) -> list[Difference]:
    """Every figure that both ledgers have, b against a."""
    found = []
    for path in a.paths:
        for metric in dict.fromkeys(entry.metric for entry in a.figures(path)):
            left, right = a.figure(path, metric), b.figure(path, metric)
            if left and right:
                found.append(_compare(path, left, right, a.values(path, metric), b.values(path, metric)))
    return found


def _compare(path: str, left: Entry, right: Entry, a: Sequence[float], b: Sequence[float]) -> Difference:
    def says(verdict: str, ratio: Estimate | None = None, note: str = "") -> Difference:
        return Difference(path, left.metric, left.unit, left.value, right.value, ratio, verdict, note)

    if left.value is None or right.value is None:
        return says("not available")
    for what in ("unit", "scope", "status", "conditions"):
        if getattr(left, what) != getattr(right, what):
            return says("not comparable", note=f"{what}: {getattr(left, what)} against {getattr(right, what)}")
    if len(a) != len(b):
        return says("not comparable", note=f"{len(a)} runs against {len(b)} cannot be paired")
    if not all(value > 0 for value in (*a, *b)):
        return says("no significant difference" if list(a) == list(b) else "no ratio", note="a value is zero or below")
    ratio = paired_ratio(b, a)
    if left.status == "counted" and len(set(a)) == len(set(b)) == 1:
        return says("equal" if a[0] == b[0] else _direction(ratio), ratio, "exact: both are counted")
    if ratio.n == 1:
        return says("one run: no verdict", ratio)
    if ratio.covers(1):
        return says("no significant difference", ratio)
    notes = []
    if ratio.n < 6:
        notes.append(f"only {ratio.n} runs: chance alone does this once in {2 ** (ratio.n - 1)}")
    if left.status == "modelled":
        notes.append("modelled from the same counters as time: no independent confirmation")
    return says(_direction(ratio), ratio, "; ".join(notes))


def _direction(ratio: Estimate) -> str:
    return "lower" if ratio.value < 1 else "higher"

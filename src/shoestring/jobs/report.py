"""The result of a run for people: one HTML page that needs nothing else, a short text, and a table in the terminal.

An absent figure is shown as "not available", never as zero. Whatever a model or a file said is text, never markup.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shoestring.core import text
from shoestring.core.budget import RESOURCES
from shoestring.core.files import atomic_file
from shoestring.jobs import report_plots as plots

ABSENT = "not available"
TEMPLATE = Path(__file__).with_name("report.html.j2")
STATUSES = {
    "measured": "read from a counter or a clock",
    "counted": "exact arithmetic over sizes and shapes",
    "declared": "taken from a table or from what you said",
    "modelled": "a formula with assumed parameters",
}
_OF_THE_MODEL = ("storage", "memory", "latency")  # limits on the finished model; the others are on the making of it
_TITLES = {
    "storage": "Storage",
    "memory": "Peak memory",
    "train.memory": "Peak memory, making it",
    "latency": "Time per token",
    "time": "Time",
    "cpu": "CPU time",
    "energy": "Energy",
    "money": "Money",
    "carbon": "Carbon",
    "water": "Water",
    "network": "Network",
}
_SPENT_UNITS = {"cpu": "s", "carbon": "gCO2e", "water": "L"}
_COMPARED = {
    "perplexity_ratio": ("Perplexity ratio", "1 would be the same; above 1 is worse"),
    "kl": ("KL divergence of next-token distributions", "nats per token; 0 would be the same"),
    "changed_top": ("Changed top tokens", "share of places where another token comes first"),
}
_LEDGER_COLUMNS = ("time", "cpu_time", "peak_memory", "flops", "energy", "carbon", "money", "tokens")
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_UNIT = re.compile(r"(\d) ([kMGT]?B)\b")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Figure:
    """A number with what is known about it; `value` is None when nobody has it."""

    value: float | None
    interval: tuple[float, float] | None = None
    status: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Bar:
    """A figure against its limit."""

    resource: str
    title: str
    what: str
    unit: str
    before: float | None
    figure: Figure
    limit: float

    @property
    def met(self) -> bool | None:
        return None if self.figure.value is None else self.figure.value <= self.limit

    @property
    def top(self) -> float:
        return max(self.before or 0, self.figure.value or 0, self.limit) * 1.02

    @property
    def verdict(self) -> str:
        if self.figure.value is None:
            return ABSENT
        share = self.figure.value / self.limit
        if self.met:
            return f"{share:.0%} of the limit" if share >= 0.01 else "under 1% of the limit"
        return f"over by {share - 1:.{0 if share > 1.1 else 1 if share > 1.001 else 3}%}"


def render(result: Mapping[str, Any]) -> str:
    """The report as one HTML page without scripts and without anything to fetch. The same `result`, the same page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        bytes=lambda v: _show(v, "B"), percent=_percent, shown=_show, span=_span, times=_times, plain=_plain
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_view(result))
    return _NOT_TEXT.sub("\ufffd", page)


def write(result: Mapping[str, Any], folder: Path | str) -> Path:
    """Write `report.html` into `folder`, whole or not at all; its path. Raises ShoestringError where that fails."""
    path = Path(folder) / "report.html"
    page = render(result)
    with atomic_file(path) as temp:
        temp.write_text(page, encoding="utf-8")
    return path


def markdown(result: Mapping[str, Any]) -> str:
    """The headline, the table before / after / budget and the bill, for a README or a model card."""
    lines = [_in_markdown(headline(result)), "", "| | before | after | budget |", "|---|---:|---:|---:|"]
    for title, before, after, budget, met in _table(result):
        mark = "" if met is None else " ✓" if met else " ✗"
        lines.append("| " + " | ".join(_in_markdown(cell) for cell in (title, before, after, budget + mark)) + " |")
    bill = "; ".join(_spent_words(result))
    lines += ["", f"Spent on making it: {_in_markdown(bill)}."]
    reference = _map(result, "quality_kept").get("reference")
    if reference:
        lines += ["", _in_markdown(f"Quality is compared with {reference}.")]
    return "\n".join(lines) + "\n"


def terminal(result: Mapping[str, Any], console: Console) -> None:
    """Print the table before / after / budget and a line with what was spent."""
    console.print(Text(_one_line(headline(result)), style="bold"))
    table = Table()
    table.add_column("")
    for name in ("before", "after", "budget"):
        table.add_column(name, justify="right")
    table.add_column("", justify="center")
    for title, before, after, budget, met in _table(result):
        mark = Text("") if met is None else Text("✓", style="green") if met else Text("✗", style="bold red")
        table.add_row(*(Text(_one_line(cell)) for cell in (title, before, after, budget)), mark)
    console.print(table)
    console.print(Text("Spent: " + "   ".join(map(_one_line, _spent_words(result)))))


def headline(result: Mapping[str, Any]) -> str:
    """The result in one plain sentence."""
    before, after = _map(result, "before"), _map(result, "after")
    parts = []
    sizes = [number(side.get("storage")) for side in (before, after)]
    if sizes[1] is not None:
        parts.append(f"{_show(sizes[0], 'B')} → {_show(sizes[1], 'B')}" if sizes[0] else _show(sizes[1], "B"))
    kept = figure(result.get("quality_kept")).value
    reference = _map(result, "quality_kept").get("reference") or "the reference"
    better = kept is not None and kept > 1
    words = f"{_percent(kept)} of the quality of {reference}" if better else f"{_percent(kept)} of quality kept"
    parts.append(words if kept is not None else f"quality kept {ABSENT}")
    speed = _ratio(after, before, "decode_tokens_per_s")
    if speed:
        parts.append(_times(speed, "faster", "slower"))
    return f"{_model_name(result)}: {', '.join(parts)}; {_verdict(result)[1]}"


def number(raw: Any) -> float | None:
    """`raw`, or its "value", as a finite number; None for anything else."""
    if isinstance(raw, Mapping):
        raw = raw.get("value")
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        return None
    return float(raw)


def figure(raw: Any) -> Figure:
    """A figure from a bare number or from {"value", "interval", "status", "unit"}."""
    if not isinstance(raw, Mapping):
        return Figure(number(raw))
    ends = raw.get("interval")
    pair = [number(end) for end in ends] if isinstance(ends, Sequence) and len(ends) == 2 else []
    interval = (pair[0], pair[1]) if len(pair) == 2 and pair[0] is not None and pair[1] is not None else None
    return Figure(number(raw), interval, str(raw.get("status") or ""), str(raw.get("unit") or ""))


# -- what the three outputs share


def _model_name(result: Mapping[str, Any]) -> str:
    model = str(_map(result, "request").get("model") or result.get("name") or "the model")
    return model.rstrip("/").rpartition("/")[2] or model


def _bars(result: Mapping[str, Any]) -> list[Bar]:
    before, after, spent = (_map(result, key) for key in ("before", "after", "spent"))
    bars = []
    for resource, raw in _map(result, "limits").items():
        limit = number(raw)
        if limit is None or limit <= 0:
            continue
        unit, _, what = RESOURCES.get(resource, ("", {}, ""))
        of_model = resource in _OF_THE_MODEL
        raw_figure = (after if of_model else spent).get(resource)
        start = number(before.get(resource)) if of_model else None
        bars.append(Bar(resource, _title(resource), what, unit, start, figure(raw_figure), limit))
    return bars


def _verdict(result: Mapping[str, Any]) -> tuple[str, str]:
    """A word for the badge (good, over, below) and the end of the headline. The figures overrule the status."""
    bars = _bars(result)
    over = [f"{bar.title.lower()} {bar.verdict}" for bar in bars if bar.met is False]
    quality = _map(result, "quality_kept")
    kept, keep = number(quality), number(quality.get("keep"))
    below = result.get("status") == "below quality" or (kept is not None and keep is not None and kept < keep)
    less = "below the quality to keep" + (f" ({_percent(keep)})" if keep is not None else "")
    if over or result.get("status") == "over budget":
        words = "over budget" + (f" ({', '.join(over)})" if over else "")
        return "over", f"{words} and {less}" if below else words
    if below:
        return "below", less
    unknown = [bar.title.lower() for bar in bars if bar.met is None]
    if not bars:
        return "good" if result.get("status") == "done" else "unknown", "no limit was set"
    if unknown:
        return "unknown", f"inside the budget as far as measured ({', '.join(unknown)} {ABSENT})"
    return "good", "inside the budget"


def _table(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, bool | None]]:
    """Rows of title, before, after, budget, met."""
    before, after = _map(result, "before"), _map(result, "after")
    bars = {bar.resource: bar for bar in _bars(result)}
    rows: list[tuple[str, str, str, str, bool | None]] = []
    for resource in ("storage", "memory", *(("latency",) if "latency" in bars else ())):
        bar, unit = bars.get(resource), RESOURCES[resource][0]
        limit = f"≤ {_show(bar.limit, unit)}" if bar else ""
        was, now = _show(before.get(resource), unit), _show(after.get(resource), unit)
        rows.append((_title(resource), was, now, limit, bar.met if bar else None))
    for title, key, unit in (("Decode speed", "decode_tokens_per_s", "tokens/s"), ("Held-out loss", "loss", "")):
        rows.append((title, _show(before.get(key), unit), _show(after.get(key), unit), "", None))
    quality = _map(result, "quality_kept")
    kept, keep = number(quality), number(quality.get("keep"))
    met = kept >= keep if kept is not None and keep is not None else None
    floor = f"≥ {_percent(keep)}" if keep is not None else ""
    # A figure that misses the floor by less than the rounding must not look as if it met it.
    close = met is False and _percent(kept) == _percent(keep)
    rows.append(("Quality kept", "", f"{kept:.3%}" if close and kept is not None else _percent(kept), floor, met))
    ratio = number(_map(result, "comparison").get("perplexity_ratio"))
    if result.get("adapted") and ratio:
        rows.append(
            (
                f"... of {_plain(result.get('compared_with') or quality.get('reference'))}",
                "",
                _percent(1 / ratio),
                "",
                None,
            )
        )
    return rows


def _spent(result: Mapping[str, Any]) -> list[tuple[str, Figure, str]]:
    """Title, figure and shown value of what was spent; time, energy and money always."""
    spent = _map(result, "spent")
    rows = []
    for name in ("time", "cpu", "energy", "money", "carbon", "water", "network", "train.memory"):
        if name in spent or name in ("time", "energy", "money"):
            known = figure(spent.get(name))
            unit = known.unit or RESOURCES.get(name, (_SPENT_UNITS.get(name, ""),))[0]
            rows.append((_title(name), known, _show(known.value, unit)))
    return rows


def _spent_words(result: Mapping[str, Any]) -> list[str]:
    words = []
    for title, known, shown in _spent(result):
        if title in ("Time", "Energy", "Money"):
            limit = next((bar for bar in _bars(result) if bar.title == title), None)
            notes = [known.status] if known.status and known.value is not None else []
            if limit:
                notes.append(
                    f"limit {_show(limit.limit, limit.unit)}{ {True: ' ✓', False: ' ✗', None: ''}[limit.met] }"
                )
            words.append(f"{title.lower()} {shown}" + (f" ({', '.join(notes)})" if notes else ""))
    return words


# -- the page


def _view(result: Mapping[str, Any]) -> dict[str, Any]:
    before, after = _map(result, "before"), _map(result, "after")
    quality = _map(result, "quality_kept")
    badge, _ = _verdict(result)
    candidates = [_candidate(n, c) for n, c in enumerate(_list(result, "candidates"), 1) if isinstance(c, Mapping)]
    keep = number(quality.get("keep"))
    pareto, axis_is = _pareto(result, candidates, keep)
    stages, columns, every = _ledger(result.get("stages"))
    return {
        "absent": ABSENT,
        "name": _plain(result.get("name")),
        "created": _plain(result.get("created")),
        "request": {k: _plain(v) for k, v in _map(result, "request").items()},
        "status": {"over": "over budget", "below": "below quality"}.get(badge, _plain(result.get("status"))),
        "badge": badge,
        "headline": _UNIT.sub("\\1\u00a0\\2", headline(result)).replace(" → ", "\u00a0→ "),
        "model": _model_name(result),
        "tiles": _tiles(before, after),
        "losses": _losses(result),
        "quality": figure(quality),
        "quality_axis": _quality_axis(figure(quality), keep),
        "reference": _plain(quality.get("reference")),
        "compared_with": _plain(result.get("compared_with") or quality.get("reference")),
        "keep": keep,
        "bars": _bars(result),
        "spent": _spent(result),
        "sides": _sides(result),
        "comparison": _comparison(result),
        "candidates": candidates,
        "error": _prediction_error(result),
        "pareto": pareto,
        "pareto_y": axis_is,
        "curve": _curve(result),
        "stages": stages,
        "columns": columns,
        "figures": every,
        "statuses": STATUSES,
        "samples": [
            {who: _said(sample.get(who)) for who in ("prompt", "before", "after", "reference")}
            for sample in _list(result, "samples")
            if isinstance(sample, Mapping)
        ],
        "environment": _flatten(_map(result, "environment")),
        "commands": [_plain(c) for c in _list(result, "commands") or [_map(result, "request").get("command")] if c],
        "python": _plain(result.get("python")),
        "notes": [_plain(n) for n in _list(result, "notes")],
        "plot": plots,
    }


def _losses(result: Mapping[str, Any]) -> str:
    sides = (("before", "before"), ("after adapting", "adapted"), ("in the result", "after"))
    known = [(words, number(_map(result, key).get("loss"))) for words, key in sides]
    return ", ".join(f"{value:.4g} {words}" for words, value in known if value is not None)


def _tiles(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, str]]:
    tiles = []
    for title, key, unit, more, less in (
        ("Storage", "storage", "B", "larger", "smaller"),
        ("Peak memory", "memory", "B", "more", "less"),
        ("Decode speed", "decode_tokens_per_s", "tokens/s", "faster", "slower"),
    ):
        ratio = _ratio(after, before, key)
        tiles.append(
            {
                "title": title,
                "before": _show(before.get(key), unit),
                "after": _show(after.get(key), unit),
                "change": _times(ratio, more, less) if ratio else "",
            }
        )
    return tiles


def _sides(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The full table of measures: title, then value and interval before, adapted, after."""
    sides = [_map(result, key) for key in ("before", "adapted", "after")]
    rows = []
    for title, key, unit in (
        ("Storage", "storage", "B"),
        ("Peak memory", "memory", "B"),
        ("Decode speed", "decode_tokens_per_s", "tokens/s"),
        ("Prefill speed", "prefill_tokens_per_s", "tokens/s"),
        ("Time per token", "latency", "s"),
        ("Loading time", "load_seconds", "s"),
        ("Held-out loss, nats per token", "loss", ""),
        ("Held-out perplexity", "perplexity", ""),
    ):
        cells = []
        for side in sides:
            known = figure(side.get(key))
            cells.append((_show(known.value, unit), _span(known.interval, unit) if known.interval else ""))
        # Nobody measures the speed of the model halfway; a blank says less than "not available" would.
        if not sides[1].get(key):
            cells[1] = ("", "")
        rows.append((title, cells))
    return rows


def _comparison(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, raw in _map(result, "comparison").items():
        title, meaning = _COMPARED.get(key, (_words(key), ""))
        known = figure(raw)
        if known.value is None and not isinstance(raw, Mapping):
            continue
        share = key == "changed_top"
        ends = known.interval
        shown = _percent(known.value) if share else _show(known.value, "")
        span = (f"{_percent(ends[0])} to {_percent(ends[1])}" if share else _span(ends, "")) if ends else ""
        rows.append((title, shown, span, meaning))
    return rows


def _candidate(n: int, raw: Mapping[str, Any]) -> dict[str, Any]:
    predicted, measured = _map(raw, "predicted"), _map(raw, "measured")
    errors = {key: _error(predicted, measured, key) for key in ("storage", "memory")}
    verdict = _plain(raw.get("verdict"))
    return {
        "number": n,
        "name": _plain(raw.get("name")) if raw.get("name") else ", ".join(map(str, _list(raw, "pipeline"))) or ABSENT,
        "predicted": {
            "storage": number(predicted.get("storage")),
            "memory": number(predicted.get("memory")),
            "flops": number(predicted.get("flops_per_token")),
        },
        "measured": {
            "storage": number(measured.get("storage")),
            "memory": number(measured.get("memory")),
            "speed": number(measured.get("decode_tokens_per_s")),
            "loss": figure(measured.get("loss")),
        },
        "tried": bool(measured),
        "errors": errors,
        "quality": figure(raw.get("quality_kept")),
        "verdict": verdict,
        "chosen": verdict.startswith("chosen"),
    }


def _pareto(
    result: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], keep: float | None
) -> tuple[plots.Pareto | None, str]:
    by_quality = any(c["quality"].value is not None for c in candidates)
    placed = []
    for c in candidates:
        known: Figure = c["quality"] if by_quality else c["measured"]["loss"]
        storages = (c["predicted"]["storage"], c["measured"]["storage"])
        placed.append(plots.Candidate(c["number"], c["name"], *storages, known.value, known.interval, c["chosen"]))
    limit = number(_map(result, "limits").get("storage"))
    if by_quality:
        return plots.pareto(placed, limit, keep, "quality kept", plots.percent_tick, [1.0]), "quality kept"
    return plots.pareto(placed, limit, None, "held-out loss, nats", lambda v, step: f"{v:.4g}"), "held-out loss"


def _curve(result: Mapping[str, Any]) -> dict[str, Any] | None:
    train: list[tuple[float, float]] = []
    held_out: list[tuple[float, float]] = []
    for row in _list(result, "loss_curve"):
        step = number(row.get("step")) if isinstance(row, Mapping) else None
        if step is None:
            continue
        for points, key in ((train, "loss"), (held_out, "eval_loss")):
            value = number(row.get(key))
            if value is not None:
                points.append((step, value))
    drawn = plots.curve(train, held_out)
    if drawn is None:
        return None
    words = [
        f"{title} from {points[0][1]:#.3g} at step {points[0][0]:g} to {points[-1][1]:#.3g} at step {points[-1][0]:g}"
        for title, points in (("Training loss", sorted(train)), ("held-out loss", sorted(held_out)))
        if points
    ]
    return {"plot": drawn, "words": ", ".join(words) + "."}


def _ledger(
    raw: Any,
) -> tuple[
    list[tuple[int, str, dict[str, tuple[str, str]]]], list[str], list[tuple[str, str, str, str, str, str, str]]
]:
    """Stages as (depth, name, {metric: (value, status)}), the metrics worth a column, and every figure as text."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    if isinstance(raw, Mapping) and isinstance(raw.get("figures"), list):
        for entry in raw["figures"]:
            stages.setdefault(str(entry.get("path") or ""), []).append(entry)
    else:
        _unnest(raw, "", stages)
    paths = sorted(stages, key=_stage_order(list(stages)))
    rows, every, seen = [], [], []
    for path in paths:
        cells = {}
        for entry in stages[path]:
            metric, known = str(entry.get("metric")), figure(entry)
            shown = _show(known.value, known.unit)
            status = known.status if known.value is not None else ""
            cells[metric] = (shown, status)
            seen.append(metric)
            span = _span(known.interval, known.unit) if known.interval else ""
            texts = (_plain(entry.get("scope") or ""), _plain(entry.get("method") or ""))
            every.append((path or "all", _words(metric), shown, span, known.status, *texts))
        depth = path.count("/") + (1 if path and "" in stages else 0)
        rows.append((depth, path.rpartition("/")[2] or "all", cells))
    columns = [metric for metric in _LEDGER_COLUMNS if metric in seen]
    others = [metric for metric in dict.fromkeys(seen) if metric not in columns]
    return rows, columns or others[:6], every


def _unnest(raw: Any, above: str, stages: dict[str, list[Mapping[str, Any]]]) -> None:
    if isinstance(raw, Mapping):
        raw = raw.get("stages") or raw.get("children") or [raw]
    for stage in raw if isinstance(raw, list) else []:
        if not isinstance(stage, Mapping) or not stage.get("name"):
            continue
        path = f"{above}/{stage['name']}" if above else str(stage["name"])
        entries = stage.get("entries") or stage.get("figures") or []
        stages[path] = [entry for entry in entries if isinstance(entry, Mapping)]
        _unnest(stage.get("stages") or stage.get("children") or [], path, stages)


def _stage_order(paths: Sequence[str]) -> Any:
    """A sort key: outer before inner, otherwise in the order in which stages first appear."""
    first: dict[str, int] = {}
    for n, path in enumerate(paths):
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            first.setdefault("/".join(parts[:depth]), n)

    def key(path: str) -> tuple[int, ...]:
        parts = path.split("/")
        return tuple(first["/".join(parts[: d + 1])] for d in range(len(parts))) if path else ()

    return key


def _quality_axis(kept: Figure, keep: float | None) -> dict[str, float] | None:
    """Percentages of a line from `low` to `high` on which the kept quality, its interval and the floor stand."""
    if kept.value is None:
        return None
    ends = kept.interval or (kept.value, kept.value)
    values = [kept.value, *ends, 1.0, *([keep] if keep is not None else [])]
    step = 0.05 if max(values) - min(values) > 0.1 else 0.01
    low = max(0.0, math.floor((min(values) - step / 2) / step) * step)
    high = math.ceil(max(values) / step - 1e-9) * step
    place = lambda v: round((v - low) / (high - low) * 100, 2)
    axis = {"low": low, "high": high, "at": place(kept.value), "from": place(ends[0]), "to": place(ends[1])}
    return axis | ({"keep": place(keep)} if keep is not None else {})


def _prediction_error(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    errors = ((key, number(raw)) for key, raw in _map(result, "prediction_error").items())
    return [(_words(key), _signed(value) if value is not None else ABSENT) for key, value in errors]


def _error(predicted: Mapping[str, Any], measured: Mapping[str, Any], key: str) -> str:
    guess, truth = number(predicted.get(key)), number(measured.get(key))
    return _signed(guess / truth - 1) if guess is not None and truth else ""


def _flatten(raw: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in raw.items():
        name = f"{above} {_words(str(key))}".strip()
        if isinstance(value, Mapping):
            rows += _flatten(value, name if key not in ("machine", "software") else "")
        elif key in ("memory", "ram", "memory_limit") and number(value) is not None:
            rows.append((name, _show(value, "B")))
        elif isinstance(value, list | tuple):
            rows.append((name, ", ".join(map(str, value)) or "none"))
        else:
            rows.append((name, "yes" if value is True else "no" if value is False else _plain(value)))
    return rows


# -- words and numbers


def _show(raw: Any, unit: str) -> str:
    value = number(raw)
    if value is None:
        return ABSENT
    if unit == "USD" and 0 < value < 1e-6:
        return "under 0.000001 USD"
    if unit == "USD" and 0 < value < 0.01:
        return f"{Decimal(f'{value:.2g}'):f} USD"  # 1e-05 USD is no price
    return text.show(value, unit).removesuffix(" 0 s")


def _percent(raw: Any) -> str:
    value = number(raw)
    return ABSENT if value is None else f"{value:.1%}"


def _signed(share: float) -> str:
    return f"{share:+.1%}".replace("-", "\u2212") if abs(share) >= 0.0005 else "0.0%"


def _span(ends: tuple[float, float], unit: str) -> str:
    low, high = (_show(end, unit) for end in ends)
    # "1.2 MB to 1.4 MB" reads better with the unit once.
    same = low.rpartition(" ")[2] == high.rpartition(" ")[2] and " " in low and low.count(" ") == 1
    return f"{low.rpartition(' ')[0]} to {high}" if same else f"{low} to {high}"


def _ratio(after: Mapping[str, Any], before: Mapping[str, Any], key: str) -> float | None:
    new, old = number(after.get(key)), number(before.get(key))
    return new / old if new and old else None


def _times(ratio: float, more: str, less: str) -> str:
    if 0.95 < ratio < 1.05:
        return "the same speed" if more == "faster" else "the same"
    factor = ratio if ratio > 1 else 1 / ratio
    return f"{factor:.{0 if factor >= 20 else 1}f}× {more if ratio > 1 else less}"


def _title(resource: str) -> str:
    return _TITLES.get(resource, _words(resource).capitalize())


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(raw: Any) -> str:
    """Any value as text a reader can trust: no control characters, and none that reverse the line."""
    if raw is None or raw == "":
        return ABSENT
    if isinstance(raw, list | tuple) and all(isinstance(part, str) for part in raw):
        raw = shlex.join(raw)
    return _BIDI.sub("", str(raw))


def _said(raw: Any) -> str:
    return "(nothing)" if raw == "" else _plain(raw)


def _one_line(words: str) -> str:
    return " ".join(_NOT_TEXT.sub(" ", _BIDI.sub("", words)).split())


def _in_markdown(words: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _one_line(words))


def _map(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    value = raw.get(key)
    return list(value) if isinstance(value, list | tuple) else []

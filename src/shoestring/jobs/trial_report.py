"""A trial for people: the table as text and Markdown, and the picture of loss against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.core import text
from shoestring.core.files import atomic_file, write_text

HEADER = ("", "method", "held-out loss", "trained", "peak memory", "above floor", "time", "a step", "adapter", "note")
_PANELS = (("trainable", "trained parameters", 1.0), ("peak_memory", "peak memory while training, MB", 1e6))


def cells(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table below `HEADER`; a star stands before what nothing else beats in everything."""
    base = result["base"]
    lines = [_line(row) for row in result["rows"]]
    if base.get("loss") is not None:
        lines.append(("", "untrained", _loss(base), *[""] * 7))
    return lines


def write(result: Mapping[str, Any], folder: Path) -> None:
    """`trial.md`, and `pareto.svg` when there is anything to show in it."""
    write_text(folder / "trial.md", markdown(result))
    if any(row.get("loss") is not None for row in result["rows"]):
        with atomic_file(folder / "pareto.svg") as file:
            picture(result, file)


def markdown(result: Mapping[str, Any]) -> str:
    budget = f" within {result['budget']}" if result["budget"] else ""
    lines = [
        f"# {result['model']} on {result['data']}: {result['steps']} steps with each method{budget}",
        "",
        "Loss in nats a token on the validation part, with its 95% interval. * marks rows that no other beats in loss,"
        " trained parameters, peak memory and seconds a step at once.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells(result)),
        "",
    ]
    if any(row.get("loss") is not None for row in result["rows"]):
        lines += ["![Held-out loss against trained parameters and against peak memory](pareto.svg)", ""]
    return "\n".join(lines)


def picture(result: Mapping[str, Any], file: Path) -> None:
    """Held-out loss against trained parameters and against peak memory, as SVG; the front of each panel is joined."""
    import matplotlib

    from shoestring.core.pareto import pareto

    with matplotlib.rc_context({"svg.hashsalt": "shoestring", "font.size": 8, "svg.fonttype": "none"}):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, len(_PANELS), sharey=True)
        for panel, (name, title, scale) in zip(axes, _PANELS, strict=True):
            rows = [row for row in result["rows"] if row.get("loss") is not None and row.get(name)]
            points = [(row[name] / scale, row["loss"]) for row in rows]
            inside = [(point, row) for point, row in zip(points, rows) if row["status"] == "done"]
            front = sorted(inside[i][0] for i in pareto([point for point, _ in inside]))
            panel.plot(*zip(*front), color="#2a6", linewidth=1, zorder=1) if front else None
            for point, row in zip(points, rows):
                colour = "#2a6" if point in front else "#555" if row["status"] == "done" else "#c44"
                spread = (
                    [[row["loss"] - row["interval"][0]], [row["interval"][1] - row["loss"]]]
                    if row["interval"]
                    else None
                )
                panel.errorbar(*point, yerr=spread, fmt="o", markersize=4, color=colour, elinewidth=0.5, alpha=0.9)
                panel.annotate(row["method"], point, xytext=(4, 3), textcoords="offset points", color=colour)
            if name == "trainable":
                panel.set_xscale("log")
            panel.margins(x=0.15)  # room for the last names
            panel.set_xlabel(title)
            panel.grid(color="#ddd", linewidth=0.5)
            base = result["base"].get("loss")
            if base is not None:
                panel.axhline(base, color="#888", linestyle=":", linewidth=1)
        axes[0].set_ylabel("held-out loss, nats a token (dotted: untrained)")
        figure.savefig(file, format="svg", metadata={"Date": None})


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row.get("loss") is None:
        return ("", row["method"], "-", "-", "-", "-", "-", "-", "-", f"{row['status']}: {row['reason']}")
    note = f"over budget: {row['reason']}" if row["reason"] else ""
    if row.get("stopped_because") == "max_seconds":
        note = ", ".join(filter(None, [note, f"time ended it after {row['steps']} steps"]))
    return (
        "*" if row["front"] else "",
        row["method"],
        _loss(row),
        f"{row['trainable']:,}" if row["trainable"] else "-",
        text.show(row["peak_memory"], "B"),
        text.show(row["above_floor"], "B"),
        text.show(row["seconds"], "s"),
        text.show(row["seconds_per_step"], "s"),
        text.show(row["storage"], "B"),
        note,
    )


def _loss(row: Mapping[str, Any]) -> str:
    bounds: Sequence[float] | None = row["interval"]
    return f"{row['loss']:.4f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")

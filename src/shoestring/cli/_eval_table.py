"""The figures of `eval` for people: one model, or two side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shoestring.cli._screen import table
from shoestring.core import text

_WORK = {
    "storage": "storage",
    "peak_memory": "peak memory",
    "load_seconds": "load",
    "first_token_seconds": "first token",
    "prefill_tokens_per_s": "prefill",
    "decode_tokens_per_s": "decode",
    "latency": "per token",
}
_QUALITY = {"loss": "held-out loss", "perplexity": "perplexity"}
_COMPARISON = {
    "perplexity_ratio": "perplexity ratio (1 is equal)",
    "kl": "KL divergence",
    "changed": "changed top tokens",
    "probability_loyalty": "probability loyalty (1 is equal)",
}


def lines(result: Mapping[str, Any]) -> str:
    """What `jobs.evaluate.evaluate` returned, as a table."""
    other = result.get("against", {})
    rows = []
    for part, titles in (("work", _WORK), ("quality", _QUALITY)):
        for name, title in titles.items():
            if name in result.get(part, {}):
                rows.append((title, figure(result[part][name]), figure(other.get(part, {}).get(name))))
    header = ("", result["model"], other.get("model", ""))
    data = result["data"]
    said = [f"{data['rows']} rows, {data['tokens']:,} tokens of {data['source']} ({data['split']})"]
    said.append(table(header if other else header[:2], rows if other else [row[:2] for row in rows]))
    compared = [(title, figure(other["comparison"].get(name))) for name, title in _COMPARISON.items()] if other else []
    said += ["", table(("compared", ""), compared)] if compared else []
    for task, found in result.get("tasks", {}).items():
        said.append(f"{task}: {json.dumps(found, default=str)}")
    return "\n".join(said)


def figure(found: Mapping[str, Any] | None) -> str:
    """A figure with its interval; an absent one is a dash."""
    if found is None or found.get("value") is None:
        return "-"
    unit = "" if found["unit"] in ("ratio", "share") else found["unit"]
    shown = text.show(found["value"], unit)
    ends = found.get("interval")
    return shown if not ends else f"{shown} ({text.show(ends[0], unit)} to {text.show(ends[1], unit)})"

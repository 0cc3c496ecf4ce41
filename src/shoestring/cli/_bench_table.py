"""The figures of `bench` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoestring.cli._screen import table
from shoestring.core import text

_DELAYS = {
    "first_token": "time to first token",
    "per_token": "time per output token",
    "between_chunks": "between chunks",
    "request": "whole request",
}
_COLUMNS = ("mean", "p50", "p95", "p99", "max")


def served(found: Mapping[str, Any]) -> str:
    """What `jobs.bench.bench_serve` returned."""
    requests, tokens, speed, client = (found[name] for name in ("requests", "tokens", "throughput", "client"))
    done = f"{requests['done']} of {requests['sent']} requests answered in {text.show(found['seconds'], 's')}"
    cached = f", {tokens['cached']:,} of them from the cache" if tokens["cached"] else ""
    lines = [
        f"{found['model']} at {found['url']}, {found['route']}",
        f"{done}; {tokens['prompt']:,} prompt tokens{cached}, {tokens['output']:,} output tokens "
        f"(counted by {tokens['counted_by']})",
        *(f"  {count} x {kind}" for kind, count in requests["errors"].items()),
        "",
        _delays(found),
        "",
        f"throughput  {speed['requests_per_s']:.2f} requests/s, {speed['output_tokens_per_s']:.1f} output tokens/s",
    ]
    good = found["goodput"]
    if good:
        asked = [f"{n} {good['limits'][n + '_ms']:g} ms" for n in ("ttft", "tpot") if good["limits"][n + "_ms"]]
        within = f"{good['share']:.0%} of the requests within " + " and ".join(asked)
        lines.append(f"goodput     {good['requests_per_s']:.2f} requests/s, {within}")
    own, share = client["cpu_seconds_per_chunk"], client["cpu_share_of_a_core"]
    lines.append(f"client      {text.show_seconds(own)} of CPU for each chunk, {share:.1%} of a core")
    return "\n".join(lines)


def alone(found: Mapping[str, Any]) -> str:
    """What `jobs.bench_engine.bench_latency` returned."""
    speed = f"prefill {found['prefill_tokens_per_s']:.0f} tokens/s, decode {found['decode_tokens_per_s']:.1f} tokens/s"
    best = f"best {found['best_decode_tokens_per_s']:.1f}; opened in {text.show_seconds(found['open_seconds'])}"
    return "\n".join([_about(found), "", _delays(found), "", f"{speed} ({best})"])


def together(found: Mapping[str, Any]) -> str:
    """What `jobs.bench_engine.bench_throughput` returned."""
    tokens, speed = found["tokens"], found["throughput"]
    size = f"{tokens['prompt']:,} prompt and {tokens['output']:,} output tokens in {text.show(found['seconds'], 's')}"
    speeds = f"{speed['output_tokens_per_s']:.1f} output tokens/s, {speed['all_tokens_per_s']:.1f} tokens/s in all"
    return "\n".join(
        [_about(found), f"{size}, {found['steps']} steps", f"{speeds}, {speed['requests_per_s']:.2f} requests/s"]
    )


def _about(found: Mapping[str, Any]) -> str:
    where = f"{found['backend']}, {found['precision']}, cache {found['cache']}, {found['threads']} threads"
    return f"{found['model']}: {where}, load average {found['load_average']:.1f}"


def _delays(found: Mapping[str, Any]) -> str:
    rows = [
        (title, *(text.show_seconds(found[name][column]) for column in _COLUMNS))
        for name, title in _DELAYS.items()
        if found.get(name)
    ]
    return table(("", *_COLUMNS), rows)

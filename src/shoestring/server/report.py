"""How a process stands that answers for this one, and how they stand together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoestring.engine.runner import BLOCK

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from shoestring.server.service import Service

_WHOLE = ("requests_open", "http_responses")  # counted where requests come in
_OWN = ("energy_joules", "resident_memory_bytes", "peak_rss_bytes")  # of every process, that one's included


@dataclass(frozen=True)
class Report:
    """One process: its number, its id, what it has at /v1/ledger, its metrics, the tokens that its cache holds."""

    name: str
    pid: int
    ledger: dict[str, Any]
    metrics: list[Metric]
    cache_tokens: int


def report(service: Service, name: str) -> Report:
    from shoestring.server.status import status

    engine = service.loaded
    assert engine
    cache = engine.counts().blocks_total * BLOCK
    return Report(name, os.getpid(), status(service), list(service.metrics.collect()), cache)


def together(own: dict[str, Any], reports: Sequence[Report] | None) -> dict[str, Any]:
    """The ledger of all: `own` is that of the process in front; each one's stands below `replicas`."""
    if reports is None:
        return own
    if not reports:
        return own | {"replicas": []}
    ledgers = [report.ledger for report in reports]
    first, all_of = ledgers[0], [own, *ledgers]
    requests = own["requests"] | {
        name: sum(ledger["requests"][name] for ledger in ledgers) for name in ("running", "waiting", "slots", "queue")
    }
    requests["finished"] = _sum(ledger["requests"]["finished"] for ledger in ledgers)
    parts = ("joules", "low", "high")
    energy = own["energy"] | {name: round(sum(one["energy"][name] for one in all_of), 3) for name in parts}
    money = [one["money"] for one in all_of]
    return own | {
        "requests": requests,
        "memory": _sum(one["memory"] for one in all_of),
        "energy": energy,
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in all_of), 3),
        "money": None if None in money else sum(money),
        "models": first["models"],
        "adapters": first["adapters"],
        "model": first["model"],
        "tokens": _sum(ledger["tokens"] for ledger in ledgers),
        "replicas": [{"replica": report.name, "pid": report.pid, **report.ledger} for report in reports],
    }


def labelled(own: Iterable[Metric], reports: Sequence[Report], prefix: str) -> list[Metric]:
    """The metrics of all: samples of a replica have its number as the label `replica`."""
    found: dict[str, Metric] = {}
    for family in own:
        word = family.name.removeprefix(prefix)
        if word in _OWN:
            _label(family, "front")
        if word in (*_WHOLE, *_OWN) or word.startswith("front_"):
            found[family.name] = family
    for report in reports:
        for family in report.metrics:
            if family.name.removeprefix(prefix) in _WHOLE:
                continue
            _label(family, report.name)
            if family.name in found:
                found[family.name].samples += family.samples
            else:
                found[family.name] = family
    return list(found.values())


def _label(family: Metric, name: str) -> None:
    family.samples = [sample._replace(labels={**sample.labels, "replica": name}) for sample in family.samples]


def _sum(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Number by number; what is None counts as nothing."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0) + (value or 0)
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}

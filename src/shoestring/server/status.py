"""/v1/ledger: how the server stands, and what it has used since it was started."""

from __future__ import annotations

import time
from typing import Any

from shoestring import __version__
from shoestring.core import probes
from shoestring.server.keys import ANYONE, Client
from shoestring.server.service import Service


def status(service: Service, client: Client = ANYONE) -> dict[str, Any]:
    """Plain data, as `client` may see it. Bytes, seconds of the clock, joules; tokens since the start, so that two
    readings give a rate.
    """
    meter, engine = service.meter, service.loaded
    now = meter.read()
    seconds = now.clock - meter.start.clock
    energy = meter.joules(meter.start, now)
    found: dict[str, Any] = {
        "state": service.health(),
        "version": __version__,
        "uptime_seconds": round(seconds, 3),
        "time": time.time(),
        "requests": {
            "open": service.gate.requests,
            "places": service.gate.room,
            "taken": service.gate.taken,
            "finished": service.metrics.finished,
            "http": service.metrics.answers,
        },
        "memory": {"resident_bytes": probes.resident(), "peak_bytes": probes.high_water()},
        "energy": {
            "joules": round(energy.value, 3),
            "low": round(energy.low, 3),
            "high": round(energy.high, 3),
            "status": "modelled",
            "method": meter.method,
        },
        "cpu_seconds": round(now.cpu, 3),
        "money": meter.money(energy.value, seconds),
        "currency": meter.declared.currency,
        "models": list(service.names),
        "adapters": service.adapters(client),
    }
    if engine is None:
        return found
    counts, inner = engine.counts(), engine.engine
    found["model"] = {
        "family": inner.facts.family,
        "precision": inner.facts.precision,
        "backend": inner.facts.backend,
        "context": inner.context,
        "weight_bytes": inner.facts.weight_bytes,
    }
    found["requests"] |= {
        "running": counts.running,
        "waiting": counts.waiting,
        "slots": service.settings.max_num_seqs,
        "queue": service.settings.queue,
    }
    found["tokens"] = {
        "prompt": counts.prompt_tokens,
        "cached": counts.prefix_hits,
        "generated": counts.generation_tokens,
        "step_seconds": round(counts.step_seconds, 3),
    }
    found["plugged"] = dict(counts.plugged)
    found["memory"] |= {"cache_used_bytes": counts.cache_bytes_used, "cache_limit_bytes": counts.cache_bytes_limit}
    return found

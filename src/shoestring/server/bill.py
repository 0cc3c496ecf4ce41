"""What a request costs: its share of the process's energy while it ran, and that energy's money."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from shoestring.core import footprint, probes
from shoestring.core.footprint import JOULES_PER_KWH, Declared, Range

_BY_MODEL = "CPU time x W per busy core + memory x W per GB"
_BY_COUNTER = "RAPL x share of the machine's busy CPU time"
_SHARED = "; shared among requests by tokens computed"


@dataclass(frozen=True)
class Reading:
    """Every counter at one moment."""

    clock: float
    cpu: float
    rapl: float | None
    busy: float | None


class Meter:
    """Reads the process's counters. `joules` and `cost` are modelled; the parameters are those of the price file."""

    def __init__(self, declared: Declared | None = None) -> None:
        self.declared = declared or Declared.load()
        self._rapl = probes.Rapl.find()
        self.method = _BY_COUNTER if self._rapl else _BY_MODEL
        self.start = self.read()
        self._memory, self._memory_read = 0.0, 0.0

    def read(self) -> Reading:
        rapl = self._rapl.joules() if self._rapl else None
        machine = probes.machine_cpu() if self._rapl else None
        return Reading(time.monotonic(), time.process_time(), rapl, machine[0] if machine else None)

    def memory(self) -> float:
        """Bytes of this process in RAM, as of the last second: reading them costs more than a token."""
        now = time.monotonic()
        if now - self._memory_read > 1:
            self._memory, self._memory_read = float(probes.resident() or 0), now
        return self._memory

    def joules(self, before: Reading, after: Reading) -> Range:
        """Of the whole process between two readings."""
        cpu, seconds = max(0.0, after.cpu - before.cpu), max(0.0, after.clock - before.clock)
        if before.rapl is not None and after.rapl is not None:
            busy = max(cpu, (after.busy or 0.0) - (before.busy or 0.0))
            joules = after.rapl - before.rapl
            most = footprint.shared_energy(joules, cpu, busy)
            least = footprint.shared_energy(joules, cpu, max(probes.cores() * seconds, cpu))
            return Range(most, min(least, most), most)
        return footprint.process_energy(cpu, seconds, self.memory(), self.declared.power)

    def money(self, joules: float, seconds: float) -> float | None:
        """In the declared currency; None without declared prices."""
        use = footprint.Use(hours=seconds / 3600, kwh=joules / JOULES_PER_KWH)
        items = footprint.money(use, self.declared.prices, self.declared.site.pue or 1.0)
        return sum(items.values()) if items else None

    def bill(self, before: Reading, share: float) -> dict[str, Any]:
        """Energy and money of what had this `share` (0..1) of the work since `before`."""
        after = self.read()
        energy = self.joules(before, after).times(share)
        found = {
            "energy_joules": round(energy.value, 6),
            "energy_low": round(energy.low, 6),
            "energy_high": round(energy.high, 6),
            "energy_status": "modelled",
            "energy_method": self.method + _SHARED,
        }
        money = self.money(energy.value, (after.clock - before.clock) * share)
        return found if money is None else found | {"money": money, "currency": self.declared.currency}

"""What a person can spend: limits per resource, with units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shoestring.core import text
from shoestring.core.errors import UsageError, nearest

_MONEY = {"USD": 1.0}

# The resource, the unit its figure has in the ledger, the units people may write, and what it limits.
RESOURCES: dict[str, tuple[str, dict[str, float], str]] = {
    "storage": ("B", text.BYTES, "bytes of the finished model folder"),
    "memory": ("B", text.BYTES, "peak memory of a process that loads the finished model and generates"),
    "train.memory": ("B", text.BYTES, "peak memory while the model is being made"),
    "latency": ("s", text.SECONDS, "time per generated token of the finished model"),
    "time": ("s", text.SECONDS, "time to make the model, from start to report"),
    "energy": ("J", text.JOULES, "energy to make the model"),
    "money": ("USD", _MONEY, "cost to make the model"),
    "network": ("B", text.BYTES, "bytes sent and received"),
}
ALIASES = {"ram": "memory", "net": "network", "disk": "storage", "size": "storage"}


@dataclass(frozen=True)
class Miss:
    """A limit that a figure passes."""

    resource: str
    value: float
    limit: float

    def __str__(self) -> str:
        unit = RESOURCES[self.resource][0]
        return f"{self.resource} {text.show(self.value, unit)} > {text.show(self.limit, unit)}"


@dataclass(frozen=True)
class Budget:
    """Limits in base units (bytes, seconds, joules, USD) by resource name."""

    limits: Mapping[str, float]

    @classmethod
    def parse(cls, written: str) -> Budget:
        """Read `storage=90MB,memory=800MB,time=6m`.

        Raises:
            UsageError: unknown resource, unknown or missing unit, a limit given twice or not above zero.
        """
        limits: dict[str, float] = {}
        for part in filter(None, (p.strip() for p in written.split(","))):
            name, equals, value = part.partition("=")
            name = ALIASES.get(name.strip(), name.strip())
            if name not in RESOURCES:
                raise UsageError(f"unknown resource {name}", remedy=nearest(name, RESOURCES))
            if not equals or not value.strip():
                raise UsageError(f"the budget's {name} has no limit", remedy=f"Write {name}=VALUE with a unit")
            if name in limits:
                raise UsageError(f"the budget limits {name} twice")
            limits[name] = text.quantity(value, RESOURCES[name][1], name)
        return cls(limits)

    def __str__(self) -> str:
        return ",".join(f"{name}={_compact(value, RESOURCES[name][1])}" for name, value in self.limits.items())

    def get(self, resource: str) -> float | None:
        return self.limits.get(resource)

    def misses(self, figures: Mapping[str, float | None]) -> Iterator[Miss]:
        """The limits that `figures` (by resource, base units) pass. A figure that is absent misses nothing."""
        for resource, limit in self.limits.items():
            value = figures.get(resource)
            if value is not None and value > limit:
                yield Miss(resource, value, limit)


def _compact(value: float, units: dict[str, float]) -> str:
    whole = [
        (scale, unit)
        for unit, scale in units.items()
        if value >= scale and abs(value / scale - round(value / scale, 3)) < 1e-9
    ]
    base = next((scale, unit) for unit, scale in units.items() if scale == 1)
    scale, unit = max(whole) if whole else base
    return f"{value / scale:.12g}{unit}"

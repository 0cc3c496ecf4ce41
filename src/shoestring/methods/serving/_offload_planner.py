"""What compute and memory devices would answer per dollar, by arithmetic over their published figures (9).

plan(Load(...) or a Shape, context=8192).best
python -m shoestring.methods.serving._offload_planner MODEL --context 512,8192
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoestring.core.errors import DoesNotFit, UsageError, nearest
from shoestring.core.shape import PROJECTIONS, Shape

USABLE = 0.9  # of a device's memory; the rest is for activations and buffers


@dataclass(frozen=True)
class Device:
    """Published figures: flops and bytes per second, bytes, dollars per hour."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    price: float


DEVICES = {
    "h100": Device("h100", 989e12, 3.35e12, 80e9, 11.06),
    "h20": Device("h20", 148e12, 4.0e12, 96e9, 4.63),
}


@dataclass(frozen=True)
class Load:
    """What a model asks of devices.

    Attributes:
        parameters: that a token multiplies with.
        width: numbers of all queries of a layer; key_width of all its keys.
        element: bytes of a number, of weights and keys alike.
    """

    parameters: float
    layers: int
    width: int
    key_width: int
    element: float = 2

    @classmethod
    def of(cls, shape: Shape, element: float = 2) -> Load:
        used = sum(w.count * w.used for w in shape.weights if w.role in PROJECTIONS | {"head", "expert", "other"})
        heads, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        return cls(used, shape.layers, heads, keys, element)

    @property
    def weight_bytes(self) -> float:
        return self.parameters * self.element

    def kv_bytes(self, context: float) -> float:
        """Of one answer."""
        return 2 * self.key_width * self.layers * context * self.element

    def sent(self, batch: float) -> float:
        """Bytes a step between model and workers: (2 + 2 / G) e d B L (2)."""
        return 2 * (self.width + self.key_width) * self.element * batch * self.layers

    def linear_time(self, batch: float, device: Device, count: int) -> float:
        """MTIME(B): 2 N B flops, e (N + 2 B d) bytes (1)."""
        flops = 2 * self.parameters * batch / (device.flops * count)
        moved = self.element * (self.parameters + 2 * batch * self.width * self.layers)
        return max(flops, moved / (device.bandwidth * count))

    def attention_time(self, batch: float, context: float, device: Device, count: int) -> float:
        """ATIME(B, l): every answer's keys and values are read once."""
        flops = 4 * self.width * self.layers * context * batch / (device.flops * count)
        return max(flops, batch * self.kv_bytes(context) / (device.bandwidth * count))


LLAMA3_70B = Load(70e9, 80, 8192, 1024)  # the model the paper plans for


@dataclass(frozen=True)
class Point:
    """One choice of devices: `a` that compute, `b` that hold keys (0: the same ones do both).

    Attributes:
        batch: answers at a time. step: seconds between two tokens of an answer. link: bytes per second sent meanwhile.
        throughput: tokens per second. price: dollars per hour.
    """

    compute: str
    memory: str
    a: int
    b: int
    batch: int
    step: float
    link: float
    throughput: float
    price: float

    @property
    def per_dollar(self) -> float:
        """Tokens."""
        return self.throughput * 3600 / self.price


@dataclass(frozen=True)
class Plan:
    """All choices that fit, the most tokens per dollar first; `homogeneous` is the best of one kind of device alone."""

    context: int
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        return next(p for p in self.points if p.b)

    @property
    def homogeneous(self) -> Point | None:
        """On the compute device, as the paper compares."""
        return next((p for p in self.points if not p.b and p.compute == self.best.compute), None)

    @property
    def gain(self) -> float:
        """Tokens per dollar of the best pair over those of compute devices alone; infinite where these do not fit."""
        return self.best.per_dollar / self.homogeneous.per_dollar if self.homogeneous else float("inf")

    def __str__(self) -> str:
        lines = [
            f"context {self.context:,}",
            f"{'devices':>22}{'batch':>8}{'ms/token':>10}{'GB/s sent':>11}{'tokens/$':>12}",
        ]
        alone: dict[str, Point] = {}
        for p in self.points:
            if not p.b:
                alone.setdefault(p.compute, p)
        chosen = [self.best, *alone.values()]
        for p in sorted(chosen, key=lambda p: -p.per_dollar):
            name = f"{p.a} {p.compute}" + (f" + {p.b} {p.memory}" if p.b else " alone")
            sent = f"{p.link / 1e9:.1f}" if p.b else ""
            lines.append(f"{name:>22}{p.batch:>8}{p.step * 1e3:>10.1f}{sent:>11}{p.per_dollar:>12,.0f}")
        return "\n".join(lines)


def plan(
    model: Load | Shape,
    *,
    context: int = 8192,
    compute: str | Device = "h100",
    memory: str | Device = "h20",
    most: int = 8,
    link: float = 50e9,
    trip: float = 33e-6,
    batches: int = 2,
    step: float = 0.2,
) -> Plan:
    """Every (a, b) up to `most` of each.

    Args:
        context: tokens of an answer with its prompt, on average.
        link: bytes per second between the two sides; trip: seconds there and back, once a layer.
        batches: under way at a time; 1 is without pipelining, n needs n - 1 replicas of the model.
        step: longest time between two tokens of an answer, in seconds.

    Raises:
        DoesNotFit: no choice holds the model and one answer. UsageError: an unknown device.
    """
    load = Load.of(model) if isinstance(model, Shape) else model
    fast, wide = _device(compute), _device(memory)
    points = [p for a in range(1, most + 1) for b in range(1, most + 1)
              if (p := _apart(load, fast, wide, a, b, context, link, trip, batches, step))]  # fmt: skip
    if not points:
        raise DoesNotFit(f"No {most} + {most} devices hold this model and an answer of {context} tokens in time")
    for device in {fast.name: fast, wide.name: wide}.values():
        points += [p for a in range(1, most + 1) if (p := _alone(load, device, a, context, step))]
    return Plan(context, tuple(sorted(points, key=lambda p: -p.per_dollar)))


def least_bandwidth(load: Load, batch: int, context: int, fast: Device, wide: Device, share: float = 0.2) -> float:
    """Bytes per second with which sending costs at most `share` of the rest of a step, one device of each kind (2)."""
    rest = load.linear_time(batch, fast, 1) + load.attention_time(batch, context, wide, 1)
    return load.sent(batch) / (share * rest)


def _apart(
    load: Load, fast: Device, wide: Device, a: int, b: int, context: int, link: float, trip: float, batches: int,
    step: float,
) -> Point | None:  # fmt: skip
    if load.weight_bytes > USABLE * fast.memory * a:
        return None
    replicas = max(1, batches - 1)

    def time(each: int) -> float:
        linear, attention = load.linear_time(each, fast, a), load.attention_time(each, context, wide, b)
        sent = load.sent(each) / link + trip * load.layers
        # With n batches on n - 1 replicas nobody waits while t_a = t_m / (n - 1) (6); one batch waits for everything.
        return max(linear * batches / replicas, attention * batches, linear + attention + sent)

    held = int(USABLE * wide.memory * b / load.kv_bytes(context))
    each = _largest(held // batches, lambda n: time(n) <= step)
    if not each:
        return None
    took, price = time(each), a * replicas * fast.price + b * wide.price
    throughput = each * batches / took
    return Point(fast.name, wide.name, a * replicas, b, each * batches, took, load.sent(each * batches) / took,
                 throughput, price)  # fmt: skip


def _alone(load: Load, device: Device, a: int, context: int, step: float) -> Point | None:
    def time(batch: int) -> float:
        return load.linear_time(batch, device, a) + load.attention_time(batch, context, device, a)

    held = int((USABLE * device.memory * a - load.weight_bytes) / load.kv_bytes(context))
    batch = _largest(held, lambda n: time(n) <= step)
    if not batch:
        return None
    return Point(device.name, "", a, 0, batch, time(batch), 0.0, batch / time(batch), a * device.price)


def _largest(end: int, holds: Any) -> int:
    """The largest number up to `end` that holds, where smaller ones do; 0 for none."""
    low, high = 0, max(end, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _device(name: str | Device) -> Device:
    if isinstance(name, Device):
        return name
    if name not in DEVICES:
        raise UsageError(f"There are no figures of {name}", "a Device of your own will do", nearest(name, DEVICES))
    return DEVICES[name]


def main(arguments: Sequence[str] | None = None) -> int:
    from shoestring import models

    parser = argparse.ArgumentParser(description=plan.__doc__)
    parser.add_argument("model")
    parser.add_argument("--context", default="512,8192")
    parser.add_argument("--compute", default="h100", choices=DEVICES)
    parser.add_argument("--memory", default="h20", choices=DEVICES)
    parser.add_argument("--batches", type=int, default=2)
    given = vars(parser.parse_args(arguments))
    shape = models.shape_of(models.resolve(given.pop("model")))
    for context in given.pop("context").split(","):
        print(plan(shape, context=int(context), **given))
    return 0


def rows(made: Plan) -> Iterator[dict[str, Any]]:
    """Of a table or JSON."""
    for point in made.points:
        yield {**asdict(point), "per_dollar": point.per_dollar}


if __name__ == "__main__":
    sys.exit(main())

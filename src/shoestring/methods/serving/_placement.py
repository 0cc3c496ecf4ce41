"""Experts on several devices, simulated: who is placed where, what travels, how long the fullest device works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.models.routing import Trace


@dataclass(frozen=True)
class Placement:
    """Where the experts of one layer stand.

    Attributes:
        homes: of each expert the devices that have a copy, the first one being its own.
        devices: how many there are.
    """

    homes: tuple[tuple[int, ...], ...]
    devices: int


@dataclass(frozen=True)
class Flow:
    """What a placement makes of a layer's routes.

    Attributes:
        imbalance: tokens on the fullest device over the mean; 1 is even.
        bytes: that travel to experts on other devices and back, all-to-all both ways.
        remote: share of the pairs of token and expert that leave their device.
        dropped: share of the pairs that a device's capacity turns away.
        copies: experts that stand on more than one device.
    """

    imbalance: float
    bytes: int
    remote: float
    dropped: float
    copies: int


def place(load: Sequence[float], devices: int, replicas: int = 0) -> Placement:
    """Put the experts on devices so that the fullest one has little to do: the heaviest first, each to the emptiest.

    Args:
        load: tokens of each expert.
        replicas: more copies to hand out, each time to the expert whose copies have most to do.

    Raises:
        UsageError: no device, or fewer experts than devices without copies for the others.
    """
    if devices < 1 or replicas < 0:
        raise UsageError(f"{devices} devices with {replicas} more copies are not possible", remedy="Give 1 or more")
    copies = [1] * len(load)
    for _ in range(replicas):
        may = [e for e in range(len(load)) if copies[e] < devices]
        if may:
            copies[max(may, key=lambda e: load[e] / copies[e])] += 1
    room = -(-sum(copies) // devices)  # no device holds more than its share of the weights
    work, held = [0.0] * devices, [0] * devices
    homes: list[list[int]] = [[] for _ in load]
    for expert in sorted(range(len(load)), key=lambda e: (-load[e] / copies[e], e)):
        for _ in range(copies[expert]):
            open_to = [d for d in range(devices) if d not in homes[expert] and held[d] < room]
            open_to = open_to or [d for d in range(devices) if d not in homes[expert]]
            best = min(open_to, key=lambda d: (work[d], d))
            homes[expert].append(best)
            work[best] += load[expert] / copies[expert]
            held[best] += 1
    return Placement(tuple(map(tuple, homes)), devices)


def in_order(experts: int, devices: int) -> Placement:
    """The first experts on the first device, and so on: what frameworks do without looking."""
    return Placement(tuple((expert * devices // experts,) for expert in range(experts)), devices)


def flow(trace: Trace, layer: int, placement: Placement, width: int, *, value: int = 2, capacity: float = 0.0) -> Flow:
    """Send the tokens of a trace, dealt to the devices in turn, to their experts of one layer.

    A token that has a copy at home stays; others go to the copy that has least to do. Each pair that leaves sends
    `width` values of `value` bytes there and as many back.

    Args:
        capacity: a device takes at most so many times its even share of pairs of each pass; 0 for no limit.
    """
    devices = placement.devices
    work = np.zeros(devices)
    remote = dropped = pairs = 0
    bounds = np.flatnonzero(np.diff(trace.steps, prepend=-1)).tolist() + [len(trace.steps)]
    for first, last in zip(bounds, bounds[1:]):
        taken = np.zeros(devices)
        met = trace.experts[first:last, layer]
        limit = np.ceil(capacity * (met >= 0).sum() / devices) if capacity else np.inf
        for number, experts in enumerate(met):
            home = (first + number) % devices
            for expert in experts[experts >= 0]:
                homes = placement.homes[expert]
                target = home if home in homes else min(homes, key=lambda d: (taken[d], d))
                pairs += 1
                if taken[target] >= limit:
                    dropped += 1
                    continue
                taken[target] += 1
                remote += target != home
        work += taken
    mean = work.mean()
    return Flow(
        imbalance=float(work.max() / mean) if mean else 1.0,
        bytes=2 * remote * width * value,
        remote=remote / max(1, pairs),
        dropped=dropped / max(1, pairs),
        copies=sum(len(homes) > 1 for homes in placement.homes),
    )

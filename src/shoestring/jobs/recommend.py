"""What a machine can run of a model: every format and method with its bytes, whether they fit, and their speed.

A token of one answer reads every weight that it is multiplied with, so the memory's bandwidth over those bytes bounds
the tokens a second; arithmetic, keys and values come on top. Nothing is built: bytes are the methods' own prices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from shoestring.core import catalog, survey, text
from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.shape import Shape, Weight
from shoestring.core.step import Step
from shoestring.kernels.layout import FOR_FILES
from shoestring.planner.cost import predict, read_per_token
from shoestring.planner.machine import bandwidth, engine_floor, machine
from shoestring.planner.plan import by_verb, priced

_MOST_THREADS = 1024


@dataclass(frozen=True)
class RecommendRequest:
    """What there is to run a model on.

    Attributes:
        model: a hub id, a folder, a .gguf file, or smollm2.
        memory: what the engine may take, such as 400MB; default: what the machine has.
        bandwidth: of the memory, such as 20GB/s; default: measured now.
        threads: that read together when bandwidth is measured; default: one for each core that the process may use.
        trust_remote_code: let the model's repository run its own Python code here.
    """

    model: str = "smollm2"
    memory: str | None = None
    bandwidth: str | None = None
    threads: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Way:
    """One way to have the model.

    Attributes:
        step: what makes it; "" is the model as it is.
        method: the step's method.
        bits: on disk for each weight of the model as it is, scales and tables included.
        storage: bytes of the folder.
        memory: peak bytes of the engine with one short answer.
        read: bytes of weights that one token needs.
        tokens_per_s: what the bandwidth allows of one answer.
        needs: as `survey.needs` says.
        quality: what the method's claims measured, as `survey.row` has it.
    """

    step: str
    method: str
    options: Mapping[str, Any]
    bits: float
    storage: int
    memory: int
    read: float
    tokens_per_s: float
    fits: bool
    needs: str
    quality: Mapping[str, Any] | None


def recommend(request: RecommendRequest) -> dict[str, Any]:
    """Every way to run the model, those that fit first, and of these the least compressed first.

    Returns:
        `model`, `memory` and `bandwidth` in bytes (a second), and `ways`: a mapping for each `Way`.

    Raises:
        UsageError: quantities that are none, or a model that cannot be resolved.
    """
    from shoestring import models

    if request.threads is not None and not 1 <= request.threads <= _MOST_THREADS:
        raise UsageError(f"threads={request.threads} is not possible", remedy=f"Give 1 to {_MOST_THREADS}")
    memory = machine().memory if request.memory is None else text.quantity(request.memory, text.BYTES, "memory")
    speed = (
        bandwidth(request.threads or _cores())
        if request.bandwidth is None
        else text.quantity(request.bandwidth.removesuffix("/s"), text.BYTES, "bandwidth")
    )
    shape = models.shape_of(models.resolve(request.model), trust_remote_code=request.trust_remote_code)
    floor = engine_floor()
    ways = [_way(step, after, shape.parameters, floor, memory, speed) for step, after in _made(shape)]
    ways.sort(key=lambda way: (not way.fits, -way.bits if way.fits else way.memory))
    return {"model": request.model, "memory": memory, "bandwidth": speed, "ways": [asdict(way) for way in ways]}


def _made(shape: Shape) -> Iterator[tuple[Step | None, Shape]]:
    """The model as it is and by every setting of every method that compresses it, as the engine has it in memory."""
    yield None, shape
    for method in by_verb("compress"):
        module = catalog.module(method.name)
        for settings in module.settings():
            try:
                after = priced(method, shape, settings)
            except (UsageError, DoesNotFit):  # it is for models of another kind, or cannot make this one so small
                continue
            made = catalog.contract(method.room).config(module, dict(settings))
            yield Step("compress", method.name, settings), after.change(lambda w: _loaded(w, made))  # noqa: B023


def _loaded(weight: Weight, made: Any) -> Weight:
    """A weight as the engine holds it: what is packed for files alone is plain bfloat16 there."""
    owner, _, tensor = weight.name.rpartition(".")
    experts = weight.role == "expert" and len(weight.dims) == 3
    matrix = tensor == "weight" and len(weight.dims) == 2
    if not (experts or matrix) or weight.tied or not hasattr(made, "format_of"):
        return weight
    format = made.format_of(weight.name if experts else owner, *weight.dims[-2:], weight.role == "embed")
    if format is None or format.layout.kind not in FOR_FILES:
        return weight
    return replace(weight, resident=2 * weight.count)


def _way(step: Step | None, after: Shape, parameters: int, floor: int, memory: float, speed: float) -> Way:
    stored = sum(weight.stored for weight in after.weights if not weight.tied)
    needed, read = predict(after, floor).memory, read_per_token(after)
    stands: dict[str, Any] = survey.row(catalog.get(step.method)) if step else {"needs": "none", "quality": None}
    return Way(
        str(step) if step else "",
        step.method if step else "",
        dict(step.options) if step else {},
        8 * stored / parameters,
        after.storage,
        needed,
        read,
        speed / read,
        needed <= memory,
        stands["needs"],
        stands["quality"],
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))

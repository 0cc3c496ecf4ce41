"""Candidate pipelines: which methods save what the budget lacks, in the order worth trying.

Nothing here knows a method by name: a method is a candidate because its room has the verb that is asked for, because
its METHOD says that it is a default choice there, and because its `settings` and `price` say what it makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shoestring.core import catalog
from shoestring.core.budget import Budget, Miss
from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.method import Method
from shoestring.core.shape import Shape
from shoestring.core.step import Step
from shoestring.planner.cost import Prediction, predict

MERGE = Step("merge")
# A finished model may miss its limit this many times over before building the closest one is refused as hopeless.
HOPELESS = 1.5
# Bytes for each tensor beside its own: its entries in the head of the weight file and in the configuration.
ENTRIES = 250


@dataclass(frozen=True)
class Candidate:
    """A pipeline with its predicted price and the limits it is predicted to miss."""

    steps: tuple[Step, ...]
    shape: Shape
    predicted: Prediction
    misses: tuple[Miss, ...]

    @property
    def name(self) -> str:
        """The methods in order; only what compresses has settings that tell candidates apart."""
        steps = [str(s) if s.verb == "compress" else s.method for s in self.steps if s != MERGE]
        return " → ".join(steps) or "as it is"

    @property
    def fits(self) -> bool:
        return not self.misses

    @property
    def excess(self) -> float:
        """How many times over its limit the worst figure is."""
        return max((m.value / m.limit for m in self.misses), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "steps": [step.to_json() for step in self.steps],
            "predicted": self.predicted.to_json(),
            "misses": [str(m) for m in self.misses],
        }


def plan(
    shape: Shape,
    budget: Budget,
    floor: int,
    *,
    adapt: str | None = None,
    compress: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Candidate]:
    """Every candidate, best first: those that fit by most bytes kept (the least compressed), then the closest misses.

    Args:
        adapt: the method to train first, "auto" for the room's default, None for no training.
        compress: the method to compress with, "none", or None for whatever the budget asks for.
        options: settings of `compress` that replace its own list.

    Raises:
        UsageError: a method that has another verb, or that does not fit the model.
    """
    before = _adaptation(shape, adapt)
    shaped = before[-1][1] if before else shape
    first = tuple(step for step, _ in before)

    def candidates(made: Iterator[tuple[tuple[Step, ...], Shape]]) -> Iterator[Candidate]:
        for steps, after in made:
            predicted = predict(after, floor)
            yield Candidate(first + steps, after, predicted, tuple(budget.misses(predicted.figures())))

    found = list(candidates(_compressions(shaped, compress, options)))
    if compress is None and not any(candidate.fits for candidate in found):
        found += candidates(_within(shaped, budget))
    return sorted(found, key=lambda c: (c.excess, -c.predicted.storage))


def refuse_hopeless(candidates: list[Candidate], budget: Budget) -> None:
    """Raises DoesNotFit when even the closest candidate is far over the budget: building it would only waste time."""
    closest = candidates[0]
    if closest.excess > HOPELESS:
        raise DoesNotFit(
            f"nothing fits {budget}",
            f"the closest, {closest.name}, is predicted to need {_needs(closest)}",
            f"Relax {' and '.join(m.resource for m in closest.misses)} to at least that, or bring a smaller model",
        )


def room_for_weights(storage: int, shape: Shape) -> int:
    """What a limit on the folder leaves to the tensors of a packed model; not above 0 where it leaves nothing."""
    return storage - shape.other_files - ENTRIES * len(shape.weights)


def relax(misses: tuple[Miss, ...] | list[Miss]) -> str:
    """What to write in the budget so that these misses are none."""
    return ", ".join(str(Budget({m.resource: _round_up(m.value)})) for m in misses)


def by_verb(verb: str) -> Iterator[Method]:
    """Methods whose room does `verb`."""
    rooms = {room for room in catalog.rooms() if catalog.contract(room).VERB == verb}
    return (m for m in catalog.methods().values() if m.room in rooms)


def refuse_family(method: Method, shape: Shape) -> None:
    """Raise UsageError for a model of a family that the method is not for, where its room says which it is for."""
    families = getattr(catalog.contract(method.room), "families", lambda module: None)(catalog.module(method.name))
    if families is not None and shape.family not in families:
        raise UsageError(
            f"{method.name} does not take a {shape.family} model",
            "it rebuilds layers, and knows how those of some families are built",
            f"Use one of {', '.join(families)}",
        )


def priced(method: Method, shape: Shape, options: Mapping[str, Any]) -> Shape:
    """The shape that a method makes of a model.

    Raises:
        UsageError: options it does not have, or a model that it is not for.
    """
    refuse_family(method, shape)
    module, room = catalog.module(method.name), catalog.contract(method.room)
    after: Shape = module.price(shape, options).shape
    getattr(room, "refuse", lambda *_: None)(module, options, shape, after)
    return after


def _adaptation(shape: Shape, adapt: str | None) -> list[tuple[Step, Shape]]:
    if adapt is None:
        return []
    if adapt == "auto":
        adapt = next(m.name for m in by_verb("train") if m.default)
    _must_do(adapt, "train")
    module = catalog.module(adapt)
    settings = module.settings()[0]
    after = module.price(shape, settings).shape  # that of the base, unless the adapter ends in weights of another form
    return [(Step("train", adapt, settings), after), (MERGE, after)]


def _compressions(
    shape: Shape, compress: str | None, options: Mapping[str, Any] | None
) -> Iterator[tuple[tuple[Step, ...], Shape]]:
    if compress in (None, "none"):
        yield (), shape
    if compress == "none":
        return
    if compress:
        _must_do(compress, "compress")
    for method in [catalog.get(compress)] if compress else [m for m in by_verb("compress") if m.default]:
        # What nobody asked for by name is no candidate where it does not fit.
        with suppress(*() if compress else (UsageError,)):
            for settings in [dict(options)] if options else catalog.module(method.name).settings():
                yield (Step("compress", method.name, settings),), priced(method, shape, settings)


def _within(shape: Shape, budget: Budget) -> Iterator[tuple[tuple[Step, ...], Shape]]:
    """By methods that are told a size: for budgets that no fixed setting keeps."""
    left = room_for_weights(int(budget.get("storage") or 0), shape)
    for method in catalog.that_define("within") if left > 0 else ():
        module = catalog.module(method.name)
        settings = module.within(left)
        with suppress(DoesNotFit, UsageError):
            yield (Step("compress", method.name, settings),), priced(method, shape, settings)


def _must_do(name: str, verb: str) -> None:
    method = catalog.get(name)
    has = catalog.contract(method.room).VERB
    if has != verb:
        raise UsageError(
            f"{name} does not {verb}", f"it stands in the room {method.room}, whose verb is {has}",
            f"Methods that {verb}: " + ", ".join(m.name for m in by_verb(verb)),
        )  # fmt: skip


def _needs(candidate: Candidate) -> str:
    return ", ".join(str(m).replace(" > ", " where the limit is ") for m in candidate.misses)


def _round_up(value: float) -> float:
    """To two significant digits, never below `value`."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step) * step:.2g}")

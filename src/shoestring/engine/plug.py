"""Methods plugged into an engine by name: `name,option=value,...`, as the flags of `shoestring serve` have it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

from shoestring.core import catalog
from shoestring.core.errors import UsageError, nearest
from shoestring.engine.hooks import Hooks

if TYPE_CHECKING:
    from shoestring.core.method import Method
    from shoestring.engine.open import Opened

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text"),
}


def spelled(word: str) -> tuple[str, dict[str, Any]]:
    """`name,key=value,key=value` as name and options; numbers, truth values and lists are read, the rest is text.

    Raises:
        UsageError: a part without `=`, or an option said twice.
    """
    name, *parts = re.split(r",(?=[\w-]*=)", word)
    if "," in name:
        raise UsageError(f"{name!r} in {word!r} is not a setting", remedy="Write name,option=value,option=value")
    options: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not key or key in options:
            raise UsageError(f"{part!r} in {word!r} is not a setting", remedy="Write name,option=value,option=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = {"True": True, "False": False}.get(value, value)
    return name.strip(), options


def pluggable(point: str = "", word: str = "plug") -> list[Method]:
    """Methods that define `word`; with `point`, those that say they plug there."""
    return [m for m in catalog.that_define(word) if not point or point in _points(m)]


def method_for(name: str, point: str = "", word: str = "plug") -> Method:
    """The method called `name`, which defines `word` and plugs in at `point`.

    Raises:
        UsageError: there is none, or it does something else.
    """
    known = [m.name for m in pluggable(point, word)]
    found = name.replace("-", "_")
    if found not in known:
        where = f"as {point}" if point else "into an engine"
        why = "" if found not in catalog.methods() else "it is a method for something else"
        raise UsageError(f"{name} does not plug in {where}", why, nearest(found, known))
    return catalog.get(found)


def configured(name: str, options: dict[str, Any]) -> Any:
    """The method's serving configuration: of its class `PLUG`, or of what its `example()` is.

    Raises:
        UsageError: an option it does not have, or a value it refuses.
    """
    module = catalog.module(name)
    made: Any = getattr(module, "PLUG", None) or type(module.example())
    known = {field.name: str(field.type).split(" | ") for field in fields(made)}
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"{name} has no option {option}", remedy=nearest(option, known))
        kinds = [_KINDS[kind] for kind in known[option] if kind in _KINDS]
        if len(kinds) == len(known[option]) and not any(type(value) in types for types, _ in kinds):
            given = value if isinstance(value, str) else json.dumps(value)
            remedy = f'Quotes make it so: {option}="{given}"' if "str" in known[option] else ""
            raise UsageError(f"{name}: {option}={given} is not {' or '.join(word for _, word in kinds)}", remedy=remedy)
    try:
        return made(**options)
    except TypeError as error:
        raise UsageError(f"{name} cannot be plugged in with {options}", str(error)) from None


def loader(words: Sequence[str]) -> Callable[..., Any] | None:
    """How the one of the methods named by `words` that defines `load` reads a model; None where none does.

    A `load` with a parameter `read` adds to a model: it is given how the other one reads it. What watches a model looks
    at its modules, so there must be some: the model is then read as usual.

    Raises:
        UsageError: an unknown method or option, or two that would read the model.
    """
    from shoestring.models.load import load as usual

    found: dict[str, Callable[..., Any]] = {}
    adding: list[Callable[..., Any]] = []
    watches = False
    for word in words:
        name, options = spelled(word)
        method = method_for(name)
        if "load" in method.words:
            load: Callable[..., Any] = partial(catalog.module(method.name).load, configured(method.name, options))
            if "read" in signature(load).parameters:
                adding.append(load)
            else:
                found[name] = load
        watches |= "watch" in _points(method)
    if len(found) > 1:
        raise UsageError(f"{' and '.join(found)} cannot be plugged in together", "each reads the model in its own way")
    read = next(iter(found.values()), usual if watches else None)
    for load in adding:
        read = partial(load, read=read) if read else load
    return read


def span(words: Sequence[str]) -> tuple[int, int] | None:
    """The layers first..last-1 that the one of the methods named by `words` that defines `span` runs here; None: all.

    Raises:
        UsageError: an unknown method or option.
    """
    for word in words:
        name, options = spelled(word)
        method = method_for(name)
        if "span" in method.words:
            found: tuple[int, int] | None = catalog.module(name).span(configured(method.name, options))
            return found
    return None


def plugged(words: Sequence[str], opened: Opened, hooks: Hooks = Hooks()) -> Hooks:
    """`hooks` and what the methods named by `words` plug in.

    Raises:
        UsageError: an unknown method or option, a model the method is not for, or two methods at one point.
    """
    taken: dict[str, str] = {}
    try:
        for word in words:
            name, options = spelled(word)
            method = method_for(name)
            config = configured(method.name, options)
            added: Hooks = catalog.module(method.name).plug(config, opened)
            filled = {f.name: part for f in fields(added) if (part := getattr(added, f.name)) is not None}
            for point in filled:
                if getattr(hooks, point) is not None:
                    added.close()
                    other = taken.get(point, "the program")
                    raise UsageError(f"{name} cannot be plugged in", f"{other} is the {point} already", "Leave out one")
                taken[point] = name
            hooks = replace(hooks, **filled)
    except BaseException:
        hooks.close()
        raise
    return hooks


def _points(method: Method) -> list[str]:
    return [point.strip() for point in method.traits.get("plugs", "").split(",")]

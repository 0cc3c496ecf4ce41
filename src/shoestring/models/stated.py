"""What a model's configuration states, which may be a lie, and who is told that kernels do not compute it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoestring.core.errors import UsageError, nearest

_MAX = 1 << 31  # beyond it no size of a model is meant
_REMEDY = "The torch runner takes it (runner=torch)"


class NotNative(UsageError):
    """A sound model that the native kernels do not compute; the torch runner may."""

    def __init__(self, what: str, why: str = "") -> None:
        super().__init__(what, why, _REMEDY)


class NoKernels(NotNative):
    """Native kernels compute the model, but not from weights that are stored as these are."""


def size(table: Mapping[str, Any], key: str, limit: int = _MAX) -> int:
    """A whole number above 0 and below `limit`."""
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
        raise UsageError(
            f"The model's configuration has no usable {key} ({str(value)[:40]})",
            "" if key in table else nearest(key, table)[:200],
            "Get an intact model",
        )
    return value


def of_each(table: Mapping[str, Any], key: str, layers: int, most: int) -> tuple[int, ...]:
    """A list of sizes up to `most`, one for each layer; empty when there is none."""
    values = table.get(key)
    if values is None:
        return ()
    if (
        not isinstance(values, list)
        or len(values) != layers
        or not all(type(value) is int and 0 <= value <= most for value in values)
    ):
        raise UsageError(
            f"The model's configuration has no usable {key}", f"{layers} sizes up to {most}", "Get an intact model"
        )
    if 0 in values:
        raise NotNative("The native runner does not compute layers that lack attention or feed-forward")
    return tuple(values)


def number(table: Mapping[str, Any], key: str) -> float:
    """A finite number above 0."""
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UsageError(
            f"The model's configuration has no usable {key} ({str(value)[:40]})", remedy="Get an intact model"
        )
    return float(value)


def flag(table: Mapping[str, Any], key: str) -> bool:
    """True or false; false where there is none."""
    value = table.get(key)
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"The model's configuration has {key}={str(value)[:40]}", "it must be true or false")
    return bool(value)

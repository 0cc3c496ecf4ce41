"""Schemas of objects without properties that nobody asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

# What speaks of the properties of one and the same object.
_OF_AN_OBJECT = {
    "properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames",
    "minProperties", "dependentSchemas", "if", "not", "$ref", "anyOf", "oneOf", "allOf",
}  # fmt: skip
_BY_NAME, _OTHERS = ("$defs", "definitions", "properties"), ("items", "prefixItems", "anyOf", "oneOf", "allOf")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, with no other properties than those it names, where it says nothing of others.

    JSON Schema admits any others then, and a small model goes on inventing them until its tokens end; programs that
    write schemas, as pydantic does, rarely exclude them. What matches the answer matches the schema too. A schema that
    describes an object in several places, each of which may name some of its properties, is left as it is.
    """
    found = copy.deepcopy(schema)
    parts = list(_parts(found))
    if any(_in_several_places(part) for part in parts):
        return found
    for part in parts:
        named, needed = part.get("properties"), part.get("required", [])
        if not isinstance(named, dict) or not isinstance(needed, list) or _OF_AN_OBJECT & part.keys() != {"properties"}:
            continue
        if all(isinstance(name, str) and name in named for name in needed):
            part["additionalProperties"] = False
    return found


def _in_several_places(part: dict[str, Any]) -> bool:
    words, all_of = _OF_AN_OBJECT & part.keys() - {"additionalProperties"}, part.get("allOf")
    return len(words) > 1 or isinstance(all_of, list) and len(all_of) > 1


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and those in it."""
    if isinstance(schema, list):
        for item in schema:
            yield from _parts(item)
    elif isinstance(schema, dict):
        yield schema
        for word in _BY_NAME:
            if isinstance(schema.get(word), dict):
                yield from _parts(list(schema[word].values()))
        for word in _OTHERS:
            yield from _parts(schema.get(word))

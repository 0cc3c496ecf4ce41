"""Which schemas get no properties but those they name."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from shoestring.server.closing import closed
from shoestring.server.sampling import of_format, of_structured
from shoestring.server.schema import JsonFormat, SchemaFormat, StructuredOutputs
from shoestring.server.settings import Settings

A = {"type": "object", "properties": {"a": {"type": "integer"}}}
SHUT = A | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (A, SHUT),
        ({"type": "array", "items": A}, {"type": "array", "items": SHUT}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [SHUT, {"type": "null"}]}),
        ({"properties": {"b": A}}, {"properties": {"b": SHUT}, "additionalProperties": False}),
        (
            {"properties": {"b": {"$ref": "#/$defs/A", "title": "B"}}, "required": ["b"], "$defs": {"A": A}},
            {"properties": {"b": {"$ref": "#/$defs/A", "title": "B"}}, "required": ["b"], "$defs": {"A": SHUT},
             "additionalProperties": False},
        ),
        ({"allOf": [A]}, {"allOf": [SHUT]}),
    ],
)  # fmt: skip
def test_an_object_has_the_properties_that_are_named(given: Any, wanted: Any) -> None:
    before = repr(given)
    assert closed(given) == wanted
    assert repr(given) == before


def test_so_it_is_wherever_a_schema_is_given() -> None:
    """As pydantic writes it, which says nothing of other properties."""
    schema = pydantic.create_model("Person", name=(str, ...)).model_json_schema()
    limits = Settings()
    made = [
        of_structured(StructuredOutputs(json=schema), limits),
        of_format(SchemaFormat(type="json_schema", json_schema={"schema": schema}), limits),
        of_format(JsonFormat(type="json_object", schema=schema), limits),
    ]
    assert [json.loads(one.text)["additionalProperties"] for one in made if one] == [False] * 3


@pytest.mark.parametrize(
    "given",
    [
        {"type": "object"},
        A | {"additionalProperties": True},
        A | {"additionalProperties": {"type": "string"}},
        A | {"patternProperties": {"^x": {}}},
        A | {"required": ["b"]},
        A | {"minProperties": 2},
        {"allOf": [A, {"properties": {"b": {}}}]},
        A | {"anyOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]},
        {"properties": {"x": A | {"$ref": "#/$defs/B"}}, "$defs": {"B": {"properties": {"b": {}}}}},
        {"const": A},
        {"enum": [A]},
        {"type": "object", "default": A},
        A | {"required": 3},
        A | {"required": [["a"]]},
        {"properties": [A]},
        {"allOf": 1},
    ],
)
def test_what_says_more_of_its_properties_is_left_as_it_is(given: Any) -> None:
    assert closed(given) == given

"""Finding calls in text, however it is cut into pieces, and schemas that hold others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.server.errors import ApiError
from shoestring.server.schema import Tool
from shoestring.server.tools import Call, Finder, call_schema, calls_in, either

CALL = '<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>'
PIECES = st.sampled_from([CALL, "<tool_call>", "</tool_call>", "text", " ", "\n", "<", "{", "}", '{"name": "a"}', "é"])


def found(pieces: list[str]) -> tuple[str, list[str]]:
    finder = Finder({"a"})
    parts = [part for piece in pieces for part in finder.push(piece)] + list(finder.finish())
    return "".join(p for p in parts if isinstance(p, str)), [p.arguments for p in parts if isinstance(p, Call)]


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join), st.lists(st.integers(0, 100), max_size=12))
def test_any_cut_finds_the_same(text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in zip(places, places[1:])]
    assert found(pieces) == found([text]) == found(list(text))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab <>/{}_tolc\n", max_size=40))
def test_text_without_calls_is_kept(text: str) -> None:
    said, calls = found(list(text))
    assert not calls
    # White space may go only where a mark of a call followed it.
    assert said == text or ("<tool_call>" in text and said.split() == text.split())


def test_text_comes_as_soon_as_it_can_be_no_call() -> None:
    finder = Finder({"a"})
    assert list(finder.push("Hel")) == ["Hel"]
    assert list(finder.push("lo <to")) == ["lo"]
    assert list(finder.push("ny>")) == [" <tony>"]
    assert [type(p) for p in finder.push(CALL[:-3])] == []
    assert [p.arguments for p in finder.push(CALL[-3:]) if isinstance(p, Call)] == ['{"x": 1}']


def test_what_is_a_call() -> None:
    assert [
        c.name for c in calls_in('[{"name": "a", "arguments": "{}"}, {"name": "b", "parameters": {}}]', {"a", "b"})
    ] == [
        "a",
        "b",
    ]
    for text in (
        "",
        "3",
        "[3]",
        '{"name": 3}',
        '{"name": "c", "arguments": {}}',
        '{"name": "a", "arguments": 3}',
        "[" * 9999,
    ):
        assert calls_in(text, {"a", "b"}) == [], text


def tool(name: str, parameters: Any = None) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


def test_definitions_of_several_tools_keep_apart() -> None:
    one = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "integer"}}}
    two = {"type": "object", "properties": {"p": {"$ref": "#/definitions/P"}}, "definitions": {"P": {"type": "string"}}}
    schema = call_schema([tool("one", one), tool("two", two)])
    assert schema["$defs"] == {"t0_P": {"type": "integer"}, "t1_P": {"type": "string"}}
    refs = [c["properties"]["arguments"]["properties"]["p"]["$ref"] for c in schema["anyOf"]]
    assert refs == ["#/$defs/t0_P", "#/$defs/t1_P"]
    both = either({"$ref": "#/$defs/P", "$defs": {"P": {"type": "null"}}}, schema)
    assert both["$defs"].keys() == {"t0_P", "t1_P", "answer_P"} and "$defs" not in both["anyOf"][0]
    assert json.loads(json.dumps(both)) == both
    with pytest.raises(ApiError):
        call_schema([tool("x", {"$ref": "https://example.com/schema"})])

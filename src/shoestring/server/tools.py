"""Tools: how an answer is made to call one, and how calls are found in its text.

A call in the text is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or a list of such objects between the
marks, or such JSON as the whole answer. What looks like a call and names no tool that was offered stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shoestring.engine.tool_text import CLOSE, OPEN
from shoestring.server.closing import closed
from shoestring.server.errors import bad
from shoestring.server.schema import Tool


@dataclass(frozen=True)
class Call:
    """One call of a tool; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of a call of one of these tools.

    Raises:
        ApiError: a tool's schema refers to itself in a way that cannot be moved.
    """
    shared: dict[str, Any] = {}
    calls = []
    for i, tool in enumerate(tools):
        given = closed(tool.function.parameters or {"type": "object", "properties": {}})
        arguments = moved(given, f"t{i}_", shared, f"tools[{i}].function.parameters")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return schema | ({"$defs": shared} if shared else {})


def either(schema: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """The schema of an answer that matches one or the other."""
    shared = dict(call.get("$defs", {}))
    answer = moved(schema, "answer_", shared, "response_format")
    calls = {key: value for key, value in call.items() if key != "$defs"}
    return {"anyOf": [calls, answer]} | ({"$defs": shared} if shared else {})


def moved(schema: dict[str, Any], prefix: str, shared: dict[str, Any], param: str) -> Any:
    """The schema as a part of another: its definitions go to `shared` under names with a prefix."""

    def rewrite(node: Any) -> Any:
        if isinstance(node, list):
            return [rewrite(item) for item in node]
        if not isinstance(node, dict):
            return node
        made = {key: rewrite(value) for key, value in node.items()}
        to = node.get("$ref")
        if isinstance(to, str):
            parts = to.split("/")
            if len(parts) != 3 or parts[0] != "#" or parts[1] not in ("$defs", "definitions"):
                raise bad(param, "A $ref that does not name one of the schema's own $defs is not supported")
            made["$ref"] = f"#/$defs/{prefix}{parts[2]}"
        return made

    for word in ("$defs", "definitions"):
        for name, node in (schema.get(word) or {}).items():
            shared[prefix + name] = rewrite(node)
    return rewrite({key: value for key, value in schema.items() if key not in ("$defs", "definitions", "$schema")})


def calls_in(text: str, known: Collection[str]) -> list[Call]:
    """The calls that a piece of JSON text stands for; none when it is anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for item in found if isinstance(found, list) else [found]:
        name = item.get("name") if isinstance(item, dict) else None
        arguments = item.get("arguments", item.get("parameters", {})) if isinstance(item, dict) else None
        if not isinstance(name, str) or name not in known:
            return []
        if isinstance(arguments, str):
            written = arguments
        elif isinstance(arguments, dict):
            written = json.dumps(arguments, ensure_ascii=False)
        else:
            return []
        calls.append(Call(name, written, f"call_{secrets.token_hex(12)}"))
    return calls


class Finder:
    """Finds calls in an answer while it is written. Gives text out as soon as it can be no part of a call.

    Args:
        known: names of the tools.
        whole: the whole answer is JSON: nothing is given out before its end.
        most: calls that count; later ones are left out.
    """

    def __init__(self, known: Collection[str], whole: bool = False, most: int = 128) -> None:
        self._known, self._most = known, most
        self._mode = "whole" if whole else "start"
        self._held = ""
        self.calls = 0

    def push(self, text: str) -> Iterator[str | Call]:
        """What is settled now that `text` has come."""
        self._held += text
        if self._mode == "start":
            begun = self._held.lstrip()
            if not begun:
                return
            # A mark may be coming, and a bare call begins like JSON.
            self._mode = "whole" if begun[0] in "{[" else "text"
        while self._mode in ("text", "call"):
            mark = OPEN if self._mode == "text" else CLOSE
            before, found, after = self._held.partition(mark)
            if not found:
                break
            self._held = after
            if self._mode == "text":
                yield from self._text(before.rstrip())
                self._mode = "call"
            else:
                yield from self._call(before, OPEN + before + CLOSE)
                self._mode = "text"
        if self._mode == "text":
            ends = range(min(len(OPEN) - 1, len(self._held)), 0, -1)
            keep = next((n for n in ends if OPEN.startswith(self._held[-n:])), 0)
            # White space stays until it is known whether a call follows.
            body = self._held[: len(self._held) - keep]
            ready = body.rstrip()
            self._held = self._held[len(ready) :]
            yield from self._text(ready)

    def finish(self) -> Iterator[str | Call]:
        """What is left at the end of the answer."""
        held, self._held = self._held, ""
        if self._mode == "call":
            yield from self._call(held, OPEN + held)
        elif self._mode == "whole":
            yield from self._call(held, held)
        else:
            yield from self._text(held)

    def _text(self, text: str) -> Iterator[str]:
        if text and not (self.calls and text.isspace()):
            yield text

    def _call(self, text: str, raw: str) -> Iterator[str | Call]:
        found = calls_in(text, self._known)
        if not found:
            yield from self._text(raw)
        for call in found[: self._most - self.calls]:
            self.calls += 1
            yield call

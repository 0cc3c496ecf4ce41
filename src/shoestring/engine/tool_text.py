"""Tools, calls and results as text of messages: for models whose chat template has no place for them.

A call is written `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, a result `<tool_response>...`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HOW = (
    "You can call these functions, one JSON description a line:\n<tools>\n{tools}\n</tools>\n"
    "To call one, answer with nothing but\n"
    '<tool_call>\n{{"name": "the function", "arguments": {{"its": "arguments"}}}}\n</tool_call>'
)


def with_tools_as_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The same conversation, with nothing of tools but text; the system message tells of those there are."""
    found = []
    for message in messages:
        role, text = message.get("role"), _text(message.get("content"))
        for call in message.get("tool_calls") or ():
            text += f"\n{OPEN}\n{json.dumps(call['function'])}\n{CLOSE}"
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        found.append({"role": role, "content": text.strip("\n") if message.get("tool_calls") else text})
    if tools:
        if not found or found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": ""})
        lines = "\n".join(json.dumps(tool.get("function", tool)) for tool in tools)
        found[0]["content"] = f"{found[0]['content']}\n\n{_HOW.format(tools=lines)}".strip()
    return found


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content or ""

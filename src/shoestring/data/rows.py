"""One row of a file (a dictionary) into one example; the shape is found by the row's keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from shoestring.data.corpus import Example

ROLES = {
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system",
    "function_call": "assistant", "observation": "tool", "function": "tool",
    "user": "user", "assistant": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip
KNOWN = (
    "messages (chat), conversations (sharegpt), instruction + output (alpaca), prompt + completion, or text; "
    "for example "
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
)


class BadRow(Exception):
    """A row that cannot be an example; the message says why, without the place."""


def shape_of_row(row: Any) -> str:
    """The name of the row's shape: chat, sharegpt, alpaca, preference, completion, text or retrieval.

    Raises:
        BadRow: not an object, or keys of no known shape.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"is {_kind(row)}, expected an object with the keys {KNOWN}")
    keys = {key for key, value in row.items() if value is not None}
    for shape, needed in _NEEDED:
        if needed <= keys:
            return shape
    seen = ", ".join(sorted(str(key) for key in keys)) or "none"
    raise BadRow(f"has the keys {seen}, which are of no known format; known keys are {KNOWN}")


def example_of_row(row: Mapping[str, Any], shape: str, line: int) -> Example:
    """The row as an example.

    Raises:
        BadRow: wrong types, roles out of order, an empty answer, text that is not valid Unicode.
    """
    messages, weights, tools = _READERS[shape](row)
    group = _group(row.get("group"))
    if shape == "text":
        text = _text(row["text"], "text")
        if not text.strip():
            raise BadRow("text is empty")
        return Example(group=group, text=text, line=line)
    _check_order(messages)
    if weights is not None and not any(
        weight for message, weight in zip(messages, weights) if message["role"] == "assistant"
    ):
        raise BadRow("every answer has weight 0, so there is nothing to learn")
    return Example(messages, weights, group, None, line, tools)


def _group(value: Any) -> str:
    """The name of a group; a table may hold numbers in place of names."""
    if value is None or value != value:  # pandas writes a missing number as NaN
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.15g}" if isinstance(value, float) else str(value)
    return _text(value, "group")


_Read = tuple[list[dict[str, Any]], list[float] | None, list[dict[str, Any]] | None]


def _chat(row: Mapping[str, Any]) -> _Read:
    tools = _tools(row.get("tools"))
    if not tools and (functions := _tools(row.get("functions"))):  # OpenAI's earlier form
        tools = [{"type": "function", "function": function} for function in functions]
    return *_messages(row["messages"], "messages", "role", "content"), tools


def _sharegpt(row: Mapping[str, Any]) -> _Read:
    turns = _parsed(row["conversations"], "conversations")
    # Some sets of this name already use role and content.
    plain = isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]
    messages, weights = _messages(turns, "conversations", *(("role", "content") if plain else ("from", "value")))
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
        weights = [0.0, *weights] if weights is not None else None
    return messages, weights, _tools(row.get("tools"))


def _alpaca(row: Mapping[str, Any]) -> _Read:
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row["system"], "system")})
    history = _parsed(row.get("history") or [], "history")
    if not isinstance(history, list):
        raise BadRow("history is not a list of [question, answer] pairs")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("history is not a list of [question, answer] pairs")
        messages += _turn(_text(pair[0], "history"), _text(pair[1], "history"))
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    return messages + _turn(question, _text(row["output"], "output")), None, None


def _completion(row: Mapping[str, Any]) -> _Read:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, _ = _messages(prompt, "prompt", "role", "content")
        after, weights = _messages(completion, "completion", "role", "content")
        return before + after, [0.0] * len(before) + (weights or [1.0] * len(after)), _tools(row.get("tools"))
    return _turn(_text(prompt, "prompt"), _text(completion, "completion")), None, None


def _text_row(row: Mapping[str, Any]) -> _Read:
    return [], None, None


def _preference(row: Mapping[str, Any]) -> _Read:
    raise BadRow(
        "is a preference pair (one answer preferred to another), from which `train` and `fit` cannot learn; "
        "keep the preferred answer as {prompt, completion}, or use a method that aligns to preferences"
    )


def _retrieval(row: Mapping[str, Any]) -> _Read:
    raise BadRow(
        "is a pair for retrieval, from which a text encoder learns and no language model does; "
        "train one in Python with shoestring.lab.retrieval.train_encoder, or write the pair as {prompt, completion}"
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], _Read]] = {
    "chat": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "preference": _preference,
    "retrieval": _retrieval,
    "completion": _completion,
    "text": _text_row,
}
_NEEDED = (
    ("chat", {"messages"}),
    ("preference", {"chosen", "rejected"}),
    ("preference", {"preferred_output", "non_preferred_output"}),
    ("sharegpt", {"conversations"}),
    ("alpaca", {"instruction", "output"}),
    ("completion", {"prompt", "completion"}),
    ("text", {"text"}),
    ("retrieval", {"query", "positive"}),
    ("retrieval", {"query", "pos"}),
    ("retrieval", {"query", "passage"}),
    ("retrieval", {"anchor", "positive"}),
)
SHAPES = tuple(shape for shape in _READERS if shape not in ("preference", "retrieval"))


def _turn(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(value: Any, key: str, role_key: str, content_key: str) -> tuple[list[dict[str, Any]], list[float] | None]:
    value = _parsed(value, key)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key} is not a list with at least one message")
    messages: list[dict[str, Any]] = []
    weights: list[float] = []
    weighted = False
    for number, item in enumerate(value, 1):
        if not isinstance(item, Mapping):
            raise BadRow(f"message {number} is {_kind(item)}, expected an object")
        name = item.get(role_key)
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise BadRow(f"message {number} has the {role_key} {name!r}; known: {', '.join(ROLES)}")
        calls = _tool_calls(item, name, content_key, number)
        content = item.get(content_key)
        message: dict[str, Any] = {"role": role}
        if calls:
            message["tool_calls"] = calls
            content = "" if content is None or name == "function_call" else content
        message["content"] = _content(content, number)
        for extra in ("name", "tool_call_id"):
            if isinstance(item.get(extra), str):
                message[extra] = _text(item[extra], extra)
        weight = item.get("weight")
        if weight is not None and weight not in (0, 1):
            raise BadRow(f"message {number} has the weight {weight!r}; it is 0 or 1")
        weighted |= weight is not None
        weights.append(float(role == "assistant" and weight != 0))
        messages.append(message)
    return messages, weights if weighted else None


def _content(value: Any, number: int) -> str:
    if isinstance(value, list):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in value
        ]
        if any(not isinstance(part, str) for part in parts):
            raise BadRow(f"message {number} has content that is not text; images and sound are not supported")
        value = "".join(str(part) for part in parts)
    return _text(value, f"content of message {number}")


def _tool_calls(item: Mapping[str, Any], name: Any, content_key: str, number: int) -> list[dict[str, Any]]:
    """Calls as chat templates expect them: arguments as an object, not as the text of one."""
    calls = _parsed(item.get("tool_calls"), "tool_calls") or []
    if item.get("function_call"):
        calls = [{"type": "function", "function": item["function_call"]}]
    if name == "function_call":
        calls = [{"type": "function", "function": _parsed(item.get(content_key), "function_call")}]
    try:
        result = []
        for call in calls:
            function = dict(call["function"])
            arguments = function.get("arguments", {})
            function["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(function["name"], str):
                raise TypeError("the name is not text")
            result.append({**call, "type": "function", "function": function})
    except (TypeError, KeyError, ValueError) as error:
        raise BadRow(
            f"message {number} has a tool call that is not {{function: {{name, arguments}}}} ({error})"
        ) from None
    return result


def _tools(value: Any) -> list[dict[str, Any]] | None:
    tools = _parsed(value, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools is not a list of objects")
    return [dict(tool) for tool in tools]


def _check_order(messages: list[dict[str, Any]]) -> None:
    previous: dict[str, Any] = {"role": "start"}
    for number, message in enumerate(messages, 1):
        role, before = message["role"], previous["role"]
        allowed = {
            "start": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("tool",) if previous.get("tool_calls") else ("user",),
            "tool": ("tool", "assistant"),
        }[before]
        if role not in allowed:
            place = "comes first" if before == "start" else f"follows {before}"
            raise BadRow(f"message {number} is from {role} and {place}; expected {' or '.join(allowed)}")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(f"message {number}, an answer, is empty")
        previous = message
    if previous["role"] != "assistant":
        raise BadRow(f"ends with a message from {previous['role']}; the last must be the assistant's answer")


def _parsed(value: Any, key: str) -> Any:
    """Tables hold lists as JSON text; anything else is returned as it is."""
    if isinstance(value, str) and value:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"{key} is text that is not JSON") from None
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_kind(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name} holds half of a surrogate pair, which is not valid Unicode") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    return {list: "a list", dict: "an object", str: "text", bool: "true or false"}.get(type(value), f"{value!r:.40}")

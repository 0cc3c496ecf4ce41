"""/v1/chat/completions: messages through the model's own template, answers with text or calls of tools."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoestring.core.errors import ShoestringError
from shoestring.engine.aio import AsyncEngine
from shoestring.engine.request import Constraint, Delta, Request, RequestError, Sampling
from shoestring.engine.tokenizer import Tokenizer
from shoestring.server.errors import ApiError, bad
from shoestring.server.logprobs import of_chat, of_prompt
from shoestring.server.sampling import (
    checked,
    compiled,
    of_logprobs,
    of_schema,
    of_structured,
    sampling,
    wanted_schema,
)
from shoestring.server.schema import ChatRequest, Message, NamedTool, Tool
from shoestring.server.service import Service, log
from shoestring.server.settings import Settings
from shoestring.server.stream import Tail, event, quoted
from shoestring.server.tools import Call, Finder, call_schema, either
from shoestring.server.work import Answer, Work

_LONG = 4096  # characters from which tokenising is not done between two answers of others
_NO_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message", "self")


@dataclass(frozen=True)
class Chat:
    """A conversation, ready to be answered.

    Attributes:
        known: names of the tools that answers are searched for; empty: not at all.
        whole: an answer may be a call only as a whole, since it is constrained to be JSON.
        continues: an answer goes on with the final message.
    """

    id: str
    model: str
    prompt: list[int]
    sampling: Sampling
    created: int
    fingerprint: str
    known: tuple[str, ...] = ()
    whole: bool = False
    most: int = 128
    continues: bool = False
    usage_in_stream: bool = False
    usage_so_far: bool = False

    def finder(self) -> Finder | None:
        return Finder(self.known, self.whole, self.most) if self.known else None


async def prepare(service: Service, engine: AsyncEngine, given: ChatRequest, request_id: str) -> Chat:
    """Everything but the computing.

    Raises:
        ApiError: what cannot be served, with the field at fault.
    """
    limits, inner = service.settings, engine.engine
    if len(given.messages) > limits.max_messages:
        raise bad("messages", f"There are {len(given.messages)} messages; at most {limits.max_messages} are read")
    if given.top_logprobs is not None and not given.logprobs:
        raise bad("top_logprobs", "top_logprobs needs logprobs to be true")
    if given.max_tokens and given.max_completion_tokens and given.max_tokens != given.max_completion_tokens:
        raise bad("max_tokens", "max_tokens and max_completion_tokens differ; give one")
    offered, forced = _offered(given, limits)
    constraint, param = _constraint(given, offered, forced, limits)
    await compiled(engine, constraint, param)
    settings = sampling(
        given,
        limits,
        inner.facts.vocab,
        max_tokens=given.max_completion_tokens or given.max_tokens,
        logprobs=of_logprobs("top_logprobs", given.top_logprobs or 0, limits) if given.logprobs else None,
        prompt_logprobs=of_logprobs("prompt_logprobs", given.prompt_logprobs, limits),
        constraint=constraint,
    )
    told = [tool.model_dump(exclude_none=True, exclude=None) for tool in offered]
    variables = given.chat_template_kwargs or {}
    prompt = await tokens_of(inner.tokenizer, given.messages, told, variables, given.ending)
    return Chat(
        id=f"chatcmpl-{request_id}",
        model=given.model,
        prompt=prompt,
        sampling=settings,
        created=int(time.time()),
        fingerprint=service.fingerprint,
        known=tuple(tool.function.name for tool in offered),
        whole=constraint is not None,
        most=1 if given.parallel_tool_calls is False else 128,
        continues=bool(given.continue_final_message),
        usage_in_stream=bool(given.stream_options and given.stream_options.include_usage),
        usage_so_far=bool(given.stream_options and given.stream_options.continuous_usage_stats),
    )


def requests(chat: Chat, adapter: str, client: str, isolation: str) -> list[Request]:
    more: dict[str, Any] = {"adapter": adapter, "client": client, "isolation": isolation}
    return [Request(chat.prompt, chat.sampling, continues=chat.continues, **more)]


# ---------------------------------------------------------------- the question


async def tokens_of(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    ending: Mapping[str, bool] | None = None,
) -> list[int]:
    """Token ids of a conversation.

    Raises:
        ApiError: messages that the template refuses, or a variable that it must not have.
    """
    for name in variables or ():
        if not name.isidentifier() or name in _NO_VARIABLES:
            raise bad(f"chat_template_kwargs.{name}", "A template's variable cannot have this name")
    plain = [_plain(message, i) for i, message in enumerate(messages)]

    def render() -> list[int]:
        return tokenizer.chat(plain, list(tools) or None, **(ending or {}), **(variables or {}))

    size = sum(len(message["content"]) for message in plain)
    try:
        return await asyncio.to_thread(render) if size > _LONG or tools or variables else render()
    except RequestError as error:
        raise ApiError(400, str(error), param=error.param or "messages", code=error.code or None) from None
    except ShoestringError as error:
        log.warning("a chat template failed: %r", str(error))
        raise bad("messages", "The model's chat template cannot render these messages", "template_failed") from None


def _plain(message: Message, at: int) -> dict[str, Any]:
    """A message as templates expect it: text, and arguments of calls as objects."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text if part.type == "text" else part.refusal for part in content)
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": content if content is not None else message.refusal or ""}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    calls = []
    for j, call in enumerate(message.tool_calls or ()):
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            path = f"messages[{at}].tool_calls[{j}].function.arguments"
            raise bad(path, "The arguments of a call are JSON text") from None
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": "function", "function": function})
    if calls:
        found["tool_calls"] = calls
    return found


def _offered(given: ChatRequest, limits: Settings) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one must be."""
    tools, choice = given.tools or [], given.tool_choice
    if choice is not None and choice != "none" and not tools:
        raise bad("tool_choice", "tool_choice needs tools")
    if given.parallel_tool_calls is not None and not tools:
        raise bad("parallel_tool_calls", "parallel_tool_calls needs tools")
    checked(json.dumps([tool.model_dump() for tool in tools]), limits, "tools")
    names = [tool.function.name for tool in tools]
    if len(set(names)) != len(names):
        raise bad("tools", "Two tools have the same name")
    if choice == "none":
        return [], False
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise bad("tool_choice.function.name", "There is no tool of that name among tools")
        return named, True
    return tools, choice == "required"


def _constraint(
    given: ChatRequest, offered: Sequence[Tool], forced: bool, limits: Settings
) -> tuple[Constraint | None, str]:
    """What the answer must match, and the field that says so."""
    structured, schema = of_structured(given.structured_outputs, limits), wanted_schema(given.response_format)
    if structured is not None:
        if schema is not None or offered:
            raise bad("structured_outputs", "It cannot be combined with response_format or tools")
        return structured, "structured_outputs"
    if forced:
        if schema is not None:
            raise bad("response_format", "It cannot be combined with a tool_choice that requires a call")
        return of_schema(call_schema(offered), limits, "tools"), "tools"
    if schema is None:
        return None, ""
    schema = either(schema, call_schema(offered)) if offered else schema
    return of_schema(schema, limits, "response_format"), "response_format"


# ---------------------------------------------------------------- the answer


def answer(chat: Chat, tokenizer: Tokenizer, found: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
    """A whole `chat.completion`."""
    scored = chat.sampling.prompt_logprobs
    return {
        "id": chat.id,
        "object": "chat.completion",
        "created": chat.created,
        "model": chat.model,
        "system_fingerprint": chat.fingerprint,
        "choices": [_choice(chat, tokenizer, i, one) for i, one in enumerate(found)],
        "usage": usage,
        "prompt_logprobs": None if scored is None else of_prompt(tokenizer, found[0].prompt_logprobs, scored),
    }


def _choice(chat: Chat, tokenizer: Tokenizer, index: int, found: Answer) -> dict[str, Any]:
    text, calls = found.text, []
    finder = chat.finder()
    if finder:
        parts = [*finder.push(text), *finder.finish()]
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [part for part in parts if isinstance(part, Call)]
    message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
    if calls:
        message["tool_calls"] = [call.to_json() for call in calls]
    wanted = chat.sampling.logprobs is not None
    return {
        "index": index,
        "message": message,
        "logprobs": {"content": of_chat(tokenizer, found.logprobs), "refusal": None} if wanted else None,
        "finish_reason": _reason(found.finish_reason, bool(calls)),
        "stop_reason": found.stop_reason,
    }


def _reason(reason: str | None, called: bool) -> str:
    return "tool_calls" if called and reason == "stop" else reason or "stop"


class Events:
    """The same as server-sent events. Everything that does not change is written once."""

    def __init__(self, chat: Chat, tokenizer: Tokenizer) -> None:
        self._chat, self._tokenizer = chat, tokenizer
        answers = range(chat.sampling.n)
        about = {
            "id": chat.id,
            "object": "chat.completion.chunk",
            "created": chat.created,
            "model": chat.model,
            "system_fingerprint": chat.fingerprint,
        }
        self._head = json.dumps(about, separators=(",", ":"))[:-1]
        self._tail = Tail(chat.usage_in_stream, chat.usage_so_far)
        self._opening = [f'data: {self._head},"choices":[{{"index":{at},"delta":{{' for at in answers]
        self._plain = '},"logprobs":null,"finish_reason":null}]'
        self._finders = [chat.finder() for _ in answers]
        self._wanted = chat.sampling.logprobs is not None

    def begin(self) -> bytes:
        first = '"role":"assistant","content":"","refusal":null' + self._plain
        end = self._tail(len(self._chat.prompt), 0)
        return "".join(opening + first + end for opening in self._opening).encode()

    def add(self, at: int, delta: Delta) -> bytes:
        finder, end = self._finders[at], self._tail(len(self._chat.prompt), delta.usage.completion_tokens)
        if finder is None and not self._wanted and delta.finish_reason is None:
            said = '"content":' + quoted(delta.text) + self._plain
            return (self._opening[at] + said + end).encode() if delta.text else b""
        parts: list[str | Call] = [delta.text] if delta.text else []
        if finder:
            parts = [*finder.push(delta.text), *(finder.finish() if delta.finish_reason else ())]
        logprobs = "null"
        if self._wanted and delta.logprobs:
            logprobs = json.dumps({"content": of_chat(self._tokenizer, delta.logprobs), "refusal": None})
            parts = parts or [""]
        lines = []
        number = (finder.calls if finder else 0) - sum(isinstance(part, Call) for part in parts)
        for part in parts:
            lines.append(self._chunk(at, end, _piece(part, number), logprobs))
            number += isinstance(part, Call)
            logprobs = "null"
        if delta.finish_reason:
            reason = _reason(delta.finish_reason, bool(finder and finder.calls))
            why = f',"stop_reason":{json.dumps(delta.stop_reason)}'
            lines.append(self._chunk(at, end, "", reason=f'"{reason}"', more=why))
        return "".join(lines).encode()

    def end(self, work: Work) -> bytes:
        if not self._chat.usage_in_stream:
            return b""
        return event({**json.loads(self._head + "}"), "choices": [], "usage": work.usage()})

    def _chunk(
        self, at: int, end: str, delta: str, logprobs: str = "null", reason: str = "null", more: str = ""
    ) -> str:
        return self._opening[at] + delta + f'}},"logprobs":{logprobs},"finish_reason":{reason}{more}}}]{end}'


def _piece(part: str | Call, number: int) -> str:
    if isinstance(part, str):
        return f'"content":{quoted(part)}'
    return f'"tool_calls":[{json.dumps({"index": number, **part.to_json()})}]'

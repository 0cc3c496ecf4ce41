"""From the fields of a body to the engine's sampling settings, and the limits on them."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from shoestring.core.errors import ShoestringError
from shoestring.engine.aio import AsyncEngine
from shoestring.engine.request import Constraint, RequestError, Sampling
from shoestring.server.body import depth_of
from shoestring.server.closing import closed
from shoestring.server.errors import ApiError, bad, refusal
from shoestring.server.schema import Knobs, ResponseFormat, StructuredOutputs
from shoestring.server.settings import Settings

_COMPILE_SECONDS = 5.0
_SMALLEST = 1e-9  # OpenAI allows a top_p of 0; nothing but the likeliest token is left of it


def sampling(given: Knobs, limits: Settings, vocab: int, **more: Any) -> Sampling:
    """Settings of one request; what it does not say is as OpenAI has it: temperature 1, everything else off.

    Raises:
        ApiError: more than a limit allows, or a token id beyond the vocabulary.
    """
    _check_stops(given, limits)
    if (given.n or 1) > limits.max_n:
        raise bad("n", f"n is {given.n}; at most {limits.max_n} answers are given to one prompt")
    for at, token in enumerate(given.stop_token_ids or ()):
        if token >= vocab:
            raise bad(f"stop_token_ids[{at}]", f"Token ids end at {vocab - 1}")
    return Sampling(
        temperature=1.0 if given.temperature is None else given.temperature,
        top_k=max(0, given.top_k or 0),
        top_p=1.0 if given.top_p is None else max(given.top_p, _SMALLEST),
        min_p=given.min_p or 0.0,
        typical_p=1.0 if given.typical_p is None else given.typical_p,
        repetition_penalty=1.0 if given.repetition_penalty is None else given.repetition_penalty,
        presence_penalty=given.presence_penalty or 0.0,
        frequency_penalty=given.frequency_penalty or 0.0,
        logit_bias=_bias(given.logit_bias or {}, limits, vocab),
        seed=given.seed,
        stop=tuple(given.stop or ()),
        stop_token_ids=tuple(given.stop_token_ids or ()),
        include_stop=bool(given.include_stop_str_in_output),
        ignore_eos=bool(given.ignore_eos),
        min_tokens=given.min_tokens or 0,
        n=given.n or 1,
        **more,
    )


def of_logprobs(param: str, wanted: int | None, limits: Settings) -> int | None:
    if wanted is not None and wanted > limits.max_logprobs:
        raise bad(param, f"{param} is {wanted}; at most {limits.max_logprobs} alternatives are reported")
    return wanted


def of_structured(given: StructuredOutputs | None, limits: Settings) -> Constraint | None:
    """The constraint that `structured_outputs` asks for."""
    if given is None:
        return None
    if given.json_ is not None:
        return of_schema(closed(given.json_), limits, "structured_outputs.json")
    if given.choice is not None:
        text = "|".join(re.escape(choice) for choice in given.choice)
        return Constraint("regex", checked(f"({text})", limits, "structured_outputs.choice"))
    if given.regex is not None:
        return Constraint("regex", checked(given.regex, limits, "structured_outputs.regex"))
    return Constraint("grammar", checked(given.grammar or "", limits, "structured_outputs.grammar"))


def wanted_schema(given: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema that `response_format` asks for; None where any text will do."""
    if given is None or given.type == "text":
        return None
    if given.type == "json_schema":
        wanted = given.json_schema.schema_
    else:
        wanted = given.value if given.schema_ is None else given.schema_
    return {"type": "object"} if wanted is None else closed(wanted)


def of_format(given: ResponseFormat | None, limits: Settings) -> Constraint | None:
    """The constraint that `response_format` asks for."""
    schema = wanted_schema(given)
    return None if schema is None else of_schema(schema, limits, "response_format")


def of_schema(schema: dict[str, Any], limits: Settings, param: str) -> Constraint:
    """The constraint to match a JSON schema.

    Raises:
        ApiError: a schema that is too long or nested too deeply.
    """
    if depth_of(schema, limits.max_schema_depth) > limits.max_schema_depth:
        raise bad(param, f"The schema is nested deeper than {limits.max_schema_depth}")
    return Constraint("json_schema", checked(json.dumps(schema), limits, param))


def checked(text: str, limits: Settings, param: str) -> str:
    if len(text.encode()) > limits.max_schema_bytes:
        raise bad(param, f"It has {len(text.encode())} bytes; at most {limits.max_schema_bytes} are read")
    return text


async def compiled(engine: AsyncEngine, constraint: Constraint | None, param: str) -> None:
    """Compile a constraint beside the event loop and the engine, which then finds it made.

    Raises:
        ApiError: it cannot be used, or takes too long.
    """
    if constraint is None:
        return
    try:
        async with asyncio.timeout(_COMPILE_SECONDS):
            await asyncio.to_thread(engine.engine.sampler.constraints.matcher, constraint)
    except TimeoutError:
        raise bad(param, "It takes too long to compile") from None
    except RequestError as error:
        raise ApiError(400, str(error), param=param, code=error.code or None) from None
    except ShoestringError as error:
        raise bad(param, str(error)) from None


def check(engine: AsyncEngine, requests: list[Any], param: str) -> None:
    """Refuse what the engine would refuse, before an answer is begun.

    Raises:
        ApiError: 400 with the field at fault; 404 for an adapter that has just gone.
    """
    for request in requests:
        try:
            engine.engine.check(request)
        except RequestError as error:
            if error.param == "prompt":
                raise ApiError(
                    400, _with_counts(error, engine, request), param=param, code=error.code or None
                ) from None
            raise refusal(error) from None


def _with_counts(error: RequestError, engine: AsyncEngine, request: Any) -> str:
    if error.code != "context_length_exceeded":
        return str(error)
    context, size = engine.engine.context, len(request.prompt)
    # Clients that shorten a conversation by themselves look for OpenAI's words.
    return (
        f"This model's maximum context length is {context} tokens, and the prompt has {size}. "
        "Shorten it so that an answer fits"
    )


def _check_stops(given: Knobs, limits: Settings) -> None:
    if len(given.stop or ()) > limits.max_stop:
        raise bad("stop", f"There are {len(given.stop or ())} stop strings; at most {limits.max_stop} are allowed")
    for stop in given.stop or ():
        if not 1 <= len(stop) <= limits.max_stop_chars:
            raise bad("stop", f"A stop string has 1 to {limits.max_stop_chars} characters")
    if len(given.stop_token_ids or ()) > 16 * limits.max_stop:
        raise bad("stop_token_ids", f"At most {16 * limits.max_stop} stop tokens are allowed")


def _bias(given: dict[str, float], limits: Settings, vocab: int) -> tuple[tuple[int, float], ...]:
    if len(given) > limits.max_logit_bias:
        raise bad("logit_bias", f"It has {len(given)} tokens; at most {limits.max_logit_bias} are allowed")
    found = []
    for word, value in given.items():
        if not (word.isascii() and word.isdigit() and len(word) < 12 and int(word) < vocab):
            raise bad("logit_bias", f"{word[:40]!r} is no token id; they are whole numbers from 0 to {vocab - 1}")
        found.append((int(word), float(value)))
    return tuple(found)

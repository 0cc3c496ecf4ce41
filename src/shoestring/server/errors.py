"""Errors as OpenAI's clients know them, for every status: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from shoestring.core.errors import ShoestringError
from shoestring.engine.request import RequestError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "overloaded",
    504: "deadline_exceeded",
}
_MESSAGES = {
    404: "There is no such address; /openapi.json lists those there are",
    405: "This address does not take this method",
}
_OF_ABSENCE = ("missing", "value_error")  # a field may be at fault by not being there
_KINDS = {"missing": "missing_required_parameter"}


class ApiError(HTTPException):
    """An answer other than 200. `param` is the JSON path of the field at fault, `code` a short word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code or _CODES.get(status)


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def respond(error: ApiError) -> Response:
    text = json.dumps(body(error.status_code, str(error.detail), error.param, error.code))
    return Response(text, error.status_code, dict(error.headers or {}), media_type="application/json")


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        message = _MESSAGES.get(error.status_code, "The request cannot be served")
        if error.status_code == 404 and (meant := _meant(request)):
            message = f"There is no such address; there is {meant}"
        error = ApiError(error.status_code, message, headers=error.headers)
    return respond(error)


def _meant(request: Request) -> str | None:
    """The address that a client meant which was given a wrong base, or speaks the interface that is not served here."""
    path = request.url.path.rstrip("/")
    if path.startswith("/v1/responses"):
        return "/v1/chat/completions, and no Responses API"
    there = {getattr(route, "path", "") for route in request.app.routes} - {""}
    return next((way for way in (path, f"/v1{path}", path.removeprefix("/v1")) if way in there), None)


async def on_invalid(request: Request, error: Exception) -> Response:
    """A body that does not match its schema: one fault of the first bad field, by its path."""
    assert isinstance(error, RequestValidationError)
    faults = [(path_of(f["loc"][1:], error.body, f["type"] in _OF_ABSENCE), f) for f in error.errors()]
    # Each alternative that a field may be has faults of its own; the one that got furthest was meant.
    same = [(param, fault) for param, fault in faults if fault["loc"][:2] == faults[0][1]["loc"][:2]]
    param = max((param for param, _ in same), key=lambda param: param.count(".") + param.count("["))
    there = [fault for path, fault in reversed(same) if path == param]
    fault = max(there, key=lambda fault: fault["type"].startswith(("greater_", "less_")))  # of the right kind, at least
    message = str(fault["msg"]).removeprefix("Value error, ")
    said = f"{param}: {message}" if param else message
    return respond(ApiError(400, said, param=param or None, code=_KINDS.get(fault["type"], "invalid_value")))


async def on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return respond(refusal(error))


def refusal(error: RequestError) -> ApiError:
    """What the engine, the sampler or the tokenizer refused, for the client."""
    status = 404 if error.code == "model_not_found" else 400
    return ApiError(status, str(error), param=error.param or None, code=error.code or None)


def failed(error: ShoestringError) -> ApiError:
    """The engine cannot go on. What it says may name files, so the client is not told."""
    return ApiError(503, "The engine has stopped", code="engine_failed", headers={"x-should-retry": "false"})


def path_of(location: Sequence[int | str], given: Any, absent: bool = False) -> str:
    """`messages[0].content` for a fault's location; names of alternatives, which are not in the body, are left out."""
    path, here = "", given
    for i, part in enumerate(location):
        if isinstance(part, int) and isinstance(here, list) and part < len(here):
            path, here = f"{path}[{part}]", here[part]
        elif isinstance(part, str) and isinstance(here, dict) and (part in here or absent and i == len(location) - 1):
            path, here = f"{path}.{part}" if path else part, here.get(part)
    return path

"""OpenAI's interface in front of other servers that speak it: the network side of the cache."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from shoestring.core.errors import UsageError
from shoestring.methods.serving._cache import Asked, Cache, Decision, IcCacheConfig, scope_of, tokens_of
from shoestring.methods.serving._router import Model

T = TypeVar("T")
log = logging.getLogger("shoestring.server")
NAME = "ic-cache"  # the model that clients ask for
ANSWER_TOKENS = 256  # what is kept free for an answer of which the client names no limit
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}
_PASSED_BACK = ("retry-after", "x-should-retry", "x-shoestring-warning")
_WARM = 0.7  # temperature of replays, so that tries differ


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        url: without /v1.
        cost: relative to the dearest.
        model: its own name there; empty for the first that it lists.
        key: environment variable of its key.
        context: tokens it takes; 0 for what it says itself.
    """

    name: str
    url: str
    cost: float = 1.0
    model: str = ""
    key: str = ""
    context: int = 0

    def __post_init__(self) -> None:
        if not all(isinstance(part, str) for part in (self.name, self.url, self.model, self.key)):
            raise UsageError(f"{self} has a name, address or key that is no text")
        if not self.name or not self.url.startswith(("http://", "https://")):
            raise UsageError(f"{self.name}={self.url} is no address of a server", remedy="Write http://HOST:PORT")
        if not (isinstance(self.cost, int | float) and self.cost > 0 and isinstance(self.context, int)):
            raise UsageError(f"{self.name} has cost={self.cost}, context={self.context}", remedy="Use numbers above 0")
        if self.key and self.key not in os.environ:
            raise UsageError(f"the environment variable {self.key} is not set", f"{self.name} takes its key from it")

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {os.environ[self.key]}"} if self.key else {}


def endpoints(config: IcCacheConfig) -> list[Endpoint]:
    """The servers that the settings name, the dearest with cost 1.

    Raises:
        UsageError: there are not two of different cost, or one of them cannot be.
    """
    if config.models:
        try:
            rows = json.loads(Path(config.models).expanduser().read_text(encoding="utf-8"))
            made = [Endpoint(**{**row, "url": _root(row["url"])}) for row in rows]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            remedy = 'Write [{"name": "small", "url": "http://...", "cost": 0.2}, ...]'
            raise UsageError(f"models={config.models} cannot be read", str(error)[:200], remedy) from None
    elif config.small:
        made = [
            Endpoint("small", _root(config.small), config.small_cost, config.small_model, config.small_key),
            Endpoint("large", _root(config.large), 1.0, config.large_model, config.large_key),
        ]
    else:
        raise UsageError("there is nothing to stand in front of", remedy="Give small=URL,large=URL or models=FILE")
    names = [e.name for e in made]
    if len(set(names)) != len(names) or NAME in names or len({e.cost for e in made}) < 2:
        raise UsageError(
            f"the models {', '.join(names)} do not make a choice", remedy="Give two or more names and different costs"
        )
    most = max(e.cost for e in made)
    return [Endpoint(e.name, e.url, e.cost / most, e.model, e.key, e.context) for e in made]


def _root(url: str) -> str:
    return str(url).rstrip("/").removesuffix("/v1")


class Refused(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def response(self) -> Response:
        return JSONResponse({"error": self.body()}, self.status)

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"message": str(self), "type": kind, "param": self.param, "code": self.code}


class _Stream(Response):
    """Server-sent events. Whoever abandons it closes what it comes from."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces) as pieces:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Failed(Exception):
    """A server could not be reached, or says that it cannot answer now."""


class Relay:
    """An ASGI application: chats through the cache, feedback, and what is known of both.

    `make` opens the cache over the models, once, in the thread that owns it from then on.
    """

    def __init__(self, config: IcCacheConfig, make: Callable[[Sequence[Model]], Cache], transport: Any = None) -> None:
        self.config = config
        self._endpoints = {e.name: e for e in endpoints(config)}
        self._read = _changed(config.models)
        self._thread = ThreadPoolExecutor(1, "shoestring-cache")  # everything of the cache happens in this one
        self._cache = self._thread.submit(make, self._models()).result()
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5.0), transport=transport,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64), trust_env=False,
        )  # fmt: skip
        self._facts: dict[str, str] = {}  # the model's own name at each endpoint that was asked
        self._down: dict[str, float] = {}
        self._open = 0
        self._idle: asyncio.Task[None] | None = None
        self.created = int(time.time())
        self.counters = {"passed_through": 0, "fallbacks": 0, "upstream_failures": 0}
        self._router = Router([
            Route("/v1/chat/completions", self._answering, methods=["POST"]),
            Route("/v1/models", self._list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._one_model, methods=["GET"]),
            Route("/v1/feedback", self._feedback, methods=["POST"]),
            Route("/v1/examples", self._forget, methods=["DELETE"]),
        ], redirect_slashes=False)  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._idle is None and self.config.replay_tokens and self._cache.checker is not None:
            self._idle = asyncio.create_task(self._replays())
        await self._router(scope, receive, send)

    def stats(self) -> dict[str, float]:
        """What /metrics shows. The counters are plain numbers, so any thread may read them."""
        return {**self._cache.stats(), **self.counters}

    async def close(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            await asyncio.gather(self._idle, return_exceptions=True)
        await self._http.aclose()
        await self._in_cache(self._cache.close)
        self._thread.shutdown()

    # ---- routes ----

    async def _answering(self, request: Request) -> Response:
        try:
            return await self._answer(request, await _body(request))
        except Refused as refused:
            return refused.response()

    async def _answer(self, request: Request, body: dict[str, Any]) -> Response:
        await self._reread()
        model = body.get("model")
        if not isinstance(model, str) or model != NAME and model not in self._endpoints:
            known = [NAME, *self._endpoints]
            raise Refused(404, f"There is no such model. There are: {', '.join(known)}", "model_not_found", "model")
        only = "" if model == NAME else model
        asked = _asked(body, _tenant(request), self.config.match_system)
        if asked is None:  # pictures, tools, several answers: nothing that examples could help with
            self.counters["passed_through"] += 1
            asked = Asked("", "", 1, ANSWER_TOKENS, alone=False)
            only = only or max(self._endpoints.values(), key=lambda e: e.cost).name
        tried: list[str] = [] if only else self._resting()
        while True:
            try:
                decision = await self._in_cache(lambda: self._cache.decide(asked, tuple(tried), only))
            except UsageError:
                raise Refused(503, "No model can be reached now", "upstream_unavailable") from None
            try:
                return await self._ask(decision, body)
            except _Failed as failed:
                self.counters["upstream_failures"] += 1
                log.warning("%s failed: %s", decision.model.name, failed)
                self._down[decision.model.name] = time.monotonic() + self.config.retry_seconds
                if only:
                    raise Refused(503, f"The model {only} cannot be reached now", "upstream_unavailable") from None
                self.counters["fallbacks"] += 1
                tried.append(decision.model.name)

    async def _ask(self, decision: Decision, body: dict[str, Any]) -> Response:
        """The answer of the model that was chosen, as it comes.

        Raises:
            _Failed: it cannot answer, and another may.
        """
        async with AsyncExitStack() as stack:
            answer = await stack.enter_async_context(self._opened(decision, body))
            if answer.status_code == 400 and decision.kept.examples:  # perhaps too long: as the client sent it, then
                await stack.aclose()
                decision = decision.bare
                answer = await stack.enter_async_context(self._opened(decision, body))
            headers = {
                "x-shoestring-model": decision.model.name,
                "x-shoestring-examples": str(len(decision.kept.examples)),
                **({"x-shoestring-feedback": "wanted"} if decision.wanted else {}),
                **{key: answer.headers[key] for key in _PASSED_BACK if key in answer.headers},
            }
            if answer.status_code != 200:
                return _refusal(answer.status_code, await answer.aread(), headers)
            if body.get("stream") is True:
                return _Stream(self._pieces(decision, answer, stack.pop_all()), headers)
            try:
                found = json.loads(await answer.aread())
                choice = found["choices"][0]
                text = (choice.get("message") or {}).get("content") or ""
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise _Failed(f"its answer cannot be read: {type(error).__name__}") from None
            found["id"] = _public(decision)
            await self._finish(decision, text, choice.get("finish_reason") == "stop")
            return JSONResponse(found, headers=headers)

    @asynccontextmanager
    async def _opened(self, decision: Decision, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        """The endpoint's answer, its body still to be read; counted as load for as long as it is open."""
        endpoint = self._endpoints.get(decision.model.name)
        if endpoint is None:
            raise _Failed("it was taken away")
        own = await self._know(endpoint)
        told = {**body, "model": own}
        if decision.kept.examples:
            told["messages"] = _with_turns(body["messages"], decision.turns)
        tokens = self._cache.begin(decision)
        self._open += 1
        try:
            async with self._http.stream(
                "POST", f"{endpoint.url}/v1/chat/completions", json=told, headers=endpoint.headers
            ) as answer:
                if answer.status_code in (401, 403, 404, 429) or answer.status_code >= 500:
                    # Its key, its name for the model and its limits are ours to care for, not the client's.
                    raise _Failed(f"HTTP {answer.status_code}")
                yield answer
        except httpx.HTTPError as error:
            raise _Failed(type(error).__name__) from None
        finally:
            self._open -= 1
            self._cache.end(tokens)

    async def _pieces(
        self, decision: Decision, answer: httpx.Response, stack: AsyncExitStack
    ) -> AsyncGenerator[bytes, None]:
        """The events as they come, under our own id."""
        text, ended = "", False
        try:
            async with stack:
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        if line.startswith(":"):  # keeps the connection open
                            yield line.encode() + b"\n\n"
                        continue
                    event = json.loads(data)
                    if "choices" in event:
                        event["id"] = _public(decision)
                    for choice in event.get("choices") or ():
                        text += (choice.get("delta") or {}).get("content") or ""
                        if choice.get("finish_reason") and not ended:
                            ended = True  # noted before the client reads it, so that its feedback finds the answer
                            await self._finish(decision, text, choice["finish_reason"] == "stop")
                    yield _event(event)
        except (_Failed, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("the stream of %s broke: %s", decision.model.name, type(error).__name__)
            yield _event({"error": Refused(502, "The model's answer broke off", "upstream_failed").body()})
        yield b"data: [DONE]\n\n"

    async def _finish(self, decision: Decision, text: str, complete: bool) -> None:
        if decision.asked.scope:
            await self._in_cache(lambda: self._cache.finish(decision, text, complete))

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about(name) for name in (NAME, *self._endpoints)]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != NAME and name not in self._endpoints:
            return Refused(404, f"There is no model {name[:100]}", "model_not_found", "model").response()
        return JSONResponse(self._about(name))

    def _about(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "shoestring"}

    async def _feedback(self, request: Request) -> Response:
        """{"request_id": the answer's id, "score": 0..1}."""
        try:
            body = await _body(request)
            number, score = body.get("request_id"), body.get("score")
            if not isinstance(number, str):
                raise Refused(400, "request_id is the id of an answer", "invalid_value", "request_id")
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
                raise Refused(400, "score is a number between 0 and 1", "invalid_value", "score")
            tenant, number = _tenant(request), number.removeprefix("chatcmpl-")
            counted = await self._in_cache(lambda: self._cache.feedback(tenant, number, score))
        except Refused as refused:
            return refused.response()
        return JSONResponse({"request_id": body["request_id"], "counted": counted})

    async def _forget(self, request: Request) -> Response:
        tenant = _tenant(request)
        return JSONResponse({"deleted": await self._in_cache(lambda: self._cache.forget(tenant))})

    # ---- models that come and go ----

    def _models(self) -> list[Model]:
        return [Model(e.name, e.cost, e.context or self.config.context) for e in self._endpoints.values()]

    def _resting(self) -> list[str]:
        """Models that have just failed; none of them when all have."""
        now = time.monotonic()
        resting = [name for name, until in self._down.items() if until > now and name in self._endpoints]
        return resting if len(resting) < len(self._endpoints) else []

    async def _reread(self) -> None:
        """The file of models has changed: some may be new, some gone. One that cannot be read changes nothing."""
        if (read := _changed(self.config.models)) == self._read:
            return
        self._read = read
        try:
            made = {e.name: e for e in endpoints(self.config)}
        except UsageError as error:
            log.warning("%s", error)
            return
        self._facts = {n: f for n, f in self._facts.items() if made.get(n) == self._endpoints.get(n)}
        self._endpoints = made
        models = self._models()
        await self._in_cache(lambda: self._cache.router.exchange(models))

    async def _know(self, endpoint: Endpoint) -> str:
        """The model's own name at the endpoint; the router learns of its context."""
        if endpoint.name not in self._facts:
            own, context = endpoint.model, endpoint.context
            row: dict[str, Any]
            try:
                listed = await self._http.get(f"{endpoint.url}/v1/models", headers=endpoint.headers, timeout=5.0)
                rows = listed.json()["data"]
                row = next((r for r in rows if not own or r["id"] == own), {})
                own = own or row["id"]
                context = context or int(row.get("max_model_len") or 0) or self.config.context
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                if not own:
                    raise _Failed(f"it lists no models ({type(error).__name__})") from None
                context = context or self.config.context
            self._facts[endpoint.name] = own
            known = Model(endpoint.name, endpoint.cost, context)
            await self._in_cache(lambda: self._cache.router.add(known))
        return self._facts[endpoint.name]

    # ---- when nobody waits ----

    async def _replays(self) -> None:
        """Better answers for the examples that need them; one request at a time, never beside a client's."""
        while True:
            await asyncio.sleep(self.config.idle_seconds)
            try:
                if not self._open:
                    await self._replay()
            except Exception as error:  # the next one may do better
                log.warning("a replay failed: %s", type(error).__name__)

    async def _replay(self) -> None:
        example = await self._in_cache(self._cache.to_replay)
        if example is None:
            return
        endpoint = max(self._endpoints.values(), key=lambda e: e.cost)
        own = await self._know(endpoint)
        told = [{"role": "system", "content": text} for text in self._cache.system_of(example.scope)]
        body = {"model": own, "messages": [*told, {"role": "user", "content": example.request}],
                "max_tokens": self.config.example_tokens, "temperature": _WARM}  # fmt: skip
        answers, tokens = [], 0
        for _ in range(self.config.replay_tries):
            if self._open:  # somebody came: what there is must do
                break
            made = await self._http.post(
                f"{endpoint.url}/v1/chat/completions", json=body, headers=endpoint.headers, timeout=60.0
            )
            found = made.raise_for_status().json()
            tokens += int((found.get("usage") or {}).get("total_tokens") or example.tokens)
            if found["choices"][0].get("finish_reason") == "stop":
                answers.append(found["choices"][0]["message"].get("content") or "")
        await self._in_cache(lambda: self._cache.replayed(example, answers, tokens))

    async def _in_cache(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


# ---------------------------------------------------------------- small things


async def _body(request: Request) -> dict[str, Any]:
    """The request's object. Raises Refused for what is no JSON, or could not be passed on as such."""
    raw = await request.body()
    try:
        found = json.loads(raw, parse_constant=_no_number)
        if b"\\u" in raw:
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        raise Refused(400, "The body is not JSON", "invalid_json") from None
    if not isinstance(found, dict):
        raise Refused(400, "The body is not a JSON object", "invalid_json")
    return found


def _no_number(word: str) -> None:
    raise ValueError(word)


def _tenant(request: Request) -> str:
    """Who is asking: the key the server knows, or the one that was sent; all without a key are one."""
    client = request.scope.get("state", {}).get("client")
    if client is not None and client.digest:
        return str(client.digest)
    sent = request.headers.get("authorization", "")
    return hashlib.sha256(sent.removeprefix("Bearer ").encode()).hexdigest() if sent else "anyone"


def _asked(body: Mapping[str, Any], tenant: str, match_system: bool) -> Asked | None:
    """The request as the cache sees it; None for one it has nothing to add to.

    Raises:
        Refused: messages that are none.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, "messages is a list of messages, at least one", "invalid_value", "messages")
    texts = [_text(m.get("content")) for m in messages]
    plain = None not in texts and all(m.get("role") in _ROLES for m in messages)
    if (
        not plain
        or body.get("tools")
        or body.get("functions")
        or body.get("n") not in (None, 1)
        or body.get("logprobs")
    ):
        return None
    said = [(m["role"], text or "") for m, text in zip(messages, texts)]
    if said[-1][0] != "user" or not said[-1][1].strip():
        return None
    system = tuple(text for role, text in said if role in _ABOVE)
    room = body.get("max_completion_tokens") or body.get("max_tokens")
    return Asked(
        scope_of(tenant, system if match_system else ()),
        said[-1][1],
        sum(tokens_of(text) for _, text in said),
        room if isinstance(room, int) and not isinstance(room, bool) and 0 < room < 2**31 else ANSWER_TOKENS,
        alone=len(said) == len(system) + 1,
        system=system,
    )


_ABOVE = ("system", "developer")
_ROLES = (*_ABOVE, "user", "assistant")


def _text(content: object) -> str | None:
    """A message's text, None when there is more to it than text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        return None
    return "".join(part["text"] for part in parts if part)


def _with_turns(messages: Sequence[Mapping[str, Any]], turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Examples after the system messages, whose text stays the prompt's stable beginning, and before all else."""
    at = next((i for i, m in enumerate(messages) if m["role"] not in _ABOVE), len(messages))
    return [*messages[:at], *turns, *messages[at:]]


def _public(decision: Decision) -> str:
    return f"chatcmpl-{decision.id}"


def _event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def _refusal(status: int, text: bytes, headers: Mapping[str, str]) -> Response:
    """What the server behind refused, if it says so in OpenAI's shape."""
    try:
        error = json.loads(text)["error"]
        body = {"message": str(error["message"]), "type": error.get("type"), "param": error.get("param"),
                "code": error.get("code")}  # fmt: skip
    except (ValueError, LookupError, TypeError, AttributeError):
        body = Refused(status, "The model's server refused the request", "upstream_refused").body()
    return JSONResponse({"error": body}, status, dict(headers))


def _changed(file: str) -> float:
    """When the file was last written; 0 without one."""
    try:
        return Path(file).expanduser().stat().st_mtime_ns if file else 0.0
    except OSError:
        return 0.0

"""The routes."""

from __future__ import annotations

import asyncio
import json
from types import ModuleType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from shoestring import __version__
from shoestring.engine.request import RequestError
from shoestring.server import adapters, chat, completions, embeddings, files, fine_tuning, page, schema
from shoestring.server.body import JsonRoute
from shoestring.server.door import Door
from shoestring.server.errors import bad, body, on_http_error, on_invalid, on_refused
from shoestring.server.keys import Client, client_of
from shoestring.server.metrics import CONTENT_TYPE
from shoestring.server.report import Report, together
from shoestring.server.sampling import check
from shoestring.server.service import Service
from shoestring.server.settings import names
from shoestring.server.status import status
from shoestring.server.stream import EventStream
from shoestring.server.work import Work, attended

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schema.ErrorAnswer, "description": "The request cannot be served"},
    "5XX": {"model": schema.ErrorAnswer, "description": "The server cannot answer now"},
}
_MANY = 256  # tokens of prompts that are judged between two answers of others
_NOTHING_LEAVES: Any = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}


def build(service: Service) -> ASGIApp:
    """The application: routes behind the door."""
    return _behind_door(routes(service), service)


def routes(service: Service) -> FastAPI:
    """The routes alone, for requests that have passed a door."""
    app = FastAPI(
        title="shoestring",
        version=__version__,
        docs_url=None,  # that page loads scripts from elsewhere
        openapi_url=None if service.settings.replicas > 1 else "/openapi.json",  # theirs describes all routes
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
        exception_handlers={
            HTTPException: on_http_error,
            RequestValidationError: on_invalid,
            RequestError: on_refused,
        },
        telemetry=_NOTHING_LEAVES,
    )
    app.state.service = service
    app.router.route_class = JsonRoute
    if not service.settings.forwards:
        _answers(app, service)
        _tokens(app, service)
        _adapters(app, service)
        _list(app, service)
        files.add_routes(app, service, _answer)
        fine_tuning.add_routes(app, service, _answer)
    _about(app, service)
    if service.settings.forwards:
        from shoestring.server.front import Guard

        app.mount("/", Guard(service))  # every other address is the front's
    return app


def _behind_door(app: FastAPI, service: Service) -> ASGIApp:
    health = next(route for route in app.routes if getattr(route, "path", "") == "/health")
    guarded: ASGIApp = Door(app, service, health)
    if service.settings.allowed_origins:
        from starlette.middleware.cors import CORSMiddleware

        guarded = CORSMiddleware(
            guarded,
            allow_origins=names(service.settings.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # clients send headers of their own; none of them lets anybody in
            expose_headers=["x-request-id", "x-shoestring-warning", "retry-after"],
        )
    return guarded


# ---------------------------------------------------------------- answers


def _answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=schema.ChatAnswer)
    async def chat_completions(given: schema.ChatRequest, request: Request) -> Response:
        return await _answered(service, request, given, chat, "messages", given.n or 1)

    @app.post("/v1/completions", response_model=schema.CompletionAnswer)
    async def text_completions(given: schema.CompletionRequest, request: Request) -> Response:
        return await _answered(service, request, given, completions, "prompt", (given.n or 1) * len(given.prompt))

    @app.post("/v1/embeddings", response_model=schema.EmbeddingAnswer)
    async def embed(given: schema.EmbeddingRequest, request: Request) -> Response:
        engine, client = service.engine, client_of(request)
        adapter = service.pick(given.model, client)
        ticket = service.gate.enter(client, len(given.input))
        try:
            prompts = await embeddings.prepare(service, engine, given)
            made = embeddings.requests(prompts, adapter, client.digest, service.isolation(client, None))
            check(engine, made, "input")
            work = Work(service, made, ticket)
            try:
                found = await attended(service, request.receive, embeddings.vectors(work))
                return _json(embeddings.answer(given, found, work), _headers(given))
            finally:
                work.close()
        finally:
            ticket.leave()


async def _answered(
    service: Service, request: Request, given: schema.Knobs, kind: ModuleType, param: str, answers: int
) -> Response:
    """A whole answer, or a stream of one: chats and completions alike."""
    engine, client = service.engine, client_of(request)
    adapter = service.pick(given.model, client)
    ticket = service.gate.enter(client, answers)
    work: Work | None = None
    handed_over = False
    try:
        made = await kind.prepare(service, engine, given, request.state.request_id.removeprefix("req_"))
        isolation = service.isolation(client, given.cache_salt)
        requests = kind.requests(made, adapter, client.digest, isolation)
        check(engine, requests, param)
        work = Work(service, requests, ticket)
        tokenizer = engine.engine.tokenizer
        if given.stream:
            handed_over = True
            return EventStream(service, work, kind.Events(made, tokenizer), _headers(given))
        found = await attended(service, request.receive, work.answers())
        usage, headers = work.usage(), _headers(given)
        whole = lambda: _json(kind.answer(made, tokenizer, found, usage), headers)
        # What is said of each token of a long prompt takes a while, in which other answers must go on.
        judged = sum(len(one.prompt_logprobs) for one in found)
        return await asyncio.to_thread(whole) if judged > _MANY else whole()
    finally:
        if not handed_over:
            if work:
                work.close()
            ticket.leave()


# ---------------------------------------------------------------- tokens


def _tokens(app: FastAPI, service: Service) -> None:
    async def tokenize(given: schema.TokenizeRequest, request: Request) -> Response:
        engine = service.engine.engine
        service.pick(given.model or service.names[0], client_of(request))
        if given.messages is not None:
            if len(given.messages) > service.settings.max_messages:
                raise bad("messages", f"At most {service.settings.max_messages} messages are read")
            if given.add_special_tokens and engine.tokenizer.encode(""):
                raise bad("add_special_tokens", "A conversation has those that its template writes, and no more")
            told = [tool.model_dump(exclude_none=True) for tool in given.tools or ()]
            ids = await chat.tokens_of(engine.tokenizer, given.messages, told, ending=given.ending)
        else:
            (ids,) = await completions.ids_of(engine.tokenizer, [given.prompt or ""], given.add_special_tokens)
        words = [engine.tokenizer.token_text(token) for token in ids] if given.return_token_strs else None
        found = {"count": len(ids), "max_model_len": engine.context, "tokens": ids, "token_strs": words}
        return _json(found, _headers(given))

    async def detokenize(given: schema.DetokenizeRequest, request: Request) -> Response:
        engine = service.engine.engine
        service.pick(given.model or service.names[0], client_of(request))
        for at, token in enumerate(given.tokens):
            if token >= engine.facts.vocab:
                raise bad(f"tokens[{at}]", f"Token ids end at {engine.facts.vocab - 1}")
        return _json({"prompt": engine.tokenizer.decode(given.tokens, skip_special=False)}, _headers(given))

    for prefix in ("", "/v1"):
        app.post(f"{prefix}/tokenize", response_model=schema.TokensAnswer)(tokenize)
        app.post(f"{prefix}/detokenize", response_model=schema.TextAnswer)(detokenize)


# ---------------------------------------------------------------- adapters


def _adapters(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter", response_model=schema.AdapterAnswer)
    async def load_lora_adapter(given: schema.LoadAdapterRequest) -> Response:
        await adapters.load(service, given)
        return _json({"id": given.lora_name, "object": "model", "loaded": True}, _headers(given))

    @app.post("/v1/unload_lora_adapter", response_model=schema.AdapterAnswer)
    async def unload_lora_adapter(given: schema.UnloadAdapterRequest, request: Request) -> Response:
        await adapters.unload(service, given.lora_name, client_of(request))
        return _json({"id": given.lora_name, "object": "model", "loaded": False}, _headers(given))


# ---------------------------------------------------------------- about the server


def _list(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=schema.ModelsAnswer)
    async def list_models(request: Request) -> Response:
        return _json({"object": "list", "data": _models(service, client_of(request))})

    @app.get("/v1/models/{model:path}", response_model=schema.ModelAnswer)
    async def one_model(model: str, request: Request) -> Response:
        client = client_of(request)
        service.pick(model, client)
        return _json(next(found for found in _models(service, client) if found["id"] == model))


def _about(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        state = service.health()
        if state == "ready":
            return _json({"status": "ok", "state": "ready"})
        error = body(503, f"The server is {state}", code=f"server_{state}")
        return Response(
            json.dumps({"status": state, "state": state, **error}), 503, {"retry-after": "2"}, "application/json"
        )

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(await _reports(service)), media_type=CONTENT_TYPE)

    @app.get("/v1/ledger")
    async def ledger(request: Request) -> Response:
        return _json(together(status(service, client_of(request)), await _reports(service)))

    @app.get("/", response_class=Response)
    async def status_page() -> Response:
        return Response(page.html(), media_type="text/html", headers=page.HEADERS)


async def _reports(service: Service) -> list[Report] | None:
    """How those stand that answer for this process; None where it answers itself."""
    return await service.front.reports() if hasattr(service.front, "reports") else None


def _models(service: Service, client: Client) -> list[dict[str, Any]]:
    engine = service.engine.engine

    def one(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "shoestring",
            "root": parent or name,
            "parent": parent,
            "max_model_len": engine.context,
        }

    return [one(name, None) for name in service.names] + [
        one(name, service.names[0]) for name in service.adapters(client)
    ]


# ---------------------------------------------------------------- small things


def _json(data: Any, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), headers=headers, media_type="application/json")


def _answer(data: Any, given: BaseModel | None = None) -> Response:
    return _json(data, _headers(given) if given else None)


def _headers(given: BaseModel) -> dict[str, str]:
    """A warning that names the fields nobody knows."""
    unknown = [name.encode("unicode_escape").decode("ascii")[:64] for name in schema.unknown_fields(given)]
    if not unknown:
        return {}
    more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
    return {"x-shoestring-warning": "unknown fields have no effect: " + ", ".join(unknown[:20]) + more}

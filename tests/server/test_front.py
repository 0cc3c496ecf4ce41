"""A front in place of an engine: the same door, the same limits, its own answers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serving import Server, error_of
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from shoestring.core.errors import UsageError
from shoestring.engine.plug import pluggable
from shoestring.server.keys import Keys
from shoestring.server.life import _bind, http_server
from shoestring.server.service import Service
from shoestring.server.settings import Settings

NAME = next(m.name for m in pluggable("front", "front"))


class Front:
    """Says who asked and what; can be slow."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/slow", self._slow, methods=["POST"]),
        ]
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._router(scope, receive, send)

    def stats(self) -> dict[str, float]:
        return {"examples": 3.0}

    async def _chat(self, request: Request) -> Response:
        return JSONResponse({"who": request.scope["state"]["client"].digest, "said": await request.json()})

    async def _slow(self, request: Request) -> Response:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return Response()


@contextmanager
def serving(keys: list[str] | None = None, ready: bool = True, **settings: Any) -> Iterator[tuple[Server, Front]]:
    made = Settings(port=0, front=f"{NAME},a=b", **settings)
    service, front = Service(made, Keys(keys or [])), Front()
    if ready:
        service.open_front(front)
    http, listener = http_server(service), _bind(made)
    thread = threading.Thread(target=http.run, args=([listener],), daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    host, port = listener.getsockname()[:2]
    try:
        yield Server(f"http://{host}:{port}", "any", (keys or [""])[0], service=service), front
    finally:
        http.should_exit = True
        thread.join(10)


def test_it_answers_behind_the_door() -> None:
    with serving(keys=["first", "second"]) as (server, _):
        answer = server.http.post("/v1/chat/completions", json={"a": 1})
        assert answer.status_code == 200 and answer.json()["said"] == {"a": 1}
        assert answer.json()["who"] and answer.headers["x-request-id"].startswith("req_")
        other = server.http.post("/v1/chat/completions", json={}, headers={"authorization": "Bearer second"})
        assert other.json()["who"] not in ("", answer.json()["who"])
        assert server.http.post("/v1/chat/completions", json={}, headers={"authorization": "x"}).status_code == 401
        assert server.http.get("/health", headers={"authorization": "x"}).json() == {"status": "ok", "state": "ready"}
        assert server.metrics()["front_examples"] == 3
        assert server.http.get("/v1/ledger").json()["models"] == [NAME]


def test_what_it_does_not_have_is_an_error_in_openais_shape() -> None:
    with serving() as (server, _):
        for method, path, status in (("GET", "/v1/nothing", 404), ("POST", "/v1/completions", 404),
                                     ("GET", "/v1/chat/completions", 405)):  # fmt: skip
            answer = server.http.request(method, path, json={})
            assert answer.status_code == status and error_of(answer)["message"]


def test_a_page_of_another_site_cannot_send_to_it() -> None:
    """What a browser sends for any page without asking is never passed on."""
    with serving() as (server, _):
        for kind in ("text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data; a=b", ""):
            answer = server.http.post("/v1/chat/completions", content=b'{"a": 1}', headers={"content-type": kind})
            assert answer.status_code == 415 and error_of(answer)["code"] == "unsupported_media_type"
        binary = {"content-type": "application/msgpack"}
        assert server.http.post("/v1/chat/completions", content=b"{}", headers=binary).status_code == 200


def test_limits_are_kept_for_it() -> None:
    with serving(max_body_bytes=1000, key_requests_per_minute=3) as (server, _):
        answer = server.http.post("/v1/chat/completions", json={"a": "x" * 2000})
        assert answer.status_code == 413 and error_of(answer)["code"] == "request_too_large"
        codes = [server.http.post("/v1/chat/completions", json={}).status_code for _ in range(4)]
        assert codes == [200, 200, 429, 429]
        assert server.service.gate.requests == 0


def test_a_slow_one_is_cut_off_and_told() -> None:
    with serving(request_seconds=0.3) as (server, front):
        answer = server.http.post("/v1/slow", json={})
        assert answer.status_code == 504 and error_of(answer)["code"] == "deadline_exceeded"
        assert front.cancelled.wait(5) and server.service.gate.requests == 0


def test_a_client_that_leaves_cancels_its_work() -> None:
    with serving() as (server, front):
        with pytest.raises(Exception, match="timed out"):
            server.http.post("/v1/slow", json={}, timeout=0.3)
        assert front.cancelled.wait(5)


def test_while_it_opens_and_ends_it_says_so() -> None:
    with serving(ready=False) as (server, front):
        answer = server.http.post("/v1/chat/completions", json={})
        assert answer.status_code == 503 and error_of(answer)["code"] == "model_loading"
        assert server.http.get("/health").status_code == 503
        server.service.open_front(front)
        assert server.http.post("/v1/chat/completions", json={}).status_code == 200
        server.service.state = "draining"
        assert error_of(server.http.post("/v1/chat/completions", json={}))["code"] == "draining"


def test_settings_that_cannot_be() -> None:
    assert Settings(front=f"{NAME},a=b").title == NAME and Settings(model="other").title == "other"
    for wrong in ({"front": "nonsense"}, {"front": NAME, "draft": "x"}, {"front": NAME, "model": "other"},
                  {"front": NAME, "adapter": ("a=b",)}):  # fmt: skip
        with pytest.raises(UsageError):
            Settings(**wrong)

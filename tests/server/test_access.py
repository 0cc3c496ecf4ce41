"""Who is let in, and what nobody is told."""

from __future__ import annotations

import ast
import base64
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from serving import HELLO, Server, error_of, toy
from test_bad_requests import raw

from shoestring import server as package
from shoestring.core.errors import UsageError
from shoestring.server.keys import Keys
from shoestring.server.life import serve
from shoestring.server.settings import Settings

KEY, OTHER = "first-key-0123456789", "second-key-0123456789"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with toy(keys=[KEY, OTHER]) as running:
        yield running


@pytest.fixture(autouse=True)
def settled(guarded: Server) -> Iterator[None]:
    yield
    assert guarded.chat().status_code == 200
    guarded.settled()


def routes(server: Server) -> list[tuple[str, str]]:
    """Every address with every method, and addresses that do not exist."""
    paths = [*server.http.get("/openapi.json").json()["paths"], "/openapi.json", "/docs", "/redoc", "/nothing", "//"]
    methods = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE")
    return [(method, path.replace("{model}", "toy")) for path in paths for method in methods]


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"authorization": "Bearer wrong"}, {"authorization": KEY},
        {"authorization": f"Bearer {KEY[:-1]}"}, {"authorization": "Bearer"},
        {"authorization": f"Token {KEY}"}, {"x-api-key": KEY}, {"authorization": "Basic !!!"}, {"cookie": f"key={KEY}"},
    ],
    ids=str,
)  # fmt: skip
def test_every_route_needs_the_key(guarded: Server, headers: dict[str, str]) -> None:
    walked = routes(guarded)
    assert len(walked) > 100
    with httpx.Client(base_url=guarded.url, headers=headers) as client:
        for method, path in walked:
            answer = client.request(method, path, params={"api_key": KEY})
            if path == "/health":
                assert answer.status_code == (200 if method in ("GET", "HEAD") else 405), (method, path)
                continue
            assert answer.status_code == 401, (method, path, answer.text)
            if method != "HEAD":
                assert error_of(answer)["code"] == "invalid_api_key"


def test_two_authorization_headers_are_none(guarded: Server) -> None:
    twice = f"authorization: Bearer {KEY}\r\n" * 2
    assert b" 401 " in raw(guarded, f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n{twice}\r\n".encode())


def test_either_key_lets_in_and_a_browser_may_ask_for_it(guarded: Server) -> None:
    for scheme in ("bearer", "BEARER"):  # names of schemes have no case
        assert guarded.http.get("/v1/models", headers={"authorization": f"{scheme} {KEY}"}).status_code == 200
    for key in (KEY, OTHER):
        basic = base64.b64encode(f"me:{key}".encode()).decode()
        for value in (f"Bearer {key}", f"Basic {basic}"):
            assert httpx.get(f"{guarded.url}/v1/models", headers={"authorization": value}).status_code == 200
    refused = httpx.get(f"{guarded.url}/")
    assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
    assert httpx.get(f"{guarded.url}/v1/models").headers["www-authenticate"] == "Bearer"


def test_the_client_raises_what_it_should(guarded: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.parametrize(
    "line",
    [
        "GET http://localhost/v1/models", "GET http://evil/health/../v1/models", "GET /health/../v1/models",
        "GET /v1/../v1/models", "GET //health", "GET /health/", "GET /health%2f..%2fv1/models",
        "GET /v1/models#/health",
        "GET /v1/models?/health", "GET /v1/models;/health", "GET \\health", "POST /health/../v1/chat/completions",
    ],
)  # fmt: skip
def test_no_spelling_of_the_address_gets_around_the_key(guarded: Server, line: str) -> None:
    for host in ("localhost", "localhost/health", "localhost?x=/health"):
        said = raw(guarded, f"{line} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
        assert said.split(b" ")[1] in (b"400", b"401", b"403"), (line, host, said)


@pytest.mark.parametrize(
    "host", ["evil", "127.0.0.1.evil", "evil:8000", "localhost.evil", "localhost@evil", "[::1", ""]
)
def test_other_hosts_are_refused_on_loopback(guarded: Server, host: str) -> None:
    for path in ("/health", "/v1/models"):
        answer = guarded.http.get(path, headers={"host": host})
        assert answer.status_code in (400, 403), (host, path)
    assert guarded.http.get("/health", headers={"host": "LOCALHOST:1234"}).status_code == 200


def test_other_names_are_served_when_allowed() -> None:
    with toy(allowed_hosts="models.example, localhost") as running:
        assert running.http.get("/health", headers={"host": "models.example:80"}).status_code == 200
        assert running.http.get("/health").status_code == 403


def test_pages_of_other_origins_are_refused(guarded: Server) -> None:
    origin = {"origin": "https://evil.example"}
    preflight = guarded.http.options(
        "/v1/chat/completions", headers={**origin, "access-control-request-method": "POST"}
    )
    assert preflight.status_code >= 400 and "access-control-allow-origin" not in preflight.headers
    simple = guarded.http.post(
        "/v1/chat/completions",
        content=json.dumps(guarded.chat_body()),
        headers={**origin, "content-type": "text/plain"},
    )
    assert simple.status_code == 415 and "access-control-allow-origin" not in simple.headers


def test_origins_can_be_allowed() -> None:
    with toy(keys=[KEY], allowed_origins="https://good.example") as running:
        wanted = "authorization,content-type,x-stainless-lang"  # the official client sends names of its own
        ask = {"access-control-request-method": "POST", "access-control-request-headers": wanted}
        options = lambda origin: httpx.options(f"{running.url}/v1/models", headers={"origin": origin, **ask})
        assert options("https://good.example").headers["access-control-allow-origin"] == "https://good.example"
        assert options("https://good.example").status_code == 200
        assert "access-control-allow-origin" not in options("https://evil.example").headers
        assert "access-control-allow-credentials" not in options("https://good.example").headers
        answer = running.http.get("/v1/models", headers={"origin": "https://good.example"})
        assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_no_key_is_ever_compared_with_equals() -> None:
    for file in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops):
                words = ast.unparse(node).lower()
                assert not any(word in words for word in ("digest", "secret", "_presented")), (file.name, words)
    assert "compare_digest" in (Path(package.__file__).parent / "keys.py").read_text()


def test_keys_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_API_KEY", "third")
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER}  \n")
    keys = Keys.load(str(file))
    found = {keys.client([(b"authorization", f"Bearer {key}".encode())]) for key in (KEY, OTHER, "third", "fourth")}
    assert None in found and len(found) == 4
    for content in (b"", b"# nothing\n", b"two words\n", b"\xff\xfe\n"):
        file.write_bytes(content)
        with pytest.raises(UsageError):
            Keys.load(str(file))
    with pytest.raises(UsageError):
        Keys.load(str(tmp_path / "absent"))


def test_a_server_for_others_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_API_KEY", raising=False)
    with pytest.raises(UsageError, match="no key"):
        serve(Settings(host="0.0.0.0", port=0))


def test_keys_do_not_share_cached_prefixes(guarded: Server) -> None:
    def cached(key: str, **more: Any) -> int:
        body = guarded.chat_body(messages=[{"role": "user", "content": "the same long beginning " * 8}], **more)
        answer = httpx.post(f"{guarded.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEY) == 0 and cached(KEY) > 100
    assert cached(OTHER) == 0 and cached(OTHER) > 100
    assert cached(KEY, cache_salt="mine") == 0 and cached(KEY, cache_salt="mine") > 100


def test_limits_of_one_key() -> None:
    with toy(keys=[KEY, OTHER], key_requests_per_minute=2) as running:
        assert [running.chat().status_code for _ in range(2)] == [200, 200]
        with pytest.raises(openai.RateLimitError) as refused:
            running.client().chat.completions.create(model="toy", messages=HELLO)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
        other = httpx.post(
            f"{running.url}/v1/chat/completions", json=running.chat_body(), headers={"authorization": f"Bearer {OTHER}"}
        )
        assert other.status_code == 200
        running.settled()


def test_a_log_line_stays_one_line(guarded: Server, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("shoestring.server")
    log.addHandler(caplog.handler)
    log.setLevel(logging.DEBUG)
    try:
        evil = 'x\n2026 INFO forged \x1b[31m%s {"a": 1}'
        guarded.chat(model=evil, user=evil, messages=[{"role": "user", "content": "the secret word"}], max_tokens=1)
        guarded.http.get("/" + "%0a%1b[31m%25s")
        guarded.http.get("/v1/models", headers={"x-request-id": "a b"})
        guarded.chat(messages=[{"role": "user", "content": "the secret word"}], stop=["the secret word"] * 9)
    finally:
        log.removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) >= 4 and all("\n" not in line and "\x1b" not in line and "\r" not in line for line in said)
    assert not any("secret word" in line or "forged" in line or KEY in line for line in said)


def test_request_ids(guarded: Server) -> None:
    assert (
        guarded.http.get("/v1/models", headers={"x-request-id": "mine-1.2_3"}).headers["x-request-id"] == "mine-1.2_3"
    )
    for odd in ("a b", "x" * 65, "a\tb", "<script>"):
        assert guarded.http.get("/v1/models", headers={"x-request-id": odd}).headers["x-request-id"].startswith("req_")
    assert guarded.http.get("/nothing").headers["x-request-id"] != guarded.http.get("/nothing").headers["x-request-id"]


def test_the_key_is_nowhere_to_be_seen(guarded: Server) -> None:
    for path in ("/metrics", "/v1/ledger", "/", "/openapi.json", "/v1/models", "/nothing"):
        assert KEY not in guarded.http.get(path).text
    digest = __import__("hashlib").sha256(KEY.encode()).hexdigest()
    assert digest not in guarded.http.get("/metrics").text + guarded.http.get("/v1/ledger").text


# ---- adapters ----


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    top = tmp_path_factory.mktemp("a")
    root, evil = top / "loras", top / "loras-evil"
    for folder in (root / "good", root / "deep" / "er", root / "bad", root / "linked", evil / "x"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (root / "out").symlink_to(evil)
    (root / "file").write_text("")
    (root / "linked" / "adapter_model.safetensors").symlink_to("/etc/passwd")
    with toy(allow_runtime_adapters=str(root)) as running:
        yield running, top


def load(server: Server, path: Any, name: str = "mine") -> httpx.Response:
    return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def test_adapters_come_and_go(adapters: tuple[Server, Path]) -> None:
    server, _ = adapters
    for path in ("good", "deep/er"):
        assert load(server, path).status_code == 200
        assert error_of(load(server, path))["code"] == "name_taken"
        assert [m.id for m in server.client().models.list()] == ["toy", "mine"]
        assert server.client().models.retrieve("mine").model_extra["parent"] == "toy"  # type: ignore[index]
        base, own = (server.chat(model=m, temperature=0, max_tokens=9).json()["choices"][0] for m in ("toy", "mine"))
        assert base["message"]["content"] != own["message"]["content"]
        drop = lambda: server.http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert drop().status_code == 200 and drop().status_code == 404
        assert error_of(server.chat(model="mine"))["code"] == "model_not_found"
    server.settled()


@pytest.mark.parametrize(
    "path",
    [
        "../loras-evil/x", "..", ".", "/etc", "{root}/good", "{root}-evil/x", "out", "out/x", "~", "~root", "file:///etc",
        "\\\\host\\share", "good\u0000", "good/../../loras-evil/x", "good//x", "good/", "good\n", "%2e%2e/x", "file",
        "linked", "absent", "...", "good/.", "C:\\x", "ｇood", "x" * 2000, "", 3, None,
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_folder(adapters: tuple[Server, Path], path: Any) -> None:
    server, top = adapters
    path = path.replace("{root}", str(top / "loras")) if isinstance(path, str) else path
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None)
    watching = True
    answer = load(server, path)
    watching = False
    assert answer.status_code in (400, 404), answer.text
    assert str(error_of(answer)["param"]) == "lora_path"
    assert not [name for name in opened if str(top) in name or "passwd" in name], opened
    assert str(top) not in answer.text


def test_bad_adapters_leave_good_ones_alone(adapters: tuple[Server, Path]) -> None:
    server, _ = adapters
    for _ in range(25):
        assert error_of(load(server, "bad"))["code"] == "invalid_adapter"
    for name in ("", "a b", "../x", "toy", "x" * 65, ".x"):
        assert load(server, "good", name).status_code in (400, 409), name
    assert load(server, "good").status_code == 200
    assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200


def test_loading_is_off_by_default(guarded: Server) -> None:
    for route, body in (("load", {"lora_name": "a", "lora_path": "good"}), ("unload", {"lora_name": "a"})):
        assert guarded.http.post(f"/v1/{route}_lora_adapter", json=body).status_code == 403


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_failures_give_nothing_away(guarded: Server) -> None:
    """An engine that breaks says neither where nor how."""
    with toy(keys=[KEY]) as running:
        running.runner.fail = f"{os.getcwd()}/secret.py has failed at 0xdeadbeef"
        answer = running.chat()
        assert answer.status_code in (500, 503) and "secret" not in answer.text
        error_of(answer)
        health = running.http.get("/health")
        assert health.status_code == 503 and health.json()["state"] == "failing"
        again = running.chat()
        assert again.status_code == 503 and error_of(again)["code"] == "engine_failed"

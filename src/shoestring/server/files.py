"""Files that clients upload, under a folder on the disk: `<id>` with its content and `<id>.json` with what it is."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response
from starlette.types import Message

from shoestring.core.errors import ShoestringError
from shoestring.core.files import atomic_file
from shoestring.server import schema
from shoestring.server.errors import ApiError, bad
from shoestring.server.keys import Client, client_of
from shoestring.server.service import Service, log
from shoestring.server.settings import Settings, names
from shoestring.server.work import ClientGone

PURPOSES = ("fine-tune", "fine-tune-results", "user_data")
_LONGEST_NAME = 256
_CLOSE = {"connection": "close"}


class Files:
    """The files below `folder`, each its owner's alone: the digest of a client, or "" for everybody's.

    Used from the event loop alone; ids are ours, so no name leads anywhere else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, tuple[str, dict[str, Any]]] = {}  # id -> owner, and what clients see
        for about in folder.glob("file-*.json"):
            try:
                read = json.loads(about.read_text(encoding="utf-8"))
                if self.path(read["id"]).is_file():
                    self._known[read["id"]] = read.pop("owner", ""), read
            except (OSError, ValueError, LookupError, TypeError) as error:
                log.warning("file %s cannot be read and is left out: %s", about.stem, error)

    def path(self, file_id: str) -> Path:
        return self.folder / file_id

    def get(self, file_id: str, client: Client, param: str | None = None) -> dict[str, Any]:
        """Raises ApiError 404 when this client has none of that id."""
        owner, about = self._known.get(file_id, (None, {}))
        if owner not in ("", client.digest):
            raise ApiError(404, "There is no such file", param=param, code="file_not_found")
        return about

    def all(self, client: Client, purpose: str | None = None) -> list[dict[str, Any]]:
        """Those of a client, newest first."""
        own = [about for owner, about in self._known.values() if owner in ("", client.digest)]
        found = [about for about in own if purpose in (None, about["purpose"])]
        return sorted(found, key=lambda about: (about["created_at"], about["id"]), reverse=True)

    def add(self, name: str, purpose: str, source: Any, owner: str) -> dict[str, Any]:
        """Keep what a binary stream holds. In any thread.

        Raises:
            ShoestringError: the disk is full.
        """
        file_id = f"file-{secrets.token_hex(12)}"
        with atomic_file(self.path(file_id)) as aside, aside.open("wb") as out:
            aside.chmod(0o600)  # it holds what people wrote
            shutil.copyfileobj(source, out)
        about = {
            "id": file_id,
            "object": "file",
            "bytes": self.path(file_id).stat().st_size,
            "created_at": int(time.time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
            "expires_at": None,
            "status_details": None,
        }
        try:
            with atomic_file(self.folder / f"{file_id}.json") as aside:
                aside.chmod(0o600)
                aside.write_text(json.dumps({**about, "owner": owner}), encoding="utf-8")
        except BaseException:
            self.path(file_id).unlink()
            raise
        self._known[file_id] = owner, about
        return about

    def delete(self, file_id: str) -> None:
        del self._known[file_id]
        for path in (self.folder / f"{file_id}.json", self.path(file_id)):
            path.unlink(missing_ok=True)


def page(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A page of a list, as OpenAI's clients turn them: those that come after the id `after`."""
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise bad("after", "Nothing here has this id")
    begin = 0 if after is None else ids.index(after) + 1
    data = items[begin : begin + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": begin + limit < len(items),
    }


def add_routes(app: FastAPI, service: Service, answer: Any) -> None:
    """`/v1/files`; `answer` makes a response of JSON."""

    def files() -> Files:
        found: Files = service.tuning.files
        return found

    @app.post("/v1/files", response_model=schema.FileAnswer, openapi_extra=_UPLOAD)
    async def upload(request: Request) -> Response:
        kept = files()
        given = await _form(request, service.settings)
        name, purpose, stream = _checked(given)
        try:
            about = await asyncio.to_thread(kept.add, name, purpose, stream.file, client_of(request).digest)
            return answer(about, schema.Upload.model_validate({field: str(value) for field, value in given.items()}))
        except (ShoestringError, OSError):
            raise ApiError(503, "The file could not be kept: the disk may be full", code="disk_full") from None
        finally:
            await stream.close()

    @app.get("/v1/files", response_model=schema.FilesAnswer)
    async def list_files(
        request: Request,
        after: str | None = None,
        limit: schema.PageLimit = 10000,
        purpose: str | None = None,
        order: str = "desc",
    ) -> Response:
        found = files().all(client_of(request), purpose)
        if order not in ("asc", "desc"):
            raise bad("order", "It is asc or desc")
        return answer(page(found[::-1] if order == "asc" else found, after, limit))

    @app.get("/v1/files/{file_id}", response_model=schema.FileAnswer)
    async def one_file(file_id: str, request: Request) -> Response:
        return answer(files().get(file_id, client_of(request)))

    @app.get("/v1/files/{file_id}/content", response_class=Response)
    async def content(file_id: str, request: Request) -> Response:
        files().get(file_id, client_of(request))
        return FileResponse(files().path(file_id), media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}", response_model=schema.FileGone)
    async def delete_file(file_id: str, request: Request) -> Response:
        files().get(file_id, client_of(request))
        service.tuning.release(file_id)
        files().delete(file_id)
        return answer({"id": file_id, "object": "file", "deleted": True})


_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


async def _form(request: Request, settings: Settings) -> Mapping[str, Any]:
    """The fields of a multipart form; its file lies on the disk when it is large.

    Raises:
        ApiError: no such form, one that is too long, or nothing of it for too long.
    """
    limit = settings.max_file_bytes
    origin = request.headers.get("origin", "")
    if origin and urlsplit(origin).netloc != request.headers["host"] and origin not in names(settings.allowed_origins):
        # A browser sends forms for any page, and with them the password it knows.
        raise ApiError(403, "Pages of other sites cannot upload; see --allowed-origins", code="origin_not_allowed")
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "The body must be a form: send Content-Type: multipart/form-data", headers=_CLOSE)
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told[:20]) > limit:
        raise _too_large(limit)
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        try:
            async with asyncio.timeout(settings.idle_seconds):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(408, "The file did not arrive in time", headers=_CLOSE) from None
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    try:
        return await Request(request.scope, receive).form(max_files=1, max_fields=8, max_part_size=65536)
    except ApiError:
        raise
    except ClientDisconnect:
        raise ClientGone from None
    except HTTPException as error:
        raise ApiError(400, f"The form cannot be read: {error.detail}", code="invalid_form", headers=_CLOSE) from None


def _checked(given: Mapping[str, Any]) -> tuple[str, str, Any]:
    stream: Any = given.get("file")
    purpose = given.get("purpose")
    if not hasattr(stream, "file"):
        raise bad("file", "The form needs a file", "missing_required_parameter")
    if purpose not in PURPOSES:
        raise bad("purpose", f"It is one of {', '.join(PURPOSES)}")
    if any(field.partition("[")[0] == "expires_after" for field in given):
        raise bad("expires_after", "A file is kept until it is deleted", "unsupported_parameter")
    name = os.path.basename(str(stream.filename or "upload").replace("\\", "/"))
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise bad("file", f"A file's name has at most {_LONGEST_NAME} printable characters")
    return name, str(purpose), stream


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The file is longer than {limit} bytes", headers=_CLOSE)

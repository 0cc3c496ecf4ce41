"""Adapters loaded and dropped by clients: off unless a folder is set aside for them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.server.errors import ApiError, bad
from shoestring.server.keys import Client
from shoestring.server.schema import LoadAdapterRequest
from shoestring.server.service import Service, log

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_PATH = re.compile(rf"{_PART}(?:/{_PART}){{0,7}}")
_MOST = 64


async def load(service: Service, given: LoadAdapterRequest) -> None:
    """Load a folder below the one that is set aside, under the name the client gives it.

    Raises:
        ApiError: 403 when this is off; 400 or 404 for a path that leads elsewhere or nowhere; 409 for a name that is
            taken; 400 for what is no adapter of this model.
    """
    engine = service.engine
    root = _root(service)
    if given.lora_name in service.names or given.lora_name in engine.engine.adapters:
        raise ApiError(409, "The name is taken", param="lora_name", code="name_taken")
    if len(engine.engine.adapters) >= _MOST:
        raise ApiError(409, f"There are {_MOST} adapters already; unload one", code="too_many_adapters")
    folder = await asyncio.to_thread(_inside, root, given.lora_path)
    try:
        await engine.run(engine.engine.add_adapter, given.lora_name, folder)
    except UsageError as error:
        log.warning("an adapter was refused: %r", str(error))
        raise bad("lora_path", "It is no adapter that fits this model", "invalid_adapter") from None
    except ShoestringError as error:
        log.warning("an adapter was refused: %r", str(error))
        raise ApiError(503, "The engine has stopped", code="engine_failed") from None
    except Exception as error:
        log.warning("an adapter was refused: %s", type(error).__name__)
        raise bad("lora_path", "It is no adapter that fits this model", "invalid_adapter") from None


async def unload(service: Service, name: str, client: Client) -> None:
    """Forget an adapter; requests that use it are finished first.

    Raises:
        ApiError: 403 when this is off; 404 when there is none of that name.
    """
    engine = service.engine
    _root(service)
    try:
        if name not in service.adapters(client):
            raise UsageError(f"There is no adapter {name}")
        await engine.run(engine.engine.drop_adapter, name)
    except UsageError:
        raise ApiError(404, "There is no such adapter", param="lora_name", code="model_not_found") from None


def _root(service: Service) -> Path:
    folder = service.settings.allow_runtime_adapters
    if not folder:
        raise ApiError(403, "Loading adapters is off. The server must be started with --allow-runtime-adapters")
    return Path(folder)


def _inside(root: Path, written: str) -> Path:
    """The folder that a path below `root` names; nothing outside is opened or even looked at."""
    if not _PATH.fullmatch(written):
        raise bad("lora_path", "It is the path of a folder below the one set aside, of letters, digits and ._-")
    root = root.resolve()
    folder = (root / written).resolve()
    if not folder.is_relative_to(root) or folder == root:
        raise bad("lora_path", "It leads out of the folder set aside")
    if not folder.is_dir():
        raise ApiError(404, "There is no such folder", param="lora_path", code="adapter_not_found")
    for file in folder.iterdir():
        if not file.resolve().is_relative_to(root) or not (file.is_file() or file.is_dir()):
            raise bad("lora_path", "A file in it leads out of the folder set aside")
    return folder

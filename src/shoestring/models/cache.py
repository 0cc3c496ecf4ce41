"""The cache folder: where a converted model is kept, made once for each content of its source."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import atomic_folder, locked, write_text

MANIFEST = ".source.json"
_CONVERTER = 2  # raise it when a conversion's result changes, so that older ones are made again


def cache_dir() -> Path:
    """`$SHOESTRING_CACHE`, else `$XDG_CACHE_HOME/shoestring`, else `~/.cache/shoestring`."""
    if os.environ.get("SHOESTRING_CACHE"):
        return Path(os.environ["SHOESTRING_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "shoestring"
    try:
        return Path.home() / ".cache" / "shoestring"
    except RuntimeError:
        raise UsageError("There is no home folder to keep converted models in", remedy="Set SHOESTRING_CACHE") from None


def origin(folder: Path) -> str:
    """Name of the file that a converted folder was made from; empty for any other folder."""
    file = folder / MANIFEST
    return str(json.loads(file.read_text(encoding="utf-8"))["source"]) if file.is_file() else ""


def convert_once(source: Path, make: Callable[[Path], None]) -> Path:
    """The folder that `make(folder)` fills from the file `source`; made only if no folder for this content exists.

    The folder is named after the source's SHA-256, so a changed source is converted again and the same file at another
    place is not. The hash itself is remembered by path, size and time of change. Of several processes, one converts.

    Raises:
        ShoestringError: the cache cannot be written, or the disk is full; nothing is left behind.
    """
    models = _models()
    digest = _known_digest(source, models)
    folder = models / f"{re.sub(r'[^A-Za-z0-9._-]', '_', source.stem)[:60]}-{digest[:12]}-{_CONVERTER}"
    _fill(folder, {"source": source.name, "bytes": source.stat().st_size, "sha256": digest}, make)
    return folder


def make_once(name: str, recipe: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder that `make(folder)` fills as `recipe` says, plain data; made only if there is none for this recipe.

    Raises:
        ShoestringError: as `convert_once`.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    folder = _models() / f"{name}-{digest[:12]}"
    _fill(folder, {"source": name, "recipe": dict(recipe), "sha256": digest}, make)
    return folder


def _models() -> Path:
    models = cache_dir() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShoestringError(
            f"The cache folder {models} cannot be made",
            error.strerror or "",
            "Set SHOESTRING_CACHE to a folder you may write to",
        ) from error
    return models


def _fill(folder: Path, manifest: Mapping[str, Any], make: Callable[[Path], None]) -> None:
    digest = str(manifest["sha256"])
    if _whole(folder, digest):
        return
    with locked(folder.parent / f".{folder.name}.lock"):
        if not _whole(folder, digest):
            with atomic_folder(folder, overwrite=True) as temp:
                make(temp)
                (temp / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _whole(folder: Path, digest: str) -> bool:
    return bool(_read_json(folder / MANIFEST).get("sha256") == digest)


def _known_digest(source: Path, models: Path) -> str:
    stat = source.stat()
    # The time of change cannot be set back as the time of modification can (cp -p, rsync -t).
    mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    index = models / ".digests.json"
    entry = _read_json(index).get(str(source.resolve()))
    if isinstance(entry, dict) and entry.get("mark") == mark and isinstance(entry.get("sha256"), str):
        return str(entry["sha256"])
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(ShoestringError), locked(models / ".digests.lock"):  # a full cache that is read-only serves as well
        known = {path: entry for path, entry in _read_json(index).items() if os.path.exists(path)}
        known[str(source.resolve())] = {"mark": mark, "sha256": digest}
        write_text(index, json.dumps(known))
    return digest


def _read_json(path: Path) -> dict:
    """The object in a JSON file; empty when it is absent or damaged, since everything in a cache can be made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

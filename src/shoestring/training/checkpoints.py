"""Checkpoints that are whole or absent, hold only tensors and JSON, and are checked before they are trusted.

A checkpoint is a folder `checkpoint-<step>`: `weights.safetensors` (trained parameters by name), `state.safetensors`
and `state.json` (optimizer, scheduler, random numbers), `trainer_state.json` (transformers' own record) and
`MANIFEST.json`, written last, with the size and SHA-256 of every file and what the run was started from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import atomic_folder

MANIFEST = "MANIFEST.json"
PREFIX = "checkpoint-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint.

    Attributes:
        fingerprint: what the run was started from, as given to `write`.
        progress: plain figures needed to go on: planned steps, seconds, tokens.
    """

    path: Path
    step: int
    fingerprint: dict[str, Any]
    progress: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.path / "weights.safetensors")

    def state(self) -> Any:
        tensors = load_file(self.path / "state.safetensors")
        return unpack(json.loads((self.path / "state.json").read_text()), tensors)


def write(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: Any,
    fingerprint: Mapping[str, Any],
    progress: Mapping[str, Any],
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write `folder/checkpoint-<step>` aside, flush it to disk and rename it; `also` adds files of its own.

    Raises:
        ShoestringError: the disk is full or the folder cannot be written; earlier checkpoints stay as they were.
    """
    path = Path(folder) / f"{PREFIX}{step}"
    with atomic_folder(path, overwrite=True) as aside:
        save_file({name: _alone(tensor) for name, tensor in weights.items()}, aside / "weights.safetensors")
        tensors: dict[str, Tensor] = {}
        tree = pack(state, tensors)
        save_file(tensors, aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps(tree))
        if also is not None:
            also(aside)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(aside.iterdir())
            if file.is_file()
        }
        manifest = {"step": step, "fingerprint": dict(fingerprint), "progress": dict(progress), "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Folders that look like checkpoints, newest step first; not verified."""
    found = [p for p in Path(folder).glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)


def newest_complete(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` whose files all match its manifest, or None when there is no checkpoint.

    Torn checkpoints are skipped with a warning that names the file.

    Raises:
        ShoestringError: checkpoints exist, but none is complete.
    """
    faults = []
    for path in checkpoints(folder):
        try:
            return read(path)
        except ShoestringError as error:
            logger.warning("Skipping %s: %s", path.name, error)
            faults.append(f"{path.name}: {error.what}")
    if faults:
        raise ShoestringError(
            f"No complete checkpoint is left in {folder}", "; ".join(faults), "Start again without resuming"
        )
    return None


def read(path: Path) -> Checkpoint:
    """Verify the checkpoint at `path` against its manifest.

    Raises:
        ShoestringError: a file is missing, cut or changed; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, step = dict(manifest["files"]), int(manifest["step"])
        fingerprint, progress = dict(manifest["fingerprint"]), dict(manifest["progress"])
    except FileNotFoundError:
        raise ShoestringError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ShoestringError(f"{MANIFEST} cannot be read", str(error)) from None
    if step != int(path.name.removeprefix(PREFIX)):
        raise ShoestringError(f"{MANIFEST} is of step {step}")
    for required in ("weights.safetensors", "state.safetensors", "state.json", "trainer_state.json"):
        if required not in files:
            raise ShoestringError(f"{MANIFEST} does not list {required}")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise ShoestringError(f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise ShoestringError(f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}")
        if sha256(file) != expected["sha256"]:
            raise ShoestringError(f"{name} differs from its checksum")
    return Checkpoint(path, step, fingerprint, progress)


def prune(folder: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; None or 0 keeps all."""
    for path in checkpoints(folder)[keep or 2**31 :]:
        shutil.rmtree(path, ignore_errors=True)


def refuse_changes(stored: Mapping[str, Any], now: Mapping[str, Any], harmless: tuple[str, ...], force: bool) -> None:
    """Raise unless a run may go on from a checkpoint: both fingerprints must be equal.

    Args:
        harmless: prefixes of fields that `force` may override, because they leave the work itself as it was.

    Raises:
        UsageError: names every field that changed, with both values.
    """
    changed = [name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)]
    serious = [name for name in changed if not name.startswith(harmless)]
    if not changed or (force and not serious):
        return
    fields = "; ".join(f"{name} was {stored.get(name)!r}, now {now.get(name)!r}" for name in changed)
    remedy = "Give the same values, or choose another folder"
    if not serious:
        remedy += '; resume="force" accepts these'
    raise UsageError("This run cannot be resumed", fields, remedy)


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree of dicts, lists, tuples, plain values, tensors and arrays; tensors go into `tensors`."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = _alone(value)
        return {"tensor": key}
    if isinstance(value, np.ndarray):
        return {"array": pack(torch.from_numpy(value.astype(np.int64)), tensors), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {"pairs": [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [pack(v, tensors) for v in value]}
    if isinstance(value, (list, set, frozenset)):
        return [pack(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ShoestringError(f"A {type(value).__name__} cannot be kept in a checkpoint", "only tensors and JSON can")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return unpack(value["array"], tensors).numpy().astype(value["dtype"])
    if "tuple" in value:
        return tuple(unpack(v, tensors) for v in value["tuple"])
    return {unpack(k, tensors): unpack(v, tensors) for k, v in value["pairs"]}


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _alone(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share storage.
    return tensor.detach().cpu().clone().contiguous()

"""What a folder must look like before its model is loaded: whole, safetensors only, nothing that points outside."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring.core.errors import UsageError
from shoestring.models.guard import Tensor, check_safetensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_JSON_LIMIT = 50_000_000
_TOKENIZER_LIMIT = 200_000_000
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")


@dataclass(frozen=True)
class Folder:
    """A checked model folder: its configuration, and its stored tensors from the headers alone."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def total(self) -> int:
        """Bytes of every file in it that does not begin with a dot."""
        return sum(e.stat().st_size for e in self.path.rglob("*") if e.is_file() and not e.name.startswith("."))


def check_folder(path: Path, *, trust_remote_code: bool = False) -> Folder:
    """Read the headers of the model folder at `path`, executing and loading nothing.

    Raises:
        UsageError: names the file, the reason and the remedy. No or bad config.json; pickle weights only; a corrupt or
            missing weight file; an index or a link that points out of the folder; code of the folder's own without
            `trust_remote_code`.
    """
    _check_entries(path)
    if not (path / "config.json").is_file():
        inside = path / "model"  # of a run that made a model
        remedy = (
            f"Give {inside}" if (inside / "config.json").is_file() else "Give the folder that save_pretrained wrote"
        )
        raise UsageError(f"{path} is not a model folder", "it has no config.json", remedy)
    config = read_json(path / "config.json")
    refuse_code(path, trust_remote_code)
    return Folder(path, config, _check_weights(path))


def check_adapter(path: Path) -> dict[str, Any]:
    """The checked adapter_config.json of the PEFT adapter folder at `path`; its weights' headers are checked too.

    Raises:
        UsageError: pickle weights, corrupt weights, or a configuration that could run code or stall.
    """
    _check_entries(path)
    if not (path / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{path} is no adapter", f"it holds no {ADAPTER_CONFIG}", "Give the folder of a PEFT adapter")
    config = read_json(path / ADAPTER_CONFIG)
    if not (path / ADAPTER_WEIGHTS).is_file():
        _refuse_pickles(path, ADAPTER_WEIGHTS)
    if not check_safetensors(path / ADAPTER_WEIGHTS):
        raise UsageError(f"{path / ADAPTER_WEIGHTS} holds no tensors", remedy="Save the adapter again")
    if config.get("auto_mapping"):
        module = str((config["auto_mapping"] or {}).get("parent_library", ""))
        if module.split(".")[0] not in ("transformers", "peft", "shoestring"):
            raise UsageError(
                f"{path / ADAPTER_CONFIG} wants to import {module!r}",
                "an adapter may only name classes of transformers, peft or shoestring",
                "Remove auto_mapping from it if you trust the rest",
            )
    rank = config.get("r")
    if rank is not None and not (isinstance(rank, int) and 0 <= rank <= 65_536):
        raise UsageError(f"{path / ADAPTER_CONFIG} has the impossible rank r={rank}", remedy="Get an intact adapter")
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        pattern = config.get(field)
        if isinstance(pattern, str) and (len(pattern) > 1000 or re.search(r"[*+}]\)+[*+{]", pattern)):
            raise UsageError(
                f"{path / ADAPTER_CONFIG} has a pattern in {field} that could take forever to match",
                f"{pattern[:60]!r} repeats a repetition",
                "List the modules' names instead",
            )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError naming the file when it is too large, no JSON or no object."""
    if path.stat().st_size > _JSON_LIMIT:
        raise UsageError(f"{path} is larger than {_JSON_LIMIT} bytes", remedy="Get an intact copy of the model")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not sound JSON", str(error), "Get an intact copy of the model") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a JSON object", remedy="Get an intact copy of the model")
    return found


def end_tokens(path: Path) -> tuple[int, ...]:
    """Ids that end an answer, as generation_config.json says, or config.json where that is silent."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(path / name).get("eos_token_id") if (path / name).is_file() else None
        if found is not None:
            return tuple(number for number in (found if isinstance(found, list) else [found]) if type(number) is int)
    return ()


def refuse_code(path: Path, trust_remote_code: bool) -> None:
    """Raises UsageError when the folder brings Python code of its own and `trust_remote_code` is false."""
    if trust_remote_code:
        return
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (path / name).is_file() and read_json(path / name).get("auto_map"):
            raise UsageError(
                f"{path / name} names Python code to run (auto_map)",
                "code from a model folder runs with all your rights",
                "Read it, then allow it with trust_remote_code (--trust-remote-code); "
                "or remove auto_map when transformers has the architecture itself",
            )


def _check_entries(path: Path) -> None:
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder", remedy="Give a model folder, a .gguf file or a hub id")
    root = path.resolve()
    # A hub download keeps its files in blobs/ and links to them from snapshots/<revision>/.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for entry in path.iterdir():
        if entry.is_symlink():
            target = entry.resolve()
            if not target.is_relative_to(root) and not (blobs and target.is_relative_to(blobs)):
                raise UsageError(
                    f"{entry} is a link that leaves the model folder",
                    f"it points to {target}",
                    "Replace it by the file itself",
                )
        mode = entry.stat().st_mode if entry.exists() else 0
        if mode and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UsageError(f"{entry} is neither a file nor a folder", remedy="Remove it from the model folder")
        if entry.name.startswith("tokenizer") and mode and entry.stat().st_size > _TOKENIZER_LIMIT:
            raise UsageError(
                f"{entry} is larger than {_TOKENIZER_LIMIT} bytes", remedy="Get an intact copy of the model"
            )


def _check_weights(path: Path) -> dict[str, Tensor]:
    if (path / WEIGHTS).is_file():
        return check_safetensors(path / WEIGHTS)
    if not (path / INDEX).is_file():
        _refuse_pickles(path, WEIGHTS)
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{path / INDEX} has no weight_map", remedy="Get an intact copy of the model")
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not isinstance(shard, str) or not _FILE_NAME.fullmatch(shard):
            raise UsageError(
                f"{path / INDEX} names the weight file {str(shard)[:80]!r}",
                "a weight file must be a .safetensors file in the same folder",
                "Do not use this model unless you know why it reaches outside its folder",
            )
        if not (path / shard).is_file():
            raise UsageError(
                f"{path / shard} is missing", f"{INDEX} names it", "Download the model again, with every file"
            )
        tensors |= check_safetensors(path / shard)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise UsageError(
            f"{path / INDEX} promises {len(absent)} tensors that no file holds, the first is {absent[0][:80]!r}",
            remedy="Download the model again, with every file",
        )
    return tensors


def _refuse_pickles(path: Path, wanted: str) -> None:
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in _PICKLES)
    if pickles:
        raise UsageError(
            f"{path} has only pickle weights ({', '.join(pickles[:3])})",
            "unpickling runs whatever code its author put there",
            f"Get {wanted} instead; its author can make it with save_pretrained",
        )
    raise UsageError(f"{path} holds no weights", f"there is no {wanted}", "Download the model again, with every file")

"""What a bug report needs to know: versions, machine, kernels, folders, and the settings in the environment."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

from shoestring.core import probes, text

# Variables that change what happens here, by the beginning of their names.
_PREFIXES = (
    "SHOESTRING_", "HF_", "TRANSFORMERS_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "CUDA_VISIBLE_DEVICES",
    "TOKENIZERS_PARALLELISM", "XDG_CACHE_HOME", "TMPDIR", "NO_COLOR", "CI", "PYTHONPATH", "LD_PRELOAD",
)  # fmt: skip
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_NOT_SECRET = ("HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")  # a name and password inside an address


def environment() -> dict[str, Any]:
    """Versions, machine, kernels, cache folder and settings as plain data; secrets are masked."""
    from shoestring.kernels import ops
    from shoestring.models.cache import cache_dir

    cache = cache_dir()
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        **{name: dict(part) for name, part in probes.fingerprint().items()},
        "kernels": ops.backend(),
        "cache": {"folder": str(cache), "exists": cache.exists(), "free": shutil.disk_usage(nearest).free},
        "variables": variables(os.environ),
    }


def variables(env: Mapping[str, str]) -> dict[str, str]:
    """The settings among `env`, sorted; a secret shows only that it is set."""
    found = {}
    for name in sorted(env):
        if name.startswith(_PREFIXES):
            secret = _SECRET.search(name) and name not in _NOT_SECRET
            found[name] = "(set)" if secret else _LOGIN.sub("***@", env[name])
    return found


def to_text(found: Mapping[str, Any]) -> str:
    """What `environment` returned, as lines to paste."""
    machine, cache = found["machine"], found["cache"]
    limit = f", limited to {text.show(machine['memory_limit'], 'B')}" if machine["memory_limit"] else ""
    lines = [f"{name:<12}  {version}" for name, version in found["software"].items() if version]
    lines += [
        f"processor     {machine['processor']} ({machine['architecture']}), {machine['cores']} cores",
        f"isa           {' '.join(machine['isa'])}",
        f"memory        {text.show(machine['ram'], 'B')}{limit}",
        "kernels       " + ", ".join(f"{name} {_flat(value)}" for name, value in found["kernels"].items() if value),
        f"cache         {cache['folder']}, {text.show(cache['free'], 'B')} free",
    ]
    return "\n".join(lines + [f"{name}={value}" for name, value in found["variables"].items()])


def _flat(value: Any) -> str:
    return " ".join(value) if isinstance(value, list | tuple) else str(value)

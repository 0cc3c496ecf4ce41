"""Folders that plain transformers would misread name, in their config.json, the import lines that make it read them.

transformers skips what it does not know and goes on with random weights. Naming a file that cannot exist as the weights
makes it stop instead, with the remedy in its message. Whoever knows the folder takes that name away while reading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from shoestring.core.errors import UsageError
from shoestring.core.files import write_text

_WEIGHTS, _NEEDS = "transformers_weights", "shoestring_needs"
_OURS = re.compile(r"shoestring\.(methods\.[a-z]+|models\.[a-z]+)")


def seal_of(module: str) -> str:
    """The name of the weight file that cannot exist, for folders that need `import module`."""
    return f"needs-the-line__import-{module}__before-from_pretrained.safetensors"


def seal(folder: Path, module: str) -> None:
    """Make a saved folder refuse readers that have not imported `module`, with the remedy in their error."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[_WEIGHTS] = seal_of(module)
    config[_NEEDS] = sorted({*needs(config), module})
    write_text(path, json.dumps(config, indent=2) + "\n")


def unseal(config: Any, module: str) -> None:
    """Take the seal of `module` off a configuration that was read from a sealed folder."""
    if getattr(config, _WEIGHTS, None) == seal_of(module):
        delattr(config, _WEIGHTS)


def needs(config: Mapping[str, Any]) -> list[str]:
    """The modules to import before a folder with this config.json can be read; only ever our own."""
    found = config.get(_NEEDS)
    return (
        [name for name in found if isinstance(name, str) and _OURS.fullmatch(name)] if isinstance(found, list) else []
    )


def fulfil(config: Mapping[str, Any]) -> None:
    """Import what a folder with this config.json needs.

    Raises:
        UsageError: this version has no such module.
    """
    for name in needs(config):
        try:
            import_module(name)
        except ModuleNotFoundError:
            raise UsageError(
                f"The model needs `import {name}`, which does not exist here", remedy="Update shoestring"
            ) from None

"""Open the rooms that a folder needs before it can be loaded, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.core import catalog
from shoestring.models.folder import ADAPTER_CONFIG, read_json
from shoestring.models.seal import fulfil, needs

if TYPE_CHECKING:
    from shoestring.models import Loaded


def open_doors(folder: Path) -> None:
    """Register the methods that wrote the model or adapter in `folder`, so that transformers and peft can read it.

    A folder that needs none costs nothing but reading its configuration. What stays unknown after all is left for the
    loader to refuse.
    """
    if (folder / "config.json").is_file():
        fulfil(read_json(folder / "config.json"))
    elif (folder / ADAPTER_CONFIG).is_file():
        from shoestring.models import resolve

        adapter = read_json(folder / ADAPTER_CONFIG)
        if not _peft_knows(adapter.get("peft_type")):
            catalog.adopt_room("adapters")
        if adapter.get("base_model_name_or_path"):
            open_doors(resolve(adapter["base_model_name_or_path"]))


def open_model(ref: str | Path, **options: Any) -> Loaded:
    """`models.load` behind open doors; same arguments and errors."""
    from shoestring.models import load, resolve

    open_doors(resolve(ref, offline=options.get("offline")))
    return load(ref, **options)


def import_lines(folder: Path) -> str:
    """What to write before plain transformers can read a model folder; empty where it can."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return "".join(f"import {name}\n" for name in needs(config))


def _peft_knows(kind: Any) -> bool:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return kind in PEFT_TYPE_TO_CONFIG_MAPPING

"""Models of transformers: loading, looking inside, changing, saving.

What needs torch is imported when it is used: the engine reads weight files without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shoestring.models.load import Loaded, load, resolve

if TYPE_CHECKING:
    from shoestring.models.anatomy import Anatomy, Block, inspect
    from shoestring.models.saving import save
    from shoestring.models.shape import shape_of

_HOME = {"Anatomy": "anatomy", "Block": "anatomy", "inspect": "anatomy", "save": "saving", "shape_of": "shape"}

__all__ = ["Anatomy", "Block", "Loaded", "inspect", "load", "resolve", "save", "shape_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

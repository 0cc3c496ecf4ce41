"""Find the native library and give its functions their types from the header that lies beside it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shoestring.core.errors import UsageError, nearest

VERSION = 12  # of native/kernels.h
LIBRARY, HEADER = "_kernels.so", "kernels.h"
REFERENCE = "reference"
LEVELS = ("base", "avx2", "avx512vnni", "avx512bf16", "neondot", REFERENCE)

_VALUES = {
    "void": None,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "const char*": ctypes.c_char_p,
}
_DECLARATION = re.compile(r"^SK_API ([\w ]+\*?) (\w+)\((.*?)\);", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Loaded:
    """The library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


def load() -> Loaded:
    """The native library of this installation, or of the folder that SHOESTRING_KERNELS names.

    Raises:
        UsageError: SHOESTRING_ISA names no level.
    """
    level = os.environ.get("SHOESTRING_ISA", "")
    if level and level not in LEVELS:
        raise UsageError(f"SHOESTRING_ISA={level} names no instruction set", remedy=nearest(level, LEVELS))
    if level == REFERENCE:
        return Loaded(None, "SHOESTRING_ISA=reference asks for plain torch")
    folders: list[Path] = []
    reason = ""
    for folder in _folders():
        folders.append(folder)
        if (folder / LIBRARY).is_file() and (folder / HEADER).is_file():
            try:
                library = _typed(ctypes.CDLL(str(folder / LIBRARY)), (folder / HEADER).read_text())
                fits = library.sk_version() == VERSION
            except (OSError, AttributeError) as error:
                return Loaded(None, f"{folder / LIBRARY} does not load: {error}; install shoestring again to build it")
            if fits:
                return Loaded(library)
            # An editable install may have one of each: the one that was built beside the sources is the newer.
            reason = reason or f"{folder / LIBRARY} belongs to another version: install shoestring again to build it"
    if reason:
        return Loaded(None, reason)
    places = ", ".join(dict.fromkeys(map(str, folders)))
    return Loaded(
        None, f"no {LIBRARY} in {places}: installing shoestring (pip install) builds it when it finds a C++ compiler"
    )


def _folders() -> Iterator[Path]:
    import shoestring.kernels as package

    if chosen := os.environ.get("SHOESTRING_KERNELS"):  # a library under construction; nothing else will do then
        yield Path(chosen)
        return
    # An editable install keeps sources and library apart; the package's path may name one or both.
    yield from map(Path, package.__path__)
    import importlib.metadata  # slow, and only needed when the library lies elsewhere

    try:
        yield Path(str(importlib.metadata.distribution("shoestring").locate_file("shoestring/kernels")))
    except importlib.metadata.PackageNotFoundError:
        return


def _typed(library: ctypes.CDLL, header: str) -> ctypes.CDLL:
    for result, name, arguments in _DECLARATION.findall(header):
        function = getattr(library, name)
        function.restype = _ctype(result)
        function.argtypes = [_ctype(a.strip().rsplit(" ", 1)[0]) for a in arguments.split(",") if a.strip() != "void"]
    return library


def _ctype(declaration: str) -> type | None:
    if declaration in _VALUES:
        return _VALUES[declaration]
    if declaration.endswith("*"):
        return ctypes.c_void_p
    raise ValueError(f"{HEADER} uses the type {declaration}, which the loader does not know")

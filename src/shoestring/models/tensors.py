"""Stored tensors as they lie in a file: memory-mapped bytes, read without torch and without a copy."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.models.folder import check_folder
from shoestring.models.guard import Tensor, check_gguf, check_safetensors

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor: its type as the file names it, dimensions with the rows first, and its bytes, uint8, read only."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    data: np.ndarray


class Tensors(Mapping[str, Stored]):
    """The tensors of one model by name. What is read of the files counts as memory only while it is in use."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._maps = {file: _map(file) for file in dict.fromkeys(tensor.file for tensor in tensors.values())}
        for tensor in tensors.values():
            if tensor.offset + tensor.size > len(self._maps[tensor.file]):
                raise UsageError(f"{tensor.file} became shorter while it was read", remedy="Fetch it again")

    def __getitem__(self, name: str) -> Stored:
        tensor = self._tensors[name]
        whole = np.frombuffer(self._maps[tensor.file], np.uint8)
        return Stored(name, tensor.dtype, tensor.dims, whole[tensor.offset : tensor.offset + tensor.size])

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def dims(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].dims

    def ahead(self, names: Iterable[str]) -> None:
        """Have the system read tensors from the disk, in this order, while other work is done."""
        wanted = [self._tensors[name] for name in names]
        if wanted and hasattr(os, "posix_fadvise"):
            # Asking takes as long as finding memory for what is read, so another thread asks.
            threading.Thread(target=_ask_for, args=(wanted,), daemon=True).start()

    def release(self, name: str) -> None:
        """Give the pages of a tensor back to the system; its bytes stay readable, from the file."""
        tensor, page = self._tensors[name], mmap.PAGESIZE
        begin, end = -(-tensor.offset // page) * page, (tensor.offset + tensor.size) // page * page
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[tensor.file].madvise(mmap.MADV_DONTNEED, begin, end - begin)


@dataclass(frozen=True, eq=False)
class Source:
    """A model as it is stored: a safetensors folder with its config.json, or a GGUF file with its metadata."""

    path: Path
    gguf: bool
    values: Mapping[str, Any]
    tensors: Tensors


def open_source(path: Path, *, trust_remote_code: bool = False) -> Source:
    """The model folder (shards too) or GGUF file at `path`.

    Raises:
        UsageError: as `check_folder` and `check_gguf`.
    """
    if path.is_file():
        found = check_gguf(path)
        return Source(path, True, found.values, Tensors(found.tensors))
    folder = check_folder(path, trust_remote_code=trust_remote_code)
    return Source(path, False, folder.config, Tensors(folder.tensors))


def open_safetensors(path: Path) -> Tensors:
    """The tensors of one safetensors file. Raises UsageError as `check_safetensors`."""
    return Tensors(check_safetensors(path))


def floats(stored: Stored) -> np.ndarray:
    """A float tensor as float32 of its own dimensions; a view of the file where it is stored so and lies even.

    Raises:
        UsageError: it holds no plain floats.
    """
    if stored.dtype == "F32":
        return aligned(stored.data, 4).view(np.float32).reshape(stored.dims)
    if stored.dtype == "F16":
        return aligned(stored.data, 2).view(np.float16).astype(np.float32).reshape(stored.dims)
    if stored.dtype == "BF16":
        return (aligned(stored.data, 2).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(stored.dims)
    raise UsageError(
        f"The tensor {stored.name} is stored as {stored.dtype}", f"plain floats ({', '.join(_FLOATS)}) are needed there"
    )


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 of any shape rounded to bfloat16, to nearest and half to even; uint16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # Rounding must not carry a NaN's last bits into infinity.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def aligned(data: np.ndarray, width: int) -> np.ndarray:
    """The bytes themselves when they begin at a multiple of `width`, else a copy: files promise no alignment."""
    return data if data.ctypes.data % width == 0 else data.copy()


def _ask_for(tensors: Iterable[Tensor]) -> None:
    with contextlib.ExitStack() as files, contextlib.suppress(OSError):  # a file that is gone is no loss here
        opened: dict[Path, int] = {}
        for tensor in tensors:
            if tensor.file not in opened:
                opened[tensor.file] = files.enter_context(tensor.file.open("rb")).fileno()
            os.posix_fadvise(opened[tensor.file], tensor.offset, tensor.size, os.POSIX_FADV_WILLNEED)


def _map(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read", str(error)) from error

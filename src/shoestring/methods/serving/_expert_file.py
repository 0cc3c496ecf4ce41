"""The experts of a model in one safetensors file, each expert in one piece, and reads of any of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.core.errors import UsageError
from shoestring.core.files import atomic_file
from shoestring.kernels import formats
from shoestring.kernels.formats._format import DTYPES
from shoestring.methods.serving._expert_slots import Key
from shoestring.models.anatomy import Mixture

_KIND = "shoestring-experts"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BACK = {name: dtype for dtype, name in _NAMES.items()} | DTYPES
ALIGN = 64  # bytes; matrix products may depend on where a matrix begins
EXACT = ""  # the width that is the weights themselves


@dataclass(frozen=True)
class Piece:
    """One tensor of an expert: where it begins within the expert's bytes, and what it is."""

    name: str
    at: int
    dtype: torch.dtype
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims) * self.dtype.itemsize


@dataclass(frozen=True)
class Record:
    """The bytes of one expert in one width, end to end: `at` within the file, `size` of them."""

    at: int
    size: int
    pieces: tuple[Piece, ...]


def fingerprint(routers: Sequence[nn.Module]) -> str:
    """What tells models of one build apart: a hash of their routers' weights."""
    digest = hashlib.sha256()
    for router in routers:
        for name, tensor in sorted(router.state_dict().items()):
            digest.update(name.encode() + str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ExpertFile:
    """A file that `write` made, open for reading.

    Attributes:
        widths: what it has of each expert: `EXACT`, and formats of fewer bits.
        source: what `write` was told of where they come from.

    Raises:
        UsageError: it is no such file, or one of another model.
    """

    def __init__(self, path: Path, model: str = "") -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size)) if size < 1 << 28 else {}
        except (OSError, ValueError, struct.error) as error:
            raise _no_file(path, str(error)) from None
        said = header.pop("__metadata__", {})
        if said.get("kind") != _KIND:
            raise _no_file(path, "it holds something else")
        if model and said["model"] != model:
            raise UsageError(
                f"{path} has the experts of another model",
                "their routers differ",
                "Give the file of this model, or let it be written anew",
            )
        self.source = str(said.get("source", ""))
        end = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != end:
            raise _no_file(path, f"it has {path.stat().st_size} bytes instead of {end}")
        parts: dict[tuple[Key, str], list[tuple[int, int, Piece]]] = {}
        for name, entry in header.items():
            layer, expert, tensor, width = _split(name)
            first, last = entry["data_offsets"]
            piece = Piece(tensor, 0, _BACK[entry["dtype"]], tuple(entry["shape"]))
            parts.setdefault(((layer, expert), width), []).append((first, last, piece))
        self.records: dict[tuple[Key, str], Record] = {}
        for key, found in parts.items():
            found.sort(key=lambda entry: entry[0])
            begin = found[0][0]
            pieces = tuple(Piece(p.name, first - begin, p.dtype, p.dims) for first, _, p in found)
            self.records[key] = Record(8 + size + begin, found[-1][1] - begin, pieces)
        self.widths = sorted({width for _, width in self.records})
        self._file = os.open(path, os.O_RDONLY)

    def read(self, wanted: Sequence[tuple[Key, str]], targets: Sequence[Tensor], *, keep_cached: bool = True) -> int:
        """Read experts that lie one behind another with one call; returns how many bytes came.

        Args:
            wanted: expert and width, in the order of the file.
            targets: of each, uint8 buffers that its bytes fill.
            keep_cached: leave them to the system to keep in memory, too, as long as nobody needs it.
        """
        records = [self.records[key] for key in wanted]
        views = [memoryview(target[: record.size].numpy().data) for record, target in zip(records, targets)]
        at, total = records[0].at, sum(record.size for record in records)
        done = 0
        while done < total:
            count = os.preadv(self._file, views, at + done)
            if count == 0:
                raise UsageError(f"{self.path} ends too early", remedy="Delete it, so that it is written anew")
            done += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
        if not keep_cached:
            os.posix_fadvise(self._file, at, total, os.POSIX_FADV_DONTNEED)
        return total

    def read_part(
        self, wanted: tuple[Key, str], target: Tensor, first: int, last: int, keep_cached: bool = True
    ) -> int:
        """Read bytes `first` to `last` of an expert into the same places of a uint8 buffer; returns how many came."""
        record = self.records[wanted]
        view, done = memoryview(target[first:last].numpy().data), 0
        while done < last - first:
            count = os.preadv(self._file, [view[done:]], record.at + first + done)
            if count == 0:
                raise UsageError(f"{self.path} ends too early", remedy="Delete it, so that it is written anew")
            done += count
        if not keep_cached:
            os.posix_fadvise(self._file, record.at + first, last - first, os.POSIX_FADV_DONTNEED)
        return done

    def holds(self, key: Key, own: Mapping[str, Tensor]) -> bool:
        """Whether an expert's bytes are those of these parameters."""
        record = self.records[key, EXACT]
        raw = torch.empty(record.size, dtype=torch.uint8)
        self.read([(key, EXACT)], [raw])
        return all(
            torch.equal(raw[piece.at : piece.at + piece.size], own[piece.name].contiguous().view(-1).view(torch.uint8))
            for piece in record.pieces
        )

    def follows(self, first: tuple[Key, str], second: tuple[Key, str]) -> bool:
        """Whether the bytes of the second begin where those of the first end."""
        return self.records[first].at + self.records[first].size == self.records[second].at

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def unpack(record: Record, width: str, raw: Tensor, exact: Record, target: Tensor) -> None:
    """Write what packed bytes `raw` stand for where the expert's own bytes would be: `target`, uint8."""
    packed: dict[str, dict[str, Tensor]] = {}
    for piece in record.pieces:
        name, _, part = piece.name.partition(":")
        packed.setdefault(name, {})[part] = raw[piece.at : piece.at + piece.size].view(piece.dtype).view(piece.dims)
    for piece in exact.pieces:
        own = target[piece.at : piece.at + piece.size].view(piece.dtype).view(piece.dims)
        parts = packed[piece.name]
        own.copy_(parts[""] if "" in parts else formats.parse(width).unpack(parts, piece.dims[-1]))


def write(
    path: Path,
    mixtures: Sequence[Mixture],
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    dtype: torch.dtype,
    layer: Callable[[int], Mapping[str, Tensor]],
    model: str,
    widths: Sequence[str] = (),
    source: str = "",
) -> None:
    """Write the experts of a model, one layer after another; no more than one layer is asked for at a time.

    The file is there when it is whole.

    Args:
        shapes: of each layer, parameter -> dimensions of one expert's slice.
        layer: of a layer's number, parameter -> tensor (experts, ...).
        model: its `fingerprint`.
        widths: formats of fewer bits to write beside, such as `int4/32`; matrices that do not fit one stay as they are.
        source: a mark of what the experts are read from, by which their file is known to be that of other ones.
    """
    header: dict[str, Any] = {"__metadata__": {"kind": _KIND, "model": model, "source": source}}
    at = 0
    for width in (EXACT, *widths):
        for number, mixture in enumerate(mixtures):
            for expert in range(mixture.count):
                for name, (kind, dims, size) in _layout(shapes[number], dtype, width).items():
                    header[f"{number}.{expert}.{name}@{width}"] = {
                        "dtype": kind, "shape": list(dims), "data_offsets": [at, at + size],
                    }  # fmt: skip
                    at += size
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    starts = dict[str, int]()
    with atomic_file(path) as whole, whole.open("wb") as file:
        file.write(struct.pack("<Q", len(said)) + said)
        base = file.tell()
        for name, entry in header.items():
            if name != "__metadata__":
                starts[name] = base + entry["data_offsets"][0]
        file.truncate(base + at)
        for number, mixture in enumerate(mixtures):
            tensors = layer(number)
            for width in (EXACT, *widths):
                for expert in range(mixture.count):
                    for name, tensor in _packed(tensors, expert, shapes[number], width):
                        file.seek(starts[f"{number}.{expert}.{name}@{width}"])
                        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            del tensors


def _layout(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, width: str) -> dict[str, tuple[str, Any, int]]:
    """Name -> type, dimensions and bytes of the tensors of one expert."""
    found: dict[str, tuple[str, Any, int]] = {}
    for name, dims in shapes.items():
        if width and fits(dims, width):
            for part, (kind, packed) in formats.parse(width).layout.tensors(*dims).items():
                found[f"{name}:{part}"] = kind, packed, math.prod(packed) * DTYPES[kind].itemsize
        else:
            found[f"{name}:" if width else name] = _NAMES[dtype], dims, math.prod(dims) * dtype.itemsize
    return found


def _packed(
    tensors: Mapping[str, Tensor], expert: int, shapes: Mapping[str, tuple[int, ...]], width: str
) -> Iterator[tuple[str, Tensor]]:
    for name, dims in shapes.items():
        own = tensors[name][expert].detach().cpu()  # a copy where it is written: the tensor holds all experts
        if width and fits(dims, width):
            for part, tensor in formats.parse(width).pack(own.float()).items():
                yield f"{name}:{part}", tensor
        else:
            yield f"{name}:" if width else name, own


def fits(dims: Sequence[int], width: str) -> bool:
    """Whether a slice is a matrix whose rows the format divides into whole groups."""
    return len(dims) == 2 and dims[1] % formats.parse(width).layout.group == 0


def _split(name: str) -> tuple[int, int, str, str]:
    body, _, width = name.partition("@")
    layer, expert, tensor = body.split(".", 2)
    return int(layer), int(expert), tensor, width


def _no_file(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is no file of experts", why, "Delete it, so that it is written anew")

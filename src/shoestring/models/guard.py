"""Headers of weight files checked in exact integers before any native loader sees the file."""

from __future__ import annotations

import json
import mmap
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from shoestring.core.errors import UsageError

SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_HEADER_LIMIT = 100_000_000
# Kind of a metadata value -> its code for struct and array.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_GGUF_BOOL, _GGUF_STRING, _GGUF_ARRAY = 7, 8, 9
# Number of a tensor type -> name, values in a block, bytes of a block. Importing them takes 0.3 s, and a test compares.
GGUF_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
_GGUF_HEADER_LIMIT = 256_000_000
_LENGTH = struct.Struct("<Q")
_GGUF_ARRAY_LIMIT = 4_000_000
_REDOWNLOAD = "Download the file again, or ask its author for an intact one"


@dataclass(frozen=True)
class Tensor:
    """One tensor as the header of `file` declares it: `size` bytes from byte `offset` of the file on."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    size: int
    offset: int
    file: Path


@dataclass(frozen=True)
class Gguf:
    """A GGUF header that is true to its file. Values are numbers, truth values, texts, lists of texts, or arrays."""

    tensors: dict[str, Tensor]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _Texts:
    """A list of texts as it stands in a file: for each its length, then its bytes."""

    raw: bytes
    count: int

    def read(self) -> list[str]:
        raw, at, unpack = self.raw, 0, _LENGTH.unpack_from
        found: list[str] = []
        for _ in range(self.count):
            begin = at + 8
            at = begin + unpack(raw, at)[0]
            found.append(raw[begin:at].decode("utf-8", "replace"))
        return found


class _Values(Mapping[str, Any]):
    """Metadata by key. Vocabularies are long and not always wanted, so lists of texts are decoded when they are."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def __getitem__(self, key: str) -> Any:
        value = self._found[key]
        if isinstance(value, _Texts):
            value = self._found[key] = value.read()
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def check_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors that the safetensors file at `path` declares, after checking that the header is true to the file.

    Raises:
        UsageError: it is a pickle or another kind of file, or a length, type, shape or offset cannot be right.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        _refuse_other_kind(path, start)
        if len(start) < 8:
            _corrupt(path, f"it has {size} bytes and its header length needs 8")
        (length,) = struct.unpack("<Q", start[:8])
        if length == 0 or length > _HEADER_LIMIT:
            _corrupt(path, f"it declares a header of {length} bytes, outside 1 to {_HEADER_LIMIT}")
        if length > size - 8:
            _corrupt(path, f"it declares a header of {length} bytes and only {size - 8} follow: it is truncated")
        file.seek(8)
        raw = file.read(length)
    return _safetensors_tensors(path, _header_json(path, raw), 8 + length, size - 8 - length)


def check_gguf(path: Path) -> Gguf:
    """What the GGUF file at `path` declares, after checking that the header is true to the file.

    Raises:
        UsageError: bad magic or version, or a count, length, type, dimension or offset that cannot be right.
    """
    size = path.stat().st_size
    if size < 24:
        _corrupt(path, f"it has {size} bytes and a GGUF header needs 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Gguf(path, data, size).read()


def is_gguf(path: Path) -> bool:
    """Whether the file starts with GGUF's magic number."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def is_pickle(path: Path) -> bool:
    """Whether the file's content is a pickle, or an archive of the kind that holds one."""
    with path.open("rb") as file:
        return bool(_pickle_kind(file.read(512)))


def _pickle_kind(start: bytes) -> str:
    # A safetensors header length can begin with 0x80 0x02 too, but only a JSON object follows it.
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[8:9] != b"{":
        return "a pickle"
    if start[:4] == b"PK\x03\x04":
        return "a zip archive, which is how PyTorch stores pickles"
    if start[257:262] == b"ustar":
        return "a tar archive, which is how old PyTorch stored pickles"
    return ""


def _refuse_other_kind(path: Path, start: bytes) -> None:
    kind = _pickle_kind(start)
    if kind:
        raise UsageError(
            f"{path} is {kind}",
            "unpickling runs whatever code its author put there",
            "Use weights in safetensors format; their author can make them with model.save_pretrained(folder)",
        )
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a git-lfs pointer, not the weights", remedy="Run `git lfs pull` in its repository")
    if start[:4] == b"GGUF":
        raise UsageError(
            f"{path} is a GGUF file with the wrong name", remedy="Give the path of a file that ends in .gguf"
        )


def _corrupt(path: Path, reason: str) -> NoReturn:
    raise UsageError(f"{path} is corrupt", reason, _REDOWNLOAD)


def _header_json(path: Path, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twice[:80]!r} stands twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        _corrupt(path, f"its header is not sound JSON ({error})")
    if not isinstance(header, dict):
        _corrupt(path, "its header is not a JSON object")
    return header


def _safetensors_tensors(path: Path, header: dict[str, Any], start: int, data: int) -> dict[str, Tensor]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _corrupt(path, "its __metadata__ is not a table of texts")
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            _corrupt(path, f"tensor {name[:80]!r} has not exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
            _corrupt(path, f"tensor {name[:80]!r} has the unknown type {str(dtype)[:40]!r}")
        if not isinstance(shape, list) or len(shape) > 16 or not all(_natural(d) for d in shape):
            _corrupt(path, f"tensor {name[:80]!r} has the impossible shape {str(shape)[:80]}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(o) for o in offsets):
            _corrupt(path, f"tensor {name[:80]!r} has the impossible offsets {str(offsets)[:80]}")
        bits = SAFETENSORS_BITS[dtype]
        for d in shape:
            bits *= d
        begin, end = offsets
        if bits % 8 or end - begin != bits // 8:
            _corrupt(path, f"tensor {name[:80]!r} needs {bits / 8:g} bytes by its shape and has {end - begin}")
        tensors[name] = Tensor(name, dtype, tuple(shape), end - begin, start + begin, path)
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            what = "overlaps the one before it" if begin < reached else f"leaves a hole of {begin - reached} bytes"
            _corrupt(path, f"tensor {name[:80]!r} {what}")
        reached = end
    if reached > data:
        _corrupt(path, f"its tensors need {reached} bytes and only {data} follow the header: it is truncated")
    if reached < data:
        _corrupt(path, f"{data - reached} bytes follow its last tensor")
    return tensors


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


class _Gguf:
    """A cursor over a GGUF header; every length is held against what is left of the file before it is used."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0
        self.limit = min(size, _GGUF_HEADER_LIMIT)

    def read(self) -> Gguf:
        if self.take(4) != b"GGUF":
            self.fail("it does not start with GGUF")
        version, n_tensors, n_values = self.u32(), self.u64(), self.u64()
        if version not in (2, 3):
            self.fail(f"it has version {version}, and 2 and 3 can be read")
        self.fits(n_tensors * 24, f"{n_tensors} tensors")
        self.fits(n_values * 13, f"{n_values} values")
        values = self.values(n_values)
        alignment = values.get("general.alignment", 32)
        declared = [self.tensor(alignment) for _ in range(n_tensors)]
        data_start = -(-self.at // alignment) * alignment
        names: dict[str, Tensor] = {}
        reached, before = 0, ""
        for tensor in sorted(declared, key=lambda tensor: tensor.offset):
            if tensor.name in names:
                self.fail(f"the tensor {tensor.name!r} stands twice")
            if tensor.offset < reached:
                self.fail(f"tensor {tensor.name!r} overlaps {before!r}")
            reached, before = tensor.offset + tensor.size, tensor.name
            if data_start + reached > self.size:
                self.fail(f"tensor {tensor.name!r} ends at byte {data_start + reached} of a file of {self.size}")
            names[tensor.name] = replace(tensor, offset=data_start + tensor.offset)
        if not names:
            self.fail("it holds no tensors")
        return Gguf(names, _Values(values))

    def values(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.string(65_535)
            if key in found:
                self.fail(f"the key {key[:80]!r} stands twice")
            kind = self.u32()
            if key == "general.alignment":
                if kind != 4:
                    self.fail("its alignment is not an unsigned 32-bit number")
                alignment = self.u32()
                if not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
                    self.fail(f"its alignment is {alignment}, not a power of two from 8 on")
                found[key] = alignment
            else:
                found[key] = self.value(kind, key, depth=0)
        return found

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _GGUF_SCALARS:
            code = "<" + _GGUF_SCALARS[kind]
            (number,) = struct.unpack(code, self.take(struct.calcsize(code)))
            return bool(number) if kind == _GGUF_BOOL else number
        if kind == _GGUF_STRING:
            return self.texts(1, key).read()[0]
        if kind != _GGUF_ARRAY:
            self.fail(f"the value {key[:80]!r} has the unknown type {kind}")
        if depth == 3:
            self.fail(f"the value {key[:80]!r} is nested deeper than 3 arrays")
        kind, count = self.u32(), self.u64()
        if count > _GGUF_ARRAY_LIMIT:
            self.fail(f"the value {key[:80]!r} has {count} items, more than {_GGUF_ARRAY_LIMIT}")
        if kind in _GGUF_SCALARS:
            numbers = array(_GGUF_SCALARS[kind])
            self.fits(count * numbers.itemsize, f"{count} values of {key[:80]!r}")
            numbers.frombytes(self.take(count * numbers.itemsize))
            return numbers
        if kind == _GGUF_STRING:
            self.fits(count * 8, f"{count} texts of {key[:80]!r}")
            texts = self.texts(count, key)
            return texts.read() if depth else texts
        self.fits(count * 12, f"{count} arrays of {key[:80]!r}")
        return [self.value(kind, key, depth + 1) for _ in range(count)]

    def texts(self, count: int, key: str) -> _Texts:
        at, last, data, unpack = self.at, self.limit - 8, self.data, _LENGTH.unpack_from
        for _ in range(count):
            if at > last:
                self.fail(f"it ends within {key[:80]!r}")
            at += 8 + unpack(data, at)[0]
        return _Texts(self.take(at - self.at), count)

    def tensor(self, alignment: int) -> Tensor:
        """A tensor with its offset still counted from where the data starts, which is known after the last one."""
        name = self.string(255)
        n_dims = self.u32()
        if not 1 <= n_dims <= 4:
            self.fail(f"tensor {name!r} has {n_dims} dimensions, outside 1 to 4")
        dims = tuple(self.u64() for _ in range(n_dims))
        kind, offset = self.u32(), self.u64()
        count = 1
        for d in dims:
            if not 1 <= d < 2**40:
                self.fail(f"tensor {name!r} has the impossible dimension {d}")
            count *= d
        if kind not in GGUF_TYPES:
            self.fail(f"tensor {name!r} has the unknown type {kind}")
        dtype, block, block_bytes = GGUF_TYPES[kind]
        if dims[0] % block:
            self.fail(f"tensor {name!r} has rows of {dims[0]} values, not a multiple of its block of {block}")
        if offset % alignment:
            self.fail(f"tensor {name!r} starts at {offset}, not a multiple of {alignment}")
        return Tensor(name, dtype, dims[::-1], count // block * block_bytes, offset, self.path)

    def take(self, count: int) -> bytes:
        self.fits(count, f"{count} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def string(self, longest: int) -> str:
        length = self.u64()
        if length > longest:
            self.fail(f"a name is declared to have {length} bytes")
        return self.take(length).decode("utf-8", errors="replace")

    def fits(self, count: int, what: str) -> None:
        if count > self.limit - self.at:
            self.fail(f"its header declares {what} and {self.limit - self.at} bytes are left")

    def fail(self, reason: str) -> NoReturn:
        _corrupt(self.path, reason)

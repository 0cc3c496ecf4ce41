"""A header that is not true to its file is refused in time, in words, and before any native loader sees it."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shoestring.core.errors import UsageError
from shoestring.models.guard import check_gguf, check_safetensors


def _entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def _write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


BAD_SAFETENSORS: dict[str, tuple[Any, bytes, int | None]] = {
    "length zero": ({}, b"", 0),
    "length beyond file": ({}, b"", 1000),
    "length 2^63": ({}, b"", 2**63),
    "length over 100 MB": ({}, b"", 100_000_001),
    "no JSON": (b"{'a': 1}", b"", None),
    "not UTF-8": (b'{"\xff": 1}', b"", None),
    "deep JSON": (b"[" * 100_000, b"", None),
    "no object": ([], b"", None),
    "duplicate keys": (b'{"a":%s,"a":%s}' % ((json.dumps(_entry(0, 4)).encode(),) * 2), b"1234", None),
    "overlap": ({"a": _entry(0, 4), "b": _entry(2, 6)}, b"123456", None),
    "hole": ({"a": _entry(0, 2), "b": _entry(4, 6)}, b"123456", None),
    "negative shape": ({"a": _entry(0, 4, [-2, -2])}, b"1234", None),
    "float shape": ({"a": _entry(0, 4, [4.0])}, b"1234", None),
    "boolean shape": ({"a": _entry(0, 1, [True])}, b"1", None),
    "product overflow": ({"a": _entry(0, 0, [2**32, 2**32])}, b"", None),
    "huge number": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"1234", None),
    "wrong size": ({"a": _entry(0, 4, [1], "U16")}, b"1234", None),
    "unknown dtype": ({"a": _entry(0, 4, dtype="U3")}, b"1234", None),
    "dtype no text": ({"a": _entry(0, 4, dtype=["U8"])}, b"1234", None),
    "offsets backwards": ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, b"1234", None),
    "trailing bytes": ({"a": _entry(0, 4)}, b"123456", None),
    "truncated": ({"a": _entry(0, 4)}, b"12", None),
    "extra field": ({"a": {**_entry(0, 4), "code": "x"}}, b"1234", None),
    "metadata": ({"__metadata__": {"a": 1}}, b"", None),
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_bad_safetensors_header(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / "model.safetensors", *BAD_SAFETENSORS[name])
    start = time.perf_counter()
    with pytest.raises(UsageError, match="model.safetensors is corrupt"):
        check_safetensors(path)
    assert time.perf_counter() - start < 1


def test_sound_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "empty": torch.ones(0), "b": torch.ones(5, dtype=torch.bfloat16)}, path)
    found = check_safetensors(path)
    assert found["a"].dims == (2, 3) and found["a"].size == 24 and found["b"].dtype == "BF16"
    assert found["empty"].size == 0


def test_mutated_safetensors_headers_are_refused_or_load(tmp_path: Path) -> None:
    """Whatever passes the check must be readable: the native loader never meets a header that is untrue."""
    path = tmp_path / "model.safetensors"
    save_file({f"layer.{i}": torch.ones(3, i + 1) for i in range(4)}, path)
    sound, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(1000):
        raw = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(min(len(raw), 330)) if raw else 0
            kind = chance.randrange(4)
            if kind == 0 and raw:
                raw[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del raw[chance.randrange(len(raw) + 1) :]
            elif kind == 2:
                raw[at : at + 4] = raw[:4]
            elif raw:
                raw[at] = chance.choice(b'0123456789[]{},:"-.e')
        path.write_bytes(raw)
        try:
            check_safetensors(path)
        except UsageError:
            refused += 1
        else:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
    assert refused > 600


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    from gguf import GGUFWriter

    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_token_list([f"word{i}" for i in range(50)])
    writer.add_tensor("token_embd.weight", np.ones((50, 32), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf(
    *, magic: bytes = b"GGUF", version: int = 3, tensors: int | None = None, values: int | None = None,
    kv: tuple[bytes, ...] = (), infos: tuple[bytes, ...] = (), data: bytes = b"\0" * 256,
) -> bytes:  # fmt: skip
    head = magic + struct.pack(
        "<IQQ", version, len(infos) if tensors is None else tensors, len(kv) if values is None else values
    )
    raw = head + b"".join(kv) + b"".join(infos)
    return raw + b"\0" * (-len(raw) % 32) + data


def _info(
    name: str = "a", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return (
        _string(name)
        + struct.pack("<I", count)
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


def _nested(depth: int) -> bytes:
    return _string("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 1) + b"\0"


BAD_GGUF: dict[str, bytes] = {
    "magic": _gguf(magic=b"GGML", infos=(_info(),)),
    "empty": b"",
    "version 0": _gguf(version=0, infos=(_info(),)),
    "version 2^32-1": _gguf(version=2**32 - 1, infos=(_info(),)),
    "n_tensors 2^63": _gguf(tensors=2**63, infos=(_info(),)),
    "n_kv 2^63": _gguf(values=2**63, infos=(_info(),)),
    "no tensors": _gguf(),
    "text of 2^63": _gguf(kv=(_string("key") + struct.pack("<IQ", 8, 2**63),), infos=(_info(),)),
    "key of 2^63": _gguf(kv=(struct.pack("<Q", 2**63),), infos=(_info(),)),
    "unknown value type": _gguf(kv=(_string("key") + struct.pack("<I", 99),), infos=(_info(),)),
    "array of 2^62": _gguf(kv=(_string("key") + struct.pack("<IIQ", 9, 4, 2**62),), infos=(_info(),)),
    "texts of 2^62": _gguf(kv=(_string("key") + struct.pack("<IIQ", 9, 8, 2**62),), infos=(_info(),)),
    "text of 2^63 in a list": _gguf(
        kv=(_string("key") + struct.pack("<IIQ", 9, 8, 2) + _string("a") + struct.pack("<Q", 2**63),), infos=(_info(),)
    ),
    "list that ends in a text": _gguf(kv=(_string("key") + struct.pack("<IIQ", 9, 8, 99) + _string("a"),), data=b""),
    "nested 100 deep": _gguf(kv=(_nested(100),), infos=(_info(),)),
    "duplicate key": _gguf(kv=(_string("k") + struct.pack("<IB", 0, 1),) * 2, infos=(_info(),)),
    "dimension 0": _gguf(infos=(_info(dims=(0,)),)),
    "dimension -1": _gguf(infos=(_info(dims=(2**64 - 1,)),)),
    "dimension 2^40": _gguf(infos=(_info(dims=(2**40,)),)),
    "product overflow": _gguf(infos=(_info(dims=(2**32, 2**32)),)),
    "no dimensions": _gguf(infos=(_info(dims=()),)),
    "5 dimensions": _gguf(infos=(_info(dims=(1, 1, 1, 1, 1)),)),
    "unknown tensor type": _gguf(infos=(_info(kind=999),)),
    "row not whole blocks": _gguf(infos=(_info(dims=(8,), kind=2),)),
    "offset beyond file": _gguf(infos=(_info(offset=2**40),)),
    "offset overflow": _gguf(infos=(_info(offset=2**64 - 32),)),
    "tensor longer than file": _gguf(infos=(_info(dims=(1000,)),)),
    "unaligned": _gguf(infos=(_info(offset=4),)),
    "overlap": _gguf(infos=(_info("a", (16,)), _info("b", (16,), offset=32))),
    "duplicate tensor": _gguf(infos=(_info(), _info(offset=32))),
    "alignment 0": _gguf(kv=(_string("general.alignment") + struct.pack("<II", 4, 0),), infos=(_info(),)),
    "alignment of wrong type": _gguf(kv=(_string("general.alignment") + struct.pack("<IQ", 10, 32),), infos=(_info(),)),
    "cut in a name": _gguf(infos=(_info(),))[:30],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_GGUF)
def test_bad_gguf_header(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(BAD_GGUF[name])
    start = time.perf_counter()
    with pytest.raises(UsageError, match="model.gguf is corrupt"):
        check_gguf(path)
    assert time.perf_counter() - start < 1


def test_sound_gguf(tmp_path: Path, gguf_file: Path) -> None:
    found = check_gguf(gguf_file).tensors
    assert found["token_embd.weight"].dims == (50, 32) and found["token_embd.weight"].size == 6400
    path = tmp_path / "made.gguf"
    path.write_bytes(_gguf(kv=(_nested(2),), infos=(_info(), _info("b", offset=32))))
    assert list(check_gguf(path).tensors) == ["a", "b"]


def test_mutated_gguf_headers_are_refused_or_sound(tmp_path: Path, gguf_file: Path) -> None:
    sound, chance, refused = gguf_file.read_bytes(), random.Random(0), 0
    path = tmp_path / "mutant.gguf"
    start = time.perf_counter()
    for _ in range(800):
        raw = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(min(1100, len(raw)))
            kind = chance.randrange(3)
            if kind == 0:
                raw[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del raw[max(1, chance.randrange(len(raw))) :]
            else:
                raw[at : at + 8] = struct.pack("<Q", chance.choice((0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1)))
        path.write_bytes(raw)
        try:
            found = check_gguf(path).tensors
        except UsageError:
            refused += 1
        else:
            assert sum(tensor.size for tensor in found.values()) <= len(raw)
    assert refused > 400 and time.perf_counter() - start < 20

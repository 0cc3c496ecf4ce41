"""Weight files are read where they lie, exactly; whatever a header claims, reading ends in words and not in a crash."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shoestring.core.errors import UsageError
from shoestring.models import gguf_tokenizer
from shoestring.models.guard import GGUF_TYPES, check_gguf
from shoestring.models.llama_like import describe
from shoestring.models.load import DEFAULT, locate
from shoestring.models.tensors import aligned, bfloat16, floats, open_safetensors, open_source


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy()


@pytest.mark.parametrize("shard", ["10KB", "5GB"])
def test_a_folder_gives_its_bytes(tmp_path: Path, folder_of: Callable[..., Path], shard: str) -> None:
    folder = folder_of("qwen3", dtype=torch.bfloat16)
    model = __import__("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.save_pretrained(tmp_path / "out", max_shard_size=shard)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard == "10KB")
    source = open_source(tmp_path / "out")
    assert not source.gguf and source.values["model_type"] == "qwen3"
    own = model.state_dict()
    assert set(source.tensors) == set(own)
    for name, stored in source.tensors.items():
        assert stored.dtype == "BF16" and stored.dims == tuple(own[name].shape)
        np.testing.assert_array_equal(stored.data, bits(own[name]))
        np.testing.assert_array_equal(floats(stored), own[name].float().numpy())
        source.tensors.release(name)
        np.testing.assert_array_equal(stored.data, bits(own[name]))


def test_all_number_types(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    made = {
        "f32": torch.randn(3, 5), "f16": torch.randn(7).half(), "bf16": torch.randn(2, 3).bfloat16(),
        "codes": torch.arange(-6, 6, dtype=torch.int8).view(2, 3, 2), "none": torch.empty(0, 4),
    }  # fmt: skip
    save_file(made, path)
    tensors = open_safetensors(path)
    for name in ("f32", "f16", "bf16"):
        np.testing.assert_array_equal(floats(tensors[name]), made[name].float().numpy())
    assert tensors["codes"].dims == (2, 3, 2) and tensors["none"].data.nbytes == 0
    with pytest.raises(UsageError, match="codes is stored as I8"):
        floats(tensors["codes"])
    with pytest.raises(KeyError):
        tensors["absent"]
    with pytest.raises(ValueError):
        tensors["f32"].data[0] = 1


def test_bytes_at_odd_places() -> None:
    raw = np.arange(9, dtype=np.uint8)
    assert aligned(raw[1:], 2).ctypes.data % 2 == 0 and (aligned(raw[1:], 2) == raw[1:]).all()


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:8] = [0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40]
    wanted = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(bfloat16(values), wanted)
    assert np.isnan((bfloat16(np.float32([np.nan])).astype(np.uint32) << 16).view(np.float32)).all()


def test_types_are_those_of_gguf() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    assert GGUF_TYPES == {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


@pytest.mark.real
def test_a_gguf_file_gives_its_bytes() -> None:
    from gguf import GGUFReader

    path = locate(DEFAULT)
    reader, source = GGUFReader(path), open_source(path)
    assert {t.name for t in reader.tensors} == set(source.tensors)
    for theirs in reader.tensors[::9]:
        ours = source.tensors[theirs.name]
        assert ours.dtype == theirs.tensor_type.name and list(ours.dims) == theirs.shape.tolist()[::-1]
        np.testing.assert_array_equal(ours.data, np.asarray(theirs.data).reshape(-1).view(np.uint8))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and len(field.data) < 10:
            found = source.values[key]
            assert (list(found) if hasattr(found, "typecode") else found) == field.contents(), key


# ---- headers that lie ----


def mutants(sound: bytes, count: int, seed: int, cut: bool = True) -> list[bytes]:
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        raw = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            at, kind = chance.randrange(len(raw)), chance.randrange(5)
            if kind == 0:
                raw[at] ^= 1 << chance.randrange(8)
            elif kind == 1 and cut:
                del raw[max(8, chance.randrange(len(raw))) :]
            elif kind == 2:
                number = chance.choice((0, 1, 31, 2**31, 2**32, 2**40, 2**63, 2**64 - 1))
                raw[at : at + 8] = struct.pack("<Q", number)[: len(raw) - at]
            elif kind == 3:
                other = chance.randrange(len(raw))
                raw[at : at + 16] = raw[other : other + 16][: len(raw) - at]
            else:
                raw[at : at + 4] = struct.pack("<I", chance.choice((0, 1, 2, 8, 9, 30, 2**31, 2**32 - 1)))[
                    : len(raw) - at
                ]
        found.append(bytes(raw))
    return found


def read_all(path: Path) -> None:
    """Open, describe, and touch both ends of some tensors."""
    source = open_source(path)
    for name in list(source.tensors)[::25]:
        data = source.tensors[name].data
        assert len(data) == 0 or int(data[0]) + int(data[-1]) >= 0
    describe(source)
    gguf_tokenizer.build(source.values)


@pytest.mark.real
def test_mutated_headers_of_the_real_model(tmp_path: Path) -> None:
    """The default model's own header with a short vocabulary, over a file with nothing in it: thousands of lies."""
    path, whole = locate(DEFAULT), tmp_path / "mutant.gguf"
    sound = header_of(path, words=300)
    size = path.stat().st_size
    refused = 0
    for raw in [sound, *mutants(sound, 2000, seed=0)]:
        with whole.open("wb") as file:
            file.write(raw)
            file.truncate(max(size, len(raw)) if len(raw) >= len(sound) else len(raw))
        try:
            read_all(whole)
        except UsageError:
            refused += 1
            assert raw is not sound
    assert refused > 1000


@pytest.mark.real
def test_mutated_whole_header(tmp_path: Path) -> None:
    path, whole = locate(DEFAULT), tmp_path / "mutant.gguf"
    first = min(tensor.offset for tensor in check_gguf(path).tensors.values())
    with path.open("rb") as file:
        sound = file.read(first)
    for raw in mutants(sound, 25, seed=1):
        whole.write_bytes(raw)
        with pytest.raises(UsageError):  # there are no weights
            read_all(whole)


def header_of(path: Path, words: int) -> bytes:
    """The header of a GGUF file with only the first words of its lists; the alignment of the data stays."""
    found = check_gguf(path)

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    def packed(value: object) -> bytes:
        if isinstance(value, bool):
            return struct.pack("<IB", 7, value)
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        if isinstance(value, float):
            return struct.pack("<If", 6, value)
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, list):
            return struct.pack("<IIQ", 9, 8, len(value[:words])) + b"".join(map(text, value[:words]))
        raw = value[:words]  # type: ignore[index]
        return struct.pack("<IIQ", 9, 5, len(raw)) + raw.tobytes()

    known = set(found.values["tokenizer.ggml.tokens"][:words])
    kinds = {name: number for number, (name, *_) in GGUF_TYPES.items()}
    start = min(tensor.offset for tensor in found.tensors.values())
    out = b"GGUF" + struct.pack("<IQQ", 3, len(found.tensors), len(found.values))
    for key, value in found.values.items():
        if key.endswith("merges"):
            value = [m for m in value if {*m.split(" "), m.replace(" ", "")} <= known]
        out += text(key) + packed(value)
    for tensor in found.tensors.values():
        out += text(tensor.name) + struct.pack("<I", len(tensor.dims)) + struct.pack(
            f"<{len(tensor.dims)}QIQ", *tensor.dims[::-1], kinds[tensor.dtype], tensor.offset - start
        )  # fmt: skip
    return out


def test_mutated_safetensors(tmp_path: Path, folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for raw in mutants(whole[:length], 1000, seed=2):
        path.write_bytes(raw + whole[length:])
        try:
            source = open_source(folder)
            describe(source)
        except UsageError:
            refused += 1
        else:
            with safe_open(path, "pt") as file:
                assert set(file.keys()) == set(source.tensors)
    assert refused > 700


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.ones(5000)}, path)
    from shoestring.models.guard import check_safetensors
    from shoestring.models.tensors import Tensors

    found = check_safetensors(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match="became shorter"):
        Tensors(found)


def test_what_is_needed_soon_is_asked_for_in_order_beside_other_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({name: torch.arange(3 * n, dtype=torch.int64) for n, name in enumerate("abc", 1)}, tmp_path / "t")
    tensors = open_safetensors(tmp_path / "t")
    asked: list[tuple[int, int]] = []
    done, main = threading.Event(), threading.get_ident()

    def advise(handle: int, begin: int, size: int, advice: int) -> None:
        assert os.fstat(handle).st_ino == (tmp_path / "t").stat().st_ino and advice == os.POSIX_FADV_WILLNEED
        assert threading.get_ident() != main
        asked.append((begin, size))
        if len(asked) == 2:
            done.set()

    monkeypatch.setattr(os, "posix_fadvise", advise)
    tensors.ahead(["c", "a"])
    assert done.wait(10)
    assert [size for _, size in asked] == [72, 24] and asked[0][0] > asked[1][0]
    (tmp_path / "t").unlink()
    tensors.ahead(["b"])  # only advice: the mapped bytes are still there
    assert tensors["b"].data.view(np.int64).tolist() == list(range(6))

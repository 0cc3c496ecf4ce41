from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file

from shoestring import models
from shoestring.core import catalog
from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.kernels import formats
from shoestring.models import packed_folder
from shoestring.models.packed_folder import pack_folder


def config(name: str, **options: Any) -> Any:
    return catalog.load(name)(**options)


def through_transformers(source: Path, out: Path, made: Any) -> Path:
    models.load(source, quantization_config=made, tokenizer=False).model.save_pretrained(out)
    return out


def written(source: Path, out: Path, made: Any) -> Any:
    out.mkdir()
    return pack_folder(source, out, made)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("gemma2", {}),
        ("gpt2", {}),
        ("opt", {}),
        ("phi3", {}),
    ],
)
@pytest.mark.parametrize("name", ["int4", "lut_gemm"])
def test_what_is_written_is_what_transformers_writes(
    name: str, family: str, changes: dict[str, Any], folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Also of transposed layers, of biases, and of a head that shares the table."""
    source, made = folder_of(family, **changes), config(name)
    want = through_transformers(source, tmp_path / "want", made)
    assert written(source, tmp_path / "got", made) is not None
    assert {file.name for file in want.iterdir()} == {file.name for file in (tmp_path / "got").iterdir()}
    for file in want.iterdir():
        assert (tmp_path / "got" / file.name).read_bytes() == file.read_bytes(), file.name


def test_experts_that_files_hold_in_one_tensor(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """As those of which some were pruned are stored."""
    source, made = folder_of("mixtral"), config("int8")
    save_file(tiny("mixtral").state_dict(), source / "model.safetensors", {"format": "pt"})
    through_transformers(source, tmp_path / "want", made)
    assert written(source, tmp_path / "got", made) is not None
    got, want = (load_file(tmp_path / place / "model.safetensors") for place in ("got", "want"))
    assert got.keys() == want.keys() and "model.layers.0.mlp.experts.down.scales" in got
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_a_folder_of_shards(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    whole, made = folder_of("llama"), config("int8")
    tiny("llama").save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for place in ("whole", "shards"):
        assert written(whole if place == "whole" else tmp_path / "shards", tmp_path / f"{place} out", made) is not None
    one, other = (tmp_path / f"{place} out" / "model.safetensors" for place in ("whole", "shards"))
    assert one.read_bytes() == other.read_bytes()


def test_weights_are_rounded_from_the_numbers_that_are_stored(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """Not from those that the type which the model computes in would make of them."""
    source = folder_of("llama", dtype=torch.float16)
    assert written(source, tmp_path / "out", config("int4", group_size=32)) is not None
    name = "model.layers.0.mlp.up_proj"
    want = formats.parse("int4/32").pack(load_file(source / "model.safetensors")[f"{name}.weight"])
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[f"{name}.{part}"], tensor) for part, tensor in want.items())


def mixture(folder_of: Callable[..., Path]) -> tuple[Path, Any]:
    return folder_of("mixtral"), config("int4")


def table_stored_twice(folder_of: Callable[..., Path]) -> tuple[Path, Any]:
    source = folder_of("llama", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source, config("int4")


def length_by_content(folder_of: Callable[..., Path]) -> tuple[Path, Any]:
    return folder_of("llama", dtype=torch.bfloat16), config("dfloat11")


@pytest.mark.parametrize("case", [mixture, table_stored_twice, length_by_content])
def test_what_cannot_be_written_piece_by_piece_is_read_whole(
    case: Callable[..., tuple[Path, Any]], folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    source, made = case(folder_of)
    assert written(source, tmp_path / "got", made) is None
    assert not list((tmp_path / "got").iterdir())
    compressed(made.quant_method.removeprefix("shoestring_"), source, tmp_path / "packed")
    want = through_transformers(source, tmp_path / "want", made)
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()


def compressed(name: str, source: Path, out: Path) -> None:
    room = catalog.contract("quantizers")
    room.apply(catalog.module(name), Step("compress", name, {}), source, out, Work(Ledger(), out.parent))


def test_compressing_reads_no_whole_model(
    folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of("llama")
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    compressed("int4", source, tmp_path / "out")
    assert models.shape_of(tmp_path / "out").storage < models.shape_of(source).storage / 2


def test_a_number_that_is_not_finite_is_refused_by_name_and_nothing_is_left(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = folder_of("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight cannot be quantized.*1 NaN"):
        compressed("int4", source, tmp_path / "results" / "out")
    assert not list((tmp_path / "results").iterdir())


def test_a_full_disk_leaves_nothing_and_a_short_write_goes_on(
    folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plain = folder_of("llama"), os.pwrite
    compressed("int4", source, tmp_path / "want")
    monkeypatch.setattr(packed_folder.os, "pwrite", lambda file, data, at: plain(file, data[:100], at))
    compressed("int4", source, tmp_path / "got")
    want, got = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("want", "got"))
    assert got == want

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packed_folder.os, "pwrite", full)
    with pytest.raises(ShoestringError, match="no space is left"):
        compressed("int4", source, tmp_path / "results" / "out")
    assert not list((tmp_path / "results").iterdir())

"""A folder as a GGUF file: the same numbers, read back by the engine and by the `gguf` library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import shoestring.methods.quantizers  # noqa: F401
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.engine.native_runner import NativeRunner
from shoestring.engine.runner import Batch
from shoestring.kernels import ops
from shoestring.lab import tiny
from shoestring.models import gguf_tokenizer
from shoestring.models.gguf_writing import write_gguf
from shoestring.models.tensors import open_source

NATIVE = pytest.mark.skipif(not ops.backend()["native"], reason="no native library in this installation")


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts as SmolLM's does."""
    alphabet = sorted(gguf_tokenizer.byte_alphabet())[: tiny.VOCAB - 3]
    words = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    merge = (alphabet[0], alphabet[1])
    words["".join(merge)] = len(words)
    made = Tokenizer(BPE(words, [merge]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def folder(place: Path, family: str = "llama", bits: int | None = None, **changes: Any) -> Path:
    tiny.model(family, **changes).to(torch.bfloat16).save_pretrained(place / "float")
    path = place / "float"
    if bits:
        config = catalog.load(f"int{bits}")(group_size=32, embeddings=8)
        packed = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)
        path = place / "packed"
        packed.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def logits(path: Path) -> np.ndarray:
    runner = NativeRunner(path)
    runner.reserve(2)
    ids = np.arange(3, 15, dtype=np.int32)
    one = np.array([0], np.int32)
    batch = Batch(ids, np.arange(12, dtype=np.int32), np.array([0, 12], np.int32), one, one[None])
    found: np.ndarray = runner.logits(runner.run(batch), np.arange(12, dtype=np.int32))
    return found


@NATIVE
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_engine_computes_the_same_bits(tmp_path: Path, family: str, bits: int | None) -> None:
    source = folder(tmp_path, family, bits)
    written = write_gguf(source, tmp_path / "model.gguf")
    assert np.array_equal(logits(written), logits(source))


@pytest.mark.parametrize(("bits", "kind"), [(4, gguf.GGMLQuantizationType.Q4_0), (8, gguf.GGMLQuantizationType.Q8_0)])
def test_another_reader_finds_the_same_numbers(tmp_path: Path, bits: int, kind: Any) -> None:
    source = folder(tmp_path, "llama", bits)
    reader = gguf.GGUFReader(write_gguf(source, tmp_path / "model.gguf"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    up = found["blk.1.ffn_up.weight"]
    assert up.tensor_type == kind
    packed: Any = AutoModelForCausalLM.from_pretrained(source).model.layers[1].mlp.up_proj
    values = gguf.quants.dequantize(up.data, up.tensor_type)
    assert np.array_equal(values, packed.unpacked().numpy())


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    source = folder(tmp_path)
    values = open_source(write_gguf(source, tmp_path / "model.gguf")).values
    made, own = gguf_tokenizer.build(values), tokenizer()
    assert made is not None and values["tokenizer.ggml.pre"] == "smollm"
    text = "".join(sorted(gguf_tokenizer.byte_alphabet())[:8])
    assert made.encode(text).ids == own(text).input_ids
    assert gguf_tokenizer.end_tokens(values)[0] == own.eos_token_id


def test_what_begins_a_text_and_what_ends_an_answer_comes_along(tmp_path: Path) -> None:
    source = folder(tmp_path)
    inner = tokenizer().backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    inner.save(str(source / "tokenizer.json"))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3, 4]}))
    values = open_source(write_gguf(source, tmp_path / "model.gguf")).values
    made = gguf_tokenizer.build(values)
    assert made is not None and made.encode("!").ids == inner.encode("!").ids and made.encode("").ids == [0]
    assert gguf_tokenizer.end_tokens(values) == (1, 3, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sliding_window": 8, "family": "mistral"}, "no exact form in GGUF"),
        ({"family": "granite"}, "no exact form"),
        ({"family": "smollm3", "no_rope_layers": [0], "pad_token_id": 0}, "no exact form"),
        ({"family": "llama", "hidden_act": "gelu_pytorch_tanh"}, "no exact form"),
        ({"family": "gemma2", "head_dim": 32}, "no exact form.*Gemma2ForCausalLM.*Families: llama"),
    ],
)
def test_families_that_gguf_does_not_carry(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        change.pop("family"), hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=tiny.VOCAB, **change,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(UsageError, match=words):
        write_gguf(tmp_path / "m", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_formats_that_gguf_does_not_carry(tmp_path: Path) -> None:
    from shoestring.models.packed import PackedConfig

    folder(tmp_path)
    config = PackedConfig(packing={"model.layers.0.mlp.up_proj": "uniform3/32"})
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(UsageError, match="no type that carries uniform3/32 exactly"):
        write_gguf(tmp_path / "packed", tmp_path / "model.gguf")


def test_a_tokenizer_that_has_no_name_there(tmp_path: Path) -> None:
    source = folder(tmp_path)
    made = Tokenizer(BPE({"a": 0}, []))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(source)
    with pytest.raises(UsageError, match="no name in GGUF"):
        write_gguf(source, tmp_path / "model.gguf")

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from passes import logits_of
from shoestring import models
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.kernels import formats, huffman, ops
from shoestring.lab import tiny
from shoestring.methods.quantizers.dfloat11 import Dfloat11Config, price
from shoestring.models.packed import packed_modules

CODINGS = pytest.mark.parametrize("coding", ["huffman", "fixed"])


@pytest.fixture
def coded(tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, PreTrainedModel, Path]]:
    """A tiny bfloat16 model, its coded form, and the folder of that."""

    def make(
        coding: str, dtype: torch.dtype = torch.bfloat16, family: str = "llama", **changes: Any
    ) -> tuple[PreTrainedModel, PreTrainedModel, Path]:
        catalog.contract("quantizers").adopt(catalog.module("dfloat11"))
        original = tiny.model(family, dtype=torch.bfloat16, **changes)
        for name, p in original.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p)
        original.save_pretrained(tmp_path / "plain")
        made = AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", dtype=dtype, quantization_config=Dfloat11Config(coding)
        )
        made.save_pretrained(tmp_path / coding)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype), made.eval(), tmp_path / coding

    return make


@CODINGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": False}])
def test_outputs_are_those_of_the_original_to_the_bit(coding, dtype, changes, coded):
    original, made, folder = coded(coding, dtype, **changes)
    assert list(packed_modules(made))
    assert torch.equal(tiny.logits(made), tiny.logits(original))
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(tiny.logits(again), tiny.logits(original))
    for sample in (False, True):
        answers = []
        for model in (original, again):
            torch.manual_seed(0)
            answers.append(model.generate(tiny.batch(1, 8), max_new_tokens=8, do_sample=sample))
        assert torch.equal(*answers)


@CODINGS
def test_every_stored_bit_comes_back(coding, coded):
    original, made, _ = coded(coding)
    for name, module in packed_modules(made):
        weight = original.get_submodule(name).weight.detach()
        assert torch.equal(module.unpacked().bfloat16().view(torch.int16), weight.view(torch.int16)), name


@CODINGS
def test_minus_zero_and_subnormals_survive(coding):
    weight = torch.tensor([[-0.0, 0.0, 2.0**-130, -(2.0**-133), 1.5]] * 3).bfloat16()
    config = Dfloat11Config(coding)
    format = config.format_of("layer", 3, 5, False)
    assert format is not None
    tensors = config.pack(weight, format, "layer")
    found = formats.parse(f"{format.layout.kind}/{tensors['weight'].numel()}").unpack(tensors, 5).bfloat16()
    assert torch.equal(found.view(torch.int16), weight.view(torch.int16))


def test_a_matrix_with_an_exponent_beyond_the_tables_is_stored_as_it_is(tmp_path):
    catalog.contract("quantizers").adopt(catalog.module("dfloat11"))
    original = tiny.model(dtype=torch.bfloat16)
    name, weight = next((n, p) for n, p in original.named_parameters() if "layers.1." in n and p.dim() == 2)
    weight.data[3, 3] = 2.0**120
    original.save_pretrained(tmp_path / "plain")
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=Dfloat11Config()
    )
    module = made.get_submodule(name.removesuffix(".weight"))
    assert isinstance(huffman.unpack(module.weight.numpy(), *weight.shape).held, np.ndarray)
    assert torch.equal(module.unpacked(), weight.float())
    other = next(m for n, m in packed_modules(made) if n + ".weight" != name)
    assert isinstance(huffman.unpack(other.weight.numpy(), None, other.columns).held, huffman.Unit)


def test_numbers_that_bfloat16_does_not_hold_are_refused_or_rounded_on_request(tmp_path):
    catalog.contract("quantizers").adopt(catalog.module("dfloat11"))
    original = tiny.model()
    original.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="bfloat16 does not hold"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=Dfloat11Config())
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=Dfloat11Config(cast=True)
    )
    for name, module in packed_modules(made):
        weight = original.get_submodule(name).weight.detach()
        assert torch.equal(module.unpacked(), weight.bfloat16().float()) and not torch.equal(module.unpacked(), weight)
    with pytest.raises(UsageError, match="coding"):
        Dfloat11Config("huffmann")


def test_a_tied_table_is_stored_once(coded):
    _, _, folder = coded("huffman", tie_word_embeddings=True)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    packing = json.loads((folder / "config.json").read_text())["quantization_config"]["packing"]
    assert packing["model.embed_tokens"].startswith("huffman/")


def test_only_one_matrix_is_plain_at_a_time(coded):
    """While a layer runs, the plain weights that are alive are its own and no other's."""
    _, made, _ = coded("huffman")
    alive: list[int] = []
    plain = formats.parse("huffman/0").__class__
    before = plain.unpack
    held: list[Any] = []

    import weakref

    def watch(self: Any, tensors: Any, cols: int) -> torch.Tensor:
        found = before(self, tensors, cols)
        alive.append(sum(ref() is not None for ref in held))
        held.append(weakref.ref(found))
        return found

    plain.unpack = watch  # type: ignore[method-assign]
    try:
        tiny.logits(made)
    finally:
        plain.unpack = before  # type: ignore[method-assign]
    assert len(alive) > 10 and max(alive) <= 1


def test_the_price_of_trained_weights_is_met(tmp_path):
    shape = models.shape_of(tiny.model(dtype=torch.bfloat16, hidden_size=256, intermediate_size=512))
    weights = {w.name: w for w in shape.weights}
    for options, share in (({}, 0.6797), ({"coding": "fixed"}, 0.75)):
        priced = {w.name: w for w in price(shape, options).shape.weights}
        name = next(n for n in weights if n.endswith("gate_proj.weight"))
        assert priced[name].stored / weights[name].stored == pytest.approx(share, abs=0.01)
        norm = next(n for n in weights if n.endswith("norm.weight"))
        assert priced[norm].stored == weights[norm].stored


@CODINGS
def test_the_engine_gives_the_bits_of_the_original(coding, coded, tmp_path):
    if not ops.backend()["native"]:
        pytest.skip("no native library in this installation")
    from shoestring.engine.native_runner import NativeRunner

    _, _, folder = coded(coding)
    found = [logits_of(NativeRunner(path, threads=1), list(range(3, 19))) for path in (tmp_path / "plain", folder)]
    assert np.array_equal(*found)


@pytest.mark.real
@CODINGS
def test_the_default_model(coding, tmp_path):
    from shoestring.engine.native_runner import NativeRunner

    source, out = models.resolve("smollm2"), tmp_path / "coded"
    step = Step("compress", "dfloat11", {"coding": coding})
    catalog.contract("quantizers").apply(catalog.module("dfloat11"), step, source, out, Work(Ledger(), tmp_path))
    share = _weights(out) / _weights(source)
    assert share < (0.70 if coding == "huffman" else 0.76)
    ids = torch.arange(100, 112).view(1, -1)
    with torch.no_grad():
        answers = [models.load(path).model(ids).logits for path in (source, out)]
    assert torch.equal(*answers)
    runners = [NativeRunner(path, threads=1) for path in (source, out)]
    assert np.array_equal(*(logits_of(runner, ids[0].tolist()) for runner in runners))
    if coding == "fixed":
        assert runners[1].facts.weight_bytes < 0.76 * runners[0].facts.weight_bytes


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

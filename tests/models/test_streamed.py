from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from shoestring.core.errors import UsageError
from shoestring.lab import tiny
from shoestring.methods.quantizers.int8 import Int8Config
from shoestring.models.streamed import Streamed, unload


def mixture() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    heads = dict(num_key_value_heads=4, num_local_experts=3, vocab_size=tiny.VOCAB)
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixture"])
def test_read_part_by_part_it_is_the_same_model(family: str, tmp_path: Path) -> None:
    """Experts that stand apart in the files become the fused tensors of the model."""
    whole = mixture() if family == "mixture" else tiny.model(family)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    streamed = Streamed(tmp_path)
    assert all(p.is_meta for p in streamed.model.parameters())
    streamed.load_rest()
    for block in streamed.anatomy.blocks:
        assert all(p.is_meta for p in block.module.parameters())
        streamed.load(block.name)
        assert not any(p.is_meta for p in block.module.parameters())
    assert torch.equal(tiny.logits(streamed.model), tiny.logits(whole))


def test_a_packed_folder_is_refused(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path / "plain")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=Int8Config())
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(UsageError, match="is packed.*unpack it with `shoestring export`"):
        Streamed(tmp_path / "packed")


def test_calls_of_blocks_are_those_of_the_model(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    streamed = Streamed(tmp_path)
    streamed.load_rest()
    rows = [list(range(3, 12)), list(range(20, 25))]
    calls = streamed.block_calls(rows)
    assert [len(call) for call in calls] == [2, 2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for row, call in zip(rows, calls):
        state = call[0][0][0]
        for index, block in enumerate(streamed.anatomy.blocks):
            streamed.load(block.name)
            with torch.no_grad():
                state = block.module(state, *call[index][0][1:], **call[index][1])
        with torch.no_grad():
            want = model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1]
        assert torch.equal(streamed.model.model.norm(state), want)


def test_unloading_gives_the_memory_back(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    streamed = Streamed(tmp_path)
    first = streamed.anatomy.blocks[0]
    streamed.load(first.name)
    unload(first.module)
    assert all(p.is_meta for p in first.module.parameters())
    streamed.load(first.name)
    assert not any(p.is_meta for p in first.module.parameters())


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    streamed = Streamed(tmp_path)
    streamed.load("model.layers.0")
    with pytest.raises(UsageError, match="no weights for model.layers.1.mlp.up_proj.weight"):
        streamed.load("model.layers.1")

"""The anatomy of every family is found by structure."""

from __future__ import annotations

import pytest
import torch
from families import CAUSAL, MASKED, SEQ2SEQ, tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring.core.errors import UsageError
from shoestring.core.shape import PROJECTIONS
from shoestring.models import inspect
from shoestring.models.anatomy import closing_norms, features, halves, is_norm, is_projection, norm_offset

_SPLIT, _FUSED = {"q", "k", "v", "o"}, {"qkv", "o"}
ROLES = {
    "gpt2": _FUSED | {"up", "down"},
    "gpt_neox": _FUSED | {"up", "down"},
    "bloom": _FUSED | {"up", "down"},
    "falcon": _FUSED | {"up", "down"},
    "opt": _SPLIT | {"up", "down"},
    "phi": _SPLIT | {"up", "down"},
    "phi3": _FUSED | {"gate_up", "down"},
    "mixtral": _SPLIT | {"router", "expert"},
    "qwen3_moe": _SPLIT | {"router", "expert"},
}


@pytest.mark.parametrize("family", CAUSAL)
def test_causal(family: str) -> None:
    model = tiny(family)
    anatomy = inspect(model)
    assert anatomy.kind == "causal" and [block.index for block in anatomy.blocks] == [0, 1]
    wanted = ROLES.get(family, _SPLIT | {"gate", "up", "down"})
    for block in anatomy.blocks:
        assert model.get_submodule(block.name) is block.module
        assert set(block.projections) == wanted and block.norms
    assert model.get_submodule(anatomy.embeddings) is model.get_input_embeddings()
    assert model.get_submodule(anatomy.head) is model.get_output_embeddings()
    assert anatomy.final_norm and not any(anatomy.final_norm.startswith(b.name) for b in anatomy.blocks)
    assert anatomy.embeddings_tied == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_a_block_has_two_halves_be_the_second_plain_or_a_mixture(family: str) -> None:
    for block in inspect(tiny(family)).blocks:
        found = halves(block)
        assert found["attention"].module == f"{block.name}.self_attn"
        assert found["mlp"].module == f"{block.name}.mlp"
        assert [half.norm for half in found.values()] == [n for n in block.norms if n.count(".") == 3]


def test_a_block_with_more_norms_has_no_halves() -> None:
    with pytest.raises(UsageError, match="with a norm before each"):
        halves(inspect(tiny("gemma2")).blocks[0])


@pytest.mark.parametrize("family", sorted({**CAUSAL, **MASKED, **SEQ2SEQ}))
def test_linears_are_all_of_a_blocks_matrices(family: str) -> None:
    model = tiny(family)
    anatomy = inspect(model)
    found = {name: role for name, _, role in anatomy.linears()}
    routers = {block.projections.get("router") for block in anatomy.blocks}
    for block in anatomy.blocks:
        for part, module in block.module.named_modules():
            if is_projection(module) and f"{block.name}.{part}" not in routers:
                assert found[f"{block.name}.{part}"] in PROJECTIONS | {"expert"}
    for name, module, role in anatomy.linears():
        columns, rows = features(module)
        assert module.weight.numel() == rows * columns
        assert role in ("q", "k", "v", "o", "qkv") or (rows < columns) == (role == "down"), name


@pytest.mark.parametrize("family", MASKED)
def test_masked(family: str) -> None:
    model = tiny(family)
    anatomy = inspect(model)
    assert anatomy.kind == "masked" and {block.stack for block in anatomy.blocks} == {"encoder"}
    assert all(set(block.projections) == _SPLIT | {"up", "down"} for block in anatomy.blocks)
    assert model.get_submodule(anatomy.head) is model.get_output_embeddings()


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoder(family: str) -> None:
    anatomy = inspect(tiny(family))
    assert anatomy.kind == "seq2seq"
    assert [(block.stack, block.index) for block in anatomy.blocks] == [
        ("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)
    ]  # fmt: skip
    cross = {"cross_q", "cross_k", "cross_v", "cross_o"}
    assert all(set(block.projections) == _SPLIT | {"up", "down"} for block in anatomy.stack("encoder"))
    assert all(set(block.projections) == _SPLIT | cross | {"up", "down"} for block in anatomy.stack("decoder"))
    assert {role for _, _, role in anatomy.linears()} == _SPLIT | {"up", "down"}


def test_projections_come_in_the_order_of_the_data() -> None:
    assert list(inspect(tiny("opt")).blocks[0].projections) == ["q", "k", "v", "o", "up", "down"]


def test_an_adapted_model_shows_the_same_parts() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    anatomy = inspect(model)
    assert set(anatomy.blocks[0].projections) == _SPLIT | {"gate", "up", "down"}
    for name, module, _ in anatomy.linears():
        assert model.get_submodule(name) is module and "lora" not in name
    assert model.get_submodule(anatomy.embeddings) is model.get_input_embeddings()


def test_an_adapted_block_shows_the_projections_inside() -> None:
    class Around(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

    model = tiny("llama")
    model.model.layers[0].mlp = Around(model.model.layers[0].mlp)
    found = inspect(model).blocks[0].projections
    assert found["gate"] == "model.layers.0.mlp.base_layer.gate_proj" and set(found) == _SPLIT | {"gate", "up", "down"}


def test_a_packed_matrix_keeps_its_role() -> None:
    class Packed(nn.Linear):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__(inner.in_features, inner.out_features, bias=False)
            self.weight = nn.Parameter(torch.zeros(inner.out_features, 2, 16, dtype=torch.int8), requires_grad=False)

    model = tiny("llama")
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Packed(up)
    assert inspect(model).blocks[0].projections["up"] == "model.layers.0.mlp.up_proj"


def test_other_architectures_are_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4)
    )
    with pytest.raises(UsageError, match=r"MambaForCausalLM is not understood: .*attention"):
        inspect(model)
    with pytest.raises(UsageError, match="Linear is not understood: a configuration"):
        inspect(nn.Linear(2, 2))


def test_a_missing_part_is_named() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(UsageError, match=r"up and down projections in model\.layers\.1"):
        inspect(model)


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED, *SEQ2SEQ])
def test_which_blocks_end_with_their_norm(family: str) -> None:
    model = tiny(family)
    found = closing_norms(model)
    blocks = inspect(model).blocks
    assert set(found) in (set(), {block.name for block in blocks}), "some blocks end otherwise than the others"
    if family in ("bert", "roberta", "distilbert", "bart"):
        assert found and all(name.startswith(block + ".") for block, name in found.items())
        norm, seen = model.get_submodule(found[blocks[-1].name]), []
        norm.register_forward_hook(lambda *call: seen.append(call[2]))
        blocks[-1].module.register_forward_hook(lambda *call: seen.append(call[2]))
        ids = torch.arange(3, 9)[None]
        model(input_ids=ids, **({"decoder_input_ids": ids} if family == "bart" else {}))
        left = seen[1][0] if isinstance(seen[1], tuple) else seen[1]
        assert torch.equal(left, seen[0])
    if family in ("llama", "gpt2", "t5", "mbart", "gemma2"):
        assert not found


def test_a_model_that_needs_more_than_tokens_is_named() -> None:
    model = tiny("bert")
    model.bert.embeddings.forward = lambda **_: 1 / 0
    with pytest.raises(UsageError, match="tokens could not be passed through BertForMaskedLM"):
        closing_norms(model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "t5"])
def test_what_norms_add_to_their_weight(family: str) -> None:
    model = tiny(family)
    for norm in (module for module in model.modules() if is_norm(module)):
        with torch.no_grad():
            norm.weight.normal_()
        assert norm_offset(norm) == (1.0 if family == "gemma2" else 0.0)
        assert norm_offset(norm.to("meta")) == (1.0 if family == "gemma2" else 0.0), "read without its numbers"

"""Mixtures whose experts stand in one tensor, packed: what transformers makes of them, and what their bytes are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mixtures import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.kernels import formats
from shoestring.lab import tiny_mixture
from shoestring.methods.quantizers.dfloat11 import Dfloat11Config
from shoestring.methods.quantizers.int4 import Int4Config
from shoestring.methods.quantizers.int8 import Int8Config
from shoestring.models import regrouped, shape_of
from shoestring.models.anatomy import mixtures, stacked
from shoestring.models.packed import PARTS, PackedConfig, PackedExperts, packed_modules

IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
# Of other blocks than Mixtral's: gates by sigmoids and groups, experts that all tokens share, layers without experts.
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "dots1", "glm4_moe", "phimoe")


def mixture(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family)
    sizes = {**SIZES, "num_key_value_heads": 2, **changes} if family != "deepseek_v3" else {**SIZES, **changes}
    config = AutoConfig.for_model(family, **{k: v for k, v in sizes.items() if hasattr(config, k)})
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return made


def packed(folder: Path, model: PreTrainedModel, config: Any = None, **given: Any) -> PreTrainedModel:
    model.save_pretrained(folder)
    made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config or Int8Config(group_size=32), **given
    ).eval()
    return made


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits.float()
    return found


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_every_usual_build_are_packed_and_answer_alike(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    made = packed(tmp_path / "plain", model)
    assert not stacked(made) and len(mixtures(made)) == len(mixtures(model))
    assert off(logits(made), logits(model)) < 0.05
    made.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), logits(made))
    plain = again.dequantize()
    assert [name for name, _ in stacked(plain)] == [name for name, _ in stacked(model)]
    assert set(plain.state_dict()) == set(model.state_dict())
    assert off(logits(plain), logits(made)) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [Int4Config(group_size=32), Int8Config(embeddings=None)], ids=["int4", "int8"])
def test_the_price_is_every_byte(config: Any, family: str, tmp_path: Path) -> None:
    made = packed(tmp_path / "plain", mixture(family), copy.deepcopy(config))
    made.save_pretrained(tmp_path / "packed")
    options = {"group_size": config.group_size, "embeddings": config.embeddings}
    shape = catalog.module(config.method).price(shape_of(tmp_path / "plain"), options).shape
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == sum(w.stored for w in shape.weights if not w.tied)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("config", [Int4Config(group_size=32), Dfloat11Config(cast=True)], ids=["int4", "dfloat11"])
def test_the_shape_of_a_packed_folder_is_that_of_its_model(config: Any, family: str, tmp_path: Path) -> None:
    made = packed(tmp_path / "plain", mixture(family), copy.deepcopy(config))
    made.save_pretrained(tmp_path / "packed")
    shape, before = shape_of(tmp_path / "packed"), shape_of(tmp_path / "plain")
    assert [(w.name, w.dims, w.role, w.used) for w in shape.weights] == [
        (w.name, w.dims, w.role, w.used) for w in before.weights
    ]
    held = {name: tensor.nbytes for name, tensor in made.state_dict().items()}
    for weight in shape.weights:
        if ".experts." in weight.name:
            owner, _, parameter = weight.name.rpartition(".")
            own = sum(size for name, size in held.items() if name.startswith(f"{owner}.{PARTS[parameter]}."))
            assert weight.stored == weight.resident == own
    assert sum(weight.stored for weight in shape.weights if not weight.tied) == sum(held.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_stay_as_they_are(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    made = packed(tmp_path / "plain", model)
    for mix in mixtures(model):
        for name, tensor in model.get_submodule(mix.router).state_dict().items():
            assert torch.equal(made.get_submodule(mix.router).state_dict()[name], tensor)


def test_each_experts_matrix_is_what_its_format_makes_of_it(tmp_path: Path) -> None:
    """For one format whose length depends on the numbers, and one whose length does not."""
    model = mixture("mixtral").bfloat16()
    for config, spec in ((Int4Config(group_size=32), "int4/32"), (Dfloat11Config(), "huffman/0")):
        made = packed(tmp_path / "plain", model, config, dtype="auto")
        for name, own in stacked(model):
            experts = made.get_submodule(name)
            assert isinstance(experts, PackedExperts)
            for parameter, matrices in experts.matrices().items():
                for number, weight in enumerate(own.get_parameter(parameter)):
                    alone = formats.parse(spec).pack(weight)
                    assert all(torch.equal(matrices.of(number)[leaf], alone[leaf]) for leaf in alone)
                whole = matrices.unpacked().view(own.get_parameter(parameter).shape)
                assert (spec != "huffman/0") or torch.equal(whole.bfloat16(), own.get_parameter(parameter))


def test_a_token_meets_its_own_experts_alone(tmp_path: Path) -> None:
    made = packed(tmp_path / "plain", mixture("mixtral"))
    name = mixtures(made)[0].experts
    experts: Any = made.get_submodule(name)
    x, gates = torch.randn(6, 32), torch.rand(6, 2)
    choices = torch.tensor([[0, 1], [7, 0], [3, 4], [3, 4], [8, 2], [5, 8]])  # 8 names nobody: another device's expert
    with torch.no_grad():
        found = experts(x, choices, gates)
        for token, row in enumerate(choices.tolist()):
            wanted = torch.zeros(32)
            for place, expert in enumerate(row):
                if expert < 8:
                    gate, up = experts.gate_up(x[token, None], expert).chunk(2, -1)
                    inner = torch.nn.functional.silu(gate) * up
                    wanted += gates[token, place] * experts.down(inner, expert)[0]
            torch.testing.assert_close(found[token], wanted)


def test_a_packing_of_ones_own_may_mix_formats(tmp_path: Path) -> None:
    model = mixture("mixtral")
    packing = {
        "model.layers.0.mlp.experts.gate_up": "uniform3/32", "model.layers.0.mlp.experts.down": "exponents/0",
        "model.layers.2.mlp.experts.gate_up": "int8/32", "model.layers.2.mlp.experts.down": "int4/32",
        "model.layers.1.self_attn.q_proj": "int8/32",
    }  # fmt: skip
    made = packed(tmp_path / "plain", model, PackedConfig(["layers.1.mlp.experts"], packing))
    said = made.config.quantization_config.packing
    assert {name: spec.partition("/")[0] for name, spec in said.items()} == {
        name: spec.partition("/")[0] for name, spec in packing.items()
    }
    made.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(made))
    assert [name for name, _ in stacked(made)] == ["model.layers.1.mlp.experts"]


@pytest.mark.parametrize("part", ["experts", "layers.0"])
def test_experts_may_be_left_alone(part: str, tmp_path: Path) -> None:
    made = packed(tmp_path / "plain", mixture("mixtral"), Int8Config(modules_to_not_convert=[part]))
    left = [name for name, _ in stacked(made)]
    assert len(left) == (1 if "layers.0" in part else 3)
    assert not [name for name, _ in packed_modules(made) if any(name.startswith(f"{other}.") for other in left)]
    shape = catalog.module("int8").price(shape_of(tmp_path / "plain"), {"modules_to_not_convert": [part]}).shape
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in made.state_dict().values()}
    assert sum(stored.values()) == sum(weight.stored for weight in shape.weights if not weight.tied)


def test_layers_of_unequally_many_experts(tmp_path: Path) -> None:
    model: Any = tiny_mixture.model()
    found = mixtures(model)
    rows = [[0, 1, 3], [0, 1, 2, 3]]
    to = [[0, 1, 2], [0, 1, 2, 0]]
    tensors = [{name: model.get_submodule(m.experts).get_parameter(name)[:3] for name in m.tensors} for m in found]
    smaller = regrouped.regroup(model, rows, to, tensors)
    made = packed(tmp_path / "plain", smaller)
    assert [made.get_submodule(m.experts).num_experts for m in found] == [3, 3]  # type: ignore[union-attr]
    assert off(logits(made), logits(smaller)) < 0.05
    made.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(made))


# ---- what cannot be ----


@pytest.mark.parametrize("part", ["down_proj", "layers.1.mlp.experts.gate_up_proj"])
def test_an_experts_two_matrices_go_together(part: str, tmp_path: Path) -> None:
    words = "tensors of model.layers.[01].mlp.experts cannot be left alone by itself.*Name experts"
    with pytest.raises(UsageError, match=words):
        packed(tmp_path / "plain", mixture("mixtral"), Int8Config(modules_to_not_convert=[part]))
    with pytest.raises(UsageError, match=words):
        catalog.module("int8").price(shape_of(tmp_path / "plain"), {"modules_to_not_convert": [part]})


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    model = mixture("mixtral")
    model.get_parameter("model.layers.1.mlp.experts.down_proj").data[5, 3, 2] = torch.inf
    with pytest.raises(UsageError, match=r"layers.1.mlp.experts.down_proj cannot be quantized.*finite"):
        packed(tmp_path / "plain", model)


def test_what_is_lacking_is_not_drawn_at_random(tmp_path: Path) -> None:
    model = mixture("mixtral")
    model.save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "model.safetensors"
    held = load_file(file)
    save_file({name: tensor for name, tensor in held.items() if "layers.1." not in name or "w2" not in name}, file)
    with pytest.raises(UsageError, match="no weight for a packed matrix of 256 x 48"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=Int8Config())


@pytest.mark.parametrize("leaf", ["weight", "scales"])
def test_codes_that_are_lacking_are_not_drawn_at_random(leaf: str, tmp_path: Path) -> None:
    packed(tmp_path / "plain", mixture("mixtral")).save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    held = load_file(file)
    save_file(
        {name: t for name, t in held.items() if not name.endswith(f"1.block_sparse_moe.experts.down.{leaf}")}, file
    )
    with pytest.raises(UsageError, match=f"no {leaf} for a packed matrix"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")

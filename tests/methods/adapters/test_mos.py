from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from shoestring.core import catalog
from shoestring.lab import tiny

mos = catalog.module("mos")
catalog.contract("adapters").adopt(mos)


def wrapped(seed: int = 0, base: Any = None, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(base or tiny.model(), mos.MosConfig(**options)).eval()


def stirred(model: PeftModel, seed: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, mos.MosLinear)}


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------- pools


@pytest.mark.parametrize(("e", "r", "p", "c"), [(2, 3, 1, 4), (2, 4, 0, 8), (3, None, 1, 1), (4, 4, 4, 2)])
def test_as_many_numbers_as_a_lora_of_the_equivalent_rank(e: int, r: int | None, p: int, c: int) -> None:
    lora = get_peft_model(tiny.model(), LoraConfig(r=e, target_modules="all-linear"))
    assert trained(wrapped(equivalent_rank=e, r=r, private_rank=p, shards=c)) == trained(lora)


def test_one_pool_for_all_layers_of_a_kind() -> None:
    model = wrapped(equivalent_rank=3, shards=4)
    pools = model.base_model.moshard_A["default"]
    assert set(pools) == {"q_proj_64x64", "k_proj_64x32", "v_proj_64x32", "o_proj_64x64", "gate_proj_64x96",
                          "up_proj_64x96", "down_proj_96x64"}  # fmt: skip
    assert pools["down_proj_96x64"].shape == (3 * 2 * 4, 24)
    assert model.base_model.moshard_B["default"]["down_proj_96x64"].shape == (3 * 2 * 4, 16)
    assert model.peft_config["default"].pools["down_proj_96x64"] == [
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj",
    ]  # fmt: skip
    assert not any("moshard" in name for name, _ in model.base_model.model.named_parameters())


def test_one_name_of_two_shapes_has_two_pools() -> None:
    model = wrapped(base=tiny.model("gpt2"))
    pools = model.peft_config["default"].pools
    assert pools["c_proj_64x64"] == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    assert pools["c_proj_96x64"] == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]


def test_a_public_shard_learns_from_every_layer_that_drew_it() -> None:
    model = stirred(wrapped(equivalent_rank=2, r=3, private_rank=1, shards=2))
    model(**tiny.inputs(model)).loss.backward()
    pool = model.base_model.moshard_A["default"]["up_proj_64x96"]
    # The same model with ordinary matrices in place of the pools, one layer after another.
    summed, users = torch.zeros_like(pool), torch.zeros(len(pool), dtype=torch.int64)
    for layer in (layer for name, layer in layers(model).items() if name.endswith("up_proj")):
        a, b = (matrix.detach().clone().requires_grad_() for matrix in layer.matrices("default"))
        layer.matrices = lambda _, a=a, b=b: (a, b)
        model.zero_grad()
        model(**tiny.inputs(model)).loss.backward()
        del layer.matrices
        for row, gradient in zip(layer.moshard_index_A["default"].tolist(), a.grad.reshape(-1, 32)):
            summed[row] += gradient
            users[row] += 1
    model.zero_grad()
    model(**tiny.inputs(model)).loss.backward()
    assert (users == 2).any(), "no shard is shared, so the test would show nothing"
    torch.testing.assert_close(pool.grad, summed, rtol=1e-4, atol=1e-7)


def test_pools_start_like_the_vectors_they_are_parts_of() -> None:
    model = wrapped(shards=16, equivalent_rank=8, base=tiny.model(num_hidden_layers=4))
    for a, b in zip(*(side["default"].values() for side in (model.base_model.moshard_A, model.base_model.moshard_B))):
        bound = (a.shape[1] * 16) ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound and not b.any()


# ---------------------------------------------------------------- drawing and assembly


@pytest.mark.parametrize(("e", "r", "p", "c"), [(2, 3, 1, 4), (3, 7, 0, 1), (4, 3, 2, 2)])
def test_a_layer_draws_public_shards_once_and_owns_its_private_ones(e: int, r: int, p: int, c: int) -> None:
    config = mos.MosConfig(equivalent_rank=e, r=r, private_rank=p, shards=c)
    many = 3
    public = (e - p) * many * c
    owned = []
    for place in range(many):
        drawn = mos.draw(config, r, place, many).tolist()
        assert len(drawn) == r * c == len(set(drawn))
        assert all(row < public for row in drawn[: (r - p) * c])
        assert drawn[(r - p) * c :] == list(range(public + place * p * c, public + (place + 1) * p * c))
        owned += drawn[(r - p) * c :]
    assert sorted(owned) == list(range(public, e * many * c))


def test_a_row_is_its_shards_one_after_another() -> None:
    model = stirred(wrapped(equivalent_rank=2, r=3, shards=4))
    layer = layers(model)["model.layers.1.mlp.down_proj"]
    a, b = layer.matrices("default")
    pools = [side["default"]["down_proj_96x64"] for side in (model.base_model.moshard_A, model.base_model.moshard_B)]
    rows = [layer.moshard_index_A["default"].tolist(), layer.moshard_index_B["default"].tolist()]
    for matrix, pool, drawn in zip((a, b), pools, rows):
        for k in range(3):
            torch.testing.assert_close(matrix[k], torch.cat([pool[drawn[4 * k + j]] for j in range(4)]), rtol=0, atol=0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 16 / 3 * b.T @ a)


def test_each_means_of_telling_layers_apart_can_be_switched_off() -> None:
    def rows(**options: Any) -> list[tuple[list[int], list[int]]]:
        model = wrapped(target_modules=["up_proj"], **options)
        return [(m.moshard_index_A["default"].tolist(), m.moshard_index_B["default"].tolist())
                for m in layers(model).values()]  # fmt: skip

    (a0, b0), (a1, b1) = rows(equivalent_rank=4, r=4, private_rank=1, shards=4)
    assert a0 != a1 and a0 != b0 and a1 != b1
    (a0, b0), (a1, b1) = rows(equivalent_rank=4, r=4, private_rank=1, shards=4, pair_dissociation=False)
    assert a0 == b0 and a1 == b1 and a0 != a1
    (a0, _), (a1, _) = rows(equivalent_rank=2, r=4, private_rank=0, shards=1)  # r = e L: no subset, no shards, no own
    assert sorted(a0) == sorted(a1) == list(range(4))
    (a0, b0), (a1, b1) = rows(equivalent_rank=2, r=2, private_rank=2, shards=1)  # all private
    assert a0 == b0 == [0, 1] and a1 == b1 == [2, 3]


def test_without_sharing_it_is_lora() -> None:
    model = stirred(wrapped(equivalent_rank=3, r=3, private_rank=3, shards=1, alpha=6.0))
    lora = get_peft_model(tiny.model(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")).eval()
    for name, layer in layers(model).items():
        a, b = layer.matrices("default")
        other = lora.get_submodule(f"base_model.model.{name}")
        other.lora_A["default"].weight.data.copy_(a)
        other.lora_B["default"].weight.data.copy_(b.T)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(lora))


def test_r_left_out_is_what_the_pool_has_room_for() -> None:
    assert {layer.r["default"] for layer in layers(wrapped()).values()} == {3}
    deep = wrapped(base=tiny.model(num_hidden_layers=20), target_modules=["q_proj"])
    assert {layer.r["default"] for layer in layers(deep).values()} == {16}


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 4}, ["r=4", "at most 3", "equivalent_rank of at least 3"]),
        ({"r": 3, "equivalent_rank": 2, "private_rank": 2}, ["r=2"]),
        ({"private_rank": 3}, ["private_rank=3", "equivalent_rank=2"]),
        ({"r": 1, "private_rank": 2}, ["r=1", "private_rank=2"]),
        ({"shards": 5}, ["shards=5", "model.layers.0.self_attn.q_proj", "64"]),
        ({"shards": 0}, ["shards=0"]),
        ({"dropout": 1.5}, ["dropout=1.5"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_numbers_that_cannot_be_are_refused_before_the_model_is_touched(options: dict, words: list[str]) -> None:
    base = tiny.model()
    with pytest.raises(ValueError) as error:
        get_peft_model(base, mos.MosConfig(**options))
    assert all(word in str(error.value) for word in words), error.value
    assert not layers(base) and not any("moshard" in name for name, _ in base.named_modules())


def test_the_bounds_that_an_error_names_do_work() -> None:
    assert {layer.r["default"] for layer in layers(wrapped(r=3)).values()} == {3}
    assert {layer.r["default"] for layer in layers(wrapped(r=4, equivalent_rank=3)).values()} == {4}


def test_a_target_that_is_no_linear_layer_is_named() -> None:
    with pytest.raises(TypeError, match="embed_tokens is a Embedding"):
        wrapped(target_modules=["embed_tokens"])


# ---------------------------------------------------------------- several adapters


def test_an_adapter_of_other_numbers_works_beside_the_first() -> None:
    model = stirred(wrapped())
    one = tiny.logits(model)
    model.add_adapter("two", mos.MosConfig(equivalent_rank=4, r=5, private_rank=2, shards=8, alpha=8.0,
                                           target_modules=["q_proj", "up_proj"]))  # fmt: skip
    torch.testing.assert_close(tiny.logits(model), one)
    model.set_adapter("two")
    assert trained(model) == 4 * 2 * (64 + 64 + 64 + 96)
    two = tiny.logits(stirred(model, 2))
    model.base_model.set_adapter(["default", "two"])
    deltas = {
        name: sum(layer.get_delta_weight(adapter) for adapter in layer.acting) for name, layer in layers(model).items()
    }
    both = tiny.model()
    for name, delta in deltas.items():
        both.get_submodule(name).weight.data += delta
    torch.testing.assert_close(tiny.logits(model), tiny.logits(both), rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    torch.testing.assert_close(tiny.logits(model), one)
    model.delete_adapter("default")
    assert set(model.base_model.moshard_A) == {"two"} and trained(model) == 4 * 2 * (64 + 64 + 64 + 96)
    torch.testing.assert_close(tiny.logits(model), two)


def test_only_the_active_adapter_trains_and_adding_one_changes_nothing() -> None:
    model = wrapped()
    full = trained(model)
    model.add_adapter("two", mos.MosConfig(equivalent_rank=1, private_rank=0, inference_mode=True))
    assert trained(model) == full
    with model.disable_adapter():
        assert trained(model) == 0
    assert trained(model) == full
    model.set_adapter("two")
    assert trained(model) == full // 2
    model.set_requires_grad("two", False)
    assert trained(model) == 0
    assert model.get_model_status().available_adapters == ["default", "two"]


def test_layers_left_out_do_not_count() -> None:
    base = tiny.model(num_hidden_layers=5)
    model = wrapped(base=base, layers_to_transform=[1, 3, 4], target_modules=["q_proj"], equivalent_rank=2)
    assert model.base_model.moshard_A["default"]["q_proj_64x64"].shape[0] == 2 * 3 * 4


# ---------------------------------------------------------------- files


def test_the_file_holds_pools_and_draws_and_no_more(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = stirred(wrapped(r=3))
    model.save_pretrained(tmp_path / "mos")
    tensors = load_file(tmp_path / "mos" / "adapter_model.safetensors")
    draws = {name: t for name, t in tensors.items() if "index" in name}
    assert len(draws) == 2 * 14 and {t.dtype for t in draws.values()} == {torch.int32}
    assert sum(t.numel() for t in tensors.values()) == trained(model) + 2 * 14 * 3 * 4
    recwarn.clear()
    again = PeftModel.from_pretrained(tiny.model(seed=0), tmp_path / "mos", adapter_name="other")
    assert not [w for w in recwarn if "missing" in str(w.message)]
    assert torch.equal(tiny.logits(again.eval()), tiny.logits(model))


def test_the_draw_is_the_files_and_not_the_seeds(tmp_path: Path) -> None:
    model = stirred(wrapped())
    model.save_pretrained(tmp_path)
    torch.manual_seed(12345)
    again = PeftModel.from_pretrained(tiny.model(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("change", ["beyond", "negative", "floats"])
def test_a_file_with_an_impossible_draw_is_refused(change: str, tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.moshard_index_B"
    tensors[name] = tensors[name].float() if change == "floats" else tensors[name].clone()
    tensors[name][0] = {"beyond": 16, "negative": -1, "floats": 0}[change]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.moshard_index_B"):
        PeftModel.from_pretrained(tiny.model(), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exported_it_is_a_plain_lora(family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if family == "llama" else {"exclude_modules": r".*h\.0\.mlp.*"}
    model = stirred(wrapped(base=tiny.model(family), equivalent_rank=3, task_type="CAUSAL_LM", **options))
    assert len({layer.r["default"] for layer in layers(model).values()}) == (1 if family == "llama" else 2)
    model.save_pretrained(tmp_path / "mos")
    mos.as_lora(tmp_path / "mos", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    lora = PeftModel.from_pretrained(tiny.model(family), tmp_path / "lora").eval()
    torch.testing.assert_close(tiny.logits(lora), tiny.logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tiny.logits(lora), tiny.logits(tiny.model(family)), atol=1e-2)


def test_a_head_trained_in_full_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    base = tiny.model(tie_word_embeddings=False)
    model = stirred(wrapped(base=base, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "mos")
    mos.as_lora(tmp_path / "mos", tmp_path / "lora")
    for folder in ("mos", "lora"):
        again = PeftModel.from_pretrained(tiny.model(tie_word_embeddings=False), tmp_path / folder).eval()
        torch.testing.assert_close(tiny.logits(again), tiny.logits(model), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what is kept at work


def test_matrices_are_kept_only_where_nothing_trains(tmp_path: Path) -> None:
    model = stirred(wrapped())
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    tiny.logits(model)
    assert not layer._assembled, "pools that train may change at any time"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    layer = layers(again)["model.layers.0.mlp.up_proj"]
    before = tiny.logits(again)
    kept = layer._assembled["default"][1]
    tiny.logits(again)
    assert layer._assembled["default"][1] is kept, "not assembled twice"
    with torch.no_grad():
        again.base_model.moshard_A["default"]["up_proj_64x96"].mul_(2)
        again.base_model.moshard_B["default"]["up_proj_64x96"].mul_(2)
    assert not torch.allclose(tiny.logits(again), before, atol=1e-3), "a change of the pools is seen"
    again.load_adapter(str(tmp_path), "default")
    torch.testing.assert_close(tiny.logits(again), before)
    again.train()
    assert not layer._assembled
    again.eval()
    for number in range(2 * mos.CACHED):
        again.load_adapter(str(tmp_path), f"n{number}")
        again.set_adapter(f"n{number}", inference_mode=True)
        tiny.logits(again)
    assert len(layer._assembled) == mos.CACHED


def test_a_cast_of_the_model_leaves_the_draw_alone() -> None:
    model = stirred(wrapped())
    rows = {name: layer.moshard_index_A["default"].clone() for name, layer in layers(model).items()}
    model.to(torch.bfloat16)
    for name, layer in layers(model).items():
        assert layer.moshard_index_A["default"].dtype == torch.int32
        assert torch.equal(layer.moshard_index_A["default"], rows[name])
    assert torch.isfinite(tiny.logits(model)).all()


def test_pools_are_float32_beside_a_bfloat16_base() -> None:
    model = wrapped(base=tiny.model(dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("quantizer", ["int4", "int8"])
def test_on_frozen_integers(quantizer: str, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=catalog.load(quantizer)(group_size=32))
    model = wrapped(base=base)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(15):
        loss = model(**tiny.inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    with pytest.raises(ValueError, match="packed"):
        model.merge_adapter()


@pytest.mark.real
def test_on_the_default_model(tmp_path: Path) -> None:
    from shoestring import models

    model = get_peft_model(models.load("smollm2").model, mos.example())
    assert trained(model) == 610_560
    assert {layer.r["default"] for layer in layers(model).values()} == {16}
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < 4 * 610_560 + 2 * 210 * 64 * 4 + 100_000

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.lab import tiny
from shoestring.methods.adapters import _contract, _peft
from shoestring.models import inspect, shape_of
from shoestring.training import TrainOptions, train

TUNERS = [n for n in catalog.in_room("adapters") if type(catalog.module(n).example()).__module__.startswith("peft.")]


def counted(name: str, options: dict[str, Any], family: str = "llama", kind: str = "causal") -> int:
    model = _contract.wrap(catalog.module(name), tiny.model(family), options, kind)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dora", {"target_modules": ["q_proj", "mlp.down_proj"]}), ("vera", {"target_modules": r".*\.1\..*_proj"}),
        ("lokr", {"decompose_both": True, "r": 2}), ("lokr", {"decompose_factor": 4}), ("lokr", {"r": 1}),
        ("tinylora", {"weight_tying": 0.5}), ("tinylora", {"weight_tying": 1.0, "u": 13}),
        ("tinylora", {"weight_tying": 0.3}), ("road", {"variant": "road_2"}), ("road", {"variant": "road_4"}),
        ("osf", {"effective_rank": 20}), ("osf", {"effective_rank": None}),
        ("gralora", {"hybrid_r": 4, "gralora_k": 4}), ("lily", {"stride_A": 2, "num_B": 3}),
        ("lily", {"target_modules": ["q_proj", "up_proj"]}), ("c3a", {"block_size": 8}),
        ("vblora", {"vector_length": 16, "num_vectors": 12}), ("oft", {"oft_block_size": 16}),
        ("boft", {"boft_block_size": 8, "target_modules": ["up_proj"]}), ("adaption_prompt", {"adapter_layers": 1}),
        ("p_tuning", {"encoder_hidden_size": 7, "num_virtual_tokens": 3}), ("randlora", {"r": 5}),
        ("ia3", {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("ln_tuning", {"target_modules": ["norm"]}), ("trainable_tokens", {"token_indices": [5, 60]}),
        ("adalora", {"init_r": 6, "target_r": 2}), ("psoft", {"r": 7}), ("prefix_tuning", {"num_virtual_tokens": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_formulas_hold_for_other_options(name: str, options: dict[str, Any]) -> None:
    promised = catalog.module(name).price(shape_of(tiny.model()), options).trainable
    assert counted(name, options) == promised


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "causal"), ("t5", "seq2seq"), ("qwen3", "causal")])
def test_formulas_hold_for_other_families(family: str, kind: str) -> None:
    shape, apart, fitting = shape_of(tiny.model(family)), {}, 0
    for name in TUNERS:
        module = catalog.module(name)
        try:
            found = counted(name, {}, family, kind)
        except UsageError:
            continue
        fitting += 1
        promised = module.price(shape, {}).trainable
        if found != promised:
            apart[name] = (found, promised)
    assert fitting > 12 and not apart, apart


def test_every_type_of_peft_is_carried_or_listed() -> None:
    listed = {row["name"].upper(): row for row in _contract.others()}
    carried = {catalog.module(name).example().peft_type.value for name in catalog.in_room("adapters")}
    assert not carried & set(listed)
    assert carried | set(listed) == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {row["why"] for name, row in listed.items() if name in _peft.NEEDS}.isdisjoint({"no file yet"})


def test_reasons_are_for_types_that_peft_still_has() -> None:
    assert set(_peft.NEEDS) <= {row["name"].upper() for row in _contract.others()}


def test_a_trait_that_is_not_so_is_found() -> None:
    module = catalog.module("road")
    for change in ({"merges": "no"}, {"family": "wonderful"}, {"acts_on": "everything"}):
        told = replace(module.METHOD, traits={**module.METHOD.traits, **change})
        lying = SimpleNamespace(
            METHOD=told, settings=module.settings, example=module.example, price=module.price, __name__="lying"
        )
        with pytest.raises(AssertionError, match=next(iter(change.values()))):
            _contract.check_traits(lying)  # type: ignore[arg-type]
    _contract.check_traits(module)


def test_what_peft_cannot_build_names_options_and_model() -> None:
    with pytest.raises(UsageError, match=r"C3AConfig does not fit LlamaForCausalLM.*block_size=5"):
        _contract.wrap(catalog.module("c3a"), tiny.model(), {"block_size": 5})
    with pytest.raises(UsageError, match="OLoRA|LoraConfig does not fit GPT2LMHeadModel"):
        _contract.wrap(catalog.module("olora"), tiny.model("gpt2"), {})
    with pytest.raises(UsageError, match="num_virtual_tokens=0"):
        _contract.wrap(catalog.module("prompt_tuning"), tiny.model(), {"num_virtual_tokens": 0})


def test_on_packed_weights_each_works_or_says_why_not(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    packing, refused = catalog.load("int4")(group_size=32), []
    for name in TUNERS:
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=packing)
        plain = tiny.logits(base)
        try:
            model = _contract.wrap(catalog.module(name), base, {})
        except UsageError as error:
            assert "with packed weights" in str(error), f"{name}: {error}"
            refused.append(name)
            continue
        if "check_starts_as_the_base_model" not in catalog.get(name).expects:
            torch.testing.assert_close(tiny.logits(model.eval()), plain, atol=1e-4, rtol=1e-3)
        model(**tiny.inputs(base)).loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), name
    assert "hira" in refused and "road" not in refused and len(refused) < len(TUNERS) / 2


def test_options_follow_the_model_until_they_are_given() -> None:
    module = catalog.module("c3a")
    for options, size in (({}, 32), ({"block_size": 16}, 16)):
        config: Any = _contract.wrap(module, tiny.model(), options).peft_config["default"]
        assert config.block_size == size
    deep = shape_of(tiny.model(num_hidden_layers=32))
    assert catalog.module("adaption_prompt").fitted(deep) == {"adapter_layers": 30}


def test_adalora_spends_its_budget_over_the_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _contract.wrap(catalog.module("adalora"), tiny.model(), {"init_r": 6, "target_r": 2, "tfinal": 2})
    ids = tiny.batch(24, 12)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    options = TrainOptions(max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=0)
    train(model, rows, [], options, tmp_path / "run")
    left = {n: int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n}
    assert len(left) == 14 and sum(left.values()) == 2 * 14, left
    assert len(set(left.values())) > 1, "every weight got the same rank"
    model.eval().save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "adapter")).eval()
    ranks = {n: p.shape[0] for n, p in again.named_parameters() if "lora_E" in n}
    assert ranks == left, "the file holds more than what is left"
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model), atol=1e-5, rtol=1e-4)


def test_what_stands_beside_an_adapter_is_not_trained_in_bfloat16_either() -> None:
    model = _contract.wrap(catalog.module("adalora"), tiny.model(dtype=torch.bfloat16), {})
    promised = catalog.module("adalora").price(shape_of(tiny.model()), {}).trainable
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == promised


@pytest.mark.parametrize("name", TUNERS)
def test_the_parts_of_an_adapted_model_are_still_found(name: str) -> None:
    plain, model = tiny.model(), tiny.model()
    _contract.wrap(catalog.module(name), model, {})
    found, was = inspect(model), inspect(plain)
    assert [b.projections.keys() for b in found.blocks] == [b.projections.keys() for b in was.blocks]
    assert shape_of(model).context == shape_of(plain).context

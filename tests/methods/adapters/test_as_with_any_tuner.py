"""What users of peft do with any tuner, beyond what the room's contract tries on a tiny language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from shoestring.core import catalog
from shoestring.lab import tiny

CONTRACT = catalog.contract("adapters")
ROUNDED = ("l4q", "lr_qat")
OURS = sorted(method.name for method in catalog.that_define("register") if method.room == "adapters")
GATED = ("exit_heads", "m2r2")  # they say where they stand by the numbers of their gates


class InPlace(nn.Module):
    """Adds in place to what a layer gives, as DeBERTa does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, length, 32) -> (rows, 32, length)"""
        y = self.layer(x).permute(0, 2, 1)
        y += 1
        return y


class Stack(nn.Module):
    """A network that is none of transformers' and calls its parts `layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 32) -> (rows, 32)"""
        for layer in self.layers:
            x = layer(x).relu()
        return x


def wrapped(name: str, base: nn.Module, **options: Any) -> Any:
    module = catalog.module(name)
    module.register()
    torch.manual_seed(0)
    config = type(module.example())(**{**module.settings()[0], "target_modules": "all-linear", **options})
    return get_peft_model(base, config).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*ROUNDED, "pst", "mos", "triadapt_lora"])
def test_a_file_is_read_into_adapters_that_take_no_memory_before(name: str, tmp_path: Path) -> None:
    model = CONTRACT._stir(wrapped(name, tiny.model(), **({"group_size": 32} if name in ROUNDED else {})))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.model(), str(tmp_path), low_cpu_mem_usage=True).eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("name", ROUNDED)
def test_merging_twice_is_said_to_do_nothing(name: str) -> None:
    model = wrapped(name, tiny.model(), group_size=32)
    model.merge_adapter()
    merged = tiny.logits(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert torch.equal(tiny.logits(model), merged)


@pytest.mark.parametrize("name", [*ROUNDED, "pst", "paca", "mos", "triadapt_lora"])
def test_what_a_model_calls_layers_stays_within_reach(name: str) -> None:
    model = wrapped(name, Stack(), target_modules=["0", "1"], **({"group_size": 32} if name in ROUNDED else {}))
    assert model.layers[0] is model.base_model.model.layers[0] and model.layers[0].has("default")


@pytest.mark.parametrize("name", ["paca", "pst", *ROUNDED, "mos", "triadapt_lora", "ssf"])
def test_a_model_that_adds_in_place(name: str) -> None:
    model = wrapped(name, InPlace(), target_modules=["layer"], **({"group_size": 32} if name in ROUNDED else {}))
    model.train()(torch.randn(2, 5, 32)).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["paca", "pst", *ROUNDED, "ssf"])
def test_a_model_that_reads_no_tokens(name: str) -> None:
    torch.manual_seed(0)
    settings = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    more = {"group_size": 32} if name in ROUNDED else {"target_modules": None} if name == "ssf" else {}
    model = wrapped(name, ViTForImageClassification(settings), **more)
    model.train()
    model(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_weighting_net_needs_a_language_model() -> None:
    with pytest.raises(ValueError, match="Stack has no table of tokens.*weighting=False"):
        wrapped("perk", Stack(), target_modules=["0"])
    assert wrapped("perk", Stack(), target_modules=["0"], weighting=False)(torch.ones(1, 32)).shape == (1, 32)


def of_our_own(name: str, **options: Any) -> Any:
    options |= {"invertible": {"form": "seq_bn"}, "connected": {"norm": True}}.get(name, {})
    return CONTRACT.wrap(catalog.module(name), tiny.model(), options | ({"group_size": 32} if name in ROUNDED else {}))


@pytest.mark.parametrize("name", OURS)
def test_two_files_are_read_into_one_model_and_written_apart(name: str, tmp_path: Path) -> None:
    answers = {}
    for seed, called in enumerate(("one", "two"), 1):
        torch.manual_seed(seed)
        model = CONTRACT._stir(of_our_own(name), seed).eval()
        model.save_pretrained(tmp_path / called)
        answers[called] = tiny.logits(model)
    both = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "one"), "one")
    both.load_adapter(str(tmp_path / "two"), "two")
    for called, answer in answers.items():
        both.set_adapter(called)
        assert torch.equal(tiny.logits(both.eval()), answer), called
    both.save_pretrained(str(tmp_path / "again"))
    for called in answers:
        tensors, again = (load_file(tmp_path / at / "adapter_model.safetensors") for at in (called, f"again/{called}"))
        assert list(tensors) == list(again) and all(torch.equal(tensors[key], again[key]) for key in tensors)


@pytest.mark.parametrize("name", [name for name in OURS if name not in GATED])
@pytest.mark.parametrize("target", ["all-linear", None])
def test_only_the_layers_that_are_asked_for(name: str, target: str | None) -> None:
    whole_blocks = name in ("connected", "invertible")
    model = of_our_own(name, layers_to_transform=[1], **{} if whole_blocks else {"target_modules": target})
    reached = [place for place, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert reached and all(".layers.1" in place for place in reached)


@pytest.mark.parametrize("name", [name for name in OURS if name != "mixlora"])
def test_rows_with_adapters_of_their_own_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"adapter_names is not possible: {name} has.*once for each adapter"):
        of_our_own(name)(input_ids=tiny.batch(), adapter_names=["default", "default"])


def test_an_adapter_that_is_called_as_a_layer_is_costs_others_no_tensors_of_others(tmp_path: Path) -> None:
    model = of_our_own("pst")
    model.add_adapter("1", model.peft_config["default"])
    with pytest.raises(ValueError, match="an adapter is called '1', as a part of the model is.*another name"):
        model.save_pretrained(tmp_path, selected_adapters=["default"])
    model.save_pretrained(tmp_path, selected_adapters=["1"])
    saved = load_file(tmp_path / "1" / "adapter_model.safetensors")
    assert len(saved) == sum(key.endswith(".1") for key in model.state_dict()) > 0

"""A model's numbers, from the model and from its folder, agree with what torch holds, counts and stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import CAUSAL, MASKED, SEQ2SEQ, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shoestring.core.errors import UsageError
from shoestring.models import inspect, load, shape_of
from shoestring.models.flops import count_flops, forward_flops, training_flops
from shoestring.models.surgery import replace_module


@pytest.mark.parametrize("family", sorted({**CAUSAL, **MASKED, **SEQ2SEQ}))
def test_parameters_and_bytes(family: str) -> None:
    model = tiny(family)
    shape = shape_of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.resident == sum(p.numel() * p.element_size() for p in model.parameters())
    assert shape.hidden == 32 and shape.heads == 4 and shape.vocab == 96 and shape.head_dim == 8


@pytest.mark.parametrize("family", sorted({**CAUSAL, **MASKED}))
def test_flops_of_a_forward_pass(family: str) -> None:
    model, ids = tiny(family), torch.full((2, 16), 5)
    shape = shape_of(model)
    flops, status = count_flops(lambda: model(input_ids=ids))
    assert status == "counted" and flops == pytest.approx(forward_flops(shape, 32, context=16), rel=1e-3)


@pytest.mark.parametrize("family", CAUSAL)
def test_kv_bytes_are_those_of_the_cache(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        cache = model(input_ids=torch.full((1, 16), 5), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert shape_of(model).kv_bytes(16, bytes_per_value=1) == held


def test_a_folder_has_the_shape_of_its_model(folder_of: Callable[..., Path]) -> None:
    for family in ("llama", "gpt2", "bert", "t5", "mixtral"):
        folder = folder_of(family)
        of_folder, of_model = shape_of(folder), shape_of(load(folder, dtype="fp32").model)
        assert of_folder.parameters == of_model.parameters and of_folder.resident == of_model.resident
        assert [(w.role, w.dims, w.tied) for w in of_folder.weights] == [
            (w.role, w.dims, w.tied) for w in of_model.weights
        ]
        assert of_folder.storage == sum(f.stat().st_size for f in folder.iterdir()), family


class Packed(nn.Linear):
    """A linear layer in one byte a weight, with two bytes of scale for each row."""

    def __init__(self, inner: nn.Linear, *, in_buffer: bool) -> None:
        super().__init__(inner.in_features, inner.out_features, bias=False)
        codes = torch.zeros(inner.out_features, 2, inner.in_features // 2, dtype=torch.int8)
        del self.weight
        if in_buffer:
            self.register_buffer("codes", codes)
        else:
            self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", torch.zeros(inner.out_features, dtype=torch.bfloat16))


@pytest.mark.parametrize("in_buffer", [False, True])
def test_a_packed_matrix_keeps_its_dimensions_and_shows_its_bytes(in_buffer: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    before = shape_of(model)
    for name, module, _ in list(inspect(model).linears()):
        replace_module(model, name, Packed(module, in_buffer=in_buffer))
    after = shape_of(model)
    assert after.parameters == before.parameters and after.flops_per_token() == before.flops_per_token()
    held = {id(t): t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values()}
    assert after.resident == sum(held.values()) < before.resident
    assert {w.name: (w.role, w.dims) for w in after.weights} == {w.name: (w.role, w.dims) for w in before.weights}


def test_a_packed_folder_shows_its_bytes(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    before = shape_of(folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weights[f"{name}.weight"] = torch.zeros(48, 16, dtype=torch.uint8)
    weights[f"{name}.scales"] = torch.zeros(48, 1, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    after = shape_of(folder)
    (packed,) = [w for w in after.weights if w.name == f"{name}.weight"]
    assert packed.dims == (48, 32) and packed.stored == packed.resident == 48 * 16 + 48 * 2
    assert before.resident - after.resident == 48 * 32 * 4 - packed.stored
    assert after.storage == sum(f.stat().st_size for f in folder.iterdir())


def test_tied_weights_cost_once() -> None:
    shape = shape_of(tiny("llama", tie_word_embeddings=True))
    (head,) = shape.of("head")
    assert head.tied == "model.embed_tokens.weight" and head.stored == head.resident == 0 and head.dims == (96, 32)
    untied = shape_of(tiny("llama"))
    assert untied.parameters - shape.parameters == 96 * 32
    assert untied.flops_per_token() == shape.flops_per_token()


def test_training_is_three_forward_passes_and_two_when_the_base_is_frozen() -> None:
    model, ids = tiny("llama", attn_implementation="eager"), torch.full((1, 16), 5)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    shape = shape_of(model)
    forward, _ = count_flops(lambda: model(input_ids=ids))
    assert count_flops(step)[0] == pytest.approx(3 * forward, rel=0.02)  # nothing flows back into the embedding
    assert training_flops(shape, 16, 16) == pytest.approx(3 * forward, rel=1e-6)
    frozen = training_flops(shape, 16, base_trained=False)
    assert frozen == 2 * forward_flops(shape, 16)
    assert training_flops(shape, 16, recompute=True) == 4 * forward_flops(shape, 16)


def test_work_outside_torch_is_modelled() -> None:
    shape = shape_of(tiny("llama"))
    flops, status = count_flops(lambda: None, shape, tokens=16)
    assert status == "modelled" and flops == forward_flops(shape, 16)


def test_an_adapter_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is an adapter"):
        shape_of(tmp_path)


@pytest.mark.real
def test_the_default_model() -> None:
    loaded = load("smollm2", dtype="bf16")
    shape = shape_of(loaded.path)
    assert shape.parameters == 134_515_008 == shape_of(loaded.model).parameters
    assert shape.resident == 2 * 134_515_008 and (shape.layers, shape.kv_heads, shape.context) == (30, 3, 8192)
    visible = [file for file in loaded.path.iterdir() if not file.name.startswith(".")]
    assert shape.storage == sum(file.stat().st_size for file in visible)
    ids = torch.arange(3, 131).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        loaded.model(ids)
    attention = shape.flops_per_token(128) - shape.flops_per_token(0)
    counted = counter.get_total_flops()  # torch's own counter leaves attention on the CPU out
    assert counted == pytest.approx(shape.flops_per_token(0) * 128, rel=1e-3)
    assert count_flops(lambda: loaded.model(ids))[0] == pytest.approx(counted + 128 * attention, rel=1e-3)

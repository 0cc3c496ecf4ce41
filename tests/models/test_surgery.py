"""Modules are replaced and blocks dropped so that the model still works; not while an optimizer holds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import tiny
from torch import nn

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.models import inspect, load, save
from shoestring.models.surgery import drop_blocks, freeze_structure, get_module, replace_module, unfreeze_structure


def test_replace() -> None:
    model = tiny("llama")
    old = replace_module(model, "model.layers.1.mlp.up_proj", nn.Linear(32, 48, bias=False))
    assert old.weight.shape == (48, 32) and get_module(model, "model.layers.1.mlp.up_proj") is not old
    replace_module(model, "model.layers.0", model.model.layers[1])
    assert model.model.layers[0] is model.model.layers[1]


def test_unknown_module_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Did you mean .*model\.layers\.0\.mlp\.up_proj"):
        replace_module(tiny("llama"), "model.layers.0.mlp.upproj", nn.Identity())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "opt", "bloom", "gpt_neox"])
def test_dropped_blocks_leave_a_model_that_generates_the_same_with_and_without_cache(
    family: str, tmp_path: Path
) -> None:
    model = tiny(family, **({"n_layer": 4} if family in ("gpt2", "bloom") else {"num_hidden_layers": 4}))
    kept = [block.module for block in inspect(model).blocks]
    drop_blocks(model, [1, 2])
    assert [block.module for block in inspect(model).blocks] == [kept[0], kept[3]]
    ids = torch.full((1, 6), 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, **options, use_cache=True)
    assert torch.equal(cached, model.generate(ids, **options, use_cache=False))
    save(model, None, tmp_path / "small")
    again = load(tmp_path / "small").model
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_drop_from_one_stack_of_two(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    for family in ("t5", "bart"):
        model = tiny(family)
        with pytest.raises(UsageError, match="2 stacks"):
            drop_blocks(model, [1])
        drop_blocks(model, [1], stack="decoder")
        assert [block.stack for block in inspect(model).blocks] == ["encoder", "encoder", "decoder"]
        save(model, None, tmp_path / family)
        ids = torch.full((1, 6), 5)
        with torch.no_grad():
            wanted = model(input_ids=ids, decoder_input_ids=ids).logits
            assert torch.equal(load(tmp_path / family).model(input_ids=ids, decoder_input_ids=ids).logits, wanted)


def test_drop_bad_blocks() -> None:
    with pytest.raises(UsageError, match="no block 2"):
        drop_blocks(tiny("llama"), [2])
    with pytest.raises(UsageError, match="at least one"):
        drop_blocks(tiny("llama"), [0, 1])


def test_refused_while_an_optimizer_holds_the_parameters() -> None:
    model = tiny("llama")
    freeze_structure(model, "the trainer's AdamW")
    with pytest.raises(ShoestringError, match="the trainer's AdamW holds its parameters"):
        drop_blocks(model, [0])
    with pytest.raises(ShoestringError, match="holds its parameters"):
        replace_module(model, "lm_head", nn.Identity())
    unfreeze_structure(model)
    drop_blocks(model, [0])
    assert len(inspect(model).blocks) == 1

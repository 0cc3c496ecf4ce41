"""Packed modules inside transformers models: what is packed, what is left, and what other heads make of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from shoestring.core.errors import UsageError
from shoestring.methods.quantizers.int8 import Int8Config
from shoestring.models.packed import Packed, parameters_of

IDS = torch.tensor([[3, 4, 5, 6]])


def packed(folder: Path, auto: Any = AutoModelForCausalLM, **given: Any) -> PreTrainedModel:
    options = given.pop("options", {})
    model: PreTrainedModel = auto.from_pretrained(folder, quantization_config=Int8Config(**options), **given).eval()
    return model


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_a_table_and_the_head_that_shares_it_are_packed_both_or_neither(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lm_head .* shares the weight of model.embed_tokens"):
        packed(plain, options={"modules_to_not_convert": ["lm_head"]})
    model = packed(plain, options={"modules_to_not_convert": ["embed_tokens"]})
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(IDS).logits, wanted)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_head_that_classifies_stays_a_float_one(labels: int, plain: Path, tmp_path: Path) -> None:
    model = packed(plain, AutoModelForSequenceClassification, num_labels=labels, pad_token_id=0)
    assert type(model.score) is nn.Linear and isinstance(model.model.layers[0].mlp.up_proj, Packed)
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(again(IDS).logits, wanted)


def test_a_folder_is_read_with_and_without_the_head_it_was_written_with(plain: Path, tmp_path: Path) -> None:
    whole = packed(plain)
    whole.save_pretrained(tmp_path / "whole")
    hidden = whole.model(IDS).last_hidden_state
    body = AutoModel.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(body(IDS).last_hidden_state, hidden)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=2, pad_token_id=0).eval()
    assert torch.equal(other.model(IDS).last_hidden_state, hidden)
    body.save_pretrained(tmp_path / "body")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "body").eval()
    assert torch.equal(again(IDS).logits, whole(IDS).logits) and again.lm_head.weight is again.model.embed_tokens.weight


def test_transposed_layers_are_such_again_when_they_are_floats(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "plain")
    model = packed(tmp_path / "plain")
    model.dequantize().save_pretrained(tmp_path / "floats")
    wanted = model(IDS).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "floats").eval()
    assert torch.equal(again(IDS).logits, wanted)
    assert type(again.transformer.h[0].mlp.c_fc) is type(model.transformer.h[0].mlp.c_fc)


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_stands_for_as_many_numbers(tied: bool, tmp_path: Path) -> None:
    original = tiny("llama", tie_word_embeddings=tied)
    original.save_pretrained(tmp_path / "plain")
    wanted = sum(p.numel() for p in original.parameters())
    assert parameters_of(original) == parameters_of(packed(tmp_path / "plain")) == wanted

"""Packed modules inside transformers models: what is packed, what is left, and what other heads make of a folder."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    CLIPConfig,
    PreTrainedModel,
    Wav2Vec2Config,
)

from shoestring.core.errors import UsageError
from shoestring.methods.quantizers.dfloat11 import Dfloat11Config
from shoestring.methods.quantizers.int4 import Int4Config
from shoestring.methods.quantizers.int8 import Int8Config
from shoestring.methods.quantizers.ptqtp import PtqtpConfig
from shoestring.models.packed import Packed, PackedEmbedding, packable, parameters_of, tied_to_table

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


@pytest.mark.parametrize(("family", "changes"), [("t5", {}), ("bart", {"scale_embedding": True})])
def test_two_stacks_share_one_table(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    given = {"input_ids": IDS, "decoder_input_ids": IDS}
    original = tiny(family, **changes)
    original.save_pretrained(tmp_path / "plain")
    wanted = original(**given).logits
    for config, near in ((Int8Config(), 0.05), (Int4Config(group_size=32), 0.5)):
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "plain", quantization_config=config).eval()
        table, sharing = tied_to_table(model)
        tables = [name for name in (table, *sharing) if isinstance(model.get_submodule(name), PackedEmbedding)]
        assert len(tables) == 3 and len({id(model.get_submodule(name).weight) for name in (table, *sharing)}) == 1
        made = model(**given).logits
        assert (made - wanted).norm() < near * wanted.norm()
        model.save_pretrained(tmp_path / "packed")
        again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed").eval()
        assert torch.equal(again(**given).logits, made)
        assert (again.dequantize()(**given).logits - made).norm() < 0.05 * made.norm()


def test_a_table_that_scales_what_it_looks_up_still_does(tmp_path: Path) -> None:
    config = AutoConfig.for_model("biogpt", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, scale_embedding=True)  # fmt: skip
    original = AutoModelForCausalLM.from_config(config).eval()
    original.save_pretrained(tmp_path / "plain")
    wanted = original(IDS).logits
    assert (packed(tmp_path / "plain")(IDS).logits - wanted).norm() < 0.05 * wanted.norm()


def test_a_head_with_a_bias_over_codes_that_are_one_run_of_bytes(tmp_path: Path) -> None:
    original = tiny("bert").bfloat16()
    nn.init.normal_(original.get_output_embeddings().bias)
    original.save_pretrained(tmp_path / "plain")
    model = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=Dfloat11Config("fixed")
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)


_SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
_T5 = {"vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
_READING: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba": (AutoModelForCausalLM, {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "falcon_mamba": (
        AutoModelForCausalLM,
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "tie_word_embeddings": True},
    ),
    "rwkv": (
        AutoModelForCausalLM,
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 8, "attention_hidden_size": 32},
    ),
    "mobilebert": (
        AutoModelForMaskedLM,
        {**_SMALL, "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    ),
    "longt5": (AutoModelForSeq2SeqLM, _T5),
    "switch_transformers": (AutoModelForSeq2SeqLM, {**_T5, "num_experts": 2}),
    "siglip_vision_model": (AutoModel, {**_SMALL, "image_size": 16, "patch_size": 4}),
}


@pytest.mark.parametrize("family", _READING)
def test_layers_whose_weight_a_family_reads_itself_stay_floats(family: str, tmp_path: Path) -> None:
    auto, options = _READING[family]
    torch.manual_seed(0)
    auto.from_config(AutoConfig.for_model(family, **options)).save_pretrained(tmp_path / "plain")
    made = packed(tmp_path / "plain", auto, options={"group_size": 32})
    made.save_pretrained(tmp_path / "packed")
    given: dict[str, Any] = {"input_ids": IDS}
    if family == "siglip_vision_model":
        given = {"pixel_values": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)}
    elif auto is AutoModelForSeq2SeqLM:
        given["decoder_input_ids"] = IDS
    said = []
    for model in (auto.from_pretrained(tmp_path / "plain"), made, auto.from_pretrained(tmp_path / "packed")):
        with torch.no_grad():
            found = model.eval()(**given)
        said.append(found.pooler_output if family == "siglip_vision_model" else found.logits)
    assert (said[1] - said[0]).norm() < 0.05 * said[0].norm()
    # Torch's own attention rounds by where its weights lie.
    assert (said[2] - said[1]).norm() < 1e-6 * said[1].norm()
    assert any(isinstance(module, Packed) for module in made.modules())


@pytest.mark.parametrize("family", ["clip", "wav2vec2"])
def test_a_model_that_reads_no_tokens_at_its_top_has_no_table(family: str, tmp_path: Path) -> None:
    sizes = {name: _SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = {
        "clip": CLIPConfig(
            text_config={**_SMALL, "max_position_embeddings": 64},
            vision_config={**sizes, "num_attention_heads": 4, "image_size": 16, "patch_size": 4},
        ),
        "wav2vec2": Wav2Vec2Config(
            **sizes, num_attention_heads=4, conv_dim=(4,), conv_stride=(4,), conv_kernel=(4,),
            num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=2,
        ),
    }[family]  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "plain")
    model = packed(tmp_path / "plain", AutoModel)
    assert any(isinstance(module, Packed) for module in model.modules())
    model.save_pretrained(tmp_path / "packed")
    again = AutoModel.from_pretrained(tmp_path / "packed")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_experts_of_another_build_are_refused_with_what_would_do(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, vocab_size=64, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    with pytest.raises(UsageError, match="GptOssForCausalLM.*gate_up_proj.*Mixtral's.*shoestring methods"):
        packed(tmp_path / "plain")


@pytest.mark.parametrize("part", ["weight", "scales"])
def test_codes_that_a_folder_lacks_are_not_drawn_at_random(part: str, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    packed(plain).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"There is no {part} for a packed matrix of 48 x 32"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("packing", [["x"], "int8/64", {"model.layers.0.mlp.up_proj": ["int8/64"]}, 7])
def test_a_packing_that_is_none(packing: Any) -> None:
    with pytest.raises(UsageError, match="does not name a format for each module"):
        Int8Config(packing=packing)


def test_what_stays_on_the_disk_is_not_packed(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="left on the disk cannot be packed"):
        packed(plain, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "away")
    assert isinstance(packed(plain, device_map={"": "cpu"}).model.layers[0].mlp.up_proj, Packed)


def test_what_products_are_computed_in_changes_no_code(plain: Path) -> None:
    made, config = [], PtqtpConfig(modules_to_not_convert=["mlp", "q_proj", "o_proj"])
    for lowered in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            made.append(AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


@pytest.mark.parametrize("config", [Int8Config(), Int4Config(group_size=32, embeddings=4), Dfloat11Config("fixed")])
def test_a_packed_table_keeps_its_rows(config: Any, plain: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16).eval()
    wanted = model(IDS).logits
    for part in (model, model.model, copy.deepcopy(model)):
        table = part.get_input_embeddings()
        assert part.resize_token_embeddings(96) is table and part.resize_token_embeddings() is table
        assert part.resize_token_embeddings(95, pad_to_multiple_of=32) is table
        for asked in ({"new_num_tokens": 100}, {"new_num_tokens": 90}, {"pad_to_multiple_of": 64}):
            with pytest.raises(UsageError, match=r"96 rows packed as .*dequantize\(\)"):
                part.resize_token_embeddings(**asked)
    assert torch.equal(model(IDS).logits, wanted) and model.config.vocab_size == 96
    floats = model.dequantize()
    floats.resize_token_embeddings(100)
    assert floats(IDS).logits.shape[-1] == floats.config.vocab_size == 100


def test_a_packed_model_is_gone_after_its_last_use(plain: Path) -> None:
    model = packed(plain)
    seen = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    gc.disable()
    try:
        del model
        assert seen() is None, "the model holds itself"
    finally:
        gc.enable()


@pytest.mark.parametrize("config", [Int8Config(), PtqtpConfig(), Dfloat11Config("fixed")])
def test_a_packed_model_without_values_says_its_shapes(config: Any, tmp_path: Path) -> None:
    tiny("qwen2", tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path)  # a family whose layers have biases
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16).to("meta")
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            logits = model(IDS.to("meta")).logits
        assert logits.is_meta and logits.shape == (1, 4, 96) and logits.dtype == torch.bfloat16
    inside = torch.empty(1, 4, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    model(inputs_embeds=inside).logits.sum().backward()
    assert inside.grad is not None and inside.grad.shape == inside.shape


def test_a_scale_is_rounded_where_the_family_rounds_it(tmp_path: Path) -> None:
    original = tiny("gemma2", tie_word_embeddings=True, hidden_size=40).bfloat16()  # the root of 40 is 6.32, not 6.31
    original.save_pretrained(tmp_path)
    config = Dfloat11Config("fixed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config).eval()
    wanted = original(IDS).logits
    assert torch.equal(model(IDS).logits, wanted) and torch.equal(model.dequantize()(IDS).logits, wanted)


class _Normed(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


def test_a_table_that_does_more_than_to_look_up_stays_a_float_one(plain: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert packable(model, "model.embed_tokens", model.get_input_embeddings())
    model.set_input_embeddings(_Normed(96, 32))
    assert not packable(model, "model.embed_tokens", model.get_input_embeddings())

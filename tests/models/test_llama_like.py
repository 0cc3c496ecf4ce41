"""The description of a model agrees with transformers; what the kernels do not compute is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring.core.errors import UsageError
from shoestring.models.llama_like import FAMILIES, MIXTURES, NotNative, check_names, from_config, from_gguf

SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
ROTARY: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=500_000.0)),
    "linear": dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=10_000.0)),
    "llama3": dict(rope_parameters={**LLAMA3, "rope_theta": 500_000.0}),
    "yarn": dict(rope_parameters={**YARN, "rope_theta": 1e6}),
    "yarn by mscale": dict(rope_parameters={**YARN, "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "yarn by factor": dict(rope_parameters={**YARN, "rope_theta": 1e4, "attention_factor": 1.3, "beta_fast": 16}),
    "yarn not truncated": dict(rope_parameters={**YARN, "rope_theta": 1e6, "truncate": False}),
    "older llama3": dict(rope_scaling=LLAMA3, rope_theta=500_000.0),
    "older linear": dict(rope_scaling=dict(type="linear", factor=3.0), rope_theta=20_000.0),
    "original beside": dict(rope_scaling={k: v for k, v in LLAMA3.items() if "original" not in k}, rope_theta=1e5),
}  # fmt: skip


def config_of(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, architectures=[f"{NAMES[family]}ForCausalLM"], **{**SIZES, **changes})


NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3",
         "granite": "Granite", "mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe",
         "olmoe": "Olmoe", "dots1": "Dots1"}  # fmt: skip
# What some families do not assume anything about.
SAID: dict[str, dict[str, Any]] = {"dots1": dict(n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1)}


@pytest.mark.parametrize("name", ROTARY)
def test_angles_are_those_of_transformers(name: str) -> None:
    changes = ROTARY[name]
    made = AutoModelForCausalLM.from_config(config_of("llama", **changes)).model.rotary_emb
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **changes}
    for config in (raw, config_of("llama", **changes).to_dict()):
        rotary = from_config(config).rotary
        np.testing.assert_allclose(rotary.inverse, made.inv_freq.numpy(), rtol=2e-6)
        assert rotary.factor == pytest.approx(made.attention_scaling, rel=1e-6)
        cosines, sines = from_config(config).tables(200)
        theirs = made(torch.zeros(1), torch.arange(200)[None])
        for found, wanted in zip((cosines, sines), theirs):
            np.testing.assert_allclose(found, wanted[0, :, : found.shape[1]].numpy(), atol=5e-5)


def test_part_of_a_head() -> None:
    raw = {**config_of("llama").to_dict(), "partial_rotary_factor": 0.5}
    assert len(from_config(raw).rotary.inverse) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_its_place(family: str) -> None:
    for tied in (True, False):
        config = config_of(family, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_config(config)
        described = from_config(config.to_dict())
        weights = dict(model.named_parameters())
        check_names(described, weights)
        assert described.family == family and described.tied == tied
        for role in ("q", "k", "v", "o", "gate", "up", "down", "attention_norm", "mlp_norm"):
            assert described.shape_of(role) == tuple(weights[described.name(role, 1) + ".weight"].shape)
        with pytest.raises(UsageError, match="lack 1 tensors"):
            check_names(described, [name for name in weights if "layers.2.self_attn.k_proj.weight" not in name])
        with pytest.raises(NotNative, match="extra_norm"):
            check_names(described, [*weights, "model.layers.0.extra_norm.weight"])


EXPERTS = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24)


@pytest.mark.parametrize("family", MIXTURES)
def test_every_tensor_of_a_mixture_has_its_place(family: str) -> None:
    more = dict(
        EXPERTS, num_local_experts=3, n_routed_experts=3, n_shared_experts=2, shared_expert_intermediate_size=40
    )
    more |= dict(mlp_only_layers=[0], first_k_dense_replace=1)
    config = config_of(family, **more)
    weights = {k: v for k, v in AutoModelForCausalLM.from_config(config).state_dict().items() if "inv_freq" not in k}
    found = from_config(config.to_dict())
    assert found.mixture
    described = replace(found, mixture=found.mixture.spelled(weights))
    check_names(described, weights)
    mixture = described.mixture
    assert mixture and described.mixes(1) and mixture.count(1) == 3 and mixture.chosen == 2
    assert described.mixes(0) == (family in ("mixtral", "olmoe"))
    for layer in range(3):
        for role in described.block_roles(layer):
            assert described.shape_of(role, layer) == tuple(weights[described.name(role, layer) + ".weight"].shape), (
                role
            )
    gate_up = weights[described.name("experts", 1) + ".gate_up_proj"]
    assert gate_up.shape == (3, *described.shape_of("expert_gate_up", 1))
    for gone in ("1.mlp.gate.weight", "1.mlp.experts.down_proj"):
        with pytest.raises(UsageError, match="lack 1 tensors"):
            check_names(described, [name for name in weights if gone not in name])
    with pytest.raises(NotNative, match="mlp.extra"):
        check_names(described, [*weights, "model.layers.1.mlp.extra.weight"])


def test_which_layers_have_experts() -> None:
    def layers(family: str, **changes: Any) -> list[bool]:
        described = from_config({**config_of(family, **SAID.get(family, {})).to_dict(), **changes})
        return [described.mixes(layer) for layer in range(described.layers)]

    assert layers("qwen2_moe", mlp_only_layers=[1]) == [True, False, True]
    assert layers("qwen3_moe", decoder_sparse_step=2) == [False, True, False]
    assert layers("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[1]) == [False] * 3
    assert layers("dots1", first_k_dense_replace=2) == [False, False, True]
    maps = [[0, 1, 0], [0, 1]]
    config = {**config_of("qwen2_moe", mlp_only_layers=[1]).to_dict(), "num_experts_per_tok": 2}
    found = from_config({**config, "layer_expert_maps": maps}).mixture
    assert (
        found and found.targets == ((0, 1, 0), (), (0, 1)) and [found.count(layer) for layer in range(3)] == [2, 0, 2]
    )


def test_windows_of_mixtures() -> None:
    assert from_config(config_of("mixtral", sliding_window=7).to_dict()).windows == (7, 7, 7)
    one = dict(use_sliding_window=True, sliding_window=9)
    assert from_config(config_of("qwen3_moe", **one).to_dict()).windows == (9, 9, 9)
    assert from_config(config_of("qwen2_moe", **one).to_dict()).windows == (9, 0, 9)
    assert from_config({**config_of("qwen2_moe", **one).to_dict(), "layer_types": None}).windows == (9, 0, 9)
    late = config_of("dots1", sliding_window=5, max_window_layers=1, **SAID["dots1"]).to_dict()
    assert from_config(late).windows == from_config({**late, "layer_types": None}).windows == (0, 5, 5)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_silent_configurations_mean_what_transformers_assumes(family: str) -> None:
    needed = dict(vocab_size=96, hidden_size=512, intermediate_size=96, num_hidden_layers=3, num_attention_heads=32)
    needed |= SAID.get(family, {})
    raw = {"architectures": [f"{NAMES[family]}ForCausalLM"], "model_type": family, **needed}
    config = AutoConfig.for_model(family, **{k: v for k, v in raw.items() if k not in ("architectures", "model_type")})
    found, whole = from_config(raw), from_config({**config.to_dict(), "architectures": raw["architectures"]})
    for key in (
        "head_dim",
        "context",
        "epsilon",
        "rotates",
        "windows",
        "biased",
        "tied",
        "kv_heads",
        "logit_scale",
        "mixture",
    ):
        assert getattr(found, key) == getattr(whole, key), key
    np.testing.assert_array_equal(found.rotary.inverse, whole.rotary.inverse)


def test_windows_and_layers_without_rotation() -> None:
    assert from_config(config_of("mistral", sliding_window=7).to_dict()).windows == (7, 7, 7)
    assert from_config(config_of("mistral", sliding_window=None).to_dict()).windows == (0, 0, 0)
    late = config_of("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1)
    assert from_config(late.to_dict()).windows == (0, 9, 9)
    assert from_config({**late.to_dict(), "layer_types": None}).windows == (0, 9, 9)
    third = config_of("smollm3", no_rope_layer_interval=3)
    assert from_config(third.to_dict()).rotates == (True, True, False)
    given = config_of("smollm3", no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5)
    assert from_config(given.to_dict()).rotates == (True, False, True)
    assert from_config(given.to_dict()).windows == (0, 5, 0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    "bare family": ({"architectures": None, "model_type": "mamba"}, "mamba"),
    "activation": ({"hidden_act": "relu"}, "activation 'relu'"),
    "rotary": ({"rope_parameters": {"rope_type": "longrope"}}, "scaling 'longrope'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2}, "rope_parameters": None}, "'dynamic'"),
    "head": ({"head_dim": 15}, "heads of 15"),
    "wide head": ({"head_dim": 1024}, "heads of 1024"),
}
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"hidden_size": None}, "hidden_size"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "text": ({"vocab_size": "many"}, "vocab_size"),
    "truth": ({"intermediate_size": True}, "intermediate_size"),
    "groups": ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
    "epsilon": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "bias": ({"attention_bias": "yes"}, "attention_bias"),
    "rotary": ({"rope_parameters": [1]}, "no table"),
    "factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    "theta": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_to_torch(name: str) -> None:
    change, said = REFUSED[name]
    with pytest.raises(NotNative, match=said) as caught:
        from_config({**config_of("llama").to_dict(), **change})
    assert "torch runner" in str(caught.value)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_model_can_have(name: str) -> None:
    change, said = IMPOSSIBLE[name]
    with pytest.raises(UsageError, match=said) as caught:
        from_config({**config_of("llama").to_dict(), **change})
    assert not isinstance(caught.value, NotNative)


# ---- GGUF metadata ----

GGUF: dict[str, Any] = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.feed_forward_length": 96, "llama.context_length": 256, "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
DIMS = {"token_embd.weight": (96, 64)}


def test_gguf_settings() -> None:
    found = from_gguf(GGUF, DIMS, None)
    assert found.kv_heads == 4 and found.head_dim == 16 and found.tied and found.interleaved and found.vocab == 96
    found = from_gguf({**GGUF, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, DIMS, None)
    np.testing.assert_allclose(found.rotary.inverse, from_gguf(GGUF, DIMS, None).rotary.inverse / 2)
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 64, "llama.rope.freq_base": 1e6}  # fmt: skip
    wanted = from_config(config_of("llama", rope_parameters={**YARN, "rope_theta": 1e6}).to_dict()).rotary
    found = from_gguf({**GGUF, **yarn}, DIMS, None)
    np.testing.assert_array_equal(found.rotary.inverse, wanted.inverse)
    assert found.rotary.factor == wanted.factor
    divided = from_gguf(GGUF, DIMS, np.full(8, 2, np.float32)).rotary.inverse
    np.testing.assert_allclose(divided, from_gguf(GGUF, DIMS, None).rotary.inverse / 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba'"), ({"llama.expert_count": 8}, "mixtures"),
        ({"llama.rope.dimension_count": 8}, "8 of 16"), ({"llama.attention.value_length": 8}, "one width"),
        ({"llama.attention.sliding_window": 32}, "sliding window"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
    ],
)  # fmt: skip
def test_gguf_settings_left_to_torch(change: dict[str, Any], said: str) -> None:
    with pytest.raises(NotNative, match=said):
        from_gguf({**GGUF, **change}, DIMS, None)


def test_gguf_settings_that_no_model_has() -> None:
    for change in ({"llama.block_count": 0}, {"llama.embedding_length": "x"}, {"llama.attention.head_count": 2**40}):
        with pytest.raises(UsageError):
            from_gguf({**GGUF, **change}, DIMS, None)
    with pytest.raises(UsageError, match="token table"):
        from_gguf(GGUF, {}, None)
    for frequencies in (np.ones(3, np.float32), np.zeros(8, np.float32), np.full(8, np.nan, np.float32)):
        with pytest.raises(UsageError, match="rope_freqs"):
            from_gguf(GGUF, DIMS, frequencies)


transformers.logging.set_verbosity_error()

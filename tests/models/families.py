"""Tiny random models, one per family of architecture."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_COMMON: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": _GROUPED,
    "gemma2": {**_GROUPED, "head_dim": 8},
    "gpt2": {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": _SIZES,
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {**_COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": _SIZES,
    "phi": _SIZES,
    "phi3": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
MASKED: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": _SIZES,
    "distilbert": {**_COMMON, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "albert": {**_SIZES, "embedding_size": 16},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {"vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    "bart": {
        **_COMMON,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
    },
}


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of a family, the same every time."""
    options = {**CAUSAL, **MASKED, **SEQ2SEQ}[family]
    auto = (
        transformers.AutoModelForMaskedLM
        if family in MASKED
        else transformers.AutoModelForSeq2SeqLM
        if family in SEQ2SEQ
        else transformers.AutoModelForCausalLM
    )
    torch.manual_seed(0)
    return auto.from_config(transformers.AutoConfig.for_model(family, **{**options, **changes})).eval()

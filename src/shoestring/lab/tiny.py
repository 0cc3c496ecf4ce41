"""Tiny random models for checks: one per family of architecture, built in milliseconds, the same every time."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

VOCAB = 64

_SMALL = {
    "llama": dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen3": dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    "gpt2": dict(n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=64),
    "bert": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    ),
    "t5": dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0),
}
FAMILIES = tuple(_SMALL)
_SPECIAL = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """A random model in eval mode with a vocabulary of 64. `changes` override its config."""
    auto = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}.get(family, AutoModelForCausalLM)
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **_SPECIAL, **{**_SMALL[family], **changes})
    before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    made = auto.from_config(config).to(dtype).eval()
    torch.random.set_rng_state(before)
    return made


def batch(rows: int = 2, length: int = 12) -> torch.Tensor:
    """Token ids (rows, length) that avoid the special ones."""
    return 3 + torch.arange(rows * length).view(rows, length) % (VOCAB - 3)


def inputs(made: PreTrainedModel, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """A forward call's arguments with labels, for any of the families."""
    ids = batch() if ids is None else ids
    return {"input_ids": ids, "labels": ids}


def logits(made: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    given = inputs(made, ids)  # type: ignore[arg-type]
    if not made.config.is_encoder_decoder:  # type: ignore[union-attr]
        given.pop("labels")
    with torch.no_grad():
        return made(**given).logits.float()

"""A tiny random mixture of experts for the checks of methods that want one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from shoestring.lab import tiny


def model(**changes: Any) -> MixtralForCausalLM:
    """Two layers of four experts, two of which each token meets; in eval mode, the same every time.

    `changes` override its config.
    """
    sizes: dict[str, Any] = dict(
        vocab_size=tiny.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    before = torch.random.get_rng_state()
    torch.manual_seed(0)
    made = MixtralForCausalLM(MixtralConfig(**{**sizes, **changes})).eval()
    torch.random.set_rng_state(before)
    return made

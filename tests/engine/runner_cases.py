"""Tiny models of several families, and batches written briefly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from shoestring.engine.runner import BLOCK, Batch, Runner

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 96
_COMMON = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
# Weights large enough that attention tells tokens apart: else nothing would show whether it looks at the right ones.
_SIZES = dict(
    **_COMMON, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
_GROUPED = dict(**_SIZES, num_key_value_heads=2)
_GPT2 = dict(**_COMMON, n_embd=64, n_layer=3, n_head=4, n_positions=128, initializer_range=0.2)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": dict(_GROUPED, head_dim=32),
    "mistral": dict(_GROUPED, sliding_window=7),
    "smollm3": dict(_GROUPED, no_rope_layers=[1, 0, 1], tie_word_embeddings=True),
    "gpt2": _GPT2,
    "gpt_neox": _SIZES,
    "opt": dict(_SIZES, ffn_dim=96, word_embed_proj_dim=48, init_std=0.2),
    "gemma2": dict(_GROUPED, head_dim=16, sliding_window=7, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "phi": _SIZES,
    "mixtral": dict(_GROUPED, num_local_experts=4),
    "gpt_oss": dict(_GROUPED, head_dim=16, sliding_window=7, num_local_experts=4),
    "cohere": dict(_GROUPED, logit_scale=0.25),
    "granite": dict(_GROUPED, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.3),
}


def make(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of a family, the same every time."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def open_runner(kind: str, folder: Path, *, dtype: str = "float32", cache_dtype: str = "bf16") -> Runner:
    if kind == "torch":
        from shoestring.engine.torch_runner import TorchRunner

        return TorchRunner(folder, dtype=dtype, cache_dtype=cache_dtype)
    native = pytest.importorskip("shoestring.engine.native_runner")
    return native.NativeRunner(folder, dtype=dtype, cache_dtype=cache_dtype, threads=1)


@dataclass
class Part:
    """One sequence's share of a batch."""

    ids: Sequence[int]
    table: Sequence[int]
    context: int = 0
    parents: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    adapter: int = -1


def batch(*parts: Part) -> Batch:
    width = max(len(part.table) for part in parts)
    tables = np.zeros((len(parts), width), np.int32)
    ids: list[int] = []
    positions: list[int] = []
    parents: list[int] = []
    adapters: list[int] = []
    for row, part in zip(tables, parts):
        row[: len(part.table)] = part.table
        count = len(part.ids)
        ids += part.ids
        mine = list(part.parents) if part.parents is not None else list(range(-1, count - 1))
        parents += mine
        adapters += [part.adapter] * count
        if part.positions is not None:
            positions += part.positions
        else:
            depth = [0] * count
            for j, parent in enumerate(mine):
                depth[j] = depth[parent] + 1 if parent >= 0 else 0
            positions += [part.context + d for d in depth]
    array = lambda values: np.array(values, np.int32)
    return Batch(
        array(ids),
        array(positions),
        array(np.cumsum([0, *(len(part.ids) for part in parts)])),
        array([part.context for part in parts]),
        tables,
        array(parents) if any(part.parents is not None for part in parts) else None,
        array(adapters) if any(part.adapter >= 0 for part in parts) else None,
    )


def logits(runner: Runner, *parts: Part) -> np.ndarray:
    """Logits [tokens, vocab] of all tokens of one batch."""
    made = batch(*parts)
    return runner.logits(runner.run(made), np.arange(made.tokens, dtype=np.int32)).copy()


def in_chunks(
    runner: Runner, ids: Sequence[int], table: Sequence[int], sizes: Sequence[int], **more: Any
) -> np.ndarray:
    """Logits of a sequence that is computed in chunks of these sizes, one after another."""
    found, at = [], 0
    for size in sizes:
        found.append(logits(runner, Part(ids[at : at + size], table, at, **more)))
        at += size
    assert at == len(ids)
    return np.concatenate(found)


def text(length: int, seed: int = 0) -> list[int]:
    """Token ids that are no special ones."""
    return [int(i) for i in np.random.default_rng(seed).integers(3, VOCAB, length)]


def pages(length: int, first: int = 0) -> list[int]:
    """Blocks for so many tokens, not in order."""
    return list(range(first, first + -(-length // BLOCK)))[::-1]

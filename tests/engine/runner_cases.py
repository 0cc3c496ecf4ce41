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
_SMALL_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=40)
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
    "qwen2_moe": dict(
        _GROUPED, **_SMALL_EXPERTS, num_experts=5, shared_expert_intermediate_size=48, mlp_only_layers=[1]
    ),
    "qwen3_moe": dict(_GROUPED, **_SMALL_EXPERTS, num_experts=20, norm_topk_prob=True, decoder_sparse_step=2),
    "olmoe": dict(_GROUPED, num_experts=5, num_experts_per_tok=3),
    "dots1": dict(
        _GROUPED,
        **_SMALL_EXPERTS,
        n_routed_experts=5,
        n_shared_experts=2,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=0.8,
    ),
    "gpt_oss": dict(_GROUPED, head_dim=16, sliding_window=7, num_local_experts=4),
    "cohere": dict(_GROUPED, logit_scale=0.25),
    "granite": dict(_GROUPED, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.3),
}


def make(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of a family, the same every time."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def open_runner(
    kind: str, folder: Path, *, dtype: str = "float32", cache_dtype: str = "bf16", threads: int = 1
) -> Runner:
    if kind == "torch":
        from shoestring.engine.torch_runner import TorchRunner

        return TorchRunner(folder, dtype=dtype, cache_dtype=cache_dtype)
    native = pytest.importorskip("shoestring.engine.native_runner")
    return native.NativeRunner(folder, dtype=dtype, cache_dtype=cache_dtype, threads=threads)


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


class FloatPages:
    """An attention worker in numpy, causal, that keeps keys and values as they come."""

    def __init__(self, blocks: int) -> None:
        self.slots = blocks * BLOCK
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, made: Batch) -> np.ndarray:
        heads, dim = k.shape[1:]
        keys, values = self.kept.setdefault(layer, tuple(np.zeros((2, self.slots, heads, dim), np.float32)))
        out = np.empty_like(q)
        for table, context, start, end in zip(made.tables, made.contexts, made.starts, made.starts[1:]):
            new, places = end - start, np.arange(context + end - start)
            slots = table[places // BLOCK] * BLOCK + places % BLOCK
            keys[slots[context:]], values[slots[context:]] = k[start:end], v[start:end]
            mine = q[start:end].reshape(new, heads, -1, dim).transpose(1, 2, 0, 3)
            scores = mine @ keys[slots].transpose(1, 2, 0)[:, None] / np.sqrt(dim)
            scores[..., places > context + np.arange(new)[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            found = weights @ values[slots].transpose(1, 0, 2)[:, None]
            out[start:end] = found.transpose(2, 0, 1, 3).reshape(new, -1, dim)
        return out


PROMPTS = (
    "The capital of France is", "Once upon a time, there was a small village where", "def fibonacci(n):",
    "Water boils at", "The three primary colours are", "Dear Sir or Madam,", "In 1969, the first man",
    "A recipe for bread: take flour,", "The derivative of x squared is", "SELECT name FROM users WHERE",
    "To be, or not to be,", "The mitochondria is", "Roses are red,", "The quick brown fox", "Paris, London, Berlin,",
    "1, 1, 2, 3, 5, 8,", "My favourite book is about a dragon who", "Photosynthesis is the process by which plants",
    "The user asked for a poem about the sea. It goes:\n", "Climate change affects the oceans because warm water",
)  # fmt: skip


@dataclass(frozen=True)
class Greedy:
    """Tokens [prompts, steps] that were the likeliest, and by how much [prompts, steps] in logits."""

    tokens: np.ndarray
    margins: np.ndarray


def greedy(runner: Runner, prompts: Sequence[Sequence[int]], steps: int) -> Greedy:
    """All prompts in one ragged batch, then all their answers side by side."""
    tables, first = [], 0
    for prompt in prompts:
        tables.append(pages(len(prompt) + steps, first))
        first += len(tables[-1])
    runner.reserve(first)
    parts = [Part(list(prompt), table) for prompt, table in zip(prompts, tables)]
    tokens, margins = [], []
    for _ in range(steps):
        made = batch(*parts)
        found = runner.logits(runner.run(made), made.starts[1:] - 1)
        best = np.partition(found, -2, axis=1)[:, -2:]
        tokens.append(found.argmax(1))
        margins.append(best[:, 1] - best[:, 0])
        parts = [Part([int(token)], part.table, part.context + len(part.ids)) for part, token in zip(parts, tokens[-1])]
    return Greedy(np.array(tokens).T, np.array(margins).T)


def own(model: Any, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocab]: what the model itself says."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far logits are from others, in standard deviations of these."""
    return float(np.sqrt(((found - wanted) ** 2).mean()) / wanted.std())

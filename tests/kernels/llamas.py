"""Native models made from transformers' own random ones, batches from lists, and a reference that rounds its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from shoestring.engine.runner import Batch
from shoestring.kernels import formats, matrix
from shoestring.kernels.llama import PAGE, Block, Cache, Llama
from shoestring.kernels.loader import load
from shoestring.lab import tiny

needs_library = pytest.mark.skipif(load().library is None, reason="no native library in this installation")


def family(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model whose norms, biases and scores are no trivial ones."""
    made = tiny_model(name, seed=seed, **changes)
    random = torch.Generator().manual_seed(seed)
    for key, value in made.named_parameters():
        if "norm" in key:
            value.data = 1 + 0.3 * torch.randn(value.shape, generator=random)
        elif key.endswith("bias"):
            value.data = 0.3 * torch.randn(value.shape, generator=random)
        else:
            value.data = torch.randn(value.shape, generator=random) * (
                1 if "embed" in key else 1.5 * value.shape[-1] ** -0.5
            )
    return made


def tiny_model(name: str, *, seed: int, **changes: Any) -> PreTrainedModel:
    small = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, attn_implementation="eager",
    )  # fmt: skip
    tiny._SMALL.setdefault(name, {})
    return tiny.model(name, seed=seed, **{**small, **changes})


def native(model: PreTrainedModel, format: str = "fp32", positions: int = 1024, **changes: Any) -> Llama:
    """The same weights on the native kernels."""
    config = model.config
    base = model.model
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    no_rope = getattr(config, "no_rope_layers", None)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is None and window:
        kinds = ["sliding_attention"] * config.num_hidden_layers

    def made(linear: torch.nn.Linear) -> matrix.Matrix:
        return pack(linear.weight, format, None if getattr(linear, "bias", None) is None else linear.bias)

    blocks = []
    for number, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        blocks.append(
            Block(
                *(made(getattr(attention, f"{name}_proj")) for name in "qkvo"),
                *(made(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")),
                array(layer.input_layernorm.weight),
                array(layer.post_attention_layernorm.weight),
                array(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
                array(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
                rotate=no_rope is None or bool(no_rope[number]),
                window=window if kinds[number] == "sliding_attention" else 0,
            )
        )
    cosines, sines = base.rotary_emb(torch.zeros(1, 1, dim), torch.arange(positions)[None])
    half = cosines.shape[-1] // 2
    embedding, head = pack(base.embed_tokens.weight, format), pack(model.lm_head.weight, format)
    facts = dict(
        epsilon=config.rms_norm_eps,
        activation={"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[config.hidden_act],
        attention_scale=attention.scaling,
        embedding_scale=getattr(config, "embedding_multiplier", 1.0),
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logit_scale=1 / getattr(config, "logits_scaling", 1.0),
    )
    return Llama(
        tuple(blocks), embedding, head, array(base.norm.weight), array(cosines[0, :, :half]), array(sines[0, :, :half]),
        config.num_attention_heads, config.num_key_value_heads, **{**facts, **changes},
    )  # fmt: skip


def sharing(model: Llama, leaders: Sequence[int]) -> Llama:
    """The same model, whose layers take the attention weights of those that `leaders` names for them."""
    gone = dict.fromkeys(("q", "k", "q_norm", "k_norm"))
    blocks = [
        block if leader == number else replace(block, **gone, leader=leader)
        for number, (block, leader) in enumerate(zip(model.blocks, leaders, strict=True))
    ]
    return replace(model, blocks=tuple(blocks))


def pack(weight: torch.Tensor, format: str, bias: torch.Tensor | None = None) -> matrix.Matrix:
    """fp32 and bf16 as they are; int8 and sums of signs, whose inputs are tables, in groups of 32."""
    values, rows, cols = array(weight), *weight.shape
    plain = None if bias is None else array(bias)
    if format == "fp32":
        return matrix.make(format, rows, cols, values, bias=plain)
    if format == "bf16":
        return matrix.make(format, rows, cols, bfloat16(values), bias=plain)
    if format == "binary4":
        made = formats.parse("binary4o/32")
        tensors = {name: tensor.numpy() for name, tensor in made.pack(weight.detach()).items()}
        return made.layout.matrix(tensors, rows, cols, plain)
    groups = -(-cols // 32)
    padded = np.zeros((rows, groups * 32), np.float32)
    padded[:, :cols] = values
    scales = bfloat16(np.abs(padded.reshape(rows, groups, 32)).max(-1) / 127)
    wide = (scales.astype(np.uint32) << 16).view(np.float32)
    codes = np.round(padded.reshape(rows, groups, 32) / np.maximum(wide, 1e-30)[..., None]).clip(-127, 127)
    return matrix.make("int8", rows, cols, codes.astype(np.int8), group=32, scales=scales, bias=plain)


def array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def bfloat16(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(
        torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    )


class RoundingCache(DynamicCache):
    """Keys and values as the pages hold them: bfloat16."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return super().update(key_states.bfloat16().float(), value_states.bfloat16().float(), *rest, **more)


def expected(model: PreTrainedModel, ids: Sequence[int]) -> np.ndarray:
    """transformers' logits [tokens, vocab], keys and values rounded to bfloat16."""
    with torch.no_grad():
        return array(model(torch.tensor([list(ids)]), past_key_values=RoundingCache(), use_cache=True).logits[0])


@dataclass
class Chain:
    """A sequence in the making: its pages, and how many slots are filled."""

    table: list[int]
    filled: int = 0


def batch(
    chunks: Sequence[tuple[Chain, Sequence[int]]],
    *,
    parents: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    adapters: Sequence[int] | None = None,
) -> Batch:
    """Chunks of tokens, each of a sequence. Positions count from the filled slots unless given."""
    counts = [len(ids) for _, ids in chunks]
    width = max((len(chain.table) for chain, _ in chunks), default=1)
    tables = np.zeros((len(chunks), width), np.int32)
    for row, (chain, _) in zip(tables, chunks):
        row[: len(chain.table)] = chain.table
    places = [chain.filled + i for chain, ids in chunks for i in range(len(ids))]
    return Batch(
        ids=int32([token for _, ids in chunks for token in ids]),
        positions=int32(places if positions is None else positions),
        starts=int32(np.cumsum([0, *counts])),
        contexts=int32([chain.filled for chain, _ in chunks]),
        tables=tables,
        parents=None if parents is None else int32(parents),
        adapters=None if adapters is None else int32(adapters),
    )


def int32(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32).reshape(np.shape(values))


def feed(model: Llama, cache: Cache, chain: Chain, ids: Sequence[int], **how: Any) -> np.ndarray:
    """Logits of one sequence's next tokens; the chain moves on."""
    hidden = model.run(cache, batch([(chain, ids)]), **how)
    chain.filled += len(ids)
    return model.logits(hidden, np.arange(len(ids)), how.get("threads", 1))


def dirty_cache(model: Llama, pages: int, type: str = "bf16") -> Cache:
    """Pages full of what is NaN in every type, so that reading a slot that was never written shows."""
    cache = model.cache(pages, type)
    data = cache.data.copy()
    data[...] = 0xFF
    return replace(cache, data=data)


def pages(tokens: int, first: int = 0) -> list[int]:
    """Page numbers for so many tokens, in descending order so that order is no accident."""
    return list(range(first, first + -(-tokens // PAGE)))[::-1]

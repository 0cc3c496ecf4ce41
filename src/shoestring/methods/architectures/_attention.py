"""Layers that take the attention weights of an earlier layer: the attention function, and the modules of such layers.

A leader computes P = softmax(Q K^T / sqrt(d) + mask) and keeps it for its block; a follower multiplies the same P with
values of its own. It has no queries and no keys, in the weights as in the cache. P is made in strips of query rows,
each as wide as causality lets it see, so that little of a square matrix is computed or held for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from shoestring.core.errors import ShoestringError
from shoestring.models import surgery
from shoestring.models.anatomy import Block, attention_of, features, inspect

NAME = "shoestring_shared"  # of the attention function below in transformers' registry
PLAIN = (None, "sdpa", "eager")  # functions in whose place it stands
STRIP = 128  # query rows of a strip: many enough to fill the kernels, few enough to compute little above the diagonal
Strips = list[Tensor]  # each [batch, key heads, heads of a key head, rows, columns]


def attend(
    module: nn.Module,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    weights: Strips | None = None,
    **more: Any,
) -> tuple[Tensor, Strips | None]:
    """transformers' attention function for models whose layers share weights.

    Args:
        module: with `keeps_weights` its weights are the second result.
        query: [batch, heads, rows, dim]; key and value [batch, key heads, columns, dim]. Neither in a follower.
        weights: those of its leader, in a follower.

    Returns:
        [batch, rows, heads, dim], and the weights that were to be kept.
    """
    if weights is not None:
        return _mix(weights, value, dropout), None
    assert query is not None and key is not None
    if not getattr(module, "keeps_weights", False):
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
        return plain[0], None
    made = _strips(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return _mix(made, value, dropout), made


def _strips(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Strips:
    rows, key_heads = query.shape[2], key.shape[1]
    # transformers leaves the mask out of plain causal passes.
    causal = mask is None and rows > 1
    query, upside = (query * scaling).unflatten(1, (key_heads, -1)), key.transpose(2, 3)
    later = torch.ones(STRIP, STRIP, dtype=torch.bool, device=query.device).triu(1) if causal else None
    made = []
    for start in range(0, rows, STRIP):
        end = min(start + STRIP, rows)
        seen = upside[..., :end] if causal else upside
        scores = (query[:, :, :, start:end].flatten(2, 3) @ seen).unflatten(2, (-1, end - start))
        if later is not None:
            scores[..., start:].masked_fill_(later[: end - start, : end - start], float("-inf"))
        elif mask is not None:
            part = mask[:, :, None, start:end]
            if part.dtype == torch.bool:
                # Not infinite, since a row of padding sees nothing at all and must not become NaN.
                scores.masked_fill_(~part, torch.finfo(scores.dtype).min)
            else:
                scores = scores + part
        made.append(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype))
    return made


def _mix(strips: Strips, value: Tensor, dropout: float) -> Tensor:
    """P V of values [batch, key heads, columns, dim]."""
    parts = []
    for strip in strips:
        # Each layer drops on its own: what is dropped in one stays in the others.
        kept = nn.functional.dropout(strip, dropout) if dropout else strip
        mixed = kept.flatten(2, 3) @ value[:, :, : strip.shape[-1]]
        parts.append(mixed.unflatten(2, strip.shape[2:4]).permute(0, 3, 1, 2, 4).flatten(2, 3))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Follower(nn.Module):
    """Attention with the weights of an earlier layer: values and output projection, and nothing else.

    Args:
        block: the layer, whose value and output projections are taken over under the names they have.
        leader: the layer whose weights it takes; `last` of those that take them gives them back.
    """

    def __init__(self, block: Block, attention: nn.Module, config: Any, leader: int, last: bool) -> None:
        super().__init__()
        self.config, self.layer_idx, self.leader, self.last = config, block.index, leader, last
        names = {role: block.projections[role].removeprefix(attention_of(block) + ".") for role in ("v", "o")}
        self._value, self._out = names["v"], names["o"]
        for name in names.values():
            setattr(self, name, attention.get_submodule(name))
        self.head_dim = features(attention.get_submodule(self._value))[1] // config.num_key_value_heads

    def forward(
        self,
        hidden_states: Tensor,
        shared: dict[int, Strips] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        weights = _shared_by(shared, self.leader, self.layer_idx)
        if self.last and shared is not None:
            del shared[self.leader]
        value = getattr(self, self._value)(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if past_key_values is not None:
            # A cache counts its tokens by its keys, so the values stand there, and nothing where values stand.
            value, _ = past_key_values.update(value, value[..., :0], self.layer_idx)
        function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attend)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, _ = function(self, None, None, value, attention_mask, dropout=dropout, weights=weights)
        out: Tensor = getattr(self, self._out)(mixed.flatten(2))
        return out, None


def share(model: nn.Module, share_map: Sequence[int]) -> None:
    """Make layers of `model` take the attention weights of others, in place.

    Args:
        share_map: for each layer the one whose weights it takes, its own number where it has its own.
    """
    if list(share_map) == list(range(len(share_map))):
        return
    config: Any = model.config
    last = {leader: layer for layer, leader in enumerate(share_map)}
    for block in inspect(model).blocks:
        name, leader = attention_of(block), share_map[block.index]
        attention = model.get_submodule(name)
        if leader != block.index:
            own = Follower(block, attention, config, leader, last[leader] == block.index)
            surgery.replace_module(model, name, own)
        elif last[leader] != leader:
            attention.keeps_weights = True  # type: ignore[assignment]
            attention.register_forward_hook(_hand_over, with_kwargs=True)
    body: Any = model.base_model
    body.register_forward_pre_hook(_begin_pass, with_kwargs=True)


def _begin_pass(body: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # What layers hand to each other belongs to one pass alone, so it travels with the pass and not with the model.
    return args, {**named, "shared": {}}


def _hand_over(attention: Any, args: Any, named: dict[str, Any], out: tuple[Tensor, Any]) -> tuple[Tensor, None]:
    if named.get("shared") is not None:
        named["shared"][attention.layer_idx] = out[1]
    return out[0], None


def _shared_by(shared: dict[int, Strips] | None, leader: int, layer: int) -> Strips:
    if shared is None or leader not in shared:
        raise ShoestringError(
            f"Layer {layer} has no attention weights to take",
            "it runs without the layers before it, which compute them",
            "Run the layers of a block together, from the model itself",
        )
    return shared[leader]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

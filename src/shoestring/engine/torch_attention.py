"""Attention over pages behind transformers' attention interface.

A ragged batch passes a model as one row of tokens, [1, tokens]; everything in a transformer but attention treats tokens
one by one. Attention comes here: keys and values go into pages, and each sequence attends over its own table.

Layers may share attention weights. A module with `keeps_weights` gets its weights as the second result, where
transformers gives them too; another layer hands them back in `weights`, with values and without queries and keys,
and has only values in its pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.engine.runner import BLOCK, AttentionWorker, Batch

NAME = "shoestring_pages"  # of this attention in transformers' registries

# What a module may hand to its attention function that changes the result in a way not computed here.
_UNKNOWN = ("position_bias", "head_mask", "alibi", "score_mod", "encoder_hidden_states")


@dataclass(frozen=True)
class Head:
    """Sizes of one layer's keys and values; a layer without keys has a key_dim of 0."""

    kv_heads: int
    key_dim: int
    value_dim: int


class Store:
    """Keys or values of one layer: [blocks, BLOCK, heads, dim], int8 with a float32 scale for each token and head."""

    def __init__(self, blocks: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(blocks, BLOCK, heads, dim, dtype=dtype, device=device)
        scaled = dtype == torch.int8 and dim > 0
        self.scales = torch.zeros(blocks, BLOCK, heads, dtype=torch.float32, device=device) if scaled else None
        self.parts = [self.data] if self.scales is None else [self.data, self.scales]

    def write(self, slots: torch.Tensor, x: torch.Tensor) -> None:
        """x [tokens, heads, dim] into flat slots [tokens]."""
        if self.scales is not None:
            x = x.float()
            scales = x.abs().amax(-1) / 127
            self.scales.flatten(0, 1).index_copy_(0, slots, scales)
            x = (x / scales.clamp_min(1e-30)[..., None]).round()
        self.data.flatten(0, 1).index_copy_(0, slots, x.to(self.data.dtype))

    def read(self, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Flat slots [sequences, length] -> [sequences, heads, length, dim]."""
        found = self.data.flatten(0, 1).index_select(0, slots.flatten())
        if self.scales is not None:
            scales = self.scales.flatten(0, 1).index_select(0, slots.flatten())
            found = found.to(torch.float32) * scales[..., None]
        return found.to(dtype).unflatten(0, slots.shape).transpose(1, 2)


@dataclass
class _Group:
    """Sequences with equally many new tokens and about equally long tables, attended to together.

    Attributes:
        rows: [sequences, new] token of the batch.
        slots: [sequences, length] flat slots of the cache, any slot beyond a sequence's end.
        allowed: [sequences, new, length] what each token sees, before a layer's own law.
        own: [sequences, new] where a new token's own key stands among the slots.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    allowed: torch.Tensor
    own: torch.Tensor
    masks: dict[Any, torch.Tensor | None] = field(default_factory=dict, init=False)

    def mask(self, law: Callable[..., Any] | None, repeat: int, positions: torch.Tensor | None) -> torch.Tensor | None:
        """[sequences, 1, repeat * new, length] under a layer's law, or None where everything is seen.

        positions: of all flat slots of the cache; a window is measured with them.
        """
        key = (law, repeat)
        if key not in self.masks:
            seen = self.allowed
            if law is not None:
                assert positions is not None
                zero = torch.zeros((), dtype=torch.long, device=seen.device)
                own = torch.gather(self.slots, 1, self.own)
                seen = seen & law(zero, zero, positions[own][:, :, None], positions[self.slots][:, None, :])
            self.masks[key] = None if bool(seen.all()) else seen.repeat(1, repeat, 1)[:, None]
        return self.masks[key]

    def put(self, found: torch.Tensor, out: torch.Tensor) -> None:
        """found [sequences, kv_heads, repeat * new, dim], the queries of a key head together, into `out`."""
        new = self.rows.shape[1]
        out[self.rows] = found.unflatten(2, (-1, new)).permute(0, 3, 1, 2, 4).flatten(2, 3)


@dataclass
class Kept:
    """Attention weights of one layer in one pass, for layers that take them.

    Attributes:
        heads: of queries.
        of: for each group of the pass [sequences, kv_heads, repeat * new, length].
    """

    heads: int
    of: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Law:
    """What a model passes on as its mask: the rule that says which place sees which, None for plain causality."""

    sees: Callable[..., Any] | None


class Pass:
    """One pass of a batch through layers: where its tokens go and what they see."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.batch = batch
        counts, totals = np.diff(batch.starts), batch.contexts + np.diff(batch.starts)
        slots = np.empty(batch.tokens, np.int64)
        by_shape: dict[tuple[int, int], list[int]] = {}
        for s in range(batch.sequences):
            new = np.arange(batch.contexts[s], totals[s])
            slots[batch.starts[s] : batch.starts[s + 1]] = _flat(batch.tables[s], new)
            if counts[s]:
                # Lengths in one group differ by less than a factor of two, so that little is computed for nothing.
                by_shape.setdefault((int(counts[s]), int(totals[s]).bit_length()), []).append(s)
        self.slots = torch.from_numpy(slots).to(device)
        self.positions = torch.from_numpy(batch.positions).to(device)
        self.groups = [self._group(members, count, device) for (count, _), members in by_shape.items()]

    def _group(self, members: list[int], count: int, device: torch.device) -> _Group:
        batch, size = self.batch, len(members)
        contexts = batch.contexts[members].astype(np.int64)
        length = int(contexts.max()) + count
        rows = batch.starts[members].astype(np.int64)[:, None] + np.arange(count)
        slots = np.zeros((size, length), np.int64)
        allowed = np.repeat((np.arange(length) < contexts[:, None])[:, None], count, 1)
        for i, s in enumerate(members):
            context = int(contexts[i])
            slots[i, : context + count] = _flat(batch.tables[s], np.arange(context + count))
            parents = None if batch.parents is None else batch.parents[rows[i, 0] : rows[i, 0] + count]
            allowed[i, :, context : context + count] = _ancestors(parents, count)
        own = contexts[:, None] + np.arange(count)
        return _Group(*(torch.from_numpy(array).to(device) for array in (rows, slots, allowed, own)))


class Attention:
    """What the attention function needs while a model runs: the pages, the pass, and a worker if there is one.

    With `batch_pass` None it only looks: one token attends to itself, and what the modules ask for is noted.
    """

    def __init__(self, layer_of: dict[int, int], stores: list[tuple[Store, Store]]) -> None:
        self.layer_of, self.stores = layer_of, stores
        self.positions: torch.Tensor | None = None  # int32 [blocks, BLOCK], of models with windows
        self.batch_pass: Pass | None = None
        self.worker: AttentionWorker | None = None
        self.seen: dict[int, Head] = {}
        self.windows = False

    def begin(self, batch: Batch, device: torch.device) -> None:
        """The passes of blocks that follow are of this batch."""
        self.batch_pass = Pass(batch, device)
        if self.positions is not None:
            self.positions.flatten().index_copy_(0, self.batch_pass.slots, self.batch_pass.positions)

    def parts(self) -> Iterator[torch.Tensor]:
        """Every array of the cache, each with blocks and slots in front."""
        for stores in self.stores:
            for store in stores:
                yield from store.parts
        if self.positions is not None:
            yield self.positions

    @contextmanager
    def at_work(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def __call__(
        self,
        module: torch.nn.Module,
        q: torch.Tensor | None,
        k: torch.Tensor | None,
        v: torch.Tensor,
        mask: Any,
        scaling: float | None,
        extra: dict[str, Any],
    ) -> tuple[torch.Tensor, Kept | None]:
        """q [1, heads, tokens, dim], k and v likewise; [1, tokens, heads, value_dim], and the weights if they are kept.

        Without q and k, `extra` has the weights of another layer.
        """
        layer = self.layer_of[id(module)]
        if q is None or k is None:
            return self._with_weights(module, layer, v[0].transpose(0, 1), extra["weights"])[None], None
        kept = Kept(q.shape[1]) if getattr(module, "keeps_weights", False) else None
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        scaling = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if self.batch_pass is None:
            _refuse_unknown(module, mask, extra, layer in self.seen)
            self.windows |= isinstance(mask, Law) and mask.sees is not None
            self.seen[layer] = Head(k.shape[1], k.shape[2], v.shape[2])
            return v.repeat_interleave(q.shape[1] // v.shape[1], 1)[None], kept
        law = mask.sees if isinstance(mask, Law) else None
        if self.worker is not None:
            _refuse_worker(module, law, extra)
            # A worker multiplies plainly by 1 / sqrt(head_dim); the model's own scale is put into the queries.
            arrays = (q.float() * (scaling * q.shape[-1] ** 0.5), k.float(), v.float())
            on_host = [x.contiguous().cpu().numpy() for x in arrays]
            found = self.worker(layer, on_host[0], on_host[1], on_host[2], self.batch_pass.batch)
            return torch.from_numpy(np.ascontiguousarray(found)).to(q)[None], None
        keys, values = self.stores[layer]
        count = self.batch_pass.batch.tokens
        keys.write(self.batch_pass.slots, k[:count])
        values.write(self.batch_pass.slots, v[:count])
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        # Further streams of the same tokens see what the first one does.
        for mine, into in zip(q.split(count), out.split(count)):
            for group in self.batch_pass.groups:
                self._attend(group, keys, values, mine, into, law, scaling, extra, kept)
        return out[None], kept

    def _with_weights(self, module: torch.nn.Module, layer: int, v: torch.Tensor, kept: Kept) -> torch.Tensor:
        """v [tokens, kv_heads, dim] of a layer that takes another's weights; [tokens, heads, dim]."""
        if self.batch_pass is None:
            self.seen[layer] = Head(v.shape[1], 0, v.shape[2])
            return v.repeat_interleave(kept.heads // v.shape[1], 1)
        if self.worker is not None:
            _refuse_worker(module, None, {"weights": kept})
        values = self.stores[layer][1]
        values.write(self.batch_pass.slots, v)
        out = v.new_empty(v.shape[0], kept.heads, v.shape[2])
        for group, weights in zip(self.batch_pass.groups, kept.of, strict=True):
            group.put(weights @ values.read(group.slots, v.dtype), out)
        return out

    def _attend(
        self,
        group: _Group,
        keys: Store,
        values: Store,
        q: torch.Tensor,
        out: torch.Tensor,
        law: Callable[..., Any] | None,
        scaling: float,
        extra: dict[str, Any],
        kept: Kept | None,
    ) -> None:
        new = group.rows.shape[1]
        kv_heads = keys.data.shape[2]
        repeat = q.shape[1] // kv_heads
        # Query heads that share a key head stand as more tokens of that head, so that keys need not be repeated.
        mine = q[group.rows].unflatten(2, (kv_heads, repeat)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k, v = keys.read(group.slots, q.dtype), values.read(group.slots, q.dtype)
        mask = group.mask(law, repeat, None if self.positions is None else self.positions.flatten())
        softcap, sinks = extra.get("softcap"), extra.get("s_aux")
        if softcap is None and sinks is None and kept is None:
            group.put(scaled_dot_product_attention(mine, k, v, attn_mask=mask, scale=scaling), out)
            return
        weights = _weights(mine, k, mask, scaling, softcap, sinks, new)
        if kept is not None:
            kept.of.append(weights)
        group.put(weights @ v, out)


def _weights(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scaling: float, softcap: float | None,
    sinks: torch.Tensor | None, new: int,
) -> torch.Tensor:  # fmt: skip
    scores = (q @ k.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        # A sink takes its share of the attention and gives nothing.
        column = sinks.reshape(k.shape[1], -1, 1).expand(-1, -1, new).reshape(1, k.shape[1], -1, 1)
        scores = torch.cat([scores, column.expand(scores.shape[0], -1, -1, -1).to(scores.dtype)], -1)
        return torch.softmax(scores, -1, dtype=torch.float32)[..., :-1].to(q.dtype)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)


class Through(Cache):
    """The cache that transformers sees: it has nothing in it and gives back what came."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


_current: ContextVar[Attention | None] = ContextVar("attention", default=None)


def _forward(
    module: torch.nn.Module, query: torch.Tensor | None, key: torch.Tensor | None, value: torch.Tensor,
    attention_mask: Any, scaling: float | None = None, **extra: Any,
) -> tuple[torch.Tensor, Kept | None]:  # fmt: skip
    attention = _current.get()
    if attention is None:
        raise ShoestringError(
            f"{type(module).__name__} belongs to an engine", "its keys and values stand in pages", "Close the engine"
        )
    return attention(module, query, key, value, attention_mask, scaling, extra)


def _law(*, mask_function: Callable[..., Any] = causal_mask_function, **_: Any) -> Law:
    return Law(None if mask_function is causal_mask_function else mask_function)


def _refuse_unknown(module: torch.nn.Module, mask: Any, extra: dict[str, Any], again: bool) -> None:
    unknown = [name for name in _UNKNOWN if extra.get(name) is not None]
    if _sees_later(module, mask, extra):
        unknown.append("attention to later tokens")
    if again:
        unknown.append("a second attention in the same layer")
    if mask is not None and not isinstance(mask, Law):
        unknown.append("a mask of its own making")
    if unknown:
        raise UsageError(
            f"The attention of {type(module).__name__} cannot run over pages",
            f"it needs {', '.join(unknown)}",
            "Use another model",
        )


def _sees_later(module: torch.nn.Module, mask: Any, extra: dict[str, Any]) -> bool:
    """Whether a token attends to those that come after it, as in a model that fills gaps."""
    if isinstance(mask, Law) and mask.sees is not None:
        zero, one = (torch.tensor(place, device=next(module.parameters()).device) for place in (0, 1))
        return bool(mask.sees(zero, zero, zero, one))
    asked = extra.get("is_causal")
    return not (getattr(module, "is_causal", True) if asked is None else asked)


def _refuse_worker(module: torch.nn.Module, law: Callable[..., Any] | None, extra: dict[str, Any]) -> None:
    special = [word for name, word in (("softcap", "capped scores"), ("s_aux", "sinks")) if extra.get(name) is not None]
    special += ["a window"] if law is not None else []
    special += ["weights of another layer"] if extra.get("weights") is not None else []
    special += ["weights that other layers take"] if getattr(module, "keeps_weights", False) else []
    if special:
        raise UsageError(
            f"The attention of {type(module).__name__} cannot be computed elsewhere",
            f"it has {' and '.join(special)}, which a worker is not told about",
            "Use a model with plain attention",
        )


def _flat(table: np.ndarray, slots: np.ndarray) -> np.ndarray:
    flat: np.ndarray = table[slots // BLOCK].astype(np.int64) * BLOCK + slots % BLOCK
    return flat


def _ancestors(parents: np.ndarray | None, count: int) -> np.ndarray:
    """Which of a chunk's tokens [count, count] each of them sees, itself included."""
    if parents is None:
        return np.tri(count, dtype=bool)
    sees = np.eye(count, dtype=bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            sees[i] |= sees[parent]
    return sees


def flat_slots(table: Sequence[int], slots: Sequence[int]) -> list[int]:
    """Flat slots of the cache of a sequence's own slots."""
    return [int(table[slot // BLOCK]) * BLOCK + slot % BLOCK for slot in slots]


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _law)

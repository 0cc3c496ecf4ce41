"""A transformers model whose keys and values are elsewhere: `attn_implementation="offloaded"`, an empty cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from shoestring.core.errors import UsageError
from shoestring.engine.runner import BLOCK, Batch, Facts
from shoestring.engine.torch_attention import Through
from shoestring.models import shape_of

NAME = "offloaded"  # of this attention in transformers' registries
_UNKNOWN = {"softcap": "capped scores", "s_aux": "sinks", "position_bias": "biased scores", "alibi": "biased scores"}


class Placeholder(Through):
    """The cache that `generate` is given: it counts tokens and holds none."""

    def __init__(self, elsewhere: Any, sequences: int, length: int) -> None:
        super().__init__()
        self.elsewhere, self.sequences, self.most = elsewhere, sequences, length
        self.length = 0  # of every sequence, the pass that is under way included
        self.batch: Batch | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *_: Any, **__: Any) -> Any:
        if layer_idx == 0:
            self.batch = self._begin(key_states.shape[0], key_states.shape[2])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, max_length: int) -> None:
        self.length = max_length if max_length >= 0 else self.length + max_length

    def reset(self) -> None:
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UsageError("Beams cannot change places in attention workers", remedy="Use num_beams=1")

    def _begin(self, rows: int, count: int) -> Batch:
        if rows > self.sequences or self.length + count > self.most:
            raise UsageError(
                f"{rows} sequences of {self.length + count} tokens do not fit",
                f"there is room for {self.sequences} of {self.most}",
                "Attach with more sequences or a greater length",
            )
        each = -(-self.most // BLOCK)
        tables = np.arange(rows * each, dtype=np.int32).reshape(rows, each)
        before, self.length = self.length, self.length + count
        positions = np.tile(np.arange(before, self.length, dtype=np.int32), rows)
        starts = np.arange(rows + 1, dtype=np.int32) * count
        return Batch(np.zeros_like(positions), positions, starts, np.full(rows, before, np.int32), tables)


@contextmanager
def attach(
    model: Any, start: Callable[[Facts], Any], *, sequences: int = 8, length: int = 1024
) -> Iterator[Placeholder]:
    """Inside, the model's attention is computed by workers; give `generate` or a call the cache as `past_key_values`.

    Args:
        model: causal, of transformers, whose attention passes through transformers' attention interface.
        start: makes the attention worker of a model with these facts.
        sequences, length: room in the workers, in answers and tokens of each.

    Raises:
        UsageError: another kind of model, or one whose attention a worker does not know.
    """
    shape = shape_of(model)
    facts = Facts(
        family=shape.family, layers=shape.layers, hidden=shape.hidden, vocab=shape.vocab, heads=shape.heads,
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, context=shape.context, weight_bytes=shape.resident,
        block_bytes=shape.kv_bytes(BLOCK, 4), precision="", backend="torch",
    )  # fmt: skip
    before, training = model.config._attn_implementation, model.training
    elsewhere = start(facts)
    model.eval()
    model.set_attn_implementation(NAME)
    cache = Placeholder(elsewhere, sequences, length)
    token = _current.set(cache)
    try:
        elsewhere.reserve(sequences * -(-length // BLOCK))
        yield cache
    finally:
        _current.reset(token)
        elsewhere.close()
        model.set_attn_implementation(before)
        model.train(training)


_current: ContextVar[Placeholder | None] = ContextVar("placeholder", default=None)


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    cache = _current.get()
    special = {word for name, word in _UNKNOWN.items() if extra.get(name) is not None}
    special |= {"a window"} if extra.get("sliding_window") is not None else set()
    if special:
        raise UsageError(
            f"The attention of {type(module).__name__} cannot be computed elsewhere",
            f"it has {' and '.join(sorted(special))}, which a worker is not told about",
            "Use a model with plain attention",
        )
    if cache is None or cache.batch is None or query.shape[2] * query.shape[0] != cache.batch.tokens:
        raise UsageError(
            f"{type(module).__name__} has no keys of its own",
            "its attention is computed elsewhere",
            "Call it inside `attach`, with the cache as past_key_values",
        )
    factor = 1.0 if scaling is None else float(scaling) * query.shape[-1] ** 0.5
    arrays = (x.transpose(1, 2).flatten(0, 1).float().contiguous() for x in (query * factor, key, value))
    q, k, v = (x.detach().cpu().numpy() for x in arrays)
    found = torch.from_numpy(cache.elsewhere(int(module.layer_idx), q, k, v, cache.batch))
    return found.to(query).unflatten(0, (query.shape[0], query.shape[2])), None


def _law(*, attention_mask: Tensor | None = None, mask_function: Any = causal_mask_function, **_: Any) -> None:
    if mask_function is not causal_mask_function:
        raise UsageError("Attention elsewhere is causal and nothing more", "this model has another mask")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UsageError(
            "Prompts of unequal length cannot be padded where attention is computed elsewhere",
            "a worker sees every slot before a token",
            "Give prompts of one length, or use the engine",
        )


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _law)

"""A model as plain numbers: enough to predict storage, memory and FLOPs without weights and without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

ROLES = ("embed", "head", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "expert", "norm", "bias", "other")
PROJECTIONS = frozenset({"q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"})
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class Weight:
    """One tensor of a model.

    Attributes:
        name: as in the state dict.
        role: one of `ROLES`.
        dims: its dimensions; for a matrix (out_features, in_features).
        stored: bytes on disk, scales and codebooks included.
        resident: bytes in memory while the model works.
        tied: name of the tensor it shares its storage with; then it costs no bytes.
        used: share of it that one token multiplies with (an expert of a mixture: active / all).
    """

    name: str
    role: str
    dims: tuple[int, ...]
    stored: int
    resident: int
    tied: str = ""
    used: float = 1.0

    @property
    def count(self) -> int:
        n = 1
        for d in self.dims:
            n *= d
        return n


@dataclass(frozen=True)
class Shape:
    """A model's architecture in numbers.

    Attributes:
        context: the longest text it accepts, 0 when unbounded.
        keyless: layers that take the attention weights of another one: they keep values and no keys.
    """

    weights: tuple[Weight, ...]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int = 0
    family: str = ""
    keyless: int = 0
    other_files: int = 0

    @property
    def parameters(self) -> int:
        return sum(w.count for w in self.weights if not w.tied)

    @property
    def storage(self) -> int:
        """Bytes of the model folder: weights plus tokenizer and configuration files."""
        return sum(w.stored for w in self.weights if not w.tied) + self.other_files

    @property
    def resident(self) -> int:
        return sum(w.resident for w in self.weights if not w.tied)

    def kv_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Key-value cache of `tokens` positions: 2 L n_kv d_head T bytes, half for a layer without keys."""
        return (2 * self.layers - self.keyless) * self.kv_heads * self.head_dim * tokens * bytes_per_value

    def flops_per_token(self, context: int = 0) -> float:
        """Forward FLOPs of one token: 2 per multiplied weight (look-ups cost none), plus attention over `context`."""
        weights = sum(
            w.count * w.used
            for w in self.weights
            if w.role in PROJECTIONS | {"head", "expert", "other"} and len(w.dims) > 1
        )
        return 2 * weights + 2 * (2 * self.layers - self.keyless) * context * self.heads * self.head_dim

    def change(self, touch: Callable[[Weight], Weight]) -> Shape:
        return replace(self, weights=tuple(touch(w) for w in self.weights))

    def of(self, *roles: str) -> Iterator[Weight]:
        return (w for w in self.weights if w.role in roles)


def context_of(config: Any) -> int:
    """How many tokens a model sees at once, as its transformers configuration has it; 0 where that says nothing."""
    said = (getattr(config, word, None) for word in _CONTEXTS)
    return next((tokens for tokens in said if isinstance(tokens, int) and tokens > 0), 0)

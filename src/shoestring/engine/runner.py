"""The one interface between scheduling and arithmetic: a range of layers over a ragged batch and a paged cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from shoestring.core.errors import ShoestringError, UsageError

BLOCK = 16  # tokens in a page of the cache; the native kernels compare a query with one page in one register


@dataclass(frozen=True)
class Batch:
    """Tokens of several sequences, one sequence after another. All arrays are int32 and contiguous.

    Token j of a sequence's chunk is stored in slot `contexts[s] + j` of that sequence, in block
    `tables[s, slot // BLOCK]` at `slot % BLOCK`, and sees every slot before `contexts[s]`, itself, and of its chunk the
    tokens before it, or with `parents` only its ancestors.

    Attributes:
        ids: [tokens].
        positions: [tokens], for rotary or learned positions; they need not equal the slot.
        starts: [sequences + 1], where each sequence's tokens begin.
        contexts: [sequences], slots that were filled by earlier steps.
        tables: [sequences, most blocks], block ids, 0 beyond the end.
        parents: [tokens] index inside the sequence's own chunk, -1 for its first level; None means a plain chain.
        adapters: [tokens] number of a loaded adapter, -1 for none; None means none anywhere.
        owners: the answers whose tokens these are, one for each sequence; runners do not look at them.
    """

    ids: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    contexts: np.ndarray
    tables: np.ndarray
    parents: np.ndarray | None = None
    adapters: np.ndarray | None = None
    owners: tuple[Any, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def sequences(self) -> int:
        return len(self.contexts)


class CacheLost(ShoestringError):
    """Keys and values are gone and pages are as fresh ones: a runner raises it when all must be computed again."""


class AttentionWorker(Protocol):
    """Computes attention elsewhere and keeps keys and values itself. A plain function will do.

    It may also define these, each found by its name:

    - `begin(layer, q, batch)`, called with the queries as soon as they exist, before the keys and values of the call
      that follows are computed. None is as good as absent.
    - `reserve(blocks)`, `copy_blocks(pairs)`, `move_slots(table, moves)`, as of `Runner`: it keeps keys and values by
      block and slot as the runner's cache does, so the runner makes none, and pages are shared, forked and found again
      as without a worker. The last two are called between passes and raise nothing; what fails there is raised by the
      next pass.
    """

    def __call__(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, batch: Batch) -> np.ndarray:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], all float32 after norms and rotation.

        Returns [tokens, heads, head_dim]: softmax(q k / sqrt(head_dim)) v over what each token sees.

        Raises:
            CacheLost: what it kept is gone, and it is ready to begin anew.
        """


def keeps_pages(worker: AttentionWorker | None) -> bool:
    """Whether a worker keeps keys and values by block and slot, in place of the runner."""
    return hasattr(worker, "reserve")


@dataclass(frozen=True)
class Facts:
    """What is fixed about an opened model. Bytes; `context` is the longest sequence it was made for."""

    family: str
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    weight_bytes: int
    block_bytes: int  # of one page over all layers, keys and values
    precision: str  # as a report names it, such as "q4_1 + q8_0" or "bfloat16"
    backend: str  # "native" or "torch"
    eos: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class Runner(Protocol):
    """Runs layers of one model. Not thread-safe: one thread steps it.

    `hidden` stands for the residual stream of a batch, [tokens, hidden], as whatever array suits the runner; hand it
    back as it came. `to_host` and `from_host` change it to and from numpy float32.
    """

    facts: Facts
    attention: AttentionWorker | None

    def reserve(self, blocks: int) -> None:
        """Make the cache: `blocks` pages. Called once, before `run`.

        Raises:
            DoesNotFit: the memory is not to be had.
        """

    def run(self, batch: Batch, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
        """Layers first..last-1 (None: all). Layer 0 starts from `batch.ids` when hidden is None. Fills the slots.

        `hidden` may hold several streams of the batch's tokens, one after another, [streams * tokens, hidden]: the
        first fills the slots, and the others see what it sees. Runners that cannot do that raise UsageError.
        """

    def logits(self, hidden: Any, rows: np.ndarray) -> np.ndarray:
        """Final norm and head on some rows of `hidden`: float32 [len(rows), vocab], valid until the next call."""

    def normed(self, hidden: Any, rows: np.ndarray) -> np.ndarray:
        """Final norm alone: float32 [len(rows), hidden], for embeddings."""

    def head(self, normed: np.ndarray) -> np.ndarray:
        """The head alone, for who norms otherwise: float32 [rows, hidden] -> float32 [rows, vocab]."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (from, to) in every layer: what copy-on-write asks for."""

    def move_slots(self, table: Sequence[int], moves: Sequence[tuple[int, int]]) -> None:
        """Copy slots (from, to) of one sequence, in order: keeps the accepted branch of a token tree."""

    def add_adapter(self, folder: str) -> int:
        """Load a PEFT adapter that is a LoRA, or can be written as one, beside the weights; its number for batches.

        Raises:
            NotBeside: it is more than that.
            UsageError: it does not belong to this model.
        """

    def drop_adapter(self, number: int) -> None: ...

    def to_host(self, hidden: Any) -> np.ndarray: ...

    def from_host(self, hidden: np.ndarray) -> Any: ...

    def close(self) -> None: ...


def within(span: tuple[int, int | None], layers: int) -> tuple[int, int]:
    """The layers first..last-1, None being the end.

    Raises:
        UsageError: they are not among `layers`, or none.
    """
    first, last = span[0], layers if span[1] is None else span[1]
    if not 0 <= first < last <= layers:
        raise UsageError(f"There are no layers {first} to {last}", f"the model has {layers}")
    return first, last

"""A table whose rows ids share, as a torch module in the place of `nn.Embedding`, and a head over the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoestring.core.errors import UsageError
from shoestring.methods.estimators._rows import PRIME, Array, Hash, Rows
from shoestring.models import surgery
from shoestring.models.anatomy import inspect

FITTING_STEPS = 30


class SharedEmbedding(nn.Module):
    """`nn.Embedding(ids, width)` with fewer rows: the row, or the sum of the rows, that `Rows` says.

    The mapping (int32) and the hashes of ids beyond it are buffers: they are saved, loaded and moved with the table.

    Args:
        rows: which rows each id reads.
        embedding_dim: width of a row.
        padding_idx: an id that reads zeros and gives no gradient.
    """

    def __init__(
        self,
        rows: Rows,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.padding_idx = embedding_dim, padding_idx
        self.weight = nn.Parameter(torch.empty(rows.count, embedding_dim, device=device, dtype=dtype))
        self.index: Tensor
        self.others: Tensor
        self.register_buffer("index", torch.from_numpy(np.ascontiguousarray(rows.index, np.int32)).to(device))
        hashes = [[other.a, other.b, other.first, other.size] for other in rows.others]
        self.register_buffer("others", torch.tensor(hashes, dtype=torch.int64, device=device))
        nn.init.normal_(self.weight)

    @property
    def num_embeddings(self) -> int:
        """Ids with rows of their own in the mapping, as `nn.Embedding` counts them; the table has `weight.shape[0]`."""
        return self.index.shape[0]

    def rows(self) -> Rows:
        """The mapping as plain numbers."""
        return Rows(self.index.cpu().numpy(), self.weight.shape[0], tuple(Hash(*h) for h in self.others.tolist()))

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows that ids read, int32 [..., columns]; ids never seen are hashed, and none is an error."""
        known = (ids >= 0) & (ids < self.num_embeddings)
        a, b, first, size = self.others.unbind(1)
        hashed = first + (a * (ids.long() % PRIME)[..., None] + b) % PRIME % size
        return torch.where(known[..., None], self.index[torch.where(known, ids, 0)], hashed.int())

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        found = nn.functional.embedding(self.look_up(ids), self.weight).sum(-2)
        return found if self.padding_idx is None else found * (ids != self.padding_idx)[..., None]

    @torch.no_grad()
    def fit_to(self, table: Tensor, counts: Tensor | Array | None = None) -> SharedEmbedding:
        """Set the rows to stand for a full table [ids, width]: of the ids that share a row the mean.

        Args:
            counts: how often each id occurs, its weight in the mean; all alike when nothing is said. An id that never
                occurs counts as a hundredth of an occurrence.

        With several columns it is the least-squares fit of their sum, by steps that each take the mean of what is left.
        """
        if table.shape != (self.num_embeddings, self.embedding_dim):
            raise UsageError(
                f"the table is {tuple(table.shape)}", f"the mapping is of {self.num_embeddings} ids", "Use its table"
            )
        weights = torch.ones(len(table)) if counts is None else torch.as_tensor(counts).float().clamp(min=0.01)
        weights = weights.to(table.device)[:, None]
        columns = self.index.long().unbind(1)
        made = torch.zeros(self.weight.shape, device=table.device)
        mass = torch.zeros(len(made), 1, device=table.device)
        for column in columns:
            mass.index_add_(0, column, weights)
        for _ in range(1 if len(columns) == 1 else FITTING_STEPS):
            rest, step = table.float().clone(), torch.zeros_like(made)
            for column in columns:
                rest -= made[column]
            for column in columns:
                step.index_add_(0, column, rest * weights)
            made += step / mass.clamp(min=1e-12) / len(columns)
        self.weight.copy_(made)
        return self

    def nbytes(self) -> int:
        """Bytes of table and mapping, as the state dict holds them."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.weight, self.index, self.others))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rows={self.weight.shape[0]}"


class SharedHead(nn.Module):
    """Scores of every id against the rows of a shared table: as many products as rows, then each id takes its own."""

    def __init__(self, table: SharedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.table, self.bias = table, bias

    @property
    def weight(self) -> nn.Parameter:
        return self.table.weight

    def forward(self, states: Tensor) -> Tensor:
        """[..., width] -> [..., ids]."""
        scores = states @ self.table.weight.T
        each = sum(scores[..., column] for column in self.table.index.long().unbind(1))
        return each if self.bias is None else each + self.bias  # type: ignore[return-value]


def share_table(
    model: nn.Module, rows: Rows, counts: Tensor | Array | None = None, *, head: bool | None = None
) -> SharedEmbedding:
    """Put a shared table in the place of a model's token table, its rows fitted to what the table held.

    Args:
        counts: how often each token occurs; see `SharedEmbedding.fit_to`.
        head: let a head that is tied to the table use the shared rows too, without which the whole table stays in
            memory for it; by default where they are tied.

    Raises:
        UsageError: rows for another vocabulary, or a head that is not tied is to share.
    """
    parts = inspect(model)
    table: Any = model.get_submodule(parts.embeddings)
    # No padding_idx: where transformers sets one, the table holds a row for it all the same, and reads it.
    shared = SharedEmbedding(rows, table.embedding_dim, device=table.weight.device, dtype=table.weight.dtype)
    shared.fit_to(table.weight, counts)
    head = parts.embeddings_tied if head is None else head
    if head and not parts.embeddings_tied:
        raise UsageError("the head has weights of its own", "only a tied one can use the table's", "Use head=False")
    surgery.replace_module(model, parts.embeddings, shared)
    if head:
        old: Any = model.get_submodule(parts.head)
        surgery.replace_module(model, parts.head, SharedHead(shared, getattr(old, "bias", None)))
    return shared

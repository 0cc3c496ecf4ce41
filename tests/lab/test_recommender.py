from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from shoestring.core.errors import UsageError
from shoestring.lab import recommender
from shoestring.lab.recommender import Recommender, Split, evaluate, full_tables, train


def met(rows: list[list[int]]) -> Any:
    return sparse.csr_matrix(np.array(rows, float))


def test_recall_and_ndcg_by_hand() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    seen = met([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    wanted = met([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    found = evaluate(scores, seen, wanted, k=2)
    # User 0 ranks 1, 2 and wants 2, 3; user 1 ranks 3, 2 and wants three; user 2 wants nothing and does not count.
    assert found["recall@2"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    ideal = 1 + 1 / math.log2(3)
    assert found["ndcg@2"] == pytest.approx((1 / math.log2(3)) / ideal)


def test_equal_scores_are_ranked_by_popularity_not_by_id() -> None:
    popular = met([[0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    for item, recall in ((3, 1.0), (1, 1.0), (0, 0.0), (2, 0.0)):
        wanted = np.zeros((3, 4))
        wanted[2, item] = 1
        assert evaluate(torch.zeros(3, 4), popular, met(wanted.tolist()), k=2)["recall@2"] == recall
    assert evaluate(torch.tensor([[0.0, 0, 1, 0]] * 3), popular, met([[0] * 4, [0] * 4, [0, 0, 1, 0]]), k=1) == {
        "recall@1": 1.0, "ndcg@1": 1.0,
    }  # fmt: skip


def test_parts_have_nothing_in_common() -> None:
    whole = met(np.random.RandomState(0).randint(0, 2, (40, 30)).tolist())
    parts = recommender.split(whole, 0)
    assert abs(parts.train.nnz - 0.8 * whole.nnz) < 2 and abs(parts.valid.nnz - 0.1 * whole.nnz) < 2
    assert ((parts.train + parts.held_out) != whole).nnz == 0
    assert (recommender.split(whole, 0).test != parts.test).nnz == 0
    assert (recommender.split(whole, 1).test != parts.test).nnz > 0
    with pytest.raises(UsageError, match="stands in two parts"):
        Split(whole, parts.valid, parts.test)
    with pytest.raises(UsageError, match="the parts are"):
        Split(whole, parts.valid[:2], parts.test)


def test_lightgcn_averages_layers_of_normalized_neighbours() -> None:
    graph = met([[1, 1, 0], [0, 1, 0]])
    split = Split(graph, met([[0] * 3] * 2), met([[0] * 3] * 2))
    model = Recommender(full_tables(split, 4), split, graph=graph, layers=1)
    users, items = model.vectors()
    first, other = model.users.weight, model.items.weight
    # User 0 has 2 edges, item 0 has 1, item 1 has 2.
    expected = (first[0] + other[0] / math.sqrt(2 * 1) + other[1] / math.sqrt(2 * 2)) / 2
    assert torch.allclose(users[0], expected, atol=1e-6)
    assert torch.allclose(items[2], other[2] / 2, atol=1e-6), "an item without edges has no neighbours"
    scores = model.pairs(torch.tensor([0, 1]), torch.tensor([1, 2]))[0]
    assert torch.allclose(scores, model.scores()[[0, 1], [1, 2]])


@pytest.mark.parametrize("graph", [False, True])
def test_it_learns_tastes_and_the_seed_decides(graph: bool) -> None:
    draw = np.random.RandomState(0)
    likes = (np.arange(60)[:, None] % 3) == (np.arange(45) % 3)
    split = recommender.split(sparse.csr_matrix((likes & (draw.random_sample((60, 45)) < 0.7)) * 1.0), 0)
    found = []
    for _ in range(2):
        model = Recommender(full_tables(split, 8), split, graph=split.train if graph else None, seed=1)
        untrained = evaluate(model.scores(), split.train + split.valid, split.test)["recall@20"]
        found.append(train(model, split, epochs=30, batch=64, seed=0))
    assert found[0] == found[1] and found[0]["recall@20"] > 0.9 > untrained


def test_the_loss_is_bpr() -> None:
    difference = torch.tensor([0.3, -1.0])
    expected = -np.log(1e-10 + 1 / (1 + np.exp(-difference.numpy()))).mean()
    assert recommender.bpr(difference, torch.zeros(2)).item() == pytest.approx(expected, rel=1e-5)


def test_missing_data_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps recbole"):
        recommender.movielens()


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="needs the package recbole")
def test_movielens_is_whole() -> None:
    import sys

    found = recommender.movielens()
    assert found.shape == (943, 1682) and found.nnz == 100_000 and found.max() == 1
    assert "recbole" not in sys.modules

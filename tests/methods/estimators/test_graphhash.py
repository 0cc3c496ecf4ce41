"""Clusters that maximize the bipartite modularity, as rows of tables that never meet an id they do not know."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from shoestring import models
from shoestring.core.errors import UsageError
from shoestring.lab import recommender
from shoestring.lab import tiny as tiny_models
from shoestring.methods.estimators import graphhash
from shoestring.methods.estimators._embedding import SharedEmbedding, share_table
from shoestring.methods.estimators._rows import RULES, by_rule
from shoestring.methods.estimators.graphhash import GraphHash, token_graph


def interactions(users: int = 300, items: int = 200, tastes: int = 25, seed: int = 0, density: float = 0.3) -> Any:
    """Users who meet items of their taste, popular ones more often."""
    draw = np.random.RandomState(seed)
    same = draw.randint(tastes, size=users)[:, None] == draw.randint(tastes, size=items)
    popular = 1 / (1 + np.arange(items) % 17)
    return sparse.csr_matrix((draw.random_sample((users, items)) < np.where(same, density, 0.01 + popular / 20)) * 1.0)


def modularity(graph: Any, rows: Any, columns: Any, gamma: float) -> float:
    """(1), by its definition."""
    dense = graph.toarray()
    edges = dense.sum()
    null = np.outer(dense.sum(1), dense.sum(0)) / edges
    return float(((dense - gamma * null) * (rows[:, None] == columns)).sum() / edges)


# ---------------------------------------------------------------- clusters


@pytest.mark.parametrize("gamma", [1.0, 2.0, 5.0])
def test_the_objective_is_the_bipartite_one(gamma: float) -> None:
    """Found clusters are better by (1) than those of the modularity that does not know of two sides."""
    import networkx
    from networkx.algorithms import bipartite

    graph = interactions()
    made = GraphHash(resolution=gamma, random_state=0).fit(graph)
    ours = modularity(graph, made.row_clusters_[made.row_labels_], made.column_clusters_[made.column_labels_], gamma)
    plain = networkx.community.louvain_communities(
        bipartite.from_biadjacency_matrix(graph), resolution=gamma, weight=None, seed=0
    )
    labels = np.empty(sum(graph.shape), int)
    for number, members in enumerate(plain):
        labels[list(members)] = number
    assert ours > modularity(graph, labels[:300], labels[300:], gamma)
    # No single id can improve it by more than the tolerance of the search.
    rows, columns = made.row_clusters_[made.row_labels_], made.column_clusters_[made.column_labels_]
    for user in range(0, 300, 30):
        moved = [modularity(graph, np.where(np.arange(300) == user, c, rows), columns, gamma) for c in set(rows)]
        assert max(moved) <= ours + 2e-3


@pytest.mark.parametrize("size", [0.05, 0.1, 0.25, 0.5, 0.8, 60, 333])
@pytest.mark.parametrize("tables", ["both", "rows", "columns"])
def test_the_size_is_reached_within_5_per_cent(size: float, tables: str) -> None:
    graph = interactions()
    ids = {"both": 500, "rows": 300, "columns": 200}[tables]
    wanted = size if isinstance(size, int) else size * ids
    if wanted > 0.9 * ids:
        return
    made = GraphHash(size, tables=tables, random_state=1).fit(graph)
    count = sum(made.table(side).count for side in graphhash.TABLES[tables])
    assert abs(count - wanted) <= 0.05 * wanted
    labels = {"rows": made.row_labels_, "columns": made.column_labels_}
    for side in graphhash.TABLES[tables]:
        assert set(labels[side]) == set(range(made.table(side).count)), "a row that nobody reads"


def test_the_size_is_reached_where_the_number_of_clusters_jumps() -> None:
    """A star: at one resolution all leaves leave the hub, so that no resolution gives a number between."""
    star = sparse.csr_matrix(np.ones((1, 100)))
    with pytest.warns(UserWarning, match="rows of full ones"):
        fits = [GraphHash(resolution=gamma, random_state=0).fit(star) for gamma in (0.5, 0.99, 1.01, 9)]
    counts = {len(set(made.column_labels_)) for made in fits}
    assert counts == {1, 100}
    made = GraphHash(40, tables="columns", random_state=0).fit(star)
    assert made.table("columns").count == 40
    assert set(made.column_labels_) == set(range(40))


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="needs the package recbole")
def test_movielens_has_the_rows_that_were_measured_for_its_resolutions() -> None:
    split = recommender.split(recommender.movielens(), 0)
    for gamma, share in ((5.0, 0.15), (10.0, 0.25), (20.0, 0.37)):
        made = GraphHash(resolution=gamma, random_state=0).fit(split.train, held_out=split.held_out)
        rows = made.table("rows").count + made.table("columns").count
        assert rows / 2625 == pytest.approx(share, abs=0.015)
    made = GraphHash(0.25, random_state=0).fit(split.train)
    assert made.table("rows").count + made.table("columns").count == pytest.approx(0.25 * 2625, rel=0.05)
    assert (~made.column_placed_).sum() == 1682 - np.count_nonzero(split.train.sum(0)) > 0


def test_what_cannot_be_reached_is_said() -> None:
    graph = sparse.csr_matrix((np.ones(3), ([0, 1, 2], [0, 1, 2])), shape=(50, 50))
    with pytest.warns(ConvergenceWarning, match="6 clusters at most where 25"):
        GraphHash(0.25, random_state=0).fit(graph)


@pytest.mark.parametrize(("size", "words"), [(0.01, "nearly all ids are one"), (0.95, "hardly anything is saved")])
def test_sizes_that_make_no_sense_are_warned_of(size: float, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        GraphHash(size, random_state=0).fit(interactions())


def test_the_seed_decides() -> None:
    graph = interactions()
    one, same, other = (GraphHash(random_state=seed).fit(graph) for seed in (0, 0, 1))
    assert np.array_equal(one.row_labels_, same.row_labels_) and one.row_hashes_ == same.row_hashes_
    assert not np.array_equal(one.row_labels_, other.row_labels_) and one.row_hashes_ != other.row_hashes_
    again = pickle.loads(pickle.dumps(one))
    assert np.array_equal(again.table("rows").look_up([3, 999_999]), one.table("rows").look_up([3, 999_999]))


def test_duplicates_and_degrees_of_liking_do_not_count() -> None:
    graph = interactions().tocoo()
    twice = sparse.coo_matrix(
        (np.concatenate([graph.data * 5, graph.data]), (np.tile(graph.row, 2), np.tile(graph.col, 2))), graph.shape
    )
    one, other = (GraphHash(random_state=0).fit(g.tocsr()) for g in (graph, twice))
    assert np.array_equal(one.row_labels_, other.row_labels_)


def test_labels_are_consecutive_and_int32() -> None:
    made = GraphHash(random_state=0).fit(interactions())
    for labels, clusters in (
        (made.row_labels_, made.row_clusters_),
        (made.column_labels_, made.column_clusters_),
    ):
        assert labels.dtype == np.int32 and set(labels) == set(range(len(clusters)))
    assert made.rows_.shape == (len(made.rows_), 300) and (made.rows_.sum(0) == 1).all()
    users, items = made.get_indices(0)
    assert len(set(made.row_labels_[users])) <= 1 and len(set(made.column_labels_[items])) <= 1


# ---------------------------------------------------------------- only what was trained on


def test_held_out_interactions_are_refused() -> None:
    whole = interactions().tocoo()
    kept = sparse.csr_matrix((np.ones(50), (whole.row[:50], whole.col[:50])), whole.shape)
    train = sparse.csr_matrix((np.ones(whole.nnz - 50), (whole.row[50:], whole.col[50:])), whole.shape)
    with pytest.raises(UsageError, match="50 held-out interactions"):
        GraphHash().fit(whole.tocsr(), held_out=kept)
    made = GraphHash(random_state=0).fit(train, held_out=kept)
    one = sparse.csr_matrix((np.ones(1), (whole.row[:1], whole.col[:1])))
    with pytest.raises(UsageError, match="1 held-out interactions"):
        made.update(kept, held_out=one)


def test_ids_without_interactions_take_no_row_of_their_own() -> None:
    graph = interactions().tolil()
    graph[10:60] = 0
    graph[:, 5:30] = 0
    graph = graph.tocsr()
    made = GraphHash(resolution=4.0, random_state=0).fit(graph)
    assert np.array_equal(made.row_placed_, np.asarray(graph.sum(1)).ravel() > 0)
    assert np.array_equal(made.column_placed_, np.asarray(graph.sum(0)).ravel() > 0)
    used = set(made.row_labels_[made.row_placed_])
    assert set(made.row_labels_[10:60]) <= used and len(set(made.row_labels_[10:60])) > 5, "they are spread"
    assert np.array_equal(made.row_labels_[10:60], made.row_hashes_[0](np.arange(10, 60)))


@pytest.mark.parametrize("double", [False, True])
def test_no_id_is_an_error_at_serving(double: bool) -> None:
    made = GraphHash(0.25, double=double, random_state=0).fit(interactions())
    table, module = made.table("columns"), made.embedding("columns", 8)
    ids = np.array([0, 199, 200, 10**6, 2**31, 2**40 + 5, -1, -(2**50)])
    rows = table.look_up(ids)
    assert rows.shape == (8, 2 if double else 1) and rows.dtype == np.int32
    assert (rows >= 0).all() and (rows < table.count).all()
    assert np.array_equal(module.look_up(torch.from_numpy(ids)).numpy(), rows), "torch and numpy disagree"
    assert torch.isfinite(module(torch.from_numpy(ids))).all()
    many = table.look_up(np.arange(10_000, 20_000))[:, 0]
    spread = np.bincount(many, minlength=table.others[0].size)
    assert spread.max() < 3 * spread.mean()


def test_new_interactions_place_new_ids_and_move_no_other() -> None:
    graph = interactions()
    made = GraphHash(0.25, random_state=0).fit(graph[:280])
    before = made.row_labels_.copy(), made.column_labels_.copy(), made.table("rows").count
    new = sparse.csr_matrix((303, 202))
    # User 300 meets items of one user's cluster; item 201 only users 300 and 301; user 302 nobody.
    cluster = made.row_clusters_[made.row_labels_[3]]
    friends = np.flatnonzero(made.column_clusters_[made.column_labels_] == cluster)
    others = np.flatnonzero(made.column_clusters_[made.column_labels_] != cluster)
    assert len(friends) >= 2, "the case is empty"
    new = new.tolil()
    new[300, friends[:2]] = 1
    new[300, others[0]] = 1
    new[301, 201] = new[300, 201] = 1
    made.update(new.tocsr())
    assert np.array_equal(made.row_labels_[:280], before[0]) and np.array_equal(made.column_labels_[:200], before[1])
    assert made.table("rows").count == before[2] and len(made.row_labels_) == 303 and len(made.column_labels_) == 202
    assert made.row_clusters_[made.row_labels_[300]] == cluster and made.row_placed_[300]
    assert not made.row_placed_[302] and made.row_labels_[302] == made.row_hashes_[0](np.array([302]))[0]
    if cluster in made.column_clusters_:  # the second round: by user 300, who was placed in the first
        assert made.column_clusters_[made.column_labels_[201]] == cluster and made.column_placed_[201]
    module = made.embedding("rows", 4)
    assert module.num_embeddings == 303


# ---------------------------------------------------------------- rules beside clusters


@pytest.mark.parametrize("rule", [name for name in RULES if name != "full"])
@pytest.mark.parametrize("count", [7, 64, 100])
def test_every_rule_keeps_to_the_rows(rule: str, count: int) -> None:
    graph = interactions()
    rows = by_rule(rule, graph, count, seed=3)
    assert rows.count == count and rows.index.dtype == np.int32 and len(rows.index) == 300
    assert rows.index.min() >= 0 and rows.index.max() < count
    assert SharedEmbedding(rows, 4).weight.shape == (count, 4)
    assert np.array_equal(rows.index, by_rule(rule, graph, count, seed=3).index)
    assert rows.look_up([10**9]).max() < count


def test_what_each_rule_is() -> None:
    graph = interactions()
    assert np.array_equal(by_rule("modulo", graph, 7).index[:, 0], np.arange(300) % 7)
    assert np.array_equal(by_rule("full", graph, 7).index[:, 0], np.arange(300))
    degrees = np.diff(graph.indptr)
    for name, columns in (("frequency", 1), ("double_frequency", 2)):
        rows = by_rule(name, graph, 40)
        often = np.argsort(-degrees, kind="stable")[:20]
        rest = np.setdiff1d(np.arange(300), often)
        assert rows.index.shape == (300, columns)
        assert sorted(rows.index[often, 0]) == list(range(20, 40)) and rows.index[rest].max() < 20
    pair = by_rule("double", graph, 40).index
    assert (pair[:, 0] != pair[:, 1]).mean() > 0.9
    near = sparse.vstack([graph[:1], graph[:1], graph[1:2]]).tocsr()
    rows = by_rule("lsh", near, 64).index[:, 0]
    assert rows[0] == rows[1] != rows[2], "equal interactions share a row"
    with pytest.raises(UsageError, match="no rule is called moduli"):
        by_rule("moduli", graph, 7)


# ---------------------------------------------------------------- the module


def test_it_stands_in_for_an_embedding(tmp_path: Path) -> None:
    graph = interactions()
    plain = nn.Embedding(300, 8)
    same = SharedEmbedding(by_rule("full", graph, 2), 8).fit_to(plain.weight)
    ids = torch.tensor([[0, 299, 5], [5, 5, 7]])
    assert torch.equal(same(ids), plain(ids)) and same.num_embeddings == 300 and same.embedding_dim == 8
    made = GraphHash(0.25, random_state=0).fit(graph)
    module = made.embedding("rows", 8, padding_idx=5)
    module(ids).sum().backward()
    row = made.row_labels_[[0, 5, 7, 299]]
    assert module.weight.grad is not None and module.weight.grad[row[0]].abs().sum() > 0
    assert torch.equal(module(ids)[0, 2], torch.zeros(8))
    members = np.flatnonzero(made.row_labels_ == made.row_labels_[0])
    assert len(members) > 1 and len(module(torch.from_numpy(members)).unique(dim=0)) == 1
    # The mapping goes where the table goes.
    torch.save(module.state_dict(), tmp_path / "table.pt")
    other = GraphHash(0.25, random_state=0).fit(graph).embedding("rows", 8)
    nn.init.zeros_(other.weight)
    other.index.zero_()
    other.load_state_dict(torch.load(tmp_path / "table.pt", weights_only=True))
    assert torch.equal(other(torch.tensor([1, 10**6])), module(torch.tensor([1, 10**6])))
    half = other.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and half.index.dtype == torch.int32 and half.others.dtype == torch.int64
    assert {tensor.device.type for tensor in other.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("double", [False, True])
def test_the_bytes_are_those_of_table_and_mapping(double: bool, tmp_path: Path) -> None:
    made = GraphHash(0.25, double=double, random_state=0).fit(interactions())
    rows, module = made.table("rows"), made.embedding("rows", 64)
    columns = 2 if double else 1
    assert module.nbytes() == rows.nbytes(64) == rows.count * 64 * 4 + (4 * 300 + 32) * columns
    torch.save(module.state_dict(), tmp_path / "table.pt")
    assert 0 <= (tmp_path / "table.pt").stat().st_size - module.nbytes() < 4000


def test_double_is_graphhash_when_its_second_rows_are_zero() -> None:
    graph = interactions()
    made = GraphHash(0.5, double=True, random_state=0).fit(graph)
    count = len(made.row_clusters_)
    assert made.table("rows").count == 2 * count
    assert abs(2 * count + 2 * len(made.column_clusters_) - 250) <= 0.05 * 250
    single = GraphHash(resolution=made.resolution_, random_state=0).fit(graph)
    assert np.array_equal(single.row_labels_, made.row_labels_)
    one, two = single.embedding("rows", 8), made.embedding("rows", 8)
    ids = torch.arange(300)
    with torch.no_grad():
        two.weight[:count] = one.weight
        assert len(two(ids).unique(dim=0)) > 2 * count, "members of a cluster differ by their second row"
        two.weight[count:] = 0
    assert torch.equal(two(ids), one(ids))


def test_rows_that_stand_for_a_table_are_its_means() -> None:
    rows = by_rule("modulo", interactions(), 100)
    table = torch.randn(300, 4)
    module = SharedEmbedding(rows, 4).fit_to(table, torch.arange(300))
    expected = (table[7] * 7 + table[107] * 107 + table[207] * 207) / (7 + 107 + 207)
    assert torch.allclose(module(torch.tensor(7)), expected, atol=1e-6)
    rows = by_rule("double", interactions(), 100)
    pair = SharedEmbedding(rows, 4).fit_to(table)
    summed = np.zeros((300, 100))
    for column in rows.index.T:
        np.add.at(summed, (np.arange(300), column), 1)
    best = np.linalg.lstsq(summed, table.numpy(), rcond=None)[1].sum()
    assert ((pair(torch.arange(300)) - table) ** 2).sum().item() == pytest.approx(best, rel=0.02)
    with pytest.raises(UsageError, match="is of 300 ids"):
        module.fit_to(table[:10])


# ---------------------------------------------------------------- a vocabulary


def test_tokens_meet_the_tokens_before_them() -> None:
    graph = token_graph([[1, 2, 3], [1, 2, 1], [4]], 6)
    assert graph.shape == (6, 6)
    assert sorted(zip(*(part.tolist() for part in graph.nonzero()))) == [(1, 2), (2, 1), (3, 2)]
    assert set(graph.data) == {1.0} and token_graph([], 6).nnz == 0
    with pytest.raises(UsageError, match="not in the vocabulary of 3"):
        token_graph([[1, 3]], 3)


@pytest.mark.parametrize("double", [False, True])
def test_a_models_table_and_tied_head_share_rows_as_priced(double: bool, tmp_path: Path) -> None:
    model = tiny_models.model()
    model.save_pretrained(tmp_path)
    whole = models.shape_of(tmp_path)
    ids = tiny_models.batch(2, 12)
    before = tiny_models.logits(model, ids)
    full = tiny_models.model()
    share_table(full, by_rule("full", sparse.csr_matrix((64, 64)), 2))
    assert torch.allclose(tiny_models.logits(full, ids), before, atol=1e-5)
    graph = interactions(64, 64, 8)
    made = GraphHash(0.25, tables="rows", double=double, random_state=0).fit(graph)
    shared = share_table(model, made.table("rows"))
    after = tiny_models.logits(model, ids)
    if not double:
        first = made.row_labels_
        one, other = next((a, b) for a in range(64) for b in range(a + 1, 64) if first[a] == first[b])
        assert torch.equal(after[..., one], after[..., other]), "ids of a row score alike"
    options = {"size": shared.weight.shape[0], "double": double}
    saved = whole.storage - graphhash.price(whole, options).shape.storage
    assert saved == 64 * 64 * 4 - shared.nbytes()
    held = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    assert sum(held.values()) == graphhash.price(whole, options).shape.storage - whole.other_files
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert shared.weight.grad is not None and shared.weight.grad.abs().sum() > 0
    kept = tiny_models.model()
    share_table(kept, made.table("rows"), head=False)
    assert kept.get_output_embeddings().weight.shape == (64, 64)
    untied = tiny_models.model("qwen3", tie_word_embeddings=False)
    with pytest.raises(UsageError, match="weights of its own"):
        share_table(untied, made.table("rows"), head=True)


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"size": 1.5}, {"size": -3}, {"size": True}, {"size": "a"}, {"tables": "all"}, {"double": 2},
     {"resolution": 0.0}, {"resolution": "high"}, {"random_state": "x"}],
    ids=str,
)  # fmt: skip
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        GraphHash(**options).fit(interactions())


def test_matrices_that_say_nothing() -> None:
    with pytest.raises(UsageError, match="no interactions"):
        GraphHash().fit(sparse.csr_matrix((5, 5)))
    with pytest.raises(ValueError, match="Negative values"):
        GraphHash().fit(-interactions())
    with pytest.raises(UsageError, match="columns have no table"):
        GraphHash(tables="rows", random_state=0).fit(interactions()).table("columns")
    with pytest.raises(UsageError, match="whole numbers"):
        GraphHash(random_state=0).fit(interactions()).table("rows").look_up([0.5])


def test_the_estimator_needs_no_torch_and_says_what_it_misses() -> None:
    code = (
        "import sys, warnings\nfrom shoestring.methods.estimators.graphhash import example, sample\n"
        "made = example().fit(**sample()).table('rows').look_up([1, 10**9])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.modules['sknetwork'] = sys.modules['sknetwork.clustering'] = None\n"
        "try: example().fit(**sample())\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'shoestring[graphs]'" in done.stdout


def test_a_good_fit_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GraphHash(0.25, random_state=0).fit(interactions(), held_out=sparse.csr_matrix((300, 200)))

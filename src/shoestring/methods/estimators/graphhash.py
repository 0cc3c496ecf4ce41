"""GraphHash: ids that cluster together in the interaction graph share one embedding row, so tables shrink fourfold.

How it works
    1. R [users, items] has 1 where a user met an item in the training interactions, duplicates as 1 (`fit(R)`). Ids of
       any kind will do: tokens and the tokens before them (`token_graph`).
    2. Louvain on the bipartite graph, users and items together, maximizes the modularity whose null model keeps to the
       two sides:  Q = 1/E sum_ui (R_ui - gamma d_u d_i / E) [cluster(u) = cluster(i)]  (1), E = sum R, d the degrees.
       Larger gamma, more clusters: it is bisected until the tables have the rows that `size` asks for. Where their
       number jumps by more than 5%, the smallest of the finer clusters are dissolved into their neighbours'.
    3. Clusters get consecutive numbers on each side, c_u and c_i, for two tables:  e_u = U[c_u(u)], e_i = I[c_i(i)]
       (2). All after the lookup is unchanged.
    4. `double=True` (DoubleGraphHash) sums two rows, by the cluster and by a universal hash into as many rows again:
       e_u = U[c_u(u)] + U'[h(u)] (3), h(x) = ((a x + b) mod p) mod K (4). Ids of a cluster differ again; with U' = 0 it
       is GraphHash.
    5. Ids without interactions, which would be clusters of one, and ids never seen are hashed into the clusters by (4).
       `update(R)` gives them the cluster of most of their neighbours once they have some; no other id moves.
    6. A table with its mapping takes  K d b + 4 n  bytes (5): K rows of d values of b bytes, n ids in int32.

Where it bends
    The graph is visited in an order drawn from `random_state`; the authors' code takes the order of ids. Their hash of
    DoubleGraphHash reads the clusters' own rows, ours rows beside them, which are counted. Members of a cluster score
    alike under (2), so break ties when ranking, by popularity say, or the order of ids leaks. Rows of large clusters
    get more gradient under the same weight decay. Where few ids make up most of what happens, as with tokens, rows of
    their own for the frequent ones are the baseline to beat. `share_table` changes a loaded model; it writes no folder
    that plain transformers reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, BiclusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, check_non_negative, validate_data

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape, Weight
from shoestring.methods.estimators._rows import Array, Hash, Rows

METHOD = Method(
    paper=Paper(
        "GraphHash: Graph Clustering Enables Parameter Efficiency in Recommender Systems", "2024-12",
        code="snap-research/GraphHash",
    ),
    provides="GraphHash",
    saves=("parameters", "storage", "memory"),
    traits={"reads": "who met what, 0 or 1, sparse", "gives": "the embedding row of each id"},
)  # fmt: skip

TABLES = {"both": ("rows", "columns"), "rows": ("rows",), "columns": ("columns",)}
NEAR = 0.05  # how far from the rows asked for the clusters may end
CLOSE = 0.01  # how near the search for the resolution goes when it can
USEFUL = (0.02, 0.9)  # shares of a full table's rows: below nearly all ids are one, above nothing is saved
STEPS = 40


class GraphHash(BiclusterMixin, BaseEstimator):
    """Clusters of a sparse matrix of interactions, as the rows of embedding tables.

    Args:
        size: rows of the tables in all: a number, or a share of the ids.
        tables: the sides that have a table: "both", "rows" or "columns" of the matrix. Only their rows count.
        double: read a second row by a universal hash; half of `size` then goes to clusters.
        resolution: gamma of (1); given, nothing is bisected and `size` is not looked at.
        random_state: of the order in which the graph is visited, and of the hashes.

    Attributes:
        row_labels_, column_labels_: int32, the row of its side's table that each id reads.
        row_clusters_, column_clusters_: the cluster of each row of a table; sides share the numbers of clusters.
        row_placed_, column_placed_: False for ids that are hashed: those without interactions, or without a neighbour
            whose cluster has a row on their side.
        resolution_: the gamma that was found.
        rows_, columns_: bool [clusters, ids], as scikit-learn's other biclusterers have them.
    """

    def __init__(
        self,
        size: int | float = 0.25,
        *,
        tables: str = "both",
        double: bool = False,
        resolution: float | None = None,
        random_state: Any = None,
    ) -> None:
        self.size = size
        self.tables = tables
        self.double = double
        self.resolution = resolution
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, *, held_out: Any = None) -> GraphHash:
        """Cluster the training interactions.

        Args:
            X: [rows, columns], sparse or dense; what is not 0 is an interaction.
            y: not looked at.
            held_out: the interactions kept for validation and test, in the same shape; they must not be in `X`.

        Raises:
            UsageError: an option that means nothing, no interactions, held-out ones among them, or scikit-network
                missing.
            ValueError: no matrix of finite numbers, or a number below 0.
        """
        self._check_options()
        given = validate_data(self, X, accept_sparse="csr")
        check_non_negative(given, type(self).__name__)
        graph = _ones(given)
        _refuse_overlap(graph, held_out)
        if not graph.nnz:
            raise UsageError("the matrix has no interactions", remedy="Give at least one")
        random = _random(self.random_state)
        seed = int(random.randint(2**31 - 1))
        # A cluster of one is all that Louvain can make of an id without edges.
        placed = (np.diff(graph.indptr) > 0, np.bincount(graph.indices, minlength=graph.shape[1]) > 0)
        found, self.resolution_ = self._clusters(graph[placed[0]][:, placed[1]], graph.shape, seed)
        for side, mine, labels in zip(TABLES["both"], placed, found):
            mine[mine] = labels >= 0
            clusters, numbers = np.unique(labels[labels >= 0], return_inverse=True)  # consecutive on each side
            hashes = Hash.draw(random, len(clusters)), Hash.draw(random, len(clusters), len(clusters))
            rows = hashes[0](np.arange(len(mine)))
            rows[mine] = numbers
            self._set(side, rows, mine, clusters.astype(np.int32), hashes)
        self._warn_of_size(graph.shape)
        return self

    def update(self, X: Any, *, held_out: Any = None) -> GraphHash:
        """Place ids that had no interactions, or did not exist, by new ones: the cluster of most of their neighbours.

        Ids that have a cluster keep it, so tables that are trained already stay good. Neighbours that only find their
        own cluster by these interactions are asked in a second round.

        Args:
            X: the new interactions, or all of them; may have more rows and columns than before.

        Raises:
            UsageError: held-out interactions among them.
        """
        check_is_fitted(self)
        given = check_array(X, accept_sparse="csr")
        check_non_negative(given, type(self).__name__)
        graph = _ones(given)
        _refuse_overlap(graph, held_out)
        sizes = [max(n, len(getattr(self, f"{_singular(s)}_labels_"))) for n, s in zip(graph.shape, TABLES["both"])]
        graph.resize(*sizes)
        where = {side: self._joint(side, size) for side, size in zip(TABLES["both"], sizes)}
        for _ in range(2):
            asked = {
                "rows": _majority(graph, where["rows"], where["columns"], self.row_clusters_),
                "columns": _majority(graph.T.tocsr(), where["columns"], where["rows"], self.column_clusters_),
            }
            for side, (ids, clusters) in asked.items():
                where[side][ids] = clusters
        for side in TABLES["both"]:
            clusters, hashes = getattr(self, f"{_singular(side)}_clusters_"), self._hashes(side)
            placed = where[side] >= 0
            labels = hashes[0](np.arange(len(placed)))
            labels[placed] = np.searchsorted(clusters, where[side][placed])
            self._set(side, labels, placed, clusters, hashes)
        self.n_features_in_ = sizes[1]
        return self

    def table(self, side: str) -> Rows:
        """Which rows each id of a side reads, "rows" or "columns"; beyond the ids of `fit` a universal hash says it."""
        check_is_fitted(self)
        if side not in TABLES[self.tables]:
            raise UsageError(f"{side} have no table", f"tables={self.tables!r}", f"Ask for {self.tables}")
        labels, (cluster, second) = getattr(self, f"{_singular(side)}_labels_"), self._hashes(side)
        if not self.double:
            return Rows(labels[:, None], cluster.size, (cluster,))
        both = np.stack([labels, second(np.arange(len(labels)))], 1)
        return Rows(both.astype(np.int32), 2 * cluster.size, (cluster, second))

    def embedding(self, side: str, width: int, **options: Any) -> Any:
        """A torch module in the place of `nn.Embedding(ids of the side, width)`; `options` are those of its table."""
        from shoestring.methods.estimators._embedding import SharedEmbedding

        return SharedEmbedding(self.table(side), width, **options)

    @property
    def rows_(self) -> Array:
        check_is_fitted(self)
        return self._indicators("row")

    @property
    def columns_(self) -> Array:
        check_is_fitted(self)
        return self._indicators("column")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        return tags

    def _check_options(self) -> None:
        size, share = self.size, isinstance(self.size, Real) and not isinstance(self.size, Integral | bool)
        whole = isinstance(size, Integral) and not isinstance(size, bool)
        if not (share and 0 < size <= 1) and not (whole and size >= 2):
            raise UsageError(
                f"size={size!r} is no size", "it is rows in all, from 2, or a share of the ids", "For example 0.25"
            )
        if self.tables not in tuple(TABLES):
            raise UsageError(f"tables={self.tables!r} is not known", remedy=f"Use {', '.join(TABLES)}")
        if not isinstance(self.double, bool | np.bool_):
            raise UsageError(f"double={self.double!r} is neither True nor False")
        gamma = self.resolution
        if gamma is not None and (not isinstance(gamma, Real) or isinstance(gamma, bool) or not 0 < gamma < np.inf):
            raise UsageError(f"resolution={gamma!r} is no number above 0", remedy="Leave it out to have it searched")

    def _clusters(self, graph: Any, shape: tuple[int, int], seed: int) -> tuple[tuple[Array, Array], float]:
        """Labels of both sides of a graph without isolated ids, and the resolution; `shape` is that of all ids."""
        if self.resolution is not None:
            return _louvain(graph, float(self.resolution), seed), float(self.resolution)
        sides = [number for number, side in enumerate(TABLES["both"]) if side in TABLES[self.tables]]
        rows = self.size if isinstance(self.size, Integral) else round(self.size * sum(shape[n] for n in sides))
        wanted = max(len(sides), round(rows / (2 if self.double else 1)))
        # Above E no two nodes gain from joining, since R_ui / E < gamma d_u d_i / E^2; far below 1 all that touch do.
        low, high = 1e-2, float(graph.nnz + 1)
        tried: list[tuple[int, float, tuple[Array, Array]]] = []
        for _ in range(STEPS):
            gamma = float(np.sqrt(low * high))
            labels = _louvain(graph, gamma, seed)
            tried.append((sum(len(np.unique(labels[n])) for n in sides), gamma, labels))
            if abs(tried[-1][0] - wanted) <= CLOSE * wanted or high / low < 1 + 1e-4:
                break
            low, high = (gamma, high) if tried[-1][0] < wanted else (low, gamma)
        count, gamma, labels = min(tried, key=lambda one: abs(one[0] - wanted))
        finer = [one for one in tried if one[0] > wanted]
        if abs(count - wanted) > NEAR * wanted and finer:
            # Ids that touch one hub alone leave its cluster at the same gamma, all at once.
            count, gamma, labels = min(finer, key=lambda one: one[0])
            labels = _dissolved(graph, labels, sides, count - wanted)
            count = sum(len(np.unique(labels[n][labels[n] >= 0])) for n in sides)
        if abs(count - wanted) > NEAR * wanted:
            warnings.warn(
                f"the graph has {count} clusters at most where {wanted} are asked for: ids without interactions get "
                "none. Ask for fewer rows.",
                ConvergenceWarning,
                stacklevel=3,
            )
        return labels, gamma

    def _warn_of_size(self, shape: tuple[int, int]) -> None:
        ids = sum(n for n, side in zip(shape, TABLES["both"]) if side in TABLES[self.tables])
        share = sum(self.table(side).count for side in TABLES[self.tables]) / ids
        if not USEFUL[0] <= share <= USEFUL[1]:
            says = "nearly all ids are one" if share < USEFUL[0] else "hardly anything is saved"
            warnings.warn(
                f"the tables have {share:.1%} of the rows of full ones: {says}. Ask for another size.", stacklevel=3
            )

    def _set(self, side: str, labels: Array, placed: Array, clusters: Array, hashes: tuple[Hash, Hash]) -> None:
        name = _singular(side)
        setattr(self, f"{name}_labels_", labels.astype(np.int32))
        setattr(self, f"{name}_placed_", placed)
        setattr(self, f"{name}_clusters_", clusters)
        setattr(self, f"{name}_hashes_", hashes)

    def _hashes(self, side: str) -> tuple[Hash, Hash]:
        made: tuple[Hash, Hash] = getattr(self, f"{_singular(side)}_hashes_")
        return made

    def _joint(self, side: str, size: int) -> Array:
        """The cluster of each of `size` ids, -1 where it has none."""
        name = _singular(side)
        labels, placed = getattr(self, f"{name}_labels_"), getattr(self, f"{name}_placed_")
        clusters = np.full(size, -1, np.int64)
        clusters[: len(labels)][placed] = getattr(self, f"{name}_clusters_")[labels[placed]]
        return clusters

    def _indicators(self, name: str) -> Array:
        known = np.union1d(self.row_clusters_, self.column_clusters_)
        mine = getattr(self, f"{name}_clusters_")[getattr(self, f"{name}_labels_")]
        return np.asarray(known[:, None] == mine)


def token_graph(sequences: Iterable[Sequence[int]], vocabulary: int) -> Any:
    """Interactions of tokens with the tokens before them: sparse [vocabulary, vocabulary], 1 where t came after c.

    Raises:
        UsageError: a token that is not in the vocabulary.
    """
    arrays = [np.asarray(tokens, np.int64) for tokens in sequences]
    none = np.empty(0, np.int64)
    after = np.concatenate([none, *(tokens[1:] for tokens in arrays)])
    before = np.concatenate([none, *(tokens[:-1] for tokens in arrays)])
    if any(((part < 0) | (part >= vocabulary)).any() for part in (after, before)):
        raise UsageError(f"a token is not in the vocabulary of {vocabulary}", remedy="Use the model's own tokenizer")
    return _ones(sparse.csr_matrix((np.ones(len(after)), (after, before)), shape=(vocabulary, vocabulary)))


def example() -> GraphHash:
    """A quarter of the rows, which is what the paper's figures are for."""
    return GraphHash(size=0.25, random_state=0)


def sample() -> dict[str, Any]:
    """80 users of four tastes and 60 items; one of each that nobody met."""
    draw = np.random.RandomState(0)
    likes = (np.arange(80)[:, None] % 4) == (np.arange(60) % 4)
    met = draw.random_sample((80, 60)) < np.where(likes, 0.5, 0.05)
    met[7] = met[:, 9] = False
    return {"X": sparse.csr_matrix(met.astype(np.float64))}


def settings() -> list[dict[str, Any]]:
    return [{"size": 0.25}, {"size": 0.25, "double": True}, {"size": 0.0625}]


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """A model whose token table, and head where it is tied, is shared as `share_table` does it (5)."""
    made = GraphHash(**options)
    made._check_options()

    def touch(weight: Weight) -> Weight:
        if weight.role != "embed" or len(weight.dims) != 2 or weight.dims[0] != shape.vocab:
            return replace(weight, dims=(rows, weight.dims[1])) if weight.tied in tables else weight
        mapping = (4 * shape.vocab + 32) * (2 if made.double else 1)  # and the hash of ids that are not in it
        stored, resident = (n * rows // shape.vocab + mapping for n in (weight.stored, weight.resident))
        return replace(weight, dims=(rows, weight.dims[1]), stored=stored, resident=resident)

    rows = round(made.size * shape.vocab) if not isinstance(made.size, Integral) else int(made.size)
    tables = {w.name for w in shape.of("embed") if len(w.dims) == 2 and w.dims[0] == shape.vocab}
    return Price(shape.change(touch))


def _louvain(graph: Any, resolution: float, seed: int) -> tuple[Array, Array]:
    """Labels of rows and columns that maximize (1), visited in the order that the seed draws."""
    try:
        from sknetwork.clustering import Louvain
    except ImportError as error:
        raise UsageError(
            "clustering needs scikit-network", str(error), "Run `pip install 'shoestring[graphs]'`"
        ) from None
    # Its modularity of directed graphs, with all edges from rows to columns, is (1). A square matrix is bipartite too.
    made = Louvain(resolution, modularity="dugue", shuffle_nodes=True, random_state=seed, return_probs=False)
    made.fit(graph, force_bipartite=True)
    return made.labels_row_, made.labels_col_


def _dissolved(graph: Any, labels: tuple[Array, Array], sides: Sequence[int], surplus: int) -> tuple[Array, Array]:
    """Without the `surplus` smallest clusters: their ids join most of their neighbours, or get -1, to be hashed."""
    made = [labels[0].astype(np.int64), labels[1].astype(np.int64)]
    sizes = [(size, side, cluster) for side in sides for cluster, size in zip(*_sizes(made[side]))]
    keep = {side: max(row for row in sizes if row[1] == side) for side in sides}  # no table loses its last row
    gone = [row for row in sorted(sizes) if row != keep[row[1]]][: max(surplus, 0)]
    graphs = graph, graph.T.tocsr()
    for side in sides:
        mine = made[side].copy()
        mine[np.isin(mine, [cluster for _, which, cluster in gone if which == side])] = -1
        ids, clusters = _majority(graphs[side], mine, labels[1 - side], np.unique(mine[mine >= 0]))
        mine[ids] = clusters
        made[side] = mine
    return made[0], made[1]


def _sizes(labels: Array) -> tuple[list[int], list[int]]:
    clusters, sizes = np.unique(labels, return_counts=True)
    return clusters.tolist(), sizes.tolist()


def _majority(graph: Any, mine: Array, theirs: Array, having: Array) -> tuple[Array, Array]:
    """(ids, cluster) of those without one: what most neighbours have, of the clusters with a row on this side."""
    ids = np.flatnonzero((mine < 0) & (np.diff(graph.indptr) > 0))
    voters = np.flatnonzero(np.isin(theirs, having))
    votes = sparse.csr_matrix(
        (np.ones(len(voters)), (voters, np.searchsorted(having, theirs[voters]))), shape=(len(theirs), len(having))
    )
    cast = graph[ids] @ votes
    some = np.diff(cast.indptr) > 0
    chosen = np.asarray(cast[some].argmax(axis=1)).ravel() if some.any() else np.empty(0, np.int64)
    return ids[some], having[chosen]


def _ones(given: Any) -> Any:
    """As a sparse matrix of ones: duplicates and degrees of liking do not count."""
    matrix = sparse.csr_matrix(given, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    matrix.data = np.ones(matrix.nnz)
    return matrix


def _refuse_overlap(graph: Any, held_out: Any) -> None:
    if held_out is None:
        return
    kept = _ones(check_array(held_out, accept_sparse="csr"))
    shape = tuple(max(a, b) for a, b in zip(graph.shape, kept.shape))
    mine = graph.copy()
    mine.resize(*shape)
    kept.resize(*shape)
    leaked = int(mine.multiply(kept).nnz)
    if leaked:
        raise UsageError(
            f"{leaked} held-out interactions are among those to cluster",
            "clusters that have seen the test inflate its scores",
            "Split first, and give the training part alone",
        )


def _random(state: Any) -> np.random.RandomState:
    try:
        made: np.random.RandomState = check_random_state(state)
    except ValueError as error:
        raise UsageError(f"random_state={state!r} is no seed", str(error), "Give a whole number") from None
    return made


def _singular(side: str) -> str:
    return side.removesuffix("s")

"""GraphHash beside hashing at equal rows and beside full tables: two recommenders, and a language model's table."""

from __future__ import annotations

from typing import Any

import numpy as np

from shoestring import data
from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.jobs.evaluate import heldout
from shoestring.lab import recommender
from shoestring.lab.arms import DATA, Arms
from shoestring.lab.recommender import Split, Tables

_PAPER = (
    "recall improved by 101.52% on average over hashing baselines with embedding tables reduced by more than 75% "
    "(MF, NeuMF, LightGCN, DirectAU; Gowalla, Yelp2018, AmazonBook)"
)
_DATA = (
    "MovieLens-100k (943 users, 1,682 items; the package recbole), all interactions as implicit feedback, a random "
    "80/10/10 split; tables 64 wide, a quarter of the rows; BPR, Adam 1e-2, batches of 8,192, the epoch (every "
    "second) by validation recall, arm by arm; recall@20"
)
_MF = _DATA + "; matrix factorization, at most 20 epochs, weight decay 1e-4 or 1e-6 by validation recall too"
_GCN = _DATA + "; LightGCN of 2 layers, at most 10 epochs, weight decay 1e-4"
_TOKENS = (
    "SmolLM2-135M-Instruct, a sixteenth of the rows of its token table (3,072); the graph is tokens by the token "
    "before them in the training part of the Python documentation; a row is the mean of its tokens by frequency, "
    "nothing is trained after; the head keeps the whole table; perplexity of held-out text"
)
_SCALE = "Gowalla, Yelp2018 and AmazonBook; click-through models, which need features"
CLAIMS = (
    Claim(
        "recall",
        paper=_PAPER,
        here=_MF + ", against the better of the hashes that see ids alone, modulo and universal",
        measure="recall_at_20",
        arm="graphhash",
        against="hash",
        expect="> 1.5",
        cannot=_SCALE,
    ),
    Claim(
        "recall-frequency",
        paper=_PAPER,
        here=_MF + ", against modulo that gives half of the rows to the most frequent ids alone",
        measure="recall_at_20",
        arm="graphhash",
        against="frequency",
        expect="> 1.5",
        cannot=_SCALE,
    ),
    Claim(
        "recall-lsh",
        paper=_PAPER,
        here=_MF + ", against locality-sensitive hashing of the interactions",
        measure="recall_at_20",
        arm="graphhash",
        against="lsh",
        expect="> 1.5",
        cannot=_SCALE,
    ),
    Claim(
        "full",
        paper="below the full table",
        here=_MF + ", against full tables",
        measure="recall_at_20",
        arm="graphhash",
        against="full",
        expect="< 1.0",
    ),
    Claim(
        "full-hash",
        paper="below the full table",
        here=_MF + ", the best hash of all by the test's own recall, against full tables",
        measure="best_recall_at_20",
        arm="hashes",
        against="full",
        expect="< 1.0",
    ),
    Claim(
        "storage",
        paper="tables reduced by more than 75%",
        here=_MF + "; bytes of both tables, the mapping of 4 bytes an id included",
        measure="storage",
        arm="graphhash",
        against="full",
        expect="<= 0.28",
    ),
    Claim(
        "recall-lightgcn",
        paper=_PAPER,
        here=_GCN + ", against the better of the modulo and the universal hash",
        measure="recall_at_20",
        arm="graphhash-gcn",
        against="hash-gcn",
        expect="> 1.0",
        cannot=_SCALE,
    ),
    Claim(
        "recall-lightgcn-frequency",
        paper=_PAPER,
        here=_GCN + ", against the hash with rows for the most frequent ids",
        measure="recall_at_20",
        arm="graphhash-gcn",
        against="frequency-gcn",
        expect="> 1.0",
        cannot=_SCALE,
    ),
    Claim(
        "tokens",
        paper="no figure; the paper's tables are of users and items",
        here=_TOKENS + ", against a universal hash into as many rows",
        measure="perplexity",
        arm="graphhash-tokens",
        against="hash-tokens",
        expect="<= 0.9",
    ),
    Claim(
        "tokens-frequency",
        paper="no figure; the paper's tables are of users and items",
        here=_TOKENS + ", against as many rows of which the most frequent tokens have half alone",
        measure="perplexity",
        arm="graphhash-tokens",
        against="frequency-tokens",
        expect="<= 1.0",
    ),
)
WIDTH, DECAYS = 64, (1e-4, 1e-6)
# What stands behind an arm: rules of which the better by validation counts.
ARMS = {
    "full": ("full",),
    "graphhash": ("graph",),
    "hash": ("modulo", "universal"),
    "frequency": ("frequency",),
    "lsh": ("lsh",),
}


def run(arms: Arms) -> None:
    method = catalog.module("graphhash")
    split = recommender.split(recommender.movielens(), arms.seed)
    hasher = method.GraphHash(0.25, random_state=arms.seed).fit(split.train, held_out=split.held_out)
    for suffix, epochs in (("", arms.size(1, 20)), ("-gcn", arms.size(1, 10))):
        for arm, rules in ARMS.items():
            if suffix and arm in ("full", "lsh"):
                continue
            with arms.arm(arm + suffix) as stage:
                decays = DECAYS[: 1 if suffix else arms.size(1, 2)]
                tried = [_trained(hasher, split, r, d, epochs, bool(suffix), arms.seed) for r in rules for d in decays]
                best = max(tried, key=lambda found: found["valid recall@20"])
                stage.record("recall_at_20", best["recall@20"], "share", "measured")
                stage.record("best_recall_at_20", best["recall@20"], "share", "measured")
                stage.record("ndcg_at_20", best["ndcg@20"], "share", "measured")
                stage.record("storage", best["bytes"], "B", "counted")
    with arms.arm("hashes") as stage:
        found = [arms.value(arm, "recall_at_20") for arm in ("hash", "frequency", "lsh")]
        stage.record("best_recall_at_20", max(value for value, _ in filter(None, found)), "share", "measured")
    _tokens(arms, method)


def _trained(
    hasher: Any, split: Split, rule: str, decay: float, epochs: int, graph: bool, seed: int
) -> dict[str, float]:
    tables = made(hasher, split, rule, seed)
    model = recommender.Recommender(tables, split, graph=split.train if graph else None, seed=seed)
    found = recommender.train(model, split, epochs=epochs, decay=decay, batch=8192, every=2, seed=seed)
    return {**found, "bytes": sum(t.numel() * t.element_size() for t in model.state_dict().values())}


def made(hasher: Any, split: Split, rule: str, seed: int) -> Tables:
    """Tables of users and items by a rule, with exactly the rows that the clusters have."""
    from shoestring.methods.estimators._embedding import SharedEmbedding
    from shoestring.methods.estimators._rows import by_rule

    if rule == "full":
        return recommender.full_tables(split, WIDTH)
    if rule == "graph":
        return hasher.embedding("rows", WIDTH), hasher.embedding("columns", WIDTH)
    sides = (("rows", split.train), ("columns", split.train.T.tocsr()))
    users, items = (SharedEmbedding(by_rule(rule, met, hasher.table(side).count, seed), WIDTH) for side, met in sides)
    return users, items


def _tokens(arms: Arms, method: Any) -> None:
    from shoestring.methods.estimators._embedding import share_table
    from shoestring.methods.estimators._rows import by_rule

    parts = data.split(data.read(DATA), seed=0)
    loaded = arms.load(dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    whole = model.get_input_embeddings()
    examples = parts[0].examples[: arms.size(400, len(parts[0]))]
    texts = ["\n".join(message["content"] for message in example.messages) for example in examples]
    ids = tokenizer(texts)["input_ids"]
    encoded = arms.docs(tokenizer, {"test": arms.size(1, 12)}, max_length=128)["test"].rows
    rows = [{**row, "labels": row["input_ids"]} for row in encoded]  # answers alone are too few to tell arms apart
    size = len(tokenizer) // arms.size(40, 16)
    graph = method.token_graph(ids, len(tokenizer))
    counts = np.bincount(np.concatenate([np.asarray(i, np.int64) for i in ids]), minlength=len(tokenizer))
    clusters = method.GraphHash(size, tables="rows", random_state=arms.seed).fit(graph).table("rows")
    for arm, rule in (("graphhash", ""), ("hash", "universal"), ("frequency", "frequency")):
        with arms.arm(f"{arm}-tokens") as stage:
            table = by_rule(rule, graph, clusters.count, arms.seed) if rule else clusters
            shared = share_table(model, table, counts, head=False)
            stage.record("perplexity", heldout(model, rows).perplexity.value, "perplexity", "measured")
            stage.record("storage", shared.nbytes(), "B", "counted")
        model.set_input_embeddings(whole)

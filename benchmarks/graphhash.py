"""Ids that share embedding rows: clusters beside every rule of hashing at the same number of rows, and full tables.

    python benchmarks/graphhash.py [--shares 0.15,0.25,0.37] [--seeds 0,1] [--epochs 20] [--vocabulary] [--json FILE]

MovieLens-100k (`pip install --no-deps recbole`), a random 80/10/10 split a seed, matrix factorization and LightGCN with
BPR, tables 64 wide, the epoch chosen by validation recall, all arms alike; recall@20 and nDCG@20 of the test. With
--vocabulary also the default model's token table at a sixteenth of its rows: perplexity of held-out text with shared
rows for the lookup alone, and for the tied head too, beside the bytes of the table with its mapping.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from shoestring import data, models
from shoestring.jobs.evaluate import heldout
from shoestring.lab import recommender
from shoestring.methods.estimators._embedding import SharedEmbedding, share_table
from shoestring.methods.estimators._rows import RULES, by_rule
from shoestring.methods.estimators.graphhash import GraphHash, token_graph

WIDTH = 64
CLUSTERS = {"graphhash": False, "double graphhash": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", default="0.15,0.25,0.37")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--models", default="mf,lightgcn")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--decay", type=float, default=1e-4)
    parser.add_argument("--vocabulary", action="store_true")
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    rows = [row for seed in seeds for row in recommenders(seed, given)]
    print(f"{'model':10} {'share':>6} {'rule':18} {'rows':>6} {'bytes':>9} {'recall@20':>10} {'ndcg@20':>8}")
    for key in dict.fromkeys((row["model"], row["share"], row["rule"]) for row in rows):
        same = [row for row in rows if (row["model"], row["share"], row["rule"]) == key]
        figures = [mean(row[name] for row in same) for name in ("rows", "bytes", "recall@20", "ndcg@20")]
        print("{:10} {:>6} {:18} ".format(*key) + "{:6.0f} {:9.0f} {:10.4f} {:8.4f}".format(*figures), flush=True)
    words = []
    for row in vocabulary(seeds[0], given) if given.vocabulary else ():
        words.append(row)
        said = f"{row['bytes']:12,} bytes  perplexity {row['perplexity']:10.2f}"
        print(f"{row['rule']:18} {row['where']:16} {said}", flush=True)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"seeds": seeds, "epochs": given.epochs, "decay": given.decay, "threads": given.threads}
        given.json.write_text(json.dumps({**about, "recommenders": rows, "vocabulary": words}, indent=1) + "\n")


def recommenders(seed: int, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    split = recommender.split(recommender.movielens(), seed)
    sides = (("rows", split.train), ("columns", split.train.T.tocsr()))
    for share in given.shares.split(","):
        started = time.perf_counter()
        made = {
            name: GraphHash(float(share), double=double, random_state=seed).fit(split.train, held_out=split.held_out)
            for name, double in CLUSTERS.items()
        }
        seconds = time.perf_counter() - started
        for kind in filter(None, given.models.split(",")):
            for name in (*CLUSTERS, *RULES):
                if name in made:
                    tables = [made[name].table(side) for side, _ in sides]
                else:
                    tables = [by_rule(name, met, made["graphhash"].table(side).count, seed) for side, met in sides]
                users, items = (SharedEmbedding(table, WIDTH) for table in tables)
                mapped = sum(part.nbytes() for part in (users, items))
                plain = sum(split.train.shape) * WIDTH * 4  # whole tables need no mapping
                graph = split.train if kind == "lightgcn" else None
                model = recommender.Recommender((users, items), split, graph=graph, seed=seed)
                found = recommender.train(
                    model, split, epochs=given.epochs, decay=given.decay, batch=8192, every=2, seed=seed
                )
                yield {
                    "model": kind, "share": share, "rule": name, "seed": seed, "clustering_s": seconds,
                    "rows": sum(table.count for table in tables), "bytes": plain if name == "full" else mapped, **found,
                }  # fmt: skip


def vocabulary(seed: int, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    loaded = models.load("smollm2", dtype="float32")
    tokens = len(loaded.tokenizer)
    train, _, test = data.split(data.read("python-docs"), seed=0)
    texts = ["\n".join(message["content"] for message in example.messages) for example in train.examples]
    ids = loaded.tokenizer(texts)["input_ids"]
    graph, counts = token_graph(ids, tokens), np.bincount(np.concatenate(ids), minlength=tokens)
    rows = data.encode(test.part(test.examples[: given.examples]), loaded.tokenizer, 128, on_long="truncate").rows
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    size = tokens // 16
    tables = {
        name: GraphHash(size, tables="rows", double=double, random_state=seed).fit(graph).table("rows")
        for name, double in CLUSTERS.items()
    }
    tables |= {name: by_rule(name, graph, size, seed) for name in ("universal", "frequency", "double")}
    model, whole = loaded.model, loaded.model.get_input_embeddings()
    head = model.get_output_embeddings()
    full = whole.weight.numel() * whole.weight.element_size()
    yield {"rule": "whole", "where": "both", "bytes": full, "perplexity": heldout(model, rows).perplexity.value}
    for name, table in tables.items():
        for tied in (False, True):
            shared = share_table(model, table, counts, head=tied)
            where = "lookup and head" if tied else "lookup"
            yield {
                "rule": name, "where": where, "bytes": shared.nbytes(),
                "perplexity": heldout(model, rows).perplexity.value,
            }  # fmt: skip
            model.set_input_embeddings(whole)
            model.set_output_embeddings(head)


if __name__ == "__main__":
    main()

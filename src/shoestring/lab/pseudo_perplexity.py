"""Pseudo-perplexity of a masked model: how well it finds each token of a text again from all the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from shoestring.core.errors import UsageError
from shoestring.models.anatomy import model_kind


@torch.no_grad()
def pseudo_perplexity(
    model: Any, tokenizer: Any, texts: Sequence[str], *, special: bool = False, max_length: int = 512, batch: int = 64
) -> float:
    """exp(-(1/N) sum log p(token | all other tokens)), N the tokens of all texts; of a causal model the perplexity.

    Every position is masked in a copy of its text; copies of several texts share a batch.

    Args:
        special: count the tokens that the tokenizer adds as well.
        batch: masked copies that pass through the model together.

    Raises:
        UsageError: no token to find, or a tokenizer without a mask token.
    """
    core = getattr(model, "get_base_model", lambda: model)()
    model.eval()
    rows = [tokenizer(t, truncation=True, max_length=max_length, return_special_tokens_mask=True) for t in texts]
    if model_kind(core) == "causal":
        return _perplexity(model, [row["input_ids"] for row in rows])
    if tokenizer.mask_token_id is None:
        raise UsageError("the tokenizer has no mask token", remedy="Use the masked model's own tokenizer")
    places = [
        (row["input_ids"], place)
        for row in rows
        for place, added in enumerate(row["special_tokens_mask"])
        if special or not added
    ]
    if not places:
        raise UsageError("the texts have no token to find", remedy="Give a text that is not empty")
    places.sort(key=lambda item: -len(item[0]))
    pad = tokenizer.pad_token_id or 0
    total = 0.0
    for start in range(0, len(places), batch):
        some = places[start : start + batch]
        longest = len(some[0][0])
        ids = torch.full((len(some), longest), pad)
        seen = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(some):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            seen[row, : len(tokens)] = 1
        where = torch.tensor([place for _, place in some])
        each = torch.arange(len(some))
        wanted = ids[each, where]
        ids[each, where] = tokenizer.mask_token_id
        device = next(model.parameters()).device
        logits = model(input_ids=ids.to(device), attention_mask=seen.to(device)).logits[each, where].float().cpu()
        total += float(logits.log_softmax(-1)[each, wanted].double().sum())
    return math.exp(-total / len(places))


def _perplexity(model: Any, rows: Sequence[list[int]]) -> float:
    total, count = 0.0, 0
    for tokens in rows:
        if len(tokens) > 1:
            ids = torch.tensor([tokens], device=next(model.parameters()).device)
            scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            total += float(scores.gather(1, ids[0, 1:, None]).double().sum())
            count += len(tokens) - 1
    if not count:
        raise UsageError("the texts have no token to predict", remedy="Give texts of two tokens or more")
    return math.exp(-total / count)

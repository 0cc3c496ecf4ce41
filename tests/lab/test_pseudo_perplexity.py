from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shoestring.core.errors import UsageError
from shoestring.lab import tiny as models
from shoestring.lab.pseudo_perplexity import pseudo_perplexity

TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14 w15", "w5 w6"]
torch.set_num_threads(1)


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    from tokenizers.processors import TemplateProcessing

    made: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny)
    made.mask_token = "w63"
    made._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    )
    return made


@torch.no_grad()
def naive(model: Any, tokenizer: Any, special: bool) -> float:
    scores = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        for place in range(len(ids)) if special else range(1, len(ids) - 1):
            copy = torch.tensor([ids])
            copy[0, place] = tokenizer.mask_token_id
            scores.append(model(input_ids=copy).logits[0, place].log_softmax(-1)[ids[place]].item())
    return math.exp(-sum(scores) / len(scores))


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("special", [False, True])
def test_batches_of_masked_copies_equal_a_loop(tokenizer: Any, batch: int, special: bool) -> None:
    model = models.model("bert")
    found = pseudo_perplexity(model, tokenizer, TEXTS, special=special, batch=batch)
    assert found == pytest.approx(naive(model, tokenizer, special), rel=1e-5)


def test_a_causal_model_has_a_perplexity(tokenizer: Any) -> None:
    model, total, count = models.model("llama"), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert pseudo_perplexity(model, tokenizer, TEXTS) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_what_has_none(tokenizer: Any, tiny: Path) -> None:
    with pytest.raises(UsageError, match="no token to find"):
        pseudo_perplexity(models.model("bert"), tokenizer, [""])
    with pytest.raises(UsageError, match="no mask token"):
        pseudo_perplexity(models.model("bert"), AutoTokenizer.from_pretrained(tiny), TEXTS)
    with pytest.raises(UsageError, match="no token to predict"):
        pseudo_perplexity(models.model("llama"), AutoTokenizer.from_pretrained(tiny), ["w5"])

"""Parts that leave a model early, trained on the model's own answers: what methods of early exit are tried on.

Answers and parts are made once and kept in the cache folder, since either takes minutes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from shoestring import models
from shoestring.core import catalog
from shoestring.engine.engine import Engine
from shoestring.engine.request import Sampling
from shoestring.models.cache import make_once
from shoestring.training.between_steps import BetweenSteps

MODEL = "smollm2"
_FORMS = (
    "Write a short story about {}.", "Explain {} to a child.", "Give three facts about {}.", "Describe {}.",
    "What do people like about {}?", "Write a short poem on {}.",
)  # fmt: skip
_TOPICS = (
    "foxes", "the sea", "bread", "castles", "winter", "music", "computers", "the moon", "friendship", "tea", "trees",
    "cities", "mountains", "trains", "dogs", "light",
)  # fmt: skip
_ANSWERS, _PARTS = 1, 4  # raise them when the same recipe gives other ones

Answers = list[tuple[list[int], list[int]]]


@cache
def own_answers(count: int = 96, tokens: int = 100) -> Answers:
    """Prompts as conversations and what the default model answers, greedily, as token ids."""

    def make(folder: Path) -> None:
        asked = [form.format(topic) for form in _FORMS for topic in _TOPICS]
        random.Random(0).shuffle(asked)
        with Engine(MODEL, threads=1, max_sequences=16) as engine:
            prompts = [engine.prompt_ids([{"role": "user", "content": text}]) for text in asked[:count]]
            found = engine.generate(prompts, Sampling(max_tokens=tokens))
        rows = [(prompt, list(answer.tokens)) for prompt, (answer,) in zip(prompts, found)]
        (folder / "answers.json").write_text(json.dumps(rows), encoding="utf-8")

    recipe = {"model": MODEL, "count": count, "tokens": tokens, "version": _ANSWERS}
    rows = json.loads((make_once("answers", recipe, make) / "answers.json").read_text(encoding="utf-8"))
    return [(prompt, answer) for prompt, answer in rows]


def trained(
    method: str, options: Mapping[str, Any], steps: int, seed: int, *, held: int = 16, rows: int = 4, length: int = 96,
    rate: float | None = None,
) -> Path:  # fmt: skip
    """The folder of an adapter of `method` for the default model, trained on all answers but the last `held`, at the
    method's own rate unless another is given."""
    rate = rate or catalog.module(method).TRAINING["learning_rate"]
    recipe = {
        "method": method, "options": dict(options), "steps": steps, "seed": seed, "held": held, "rows": rows,
        "length": length, "rate": rate, "version": _PARTS,
    }  # fmt: skip

    def make(folder: Path) -> None:
        model = fit(method, options, steps, seed, held=held, rows=rows, length=length, rate=rate)
        model.save_pretrained(str(folder))

    return make_once(method, recipe, make)


def fit(
    method: str, options: Mapping[str, Any], steps: int, seed: int, *, held: int = 16, rows: int = 4, length: int = 96,
    rate: float | None = None,
) -> PeftModel:  # fmt: skip
    """A new adapter after `learn` on stretches of `length` tokens that the seed chooses."""
    torch.manual_seed(seed)
    loaded = models.load(MODEL)
    model: Any = catalog.contract("adapters").wrap(catalog.module(method), loaded.model, dict(options)).train()
    texts = [prompt + answer for prompt, answer in own_answers()[: -held or None]]
    draw, pad = random.Random(seed), loaded.tokenizer.pad_token_id or 0

    def batch() -> tuple[Tensor, Tensor]:
        ids = stretches(draw.sample(texts, rows), length, draw, pad)
        return ids, ids.masked_fill(ids == pad, -100)

    return learn(model, batch, steps, rate or catalog.module(method).TRAINING["learning_rate"])


def learn(model: Any, batch: Callable[[], tuple[Tensor, Tensor]], steps: int, rate: float) -> Any:
    """AdamW on what is still free, a tenth of the steps to warm up, then to zero; `batch` gives ids and labels. A tuner
    that acts between steps does so."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    between, warm = BetweenSteps(model), max(1, steps // 10)
    between.begin(steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        ids, labels = batch()
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        between.act(step, optimizer, tuple)
    return model.eval()


def stretches(texts: list[list[int]], length: int, draw: random.Random, pad: int) -> Tensor:
    """(texts, length) ids from a random place of each; what is too short is padded at its end."""
    made = []
    for text in texts:
        start = draw.randrange(max(1, len(text) - length + 1))
        some = text[start : start + length]
        made.append(some + [pad] * (length - len(some)))
    return torch.tensor(made)

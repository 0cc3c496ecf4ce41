"""STABLE-RPS beside a narrower model, beside the model it compresses, and beside ROAST at several initial scales."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shoestring import data
from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.lab.arms import DATA, Arms

_SIZES = (
    "Llama over bytes, 2 layers of hidden 128, from random weights, batches of 8 x 128 bytes of Python documentation"
)
_TENTH = (
    _SIZES + ", its 360,448 weights in an array of a tenth, against a Llama of hidden 40 with as many parameters; 150 "
    "steps of AdamW, each arm's learning rate the better of 3e-3 and 1e-2 by validation loss; held-out loss on the "
    "test part, nats a byte"
)
_STEPS = (
    "30 steps of SGD at the rate 2 without momentum or clipping; held-out loss, that of a uniform guess where it is "
    "higher or no number"
)
_SGD = _SIZES + ", array of a tenth, " + _STEPS
_PAPER = (
    "parameter sharing matches or beats smaller models and MAG, SNIP, SYNFLOW, GRASP at all compressions, and beats "
    "lottery-ticket rewinding at high compression"
)
_FIXES = "STABLE-RPS provably fixes ROAST's divergence and its gap at zero compression"
_SCALE = "CIFAR, ImageNet and Criteo; pruning at initialization and lottery tickets, which are not measured here"
CLAIMS = (
    Claim(
        "narrower",
        paper=_PAPER,
        here=_TENTH,
        measure="heldout_loss",
        arm="stable-rps",
        against="narrower",
        expect="<= 1.0",
        cannot=_SCALE,
    ),
    Claim(
        "parameters",
        paper=_PAPER,
        here=_TENTH + "; parameters of the two, which make the comparison fair",
        measure="parameters",
        arm="stable-rps",
        against="narrower",
        expect="<= 1.001",
    ),
    Claim(
        "storage",
        paper="no figure; compression is by any factor that is asked for",
        here=_SIZES + ", array of a tenth; parameters with norms",
        measure="parameters",
        arm="stable-rps",
        against="dense",
        expect="<= 0.105",
    ),
    Claim(
        "no-gap",
        paper=_FIXES,
        here=_SIZES + ", array of all weights, both from the same ones, " + _STEPS,
        measure="heldout_loss",
        arm="all-kept",
        against="dense",
        expect="<= 1.01",
    ),
    Claim(
        "small-scale",
        paper=_FIXES,
        here=_SGD + "; psi from U(-0.001, 0.001), against the same mapping with gradients as they are",
        measure="heldout_loss",
        arm="scaled-0.001",
        against="plain-0.001",
        expect="<= 0.9",
        cannot=_SCALE,
    ),
    Claim(
        "large-scale",
        paper=_FIXES,
        here=_SGD + "; psi from U(-0.5, 0.5), against the same mapping with gradients as they are",
        measure="heldout_loss",
        arm="scaled-0.5",
        against="plain-0.5",
        expect="<= 0.98",
        cannot=_SCALE,
    ),
    Claim(
        "any-scale",
        paper=_FIXES,
        here=_SGD + "; psi from U(-0.001, 0.001) against U(-0.5, 0.5)",
        measure="heldout_loss",
        arm="scaled-0.001",
        against="scaled-0.5",
        expect="<= 1.01",
    ),
)
RATES = (3e-3, 1e-2)
BATCH, LENGTH, WINDOWS = 8, 128, 32


def run(arms: Arms) -> None:
    rps = catalog.module("stable_rps")
    steps = arms.size(3, 150)
    arrays = {"mapping": "fold", "shared_size": rps.size_of(360_448, (128, 256), 0.1)}
    for name in ("stable-rps", "narrower"):
        with arms.arm(name) as stage:
            tried = []
            for rate in RATES:
                model = _hashed(rps, arms.seed, **arrays) if name == "stable-rps" else _plain(arms.seed, 40, 56)
                optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
                _fit(model, optimizer, steps, arms.seed)
                tried.append((heldout(model, 1), heldout(model, 2), rate))
            _, loss, rate = min(tried)
            stage.record("heldout_loss", loss, "nat", "measured")
            stage.record("chosen_rate", rate, "", "counted")
            stage.record("parameters", sum(p.numel() for p in model.parameters()), "parameter", "counted")
    dense = _plain(arms.seed, 128, 256)
    whole = rps.convert(dense, rps.StableRPSOptions(kept=1.0), []).model
    models: dict[str, Any] = {"dense": lambda: dense, "all-kept": lambda: whole}
    for spread in (0.001, 0.5):
        for word, scaler in (("scaled", "v1"), ("plain", "none")):
            said = {**arrays, "spread": spread, "scaler": scaler}
            models[f"{word}-{spread}"] = lambda said=said: _hashed(rps, arms.seed, **said)
    for name, make in models.items():
        with arms.arm(name) as stage:
            model = make()
            _fit(model, torch.optim.SGD(model.parameters(), 2.0), arms.size(2, 30), arms.seed)
            loss = heldout(model, 2)
            worst = math.log(256)
            stage.record("heldout_loss", min(loss, worst) if math.isfinite(loss) else worst, "nat", "measured")
            stage.record("parameters", sum(p.numel() for p in model.parameters()), "parameter", "counted")


def _said(hidden: int, inner: int) -> dict[str, Any]:
    return dict(
        vocab_size=256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


def _plain(seed: int, hidden: int, inner: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_said(hidden, inner)))


def _hashed(rps: Any, seed: int, **own: Any) -> PreTrainedModel:
    """A new model on an array, which is drawn alike whatever its spread is."""
    config = rps.MODELS[0][0](**_said(128, 256), **own, map_seed=seed)
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made


@cache
def stream(part: int) -> Tensor:
    """All bytes of the training (0), validation (1) or test part (2)."""
    examples = data.split(data.read(DATA), seed=0)[part].examples
    text = "\n".join(message["content"] for example in examples for message in example.messages)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def _fit(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    """Train on stretches of the text that the seed chooses; a rate warms up over a tenth of the steps, then falls."""
    text, draw = stream(0), torch.Generator().manual_seed(seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    warm = max(1, steps // 10)
    model.train()
    for step in range(steps):
        part = min((step + 1) / warm, max(0.1, (steps - step) / max(1, steps - warm)))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * part
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=draw).tolist()
        ids = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def heldout(model: PreTrainedModel, part: int) -> float:
    """Cross-entropy in nats a byte on stretches spread over a part that was not trained on."""
    text = stream(part)
    starts = torch.linspace(0, len(text) - LENGTH, WINDOWS).long().tolist()
    ids = torch.stack([text[start : start + LENGTH] for start in starts])
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

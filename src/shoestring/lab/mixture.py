"""Small language models with experts, trained on the built-in text: what methods for mixtures are tried on.

Training takes about a minute of one core, so a model is trained once for each recipe and seed and then kept in the
cache folder. Text comes as conversations, as everywhere else, in byte pairs learned from the training part.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from shoestring import data
from shoestring.models.cache import make_once

DATA = "python-docs"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, START = "<|im_end|>", "<|im_start|>"
_VERSION = 2  # raise it when the same recipe gives another model


@dataclass(frozen=True)
class Recipe:
    """A mixture and its training.

    Attributes:
        hidden, inner: width of the residual stream and of an expert.
        experts, chosen: how many a layer has, and how many of them a token meets.
        tails: degrees of freedom of Student's t, from which the experts' weights are drawn at first; 0 for normal ones.
            A minute of training leaves outliers as it finds them, and methods that live on them need those that long
            training makes: with 8, as many weights lie below half of their row's ends (about 0.9) as in rows of a
            language model that was trained on trillions of tokens.
        length: tokens of a training sequence; `batch` of them make a step.
    """

    hidden: int = 384
    inner: int = 384
    experts: int = 8
    chosen: int = 2
    layers: int = 3
    heads: int = 6
    tails: float = 8.0
    vocabulary: int = 512
    length: int = 256
    batch: int = 4
    steps: int = 110
    rate: float = 2e-3


WIDE = Recipe()  # rows long enough for codes with a fixed cost a row
FINE = Recipe(hidden=192, inner=96, experts=16, heads=3, tails=0.0, batch=8, steps=180, rate=4e-3)  # many small experts


def mixture(recipe: Recipe = WIDE, seed: int = 0) -> Path:
    """The folder of a trained mixture with its tokenizer, in bfloat16; trained now if the cache has none."""
    # The text is that of the running Python's library.
    said = {**asdict(recipe), "seed": seed, "python": sys.version.split()[0], "version": _VERSION}
    return make_once("mixture", said, lambda folder: _train(recipe, seed, folder))


def new(recipe: Recipe, seed: int = 0) -> MixtralForCausalLM:
    """The model of a recipe before its training."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config(recipe))
    if recipe.tails:
        draw = torch.distributions.StudentT(recipe.tails)
        scale = model.config.initializer_range * (1 - 2 / recipe.tails) ** 0.5  # of the same variance
        for weight in model.parameters():
            if weight.dim() == 3:
                weight.data = scale * draw.sample(weight.shape)
    return model


def config(recipe: Recipe) -> MixtralConfig:
    """The configuration of a recipe's model; its loss has a part that keeps the experts evenly loaded."""
    return MixtralConfig(
        vocab_size=recipe.vocabulary, hidden_size=recipe.hidden, intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        num_local_experts=recipe.experts, num_experts_per_tok=recipe.chosen, max_position_embeddings=1024,
        tie_word_embeddings=True, output_router_logits=True, router_aux_loss_coef=0.01,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


@cache
def tokenizer(vocabulary: int = WIDE.vocabulary) -> PreTrainedTokenizerFast:
    """Byte pairs learned from the training part; its end token is 0."""
    texts = [message["content"] for example in _part(0).examples for message in example.messages]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END, START], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=END, additional_special_tokens=[START], chat_template=TEMPLATE
    )


@cache
def stream(vocabulary: int = WIDE.vocabulary, part: int = 0) -> Tensor:
    """All tokens of the training (0), validation (1) or test part (2), one conversation after another."""
    encoded = data.encode(_part(part), tokenizer(vocabulary), 1024, loss_on="all", on_long="truncate")
    return torch.tensor([token for row in encoded.rows for token in row["input_ids"]])


def fit(model: PreTrainedModel, recipe: Recipe, seed: int, *, steps: int | None = None, rate: float = 0.0) -> float:
    """Train on stretches of the text that the seed chooses; the mean loss of the last ten steps.

    AdamW with a tenth of the steps to warm up, then linearly to a tenth of the rate; gradients clipped at 1.
    """
    tokens, count = stream(recipe.vocabulary), steps or recipe.steps
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate or recipe.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, count // 10)
    losses = []
    model.train()
    for step in range(count):
        for group in optimizer.param_groups:
            left = max(0.1, (count - step) / max(1, count - warm))
            group["lr"] = (rate or recipe.rate) * min(1.0, (step + 1) / warm, left)
        starts = torch.randint(len(tokens) - recipe.length, (recipe.batch,), generator=draw).tolist()
        ids = torch.stack([tokens[start : start + recipe.length] for start in starts])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-10:]) / len(losses[-10:])


@torch.no_grad()
def heldout(model: PreTrainedModel, recipe: Recipe, windows: int = 48, part: int = 1) -> float:
    """Cross-entropy in nats a token on stretches spread over a part that was not trained on."""
    tokens = stream(recipe.vocabulary, part)
    starts = torch.linspace(0, len(tokens) - recipe.length, windows).long().tolist()
    total = 0.0
    for first in range(0, windows, 8):
        ids = torch.stack([tokens[start : start + recipe.length] for start in starts[first : first + 8]])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / (windows * (recipe.length - 1))


@cache
def _part(index: int) -> data.Corpus:
    return data.split(data.read(DATA), seed=0)[index]


def _train(recipe: Recipe, seed: int, folder: Path) -> None:
    model = new(recipe, seed)
    fit(model, recipe, seed)
    model.config.output_router_logits = False  # the even load is a matter of training
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer(recipe.vocabulary).save_pretrained(folder)

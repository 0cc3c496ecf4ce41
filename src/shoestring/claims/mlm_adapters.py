"""Language adapters beside LoRA and full tuning: Italian for a small English model, and a task on top."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from shoestring.core.claim import Claim
from shoestring.core.errors import UsageError
from shoestring.lab.arms import Arms

METHODS = ("invertible",)
LENGTH, FOLDS, TOPICS_FROM = 64, 5, 240

_HERE = (
    "SmolLM2-135M-Instruct in float32; the 562 Italian dialogues of chatterbot-corpus, a tenth (56) held out for the "
    "test; 20 AdamW steps of 1 x 64 tokens; learning rates usual for each kind (1e-3; all weights 1e-4), not searched"
)
_LANGUAGE = (
    "adapters match or outperform full fine-tuning with far fewer parameters, on up to 1 GB of text or a few MB of "
    "triples; the sequential bottleneck is best in language modelling"
)
_CANNOT = "masked models, 30 languages, SIB-200, WikiANN, FLORES-200, comparison with very large models"
CLAIMS = (
    Claim(
        "bottleneck and invertible part beside full tuning",
        paper=_LANGUAGE,
        here=_HERE + "; held-out loss, nats a token",
        measure="heldout_loss",
        arm="seq_bn_inv",
        against="full",
        expect="<= 0.1",
        by="difference",
        cannot=_CANNOT,
    ),
    Claim(
        "bottleneck beside full tuning",
        paper=_LANGUAGE,
        here=_HERE + "; held-out loss, nats a token",
        measure="heldout_loss",
        arm="seq_bn",
        against="full",
        expect="<= 0.1",
        by="difference",
        cannot=_CANNOT,
    ),
    Claim(
        "bottleneck beside LoRA",
        paper="the sequential bottleneck is best in language modelling, before LoRA",
        here=_HERE + "; held-out loss, nats a token, LoRA r 4 with as many parameters on all linear layers",
        measure="heldout_loss",
        arm="seq_bn",
        against="lora",
        expect="<= 0.05",
        by="difference",
        cannot=_CANNOT,
    ),
    Claim(
        "gain",
        paper="adaptation gives gains in language modelling",
        here=_HERE + "; held-out loss, nats a token, against the model as it is",
        measure="heldout_loss",
        arm="seq_bn_inv",
        against="untuned",
        expect="<= -0.5",
        by="difference",
        cannot=_CANNOT,
    ),
    Claim(
        "parameters",
        paper="far fewer parameters",
        here=_HERE + "; trained parameters",
        measure="trainable_parameters",
        arm="seq_bn_inv",
        against="full",
        expect="<= 0.012",
    ),
    Claim(
        "task above the language",
        paper="gains in three task types; the invertible form slightly best downstream",
        here="the topic (19 files) of 240 dialogues from a linear head on the mean of the frozen last states, five "
        "folds, macro-F1; states under the language adapter against those of the model as it is",
        measure="macro_f1",
        arm="seq_bn_inv",
        against="untuned",
        expect=">= 0",
        by="difference",
        cannot=_CANNOT + "; task adapters of the paper's size",
    ),
)
# Arm -> its adapter (None for none) and its learning rate; 0 trains nothing.
ARMS: dict[str, tuple[str, dict[str, Any], float]] = {
    "untuned": ("", {}, 0.0),
    "seq_bn": ("invertible", {"form": "seq_bn", "init": "normal"}, 1e-3),
    "seq_bn_inv": ("invertible", {"form": "seq_bn_inv", "init": "normal"}, 1e-3),
    "lora": ("lora", {"r": 4, "lora_alpha": 8}, 1e-3),
    "full": ("", {}, 1e-4),
}


def run(arms: Arms) -> None:
    parts = dialogues(arms.seed)
    steps = arms.size(2, 20)
    for name, (method, options, rate) in ARMS.items():
        with arms.arm(name) as stage:
            model, tokenizer, trained = adapt(arms, parts["train"], method, options, rate, steps)
            stage.record("trainable_parameters", trained, "parameter", "counted")
            stage.record("heldout_loss", loss(model, tokenizer, parts["test"][: arms.size(8, 56)]), "nat", "measured")
            if name in ("untuned", "seq_bn_inv"):
                some = parts["train"][: arms.size(40, TOPICS_FROM)]
                found = macro_f1(states(model, tokenizer, some), [topic for topic, _ in some])
                stage.record("macro_f1", found, "F1", "measured")
        del model


def adapt(
    arms: Arms, texts: list[tuple[str, str]], method: str, options: dict[str, Any], rate: float, steps: int
) -> tuple[Any, Any, int]:
    """The model after `steps` on the texts, its tokenizer, and how many parameters trained."""
    from shoestring.core import catalog
    from shoestring.training import TrainOptions, train

    loaded = arms.load(dtype="float32")
    model = loaded.model
    if not rate:
        return model.eval(), loaded.tokenizer, 0
    if method:
        model = catalog.contract("adapters").wrap(catalog.module(method), model, options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    settings = TrainOptions(
        learning_rate=rate, max_steps=steps, per_device_train_batch_size=1, seed=arms.seed, save_steps=10_000
    )
    place = arms.folder / "-".join(map(str, (method, *options.values(), rate)))
    train(model, windows(texts, loaded.tokenizer), [], settings, place, tokenizer=loaded.tokenizer)
    return model.eval(), loaded.tokenizer, trained


def windows(texts: list[tuple[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """The dialogues one after another, cut into rows of 64 tokens."""
    stream: list[int] = []
    for _, text in texts:
        stream += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    rows = [stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH + 1, LENGTH)]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


def loss(model: Any, tokenizer: Any, texts: list[tuple[str, str]]) -> float:
    """Nats a token over the first 128 tokens of each dialogue."""
    from shoestring.jobs.evaluate import heldout

    rows = [tokenizer(text)["input_ids"][:128] for _, text in texts]
    return heldout(model, [{"input_ids": row, "labels": row} for row in rows if len(row) > 1]).loss.value


def states(model: Any, tokenizer: Any, texts: list[tuple[str, str]]) -> Any:
    """(texts, width): means over the first 24 tokens of the last hidden states, of length 1."""
    import torch

    body = getattr(model, "get_base_model", lambda: model)().base_model
    rows = [tokenizer(text)["input_ids"][:24] for _, text in texts]
    made: dict[int, Any] = {}
    with torch.no_grad():
        for length in {len(row) for row in rows}:  # texts of one length need no padding
            some = [i for i, row in enumerate(rows) if len(row) == length]
            out = body(input_ids=torch.tensor([rows[i] for i in some])).last_hidden_state.float().mean(1)
            made |= dict(zip(some, out))
    return torch.nn.functional.normalize(torch.stack([made[i] for i in range(len(rows))]), dim=1)


def macro_f1(features: Any, topics: list[str]) -> float:
    """Macro-F1 of a linear head, each fifth predicted by a head that was trained on the other four."""
    import numpy as np
    import torch

    names = sorted(set(topics))
    labels = torch.tensor([names.index(topic) for topic in topics])
    fold = torch.from_numpy(np.random.default_rng(0).permutation(len(topics)) % FOLDS)
    guesses = torch.empty_like(labels)
    for number in range(FOLDS):
        x, y = features[fold != number], labels[fold != number]
        mean = x.mean(0)
        x, new = (x - mean) / x.std(), (features[fold == number] - mean) / x.std()
        weight = torch.zeros(len(names), x.shape[1], requires_grad=True)
        bias = torch.zeros(len(names), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

        def step(x: Any = x, y: Any = y, w: Any = weight, b: Any = bias, o: Any = optimizer) -> Any:
            o.zero_grad()
            value = torch.nn.functional.cross_entropy(x @ w.T + b, y) + 1e-3 * w.square().sum()
            value.backward()
            return value

        optimizer.step(step)
        guesses[fold == number] = (new @ weight.T + bias).argmax(1)
    scores = []
    for label in range(len(names)):
        right = int(((guesses == label) & (labels == label)).sum())
        scores.append(2 * right / max(1, int((guesses == label).sum() + (labels == label).sum())))
    return float(np.mean(scores))


def dialogues(seed: int) -> dict[str, list[tuple[str, str]]]:
    """(topic, text) of the Italian dialogues: train, valid and test, which the seed chooses.

    Raises:
        UsageError: the package is not installed.
    """
    import random

    import yaml

    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "the package chatterbot-corpus is not installed",
            "this claim is measured on its Italian dialogues",
            "pip install --no-deps chatterbot-corpus",
        )
    found = []
    for file in sorted((Path(spec.submodule_search_locations[0]) / "data" / "italian").glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            found.append((file.stem, "\n".join(str(turn) for turn in turns)))
    random.Random(seed).shuffle(found)
    tenth = len(found) // 10
    return {"test": found[:tenth], "valid": found[tenth : 2 * tenth], "train": found[2 * tenth :]}

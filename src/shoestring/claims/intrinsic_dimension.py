"""Intrinsic dimension: it hardly grows with the model, compresses a training run, and needs no matrix of projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.errors import ShoestringError
from shoestring.jobs.evaluate import heldout
from shoestring.lab.arms import Arms

_DIGITS = (
    "scikit-learn's digits, 1,797 images of 8x8, a quarter held out; MLP 64-w-w-10 from random weights, Adam 0.1 on v "
    "and 0.01 on weights, 60 epochs, batch 256; d90 on the grid 20, 60, 120, 200, 300, 500, mean of three runs"
)
_CANNOT = "MNIST, CIFAR-10, Atari; the ratio of 100 between tasks"
_MODEL = (
    "SmolLM2-135M-Instruct, Python documentation, 12 steps of 4 examples of at most 128 tokens, Fastfood on the "
    "attention projections, learning rate 0.4 (0.02, 0.1, 0.4 and 1 tried on validation data)"
)
_LARGE, _SMALL = "17,610 weights", "3,466 weights"
CLAIMS = (
    Claim(
        "size",
        paper="for one data set d varies little over models of very different size",
        here=_DIGITS + "; the larger model has 5.1 times the weights of the smaller",
        measure="d90",
        arm="17,610 weights",
        against="3,466 weights",
        expect="<= 2.5",
        cannot=_CANNOT,
    ),
    Claim(
        "compression",
        paper="compression above 100x in some cases",
        here=_DIGITS + "; numbers that are trained, all weights against v at d90",
        measure="trained",
        arm="direct",
        against="17,610 weights",
        expect=">= 50",
        cannot=_CANNOT,
    ),
    Claim(
        "fastfood",
        paper="dense, sparse and Fastfood projections are three ways to the same subspace",
        here=_DIGITS + "; accuracy at d = 200, mean of three runs",
        measure="accuracy",
        arm="fastfood",
        against="dense",
        expect=">= -0.05",
        by="difference",
        cannot=_CANNOT,
    ),
    Claim(
        "language",
        paper="a whole fine-tune is a seed and d numbers",
        here=_MODEL + ", d = 2,000; held-out loss of the answers, nats a token, against the untuned model",
        measure="heldout_loss",
        arm="subspace",
        against="untuned",
        expect="< 0",
        by="difference",
    ),
    Claim(
        "file",
        paper="a whole fine-tune is a seed and d numbers",
        here=_MODEL + ", d = 2,000; bytes of the weights' file, against LoRA of rank 2 on every linear layer",
        measure="file",
        arm="subspace",
        against="lora",
        expect="<= 0.01",
    ),
)


def run(arms: Arms) -> None:
    _digits(arms)
    _language(arms)


def _digits(arms: Arms) -> None:
    x, y, held = _images(arms.seed)
    epochs, runs = arms.size(3, 60), range(10 * arms.seed, 10 * arms.seed + arms.size(1, 3))
    for name, width in ((_SMALL, 32), (_LARGE, 96)):
        direct = [_accuracy(width, seed, epochs, x, y, held) for seed in runs]
        with arms.arm(name) as stage:
            for d in (20, 60, 120, 200, 300, 500):
                found = [_accuracy(width, seed, epochs, x, y, held, d=d) for seed in runs]
                stage.record(f"accuracy_at_{d}", sum(found) / len(found), "ratio", "measured")
                if sum(found) >= 0.9 * sum(direct):
                    stage.record("d90", d, "dimension", "measured")
                    stage.record("trained", d, "parameter", "counted")
                    break
    with arms.arm("direct") as stage:
        stage.record("trained", 64 * 96 + 96 + 96 * 96 + 96 + 96 * 10 + 10, "parameter", "counted")
        stage.record("accuracy", sum(direct) / len(direct), "ratio", "measured")
    for kind in ("fastfood", "dense", "sparse"):
        with arms.arm(kind) as stage:
            found = [_accuracy(96, seed, epochs, x, y, held, d=200, projection=kind) for seed in runs]
            stage.record("accuracy", sum(found) / len(found), "ratio", "measured")


def _images(seed: int) -> Any:
    """Pixels (n, 64), labels (n,), and which are held out."""
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ShoestringError("this claim needs scikit-learn", str(error), "Run `pip install scikit-learn`") from None
    pixels, labels = load_digits(return_X_y=True)
    held = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < 0.25
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels), held


def _accuracy(width: int, seed: int, epochs: int, x: Any, y: Any, held: Any, **options: Any) -> float:
    """Of one MLP trained in a subspace, or (no options) in all its weights."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    layers: list[Any] = [torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU()]
    net: Any = torch.nn.Sequential(*layers, torch.nn.Linear(width, 10))
    if options:
        config = catalog.load("intrinsic_dimension")
        net = get_peft_model(net, config(target_modules="all", projection_seed=seed, **options))
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 0.1 if options else 0.01)
    known, named = x[~held], y[~held]
    for _ in range(epochs):
        for batch in torch.randperm(len(known)).split(256):
            loss = torch.nn.functional.cross_entropy(net(known[batch]), named[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float((net(x[held]).argmax(1) == y[held]).float().mean())


def _language(arms: Arms) -> None:
    from shoestring.models.folder import ADAPTER_WEIGHTS
    from shoestring.training import TrainOptions, train

    steps = arms.size(1, 12)
    plans: tuple[tuple[str, str, float, dict[str, Any]], ...] = (
        ("subspace", "intrinsic_dimension", 0.4, {"d": 2000}),
        ("lora", "lora", 1e-3, {"r": 2, "lora_alpha": 4}),
    )
    for arm, method, rate, options in plans:
        loaded = arms.load()
        rows = arms.docs(loaded.tokenizer, {"train": 4 * steps, "test": arms.size(4, 48)}, max_length=128)
        if arm == "subspace":
            with arms.arm("untuned") as stage:
                stage.record("heldout_loss", heldout(loaded.model, rows["test"].rows).loss.value, "nat", "measured")
        with arms.arm(arm) as stage:
            model = catalog.contract("adapters").wrap(catalog.module(method), loaded.model, options)
            settings = TrainOptions(
                learning_rate=rate, max_steps=steps, per_device_train_batch_size=4, seed=arms.seed, save_steps=10_000
            )
            train(model, rows["train"].rows, [], settings, arms.folder / arm, tokenizer=loaded.tokenizer)
            model.eval()
            stage.record("heldout_loss", heldout(model, rows["test"].rows).loss.value, "nat", "measured")
            model.save_pretrained(str(arms.folder / f"{arm} saved"))
            file = Path(arms.folder) / f"{arm} saved" / ADAPTER_WEIGHTS
            stage.record("file", file.stat().st_size, "B", "counted")
        del loaded, model

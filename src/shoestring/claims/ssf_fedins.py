"""SSF and its pools: folding loses nothing, two vectors a layer learn, and choosing for each input is the gain.

Clients are averaged here in one process; messages and their bytes belong to the federated strategy.
"""

from __future__ import annotations

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.errors import ShoestringError
from shoestring.jobs.evaluate import heldout
from shoestring.lab.arms import Arms

METHODS = ("ssf",)
_GAIN = "6.64% better than the best competing method at less than 15% of its communication cost on Tiny-ImageNet"
_DIGITS = (
    "scikit-learn's digits in five visual domains (plain, inverted, rotated by 90 degrees, flipped, transposed) mixed "
    "inside each of 5 clients, Dirichlet 0.3 over labels; a frozen MLP 64-64-64-10 trained on the plain domain alone; "
    "query = centred pixels; pooled classifier started from the frozen head; Adam 5e-3, batch 32, 30 rounds of 5 "
    "local epochs, plain mean of what the adapter's file holds; accuracy over all domains"
)
_CANNOT = "ViT-B/16, Tiny-ImageNet, DomainNet; bytes on a network"
_MODEL = (
    "SmolLM2-135M-Instruct, Python documentation, 12 steps of 4 examples of at most 128 tokens, every linear layer of "
    "the blocks; SSF 311,040 numbers at learning rate 1e-3, LoRA of rank 1 305,280 at 1e-2, each the best on "
    "validation data among steps of about 3 times around it; held-out loss of the answers, nats a token"
)
CLAIMS = (
    Claim(
        "choice",
        paper=_GAIN,
        here=_DIGITS + "; pool of 25, 3 chosen for each image, against a single SSF",
        measure="accuracy",
        arm="pool 25, 3 chosen",
        against="single",
        expect=">= 0.15",
        by="difference",
        cannot=_CANNOT,
    ),
    Claim(
        "choice, not size",
        paper=_GAIN,
        here=_DIGITS + "; against the same pool of 25 without a choice: the mean of all for every image",
        measure="accuracy",
        arm="pool 25, 3 chosen",
        against="pool 25, all",
        expect=">= 0.15",
        by="difference",
        cannot=_CANNOT,
    ),
    Claim(
        "fold",
        paper="merging is exact: W' = scale W, b' = scale b + shift",
        here=_MODEL + "; the trained model with its adapter folded in, against the adapter beside its base",
        measure="heldout_loss",
        arm="folded",
        against="ssf",
        expect="<= 0.001",
        by="difference",
    ),
    Claim(
        "quality",
        paper="SSF outperforms other parameter-efficient methods at about as many parameters (ViT-B/16, FGVC, VTAB-1k)",
        here=_MODEL,
        measure="heldout_loss",
        arm="ssf",
        against="lora",
        expect="<= 0.05",
        by="difference",
        cannot="ViT-B/16, FGVC, VTAB-1k",
    ),
)


def run(arms: Arms) -> None:
    _language(arms)
    _digits(arms)


def _language(arms: Arms) -> None:
    import torch

    from shoestring.training import TrainOptions, train

    steps = arms.size(1, 12)
    every = {"target_modules": "all-linear"}
    for name, rate, options in (("ssf", 1e-3, every), ("lora", 1e-2, {"r": 1, "lora_alpha": 2, **every})):
        with arms.arm(name) as stage:
            loaded = arms.load()
            rows = arms.docs(loaded.tokenizer, {"train": 4 * steps, "test": arms.size(4, 48)}, max_length=128)
            model = catalog.contract("adapters").wrap(catalog.module(name), loaded.model, options)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            stage.record("trainable_parameters", trained, "parameter", "counted")
            settings = TrainOptions(
                learning_rate=rate, max_steps=steps, per_device_train_batch_size=4, seed=arms.seed, save_steps=10_000
            )
            train(model, rows["train"].rows, [], settings, arms.folder / name, tokenizer=loaded.tokenizer)
            model.eval()
            stage.record("heldout_loss", heldout(model, rows["test"].rows).loss.value, "nat", "measured")
        if name == "ssf":
            with arms.arm("folded") as stage, torch.no_grad():
                folded = model.merge_and_unload()
                stage.record("heldout_loss", heldout(folded, rows["test"].rows).loss.value, "nat", "measured")
        del loaded, model


def _digits(arms: Arms) -> None:
    import torch
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = catalog.load("ssf")
    x, y, plain, held = _images(arms.seed)
    torch.manual_seed(arms.seed)
    base = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )
    _fit(base, plain[~held], y[~held], 40, 1e-2)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    centre = x[~held].mean(0)
    for name, pool, choose in (("single", 1, 1), ("pool 25, 3 chosen", 25, 3), ("pool 25, all", 25, 25)):
        with arms.arm(name) as stage:
            base.load_state_dict(frozen)
            options = {"pool": pool, "choose": choose, "classifier": "4", "classifier_from_base": True}
            model = get_peft_model(base, config(target_modules=["0", "2"], query_size=64, **options))
            server = _state(get_peft_model_state_dict(model))
            for _ in range(arms.size(2, 30)):
                sent = []
                for client in _clients(y, held, arms.seed):
                    set_peft_model_state_dict(model, server)
                    _fit(model, x[client], y[client], arms.size(1, 5), 5e-3, centre)
                    sent.append(_state(get_peft_model_state_dict(model)))
                server = {key: torch.stack([state[key] for state in sent]).mean(0) for key in server}
            set_peft_model_state_dict(model, server)
            model.eval()
            with torch.no_grad(), model.base_model.asking(x[held] - centre):
                right = (model(x[held]).argmax(1) == y[held]).float().mean()
            stage.record("accuracy", float(right), "ratio", "measured")
            stage.record("message", sum(4 * value.numel() for value in server.values()), "B", "counted")
            base = model.unload()


def _state(found):  # type: ignore[no-untyped-def]
    return {name: value.detach().clone() for name, value in found.items()}


def _clients(y, held, seed: int):  # type: ignore[no-untyped-def]
    """Indices of the images of each of five clients, labels spread among them by a Dirichlet of 0.3."""
    import numpy as np
    import torch

    random = np.random.default_rng(seed)
    owner = torch.full((len(y),), -1)
    for label in range(10):
        places = torch.nonzero((y == label) & ~held).flatten()
        owner[places] = torch.tensor(random.choice(5, len(places), p=random.dirichlet([0.3] * 5)))
    return [found for client in range(5) if len(found := torch.nonzero(owner == client).flatten())]


def _images(seed: int):  # type: ignore[no-untyped-def]
    """Pixels (n, 64) of the five domains mixed, labels (n,), the same images plain, and which of them are held out."""
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ShoestringError("this claim needs scikit-learn", str(error), "Run `pip install scikit-learn`") from None
    pixels, labels = load_digits(return_X_y=True)
    plain = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16
    generator = torch.Generator().manual_seed(seed)
    domain = torch.randint(5, (len(plain),), generator=generator)
    views = torch.stack([plain, 1 - plain, plain.rot90(1, (1, 2)), plain.flip(2), plain.transpose(1, 2)])
    held = torch.rand(len(plain), generator=generator) < 0.25
    mixed = views[domain, torch.arange(len(plain))].reshape(-1, 64)
    return mixed, torch.tensor(labels), plain.reshape(-1, 64), held


def _fit(model, x, y, epochs: int, rate: float, centre=None) -> None:  # type: ignore[no-untyped-def]
    """Adam with batches of 32; with a `centre`, an adapter that is asked with the centred pixels."""
    import contextlib

    import torch

    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(32):
            asked = contextlib.nullcontext() if centre is None else model.base_model.asking(x[batch] - centre)
            with asked:
                loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
                extra = None if centre is None else model.base_model.auxiliary_loss()
            optimizer.zero_grad()
            (loss if extra is None else loss + extra).backward()
            optimizer.step()

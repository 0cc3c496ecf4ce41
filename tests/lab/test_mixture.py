from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoestring import models
from shoestring.core import catalog
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.data.corpus import Corpus, Example
from shoestring.kernels.formats import dictionary
from shoestring.lab import mixture

SMALL = mixture.Recipe(
    hidden=64, inner=24, experts=4, layers=2, heads=2, vocabulary=300, length=32, batch=4, steps=25, rate=1e-2
)


def corpus(part: int) -> Corpus:
    examples = [
        Example([{"role": "user", "content": f"Say {n % 7}."}, {"role": "assistant", "content": f"It is {n % 7}."}])
        for n in range(60)
    ]
    return Corpus(examples[part::3], "chat")


@pytest.fixture(autouse=True)
def small_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mixture, "_part", corpus)
    for function in (mixture.tokenizer, mixture.stream):
        function.cache_clear()
    yield
    for function in (mixture.tokenizer, mixture.stream):
        function.cache_clear()


def test_a_mixture_is_trained_once_for_a_recipe_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixture.mixture(SMALL, 0)
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    other = mixture.mixture(SMALL, 1)
    assert other != folder
    monkeypatch.setattr(mixture, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert mixture.mixture(SMALL, 0) == folder and mixture.mixture(SMALL, 1) == other
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed
    with pytest.raises(pytest.fail.Exception):
        mixture.mixture(replace(SMALL, steps=26), 0)


def test_it_learns_and_can_be_talked_to() -> None:
    untrained = mixture.heldout(mixture.new(SMALL), SMALL, windows=4)
    loaded = models.load(mixture.mixture(SMALL), dtype="float32")
    assert mixture.heldout(loaded.model, SMALL, windows=4) < 0.5 * untrained
    ids = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Say 3."}], tokenize=True)["input_ids"]
    assert loaded.tokenizer.decode(ids) == "<|im_start|>user\nSay 3.<|im_end|>\n"
    assert not loaded.model.config.output_router_logits


def test_training_can_be_repeated() -> None:
    losses = [mixture.fit(mixture.new(SMALL, 3), SMALL, 3, steps=4) for _ in range(2)]
    assert losses[0] == losses[1]


def test_heavy_tails_are_what_long_training_makes() -> None:
    """Of the same variance, with nine in ten weights below half of their row's ends; normal ones have fewer."""
    shares = {}
    for tails in (0.0, 8.0):
        model = mixture.new(replace(mixture.WIDE, layers=1, tails=tails))
        weight = torch.cat([p.detach().flatten(0, 1) for p in model.parameters() if p.dim() == 3])
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        shares[tails] = (dictionary.to_symbols(weight, *dictionary.ends(weight)) == 0).float().mean().item()
    assert shares[0.0] < 0.88 < 0.89 < shares[8.0] < 0.92


@pytest.mark.parametrize(("room", "name"), [("quantizers", "qmoe"), ("architectures", "mole")])
def test_the_rooms_compress_it(room: str, name: str, tmp_path: Path) -> None:
    module, contract = catalog.module(name), catalog.contract(room)
    work = Work(Ledger(), tmp_path / "work", train=corpus(0), training={"max_steps": 2, "save_steps": 0})
    recipe = replace(SMALL, steps=2)
    source, out = mixture.mixture(recipe), tmp_path / "out"
    contract.apply(module, Step("compress", name, {}), source, out, work)
    before, after = (mixture.heldout(models.load(f, dtype="float32").model, recipe, windows=2) for f in (source, out))
    assert abs(after - before) < 0.5

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoestring import models
from shoestring.core import catalog
from shoestring.core.ledger import Ledger
from shoestring.core.shape import Shape
from shoestring.core.step import Step, Work
from shoestring.jobs.at_work import at_work, storage
from shoestring.jobs.pipeline import execute
from shoestring.lab import tiny
from shoestring.planner.cost import NEW_TOKENS, PROMPT_TOKENS, Prediction, errors, predict, read_per_token

FLOOR = 500_000_000


def shape(**changes: object) -> Shape:
    return models.shape_of(tiny.model(dtype=torch.bfloat16, **changes))


@pytest.mark.parametrize(
    "larger",
    [{"num_hidden_layers": 3}, {"intermediate_size": 128}, {"hidden_size": 128, "head_dim": 16},
     {"num_key_value_heads": 4}],
)  # fmt: skip
def test_more_of_anything_costs_more(larger: dict) -> None:
    small, large = predict(shape(), FLOOR), predict(shape(**larger), FLOOR)
    assert large.storage > small.storage
    assert large.memory > small.memory and large.flops_per_token > small.flops_per_token


def test_a_token_reads_every_matrix_once_and_one_row_of_a_mere_table() -> None:
    tied, apart = shape(tie_word_embeddings=True), shape(tie_word_embeddings=False)
    row = next(tied.of("embed")).resident / next(tied.of("embed")).dims[0]
    assert read_per_token(tied) == pytest.approx(tied.resident + row)
    assert read_per_token(apart) == pytest.approx(read_per_token(tied))
    assert apart.resident > tied.resident
    halved = tied.change(lambda w: replace(w, used=0.5) if w.role == "down" else w)
    assert read_per_token(halved) == pytest.approx(tied.resident + row - sum(w.resident for w in tied.of("down")) / 2)


def test_fewer_bits_cost_less_and_compute_the_same() -> None:
    plain = predict(shape(), FLOOR)
    packed = [
        predict(catalog.module("int4").price(shape(), settings).shape, FLOOR)
        for settings in catalog.module("int4").settings()
    ]
    assert all(p.storage < plain.storage and p.memory < plain.memory for p in packed)
    assert {p.flops_per_token for p in packed} == {plain.flops_per_token}


def test_the_floor_and_other_files_are_in() -> None:
    one = predict(shape(), FLOOR)
    assert predict(shape(), FLOOR + 1000).memory == one.memory + 1000
    more = predict(replace(shape(), other_files=500), FLOOR)
    assert more.storage == one.storage + 500 and more.memory == one.memory, "a tokenizer's bytes are not the model's"
    assert predict(shape(), FLOOR).storage == sum(w.stored for w in shape().weights if not w.tied)
    assert predict(shape(), FLOOR).memory > FLOOR + shape().resident + shape().kv_bytes(PROMPT_TOKENS + NEW_TOKENS)


def test_errors_have_the_sign_of_too_much() -> None:
    found = errors(Prediction(110, 90, 5.0), {"storage": 100, "memory": 100})
    assert found == {"storage": pytest.approx(0.1), "memory": pytest.approx(-0.1)}
    assert errors(Prediction(110, 90, 5.0), {"storage": None, "memory": 0}) == {}, "what was not measured has none"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shape, Path]:
    """The default model in 4 bits: its promised shape, and the folder."""
    settings = {"group_size": 64, "embeddings": 8}
    source = models.resolve("smollm2")
    with Ledger() as ledger:
        work = Work(ledger, tmp_path_factory.mktemp("packed"))
        folder, _ = execute([Step("compress", "int4", settings)], source, work)
    return catalog.module("int4").price(models.shape_of(source), settings).shape, folder


@pytest.mark.real
def test_storage_of_the_default_model(packed: tuple[Shape, Path]) -> None:
    promised, folder = packed
    held = models.shape_of(folder)
    weights = sum(w.stored for w in promised.weights if not w.tied)
    assert sum(w.stored for w in held.weights if not w.tied) == weights, "weights are exact to the byte"
    assert predict(promised, FLOOR).storage == pytest.approx(storage(folder), rel=1e-3)


@pytest.mark.real
def test_memory_of_the_default_model(packed: tuple[Shape, Path]) -> None:
    promised, folder = packed
    found = at_work(folder, prompt_tokens=PROMPT_TOKENS, new_tokens=16, repeats=1)
    predicted = predict(promised, found["floor_memory"]).memory
    assert predicted == pytest.approx(found["peak_memory"], rel=0.15)

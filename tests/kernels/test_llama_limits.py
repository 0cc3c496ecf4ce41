"""Indices outside their range are refused before anything is written; sizes are exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from llamas import Chain, batch, dirty_cache, family, int32, native, needs_library, pages, sharing, tiny_model

from shoestring.core.errors import UsageError
from shoestring.kernels.llama import Adapter, Llama

pytestmark = needs_library

IDS = [3, 9, 27, 50, 11]


@pytest.fixture(scope="module")
def model() -> Llama:
    return native(family("llama"), positions=32)


def test_pages_have_the_size_they_say(model):
    whole, scaled = 2 * 2 * 16 * 16, 2 * (2 * 16 * 16 + 2 * 16 * 4)
    assert model.page_bytes("bf16") == (whole * 2,) * 3
    assert model.page_bytes("int8") == (scaled,) * 3
    assert model.page_bytes("fp32") == (whole * 4,) * 3
    windowed = native(family("mistral", sliding_window=4))
    assert windowed.page_bytes("bf16") == (whole * 2 + 64,) * 3
    wide = native(family("llama", head_dim=18))
    assert wide.page_bytes("bf16") == (2 * (18 + 32) * 16 * 2,) * 3  # values stand in whole registers
    cache = model.cache(7, "int8")
    assert cache.data.shape == (3 * 7 * scaled,) and cache.data.ctypes.data % 64 == 0 and cache.pages == 7


def test_layers_without_keys_have_pages_of_values_alone(model):
    for made, type, positions in ((model, "bf16", 0), (model, "int8", 0), (model, "fp32", 0), (None, "bf16", 64)):
        whole = made or native(family("mistral", sliding_window=4))
        (each,) = set(whole.page_bytes(type))
        assert sharing(whole, [0, 0, 2]).page_bytes(type) == (each, (each - positions) // 2, each)


WRONG: dict[str, dict[str, Any]] = {
    "id below": dict(ids=int32([3, -1, 5, 6, 7])),
    "id above": dict(ids=int32([3, 4, 5, 6, 64])),
    "position below": dict(positions=int32([0, 1, 2, 3, -1])),
    "position above": dict(positions=int32([0, 1, 2, 3, 32])),
    "page below": dict(tables=int32([[-1]])),
    "page above": dict(tables=int32([[4]])),
    "more slots than pages": dict(contexts=int32([12])),
    "context below": dict(contexts=int32([-1])),
    "huge context": dict(contexts=int32([2**31 - 1])),
    "starts late": dict(starts=int32([1, 5])),
    "ends early": dict(starts=int32([0, 4])),
    "ends late": dict(starts=int32([0, 6])),
    "starts go back": dict(starts=int32([0, 6, 5]), contexts=int32([0, 0]), tables=int32([[0], [1]])),
    "parent of itself": dict(parents=int32([-1, 0, 2, 0, 0])),
    "parent below": dict(parents=int32([-2, 0, 1, 0, 0])),
    "no such adapter": dict(adapters=int32([-1, -1, 1, -1, -1])),
    "adapter below": dict(adapters=int32([-1, -1, -2, -1, -1])),
    "array of another length": dict(positions=int32([0, 1])),
    "array of another type": dict(positions=np.arange(5)),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_index_outside_is_refused_and_nothing_written(name, model):
    cache = dirty_cache(model, 4)
    before = cache.data.copy()
    made = dataclasses.replace(batch([(Chain([2]), IDS)]), **WRONG[name])
    stream = np.full((5, 64), 7, np.float32)
    for hidden in (None, stream):
        if hidden is not None and "id " in name:
            continue  # ids are not read where the stream is given
        with pytest.raises(UsageError):
            model.run(cache, made, hidden=hidden, adapters=[Adapter(3, {})], threads=2)
    np.testing.assert_array_equal(cache.data, before)
    assert (stream == 7).all()


def test_layers_outside_and_dropped_adapters_are_refused(model):
    cache, made = dirty_cache(model, 4), batch([(Chain([0]), IDS)])
    for first, last in ((0, 4), (2, 1), (-1, 2), (4, 4)):
        with pytest.raises(UsageError):
            model.run(cache, made, first=first, last=last, hidden=np.zeros((5, 64), np.float32))
    with pytest.raises(UsageError, match="layers before"):
        model.run(cache, made, first=1)
    with pytest.raises(UsageError):
        model.run(cache, batch([(Chain([0]), IDS)], adapters=[0] * 5), adapters=[None])
    with pytest.raises(UsageError):
        model.run(None, made)
    with pytest.raises(UsageError):
        model.run(native(family("mistral", sliding_window=4)).cache(4), made)


def test_moves_and_copies_outside_are_refused(model):
    cache = dirty_cache(model, 4)
    before = cache.data.copy()
    for moves in ([(0, 16)], [(-1, 0)], [(0, 1), (99, 0)]):
        with pytest.raises(UsageError):
            model.move(cache, [1], moves)
    with pytest.raises(UsageError):
        model.move(cache, [7], [(0, 1)])
    with pytest.raises(UsageError):
        cache.copy([(0, 4)])
    np.testing.assert_array_equal(cache.data, before)


def test_rows_outside_are_refused(model):
    hidden = np.zeros((3, 64), np.float32)
    for rows in ([3], [-1]):
        with pytest.raises(UsageError):
            model.logits(hidden, np.array(rows))
    with pytest.raises(UsageError):
        model.logits(hidden.astype(np.float64), np.array([0]))


def test_an_empty_batch_is_nothing_to_do(model):
    cache = dirty_cache(model, 2)
    made = batch([(Chain([0]), [])])
    assert model.run(cache, made).shape == (0, 64)
    assert model.logits(np.zeros((2, 64), np.float32), np.array([], np.int32)).shape == (0, 64)


def test_weights_that_do_not_belong_together_are_named(model):
    block = model.blocks[0]
    with pytest.raises(UsageError, match="Layer 0: down is 96 x 64"):
        dataclasses.replace(model, blocks=(dataclasses.replace(block, down=block.up), *model.blocks[1:]))
    with pytest.raises(UsageError, match="q_norm"):
        dataclasses.replace(model, blocks=(dataclasses.replace(block, q_norm=np.ones(3, np.float32)),))
    with pytest.raises(UsageError, match="3 heads"):
        dataclasses.replace(model, heads=3)
    with pytest.raises(UsageError, match="relu"):
        dataclasses.replace(model, activation="relu")
    with pytest.raises(UsageError, match="without layers"):
        dataclasses.replace(model, blocks=())
    zeros = np.zeros((64, 64), np.float32)
    for parts, message in (
        ({(0, "q"): (zeros[:4, :3], zeros[:, :4])}, "adapter's q of layer 0"),
        ({(0, "down"): (zeros[:4], zeros[:, :4])}, "adapter's down of layer 0"),
        ({(0, "q"): (zeros[:0], zeros[:, :0])}, "adapter's q of layer 0"),
        ({(9, "q"): (zeros[:4], zeros[:, :4])}, "q of layer 9"),
        ({(0, "w"): (zeros[:4], zeros[:, :4])}, "w of layer 0"),
    ):
        with pytest.raises(UsageError, match=message):
            model.adapter(parts)
    made = batch([(Chain(pages(5)), IDS)], adapters=[0] * 5)
    with pytest.raises(UsageError, match="adapter for 2 layers"):
        model.run(dirty_cache(model, 2), made, adapters=[Adapter(2, {})])
    small = native(tiny_model("llama", seed=0, hidden_size=32))
    alien = small.adapter({(0, "q"): (zeros[:4, :32], zeros[:32, :4])})
    with pytest.raises(UsageError, match="index lies outside"):
        model.run(dirty_cache(model, 2), made, adapters=[alien])

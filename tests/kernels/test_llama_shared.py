"""Layers that take the attention weights of an earlier one, against transformers' models that are made to do so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from llamas import Chain, array, batch, dirty_cache, expected, family, feed, native, needs_library, pages, sharing
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from shoestring.core.errors import UsageError
from shoestring.kernels.llama import Llama

pytestmark = needs_library

IDS = [(7 * i * i + 3 * i) % 61 + 3 for i in range(300)]  # more than the slots of a span
LEADERS = [0, 1, 1, 1, 4, 4]
LIMITS = {"fp32": 1e-5, "bf16": 2e-3, "int8": 0.1}  # of the largest logit: twice what holds for half the layers


def borrowing(model: Any, leaders: list[int]) -> Any:
    """`model`, whose attention function gives layers the weights of their leaders; nothing of it is taken out."""
    seen: dict[int, torch.Tensor] = {}

    def borrow(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        layer, group = module.layer_idx, q.shape[1] // k.shape[1]
        if leaders[layer] == layer:
            seen[layer] = torch.softmax(q @ k.repeat_interleave(group, 1).transpose(2, 3) * scaling + mask, -1)
        return (seen[leaders[layer]] @ v.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register("borrowing", borrow)
    AttentionMaskInterface.register("borrowing", eager_mask)
    model.set_attn_implementation("borrowing")
    return model


def far(got: np.ndarray, want: np.ndarray) -> float:
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.fixture(scope="module")
def model() -> Llama:
    return sharing(native(family("llama", num_hidden_layers=6)), LEADERS)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_prefill_and_steps_give_the_logits_of_the_leaders_weights(name, isa):
    changes = {"mistral": dict(sliding_window=9), "qwen3": dict(head_dim=16)}.get(name, {})
    made = family(name, num_hidden_layers=6, **changes)
    whole = native(made)
    model = sharing(whole, LEADERS)
    plain = expected(made, IDS)
    rounded = expected(borrowing(made, LEADERS), IDS)
    with torch.no_grad():
        exact = array(made(torch.tensor([IDS])).logits[0])
    assert far(exact, plain) > 0.05, "sharing would change nothing: the test is blind"
    for type, limit in LIMITS.items():
        want = rounded if type == "bf16" else exact
        cache, chain = dirty_cache(model, 20, type), Chain(pages(300))
        parts = [IDS[:17], IDS[17:290], *([i] for i in IDS[290:])]
        steps = np.concatenate([feed(model, cache, chain, part, threads=2) for part in parts])
        assert far(steps, want) < limit, type


def test_layers_run_apart_where_no_block_is_cut(model):
    cache, made = dirty_cache(model, 5), batch([(Chain(pages(20)), IDS[:20])])
    want = model.run(cache, made)
    cache = dirty_cache(model, 5)
    stream = model.run(cache, made, last=1)
    for first, last in ((1, 4), (4, 6)):
        stream = model.run(cache, made, first=first, last=last, hidden=stream)
    np.testing.assert_array_equal(stream, want)
    for first, last, layer in ((2, 4, 2), (3, 6, 3), (5, 6, 5)):
        with pytest.raises(UsageError, match=f"Layer {layer} has no attention weights to take"):
            model.run(cache, made, first=first, last=last, hidden=stream)
    with pytest.raises(UsageError, match="Layer 2 .*computed elsewhere"):
        model.run(None, made, attend=lambda layer, q, k, v: q)


def test_pages_are_copied_in_every_layer(model):
    cache, chain = dirty_cache(model, 6), Chain([0, 1])
    feed(model, cache, chain, IDS[:20])
    cache.copy([(0, 4), (1, 5)])
    copied = Chain([4, 5], 20)
    np.testing.assert_array_equal(
        feed(model, cache, copied, IDS[20:22]), feed(model, cache, Chain([0, 1], 20), IDS[20:22])
    )


IMPOSSIBLE = {
    "of a follower": [0, 1, 1, 2, 4, 5],
    "a later layer's": [0, 1, 4, 3, 4, 5],
    "no layer's": [0, 1, 1, -1, 4, 5],
    "gone": [0, 1, 2, 2, 1, 5],  # since layer 2 those of layer 1 are not kept any more
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_weights_that_are_not_there_cannot_be_taken(name):
    with pytest.raises(UsageError, match="cannot take the attention weights"):
        sharing(native(family("llama", num_hidden_layers=6)), IMPOSSIBLE[name])


def test_an_adapter_for_queries_that_are_not_there_is_refused(model):
    a, b = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
    model.adapter({(1, "q"): (a, b), (2, "o"): (a, b)})
    with pytest.raises(UsageError, match="q of layer 2, which takes another's"):
        model.adapter({(2, "q"): (a, b)})

"""The fused step against transformers' own models, at every instruction level.

Pages hold bfloat16, so the reference rounds keys and values too. Even so a key that lies between two bfloat16 numbers
may round to the other one, 2^-8 of it away; through a softmax and three layers that stays below LIMIT of the largest
logit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llamas import Chain, array, batch, dirty_cache, expected, family, feed, native, needs_library, pages

from shoestring.kernels.llama import Llama

pytestmark = needs_library

LIMIT = 1e-3
IDS = [(7 * i * i + 3 * i) % 61 + 3 for i in range(70)]
FAMILIES = {
    "llama": {},
    "llama with biases": dict(family="llama", attention_bias=True, mlp_bias=True),
    "llama with one head of keys": dict(family="llama", num_key_value_heads=1),
    "llama without groups": dict(family="llama", num_key_value_heads=4),
    "llama with odd heads": dict(
        family="llama", hidden_size=48, head_dim=18, num_attention_heads=3, num_key_value_heads=3
    ),
    "llama with wide heads": dict(family="llama", head_dim=80),
    "llama with scaled positions": dict(
        family="llama",
        rope_parameters=dict(
            rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "mistral": dict(sliding_window=9),
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "granite": dict(embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=2.0, attention_multiplier=0.2),
    "gelu": dict(family="llama", hidden_act="gelu_pytorch_tanh"),
}  # fmt: skip


def pair(name: str) -> tuple[torch.nn.Module, Llama]:
    settings = dict(FAMILIES[name])
    made = family(settings.pop("family", name), **settings)
    return made, native(made)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, as a share of the largest logit."""
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_steps_give_transformers_logits(name, isa):
    made, model = pair(name)
    want = expected(made, IDS)
    cache = dirty_cache(model, 8)
    assert distance(feed(model, cache, Chain(pages(70, 2)), IDS, threads=2), want) < LIMIT
    chain = Chain(pages(70, 3))
    parts = [IDS[:17], IDS[17:50], *([i] for i in IDS[50:])]
    steps = np.concatenate([feed(model, cache, chain, part) for part in parts])
    assert distance(steps, want) < LIMIT


def test_differences_come_from_rounding_keys_alone():
    """With weights that keep keys and values bfloat16 numbers already, float32 remains: 1e-4 holds with room."""
    made = family("llama")
    for layer in made.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data *= 0  # only the bias remains
            projection.bias = torch.nn.Parameter(torch.randn(projection.out_features).bfloat16().float())
    model = native(made)
    model = Llama(**{**model.__dict__, "cosines": np.ones_like(model.cosines), "sines": np.zeros_like(model.sines)})
    rotary = made.model.rotary_emb
    rotary.forward = lambda x, position_ids: (torch.ones(1, 70, 16), torch.zeros(1, 70, 16))
    assert distance(feed(model, dirty_cache(model, 5), Chain(pages(70)), IDS), expected(made, IDS)) < 1e-5


def test_partial_rotation_turns_the_leading_dimensions():
    made = family("llama")
    whole = native(made)
    half = Llama(**{**whole.__dict__, "cosines": whole.cosines[:, :4].copy(), "sines": whole.sines[:, :4].copy()})
    rotary = made.model.rotary_emb

    def partial(x, position_ids):
        cosines, sines = (torch.from_numpy(t[:70]) for t in (half.cosines, half.sines))
        # transformers turns halves of the whole head: the rest gets angle zero, and dimensions another order
        still = torch.ones(len(cosines), 4), torch.zeros(len(cosines), 4)
        return tuple(torch.cat([t, s, t, s], -1)[None] for t, s in zip((cosines, sines), still))

    rotary.forward = partial
    order = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
    for layer in made.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data = projection.weight.data.view(-1, 16, 64)[:, order].reshape(projection.weight.shape)
    want = expected(made, IDS)
    assert distance(feed(half, dirty_cache(half, 5), Chain(pages(70)), IDS), want) < LIMIT


def test_bfloat16_and_int8_weights_run_the_whole_step(isa):
    made = family("llama")
    with torch.no_grad():
        for value in made.parameters():
            value.data = value.data.bfloat16().float()
    want = expected(made, IDS)
    for format, limit in (("bf16", 0.05), ("int8", 0.15)):
        model = native(made, format)
        assert distance(feed(model, dirty_cache(model, 5), Chain(pages(70)), IDS, threads=2), want) < limit


def test_int8_pages_stay_near_bfloat16_pages(isa):
    """A key or value is off by half a 127th of its largest element: logits by at most 5 percent of the largest here."""
    made = family("llama")
    model = native(made)
    want = expected(made, IDS)
    assert sum(model.page_bytes("int8")) < 0.65 * sum(model.page_bytes("bf16"))
    cache, chain = dirty_cache(model, 8, "int8"), Chain(pages(70, 2))
    whole = feed(model, cache, chain, IDS)
    assert 1e-5 < distance(whole, want) < 0.05
    cache, chain = dirty_cache(model, 8, "int8"), Chain(pages(70))
    steps = [feed(model, cache, chain, part) for part in (IDS[:31], IDS[31:60], *([i] for i in IDS[60:]))]
    np.testing.assert_array_equal(np.concatenate(steps), whole)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_fp32_pages_lose_nothing(name, isa):
    made = family(name)
    model = native(made)
    with torch.no_grad():
        want = array(made(torch.tensor([IDS])).logits[0])
    cache, chain = dirty_cache(model, 8, "fp32"), Chain(pages(70, 2))
    whole = feed(model, cache, chain, IDS)
    assert distance(whole, want) < 1e-5
    cache, chain = dirty_cache(model, 8, "fp32"), Chain(pages(70))
    steps = [feed(model, cache, chain, part) for part in (IDS[:31], IDS[31:60], *([i] for i in IDS[60:]))]
    np.testing.assert_array_equal(np.concatenate(steps), whole)


def test_normed_is_the_final_norm():
    made = family("qwen3")
    model = native(made)
    with torch.no_grad():
        want = array(made.model(torch.tensor([IDS])).last_hidden_state[0])
    hidden = model.run(dirty_cache(model, 5), batch([(Chain(pages(70)), IDS)]))
    rows = np.array([3, 69, 0])
    assert distance(model.normed(hidden, rows), want[rows]) < 5e-3


def test_nan_weights_give_nan_and_no_crash():
    made = family("llama")
    made.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    for type in ("bf16", "int8", "fp32"):
        model = native(made)
        cache = model.cache(5, type)
        hidden = model.run(cache, batch([(Chain(pages(20)), IDS[:20])]))
        assert np.isnan(model.logits(hidden, np.arange(20))).all()

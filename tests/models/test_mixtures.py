"""Where the experts of every family are, and what a recorder sees of their routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring.core.errors import UsageError
from shoestring.lab import tiny
from shoestring.models.anatomy import mixtures, route
from shoestring.models.routing import Trace, watch

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_local_experts=8, num_experts=8, n_routed_experts=8,
    num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1,
    shared_expert_intermediate_size=24, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128,
)  # fmt: skip
# Softmax before the choice, with and without gates that sum to 1; after it; sigmoid with groups; shared experts.
FAMILIES = ("mixtral", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3", "qwen2_moe")


def mixture(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{k: v for k, v in SIZES.items() if hasattr(config, k)})
    made = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in made.named_parameters():
        if "gate.weight" in name or "router" in name:  # some families begin with zeros, which choose nobody
            torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_router_is_found_and_answers_alike(family: str) -> None:
    model = mixture(family)
    found = mixtures(model)
    assert [m.block for m in found] == list(range(3 - len(found), 3)) and {m.count for m in found} == {8}
    with torch.no_grad():
        logits, gates, choices = route(model.get_submodule(found[0].router), torch.randn(5, 32))
    assert logits.shape == (5, 8) and gates.shape == choices.shape == (5, 2)
    for name in found[0].tensors:
        assert len(model.get_submodule(found[0].experts).get_parameter(name)) == 8


@pytest.mark.parametrize("family", ("llama4_text", "afmoe"))
def test_routers_of_another_kind_are_refused(family: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        mixtures(mixture(family))


def test_dense_models_are_refused_and_strange_answers_too() -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM has no experts"):
        mixtures(tiny.model())
    with pytest.raises(UsageError, match="Linear is not understood"):
        route(torch.nn.Linear(4, 4), torch.randn(2, 4))


def test_a_trace_is_what_the_routers_said(tmp_path: Path) -> None:
    model, ids = mixture("deepseek_v3"), tiny.batch(1, 9)
    routers = [model.get_submodule(m.router) for m in mixtures(model)]
    said: list[Any] = []
    hooks = [r.register_forward_hook(lambda _, args, out: said.append((args[0], *out[1:]))) for r in routers]
    with watch(model, hidden=True) as recorder, torch.no_grad():
        first = model(ids[:, :7], use_cache=True)
        model(ids[:, 7:8], past_key_values=first.past_key_values)
    for hook in hooks:
        hook.remove()
    trace = recorder.trace()
    assert trace.experts.shape == (8, 2, 2) and trace.steps.tolist() == [0] * 7 + [1] and trace.counts == (8, 8)
    for number, (hidden, gates, choices) in enumerate(said):
        tokens, layer = (slice(0, 7), number) if number < 2 else (slice(7, 8), number - 2)
        assert np.array_equal(trace.experts[tokens, layer], choices.numpy())
        assert np.allclose(trace.gates[tokens, layer], gates.numpy())
        assert torch.equal(recorder.states(layer)[tokens], hidden.reshape(-1, 32))
    with torch.no_grad():
        model(ids)
    assert len(recorder.trace().steps) == 8, "it goes on recording"
    trace.save(tmp_path / "trace.safetensors")
    again = Trace.load(tmp_path / "trace.safetensors")
    assert all(np.array_equal(getattr(again, n), getattr(trace, n)) for n in ("experts", "gates", "steps"))
    assert again.counts == trace.counts
    visits = list(trace.visits())
    assert len(visits) == 4 and visits[2] == (0, sorted(set(trace.experts[7, 0].tolist())))
    assert len(list(trace.as_decoding().visits())) == 16


def test_entropy_and_repeats_of_known_routes() -> None:
    even = np.arange(16, dtype=np.int32).reshape(8, 1, 2) % 4
    gates = np.full(even.shape, 0.5, np.float32)
    trace = Trace(even, gates, np.arange(8, dtype=np.int32), (4,))
    assert trace.entropy() == [pytest.approx(1.0)] and trace.repeats() == [0.0]
    same = Trace(np.zeros_like(even), gates, trace.steps, (4,))
    assert same.entropy() == [0.0] and same.repeats() == [1.0] and same.masses()[0].tolist() == [8.0, 0, 0, 0]


def test_another_file_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no")
    with pytest.raises(UsageError, match="no recorded routing"):
        Trace.load(tmp_path / "x")

"""Mixtures with other experts: what they compute, save, and what strangers make of their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring import models
from shoestring.core.errors import UsageError
from shoestring.lab import tiny
from shoestring.models import regrouped
from shoestring.models.anatomy import mixtures

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_local_experts=4, num_experts=4,
    num_experts_per_tok=2, shared_expert_intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def mixture(family: str = "mixtral") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{k: v for k, v in SIZES.items() if hasattr(config, k)})
    made = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in made.named_parameters():
        if "gate.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def tensors(model: Any, keep: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    return [
        {name: model.get_submodule(m.experts).get_parameter(name)[kept] for name in m.tensors}
        for m, kept in zip(mixtures(model), keep)
    ]


@pytest.mark.parametrize("family", regrouped.FAMILIES)
def test_copies_that_are_joined_again_change_nothing(family: str, tmp_path: Path) -> None:
    """Experts 0 and 2 are one: their rows may point to the same one."""
    model = mixture(family)
    with torch.no_grad():
        for m in mixtures(model):
            for name in m.tensors:
                weight = model.get_submodule(m.experts).get_parameter(name)
                weight[2] = weight[0]
    keep, to = [[0, 1, 3]] * 2, [[0, 1, 0, 2]] * 2
    small = regrouped.regroup(model, [[0, 1, 2, 3]] * 2, to, tensors(model, keep))
    assert torch.allclose(tiny.logits(small), tiny.logits(model), atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert regrouped.maps(small) == to
    small.save_pretrained(tmp_path)
    again = models.load(tmp_path).model
    assert type(again) is type(small) and torch.equal(tiny.logits(again), tiny.logits(small))
    assert again.generate(tiny.batch(1, 4), max_new_tokens=3, do_sample=False).shape[1] > 4


def test_layers_may_keep_different_numbers_and_equal_ones_are_plain() -> None:
    model = mixture()
    keep = [[0, 1, 3], [1, 2]]
    small = regrouped.regroup(model, keep, [[0, 1, 2], [0, 1]], tensors(model, keep))
    assert [m.count for m in mixtures(small)] == [3, 2]
    assert small.config.model_type == "shoestring_regrouped_mixtral"
    keep = [[0, 1, 3], [1, 2, 3]]
    plain = regrouped.regroup(model, keep, [[0, 1, 2]] * 2, tensors(model, keep))
    assert type(plain) is type(model) and plain.config.num_local_experts == 3


def test_a_kept_expert_computes_as_before() -> None:
    """When the rows of the others are never chosen, leaving them out changes nothing."""
    model = mixture()
    seen: list[torch.Tensor] = []
    router = model.get_submodule(mixtures(model)[0].router)
    hook = router.register_forward_hook(lambda _, args, out: seen.append(out[2]))
    tiny.logits(model, tiny.batch(1, 4))
    hook.remove()
    used = sorted(set(seen[0].flatten().tolist()))
    keep = [used, [0, 1, 2, 3]]
    small = regrouped.regroup(model, keep, [list(range(len(k))) for k in keep], tensors(model, keep))
    assert torch.allclose(tiny.logits(small, tiny.batch(1, 4)), tiny.logits(model, tiny.batch(1, 4)), atol=1e-6)


def test_a_stranger_stops(tmp_path: Path) -> None:
    """The family's own class does not know what was regrouped, here as where this package was never imported."""
    model = mixture()
    keep = [[0, 1, 3], [1, 2]]
    regrouped.regroup(model, keep, [[0, 1, 2], [0, 1]], tensors(model, keep)).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"shoestring\.models\.regrouped"):
        type(model).from_pretrained(tmp_path)


def test_clear_errors() -> None:
    model = mixture()
    with pytest.raises(UsageError, match="LlamaForCausalLM has no experts"):
        regrouped.family_of(tiny.model())
    with pytest.raises(UsageError, match="keep 1 choices, and a token makes 2"):
        regrouped.regroup(model, [[0], [0]], [[0], [0]], tensors(model, [[0], [0]]))
    with pytest.raises(UsageError, match="not those of 2 experts"):
        regrouped.regroup(model, [[0, 1]] * 2, [[0, 1]] * 2, tensors(model, [[0]] * 2))

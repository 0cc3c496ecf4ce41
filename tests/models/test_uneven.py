"""Models whose layers differ in size: cut out exactly, saved, reloaded, refused by who does not know them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from shoestring import models
from shoestring.core.errors import UsageError
from shoestring.lab import tiny
from shoestring.models import surgery, uneven
from shoestring.models.anatomy import inspect
from shoestring.models.uneven import Keep, shrink

ALL, GROUPS = range(96), [0, 1]
SIZES: dict[str, Any] = dict(
    vocab_size=tiny.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
)  # fmt: skip


def model(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
    return made


def masked(whole: Any, keep: list[Keep]) -> torch.Tensor:
    """Logits of the model with all else zeroed where it enters the residual stream."""
    made = copy.deepcopy(whole)
    with torch.no_grad():
        for block, kept in zip(inspect(made).blocks, keep):
            o, down = (made.get_submodule(block.projections[role]) for role in ("o", "down"))
            for group in set(GROUPS) - set(kept.groups):
                o.weight[:, group * 32 : group * 32 + 32] = 0
            down.weight[:, sorted(set(ALL) - set(kept.neurons))] = 0
            if o.bias is not None and not len(kept.groups):
                o.bias.zero_()
    return tiny.logits(made)


KEEPS = {
    "unequal": [Keep([1], range(0, 90, 2)), Keep(GROUPS, range(5)), Keep([0], ALL)],
    "first without attention": [Keep([], ALL), Keep([1], range(50)), Keep(GROUPS, range(9))],
    "one without MLP": [Keep(GROUPS, ALL), Keep([1], []), Keep(GROUPS, ALL)],
    "a layer gone": [Keep([1], ALL), Keep([], []), Keep([0], ALL)],
}


@pytest.mark.parametrize("family", uneven.FAMILIES)
@pytest.mark.parametrize("name", KEEPS)
def test_what_is_left_computes_what_the_masked_model_does(family: str, name: str, tmp_path: Path) -> None:
    whole, keep = model(family), KEEPS[name]
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    small = shrink(whole, keep)
    assert torch.allclose(tiny.logits(small), masked(whole, keep), atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items()), "the original changed"
    small.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(small) and torch.equal(tiny.logits(again), tiny.logits(small))
    ids = tiny.batch(1, 9)
    with torch.no_grad():
        whole_text, first = again(ids).logits, again(ids[:, :6], use_cache=True)
        rest = again(ids[:, 6:], past_key_values=first.past_key_values).logits
    assert torch.allclose(whole_text[:, 6:], rest, atol=1e-5)
    assert first.past_key_values.get_seq_length() == 9


def test_layers_that_come_out_alike_make_a_plain_model(tmp_path: Path) -> None:
    for keep in ([Keep([1], range(40))] * 3, KEEPS["a layer gone"]):
        small = shrink(model(), keep)
        assert type(small) is LlamaForCausalLM and not uneven.is_uneven(small)
        small.save_pretrained(tmp_path)
        assert "shoestring" not in (tmp_path / "config.json").read_text()
    assert torch.equal(tiny.logits(shrink(model(), [Keep(GROUPS, ALL)] * 3)), tiny.logits(model()))


def test_heads_that_do_not_divide_the_width_are_uneven_for_a_family_that_forbids_them() -> None:
    whole = model(num_attention_heads=16, num_key_value_heads=8, head_dim=4)
    small = shrink(whole, [Keep(range(5), ALL)] * 3)  # 10 heads, a width of 64
    assert uneven.is_uneven(small) and torch.isfinite(tiny.logits(small)).all()


def test_a_narrower_stream_has_the_norms_of_the_full_one() -> None:
    whole = model(rms_norm_eps=1e-2)
    stays = list(range(0, 64, 3))
    made, gone = copy.deepcopy(whole), [i for i in range(64) if i % 3]
    with torch.no_grad():
        made.get_input_embeddings().weight[:, gone] = 0
        for block in inspect(made).blocks:
            for role in ("o", "down"):
                made.get_submodule(block.projections[role]).weight[gone] = 0
    small = shrink(whole, [Keep(GROUPS, ALL)] * 3, hidden=stays)
    assert uneven.is_uneven(small), "22 dimensions for 4 heads are more than a plain Llama can say"
    assert torch.allclose(tiny.logits(small), tiny.logits(made), atol=1e-5)
    assert small.config.hidden_size == 22 and small.config.rms_norm_eps == pytest.approx(1e-2 * 64 / 22)


def test_constants_stand_in_for_what_is_gone(tmp_path: Path) -> None:
    a, b = torch.randn(64), torch.randn(64)
    whole = model()
    keep = [Keep([1], ALL, attention_bias=a), Keep(GROUPS, [], mlp_bias=b), Keep(GROUPS, ALL)]
    small = shrink(whole, keep)
    parts = inspect(whole).blocks
    hooks = [
        whole.get_submodule(parts[0].projections["o"]).register_forward_hook(lambda m, given, out: out + a),
        whole.get_submodule(parts[1].projections["down"]).register_forward_hook(lambda m, given, out: out + b),
    ]
    with torch.no_grad():
        whole.get_submodule(parts[0].projections["o"]).weight[:, :32] = 0
        whole.get_submodule(parts[1].projections["down"]).weight.zero_()
    assert torch.allclose(tiny.logits(small), tiny.logits(whole), atol=1e-5)
    for hook in hooks:
        hook.remove()
    small.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(models.load(tmp_path).model), tiny.logits(small))
    # And once more: a constant of a part that goes for good goes with it, others stay.
    twice = shrink(small, [Keep([0], ALL), Keep(GROUPS, []), Keep([0], ALL)])
    assert torch.isfinite(tiny.logits(twice)).all() and uneven.is_uneven(twice)


def test_an_uneven_model_can_be_cut_and_shortened_again() -> None:
    once = shrink(model(), KEEPS["first without attention"])
    twice = shrink(once, [Keep([], range(4)), Keep([0], range(50)), Keep([1], range(3))])
    assert uneven.sizes(twice).blocks == (uneven.Size(0, 4), uneven.Size(1, 50), uneven.Size(1, 3))
    surgery.drop_blocks(twice, [0])
    assert twice.config.layer_key_value_heads == [1, 1] and twice.config.layer_intermediate_sizes == [50, 3]
    assert torch.isfinite(tiny.logits(twice)).all()


def test_strangers_stop_with_the_remedy_in_the_message(tmp_path: Path) -> None:
    small = shrink(model(), KEEPS["first without attention"])
    small.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"import-shoestring\.models\.uneven"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "shoestring_uneven_llama"


def test_the_shape_counts_what_is_there(tmp_path: Path) -> None:
    small = shrink(model(), KEEPS["first without attention"])
    small.save_pretrained(tmp_path)
    counted = sum(p.numel() for p in small.parameters())
    assert models.shape_of(tmp_path).parameters == models.shape_of(small).parameters == counted
    assert models.shape_of(small).kv_heads == 2
    sizes = uneven.sizes(small)
    assert sizes.weights == sum(module.weight.numel() for _, module, _ in inspect(small).linears())  # type: ignore[operator, misc]


@pytest.mark.parametrize(
    ("keep", "hidden", "word"),
    [
        ([Keep(GROUPS, ALL)] * 2, None, "2 blocks"),
        ([Keep([0, 2], ALL)] * 3, None, "groups"),
        ([Keep([0, 0], ALL)] * 3, None, "groups"),
        ([Keep(GROUPS, [96])] * 3, None, "neurons"),
        ([Keep([], ALL)] * 3, None, "attention"),
        ([Keep(GROUPS, ALL)] * 3, [64], "dimensions"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep: list[Keep], hidden: list[int] | None, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        shrink(model(), keep, hidden=hidden)


def test_models_that_cannot_be_cut_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="GPT2LMHeadModel"):
        uneven.sizes(tiny.model("gpt2"))
    with pytest.raises(UsageError, match="Qwen3ForCausalLM.*narrower"):
        shrink(model("qwen3"), [Keep(GROUPS, ALL)] * 3, hidden=range(32))
    types = ["full_attention", "sliding_attention", "full_attention"]
    windows = model("qwen2", layer_types=types, use_sliding_window=True, sliding_window=4)
    with pytest.raises(UsageError, match="Qwen2ForCausalLM.*attention of single layers"):
        shrink(windows, KEEPS["first without attention"])
    kept = shrink(windows, [Keep([], []), Keep([1], ALL), Keep(GROUPS, range(4))])
    assert kept.config.layer_types == types[1:]


def test_a_configuration_that_lies_is_refused() -> None:
    made: Any = type(shrink(model(), KEEPS["unequal"]).config)
    for bad in ({"layer_key_value_heads": [1]}, {"layer_intermediate_sizes": [9] * 3, "intermediate_size": 8}):
        with pytest.raises(Exception, match="layer"):
            made(**{**SIZES, **bad})

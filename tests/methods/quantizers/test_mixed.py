"""Formats by layer: the limit holds, bytes go where they help most, and rounding makes up for its errors."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.kernels import formats
from shoestring.lab import tiny, tiny_mixture
from shoestring.methods.quantizers import mixed
from shoestring.methods.quantizers.mixed import Choice, MixedConfig
from shoestring.models import shape_of


def rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny.batch(count, 24).tolist()]


def compressed(tmp_path: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return mixed.compress(tiny.model(), MixedConfig(**options), rows(), Work(Ledger(), tmp_path)).eval()


def size(model: Any) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}.values())


@pytest.mark.parametrize("bits", [4.5, 5.5, 7.0])
def test_the_limit_holds_and_is_used(tmp_path: Path, bits: float) -> None:
    limit = bits * sum(p.numel() for p in tiny.model().parameters()) / 8
    assert 0.93 * limit < size(compressed(tmp_path, bits=bits)) <= limit


def test_more_bytes_are_less_harm(tmp_path: Path) -> None:
    reference = tiny.logits(tiny.model())
    off = [(tiny.logits(compressed(tmp_path, bits=b)) - reference).norm().item() for b in (4.0, 5.0, 8.0)]
    assert off[0] > off[1] > off[2]


def test_a_mixture_is_refused_for_its_experts_and_not_for_the_limit() -> None:
    with pytest.raises(UsageError, match="experts.gate_up_proj"):
        mixed.price(shape_of(tiny_mixture.model()), {"bits": 4.5})


def test_what_is_too_small_says_how_small_it_can_be(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="the smallest on offer take"):
        compressed(tmp_path, bits=1.0)
    with pytest.raises(DoesNotFit, match="no choice of formats"):
        from shoestring.models import shape_of

        mixed.price(shape_of(tiny.model()), {"bits": 1.0})


def test_allocation_is_the_best_one_of_all() -> None:
    """Held against all plans, on choices of which more bytes are not always better."""
    from itertools import product

    generator = torch.Generator().manual_seed(0)
    choices = {}
    for name in "abcd":
        sizes = torch.randint(1, 40, (4,), generator=generator).tolist()
        found = torch.rand(4, generator=generator).tolist()
        choices[name] = [Choice(f"{name}{i}", size, harm) for i, (size, harm) in enumerate(zip(sizes, found))]
    by_spec = {c.spec: c for some in choices.values() for c in some}
    for limit in range(sum(min(c.bytes for c in some) for some in choices.values()), 160, 3):
        plan = mixed.allocate(choices, limit)
        assert list(plan) == list(choices)
        taken = [by_spec[spec] for spec in plan.values()]
        least = min(sum(c.harm for c in p) for p in product(*choices.values()) if sum(c.bytes for c in p) <= limit)
        assert sum(c.bytes for c in taken) <= limit
        assert sum(c.harm for c in taken) == pytest.approx(least)


def test_allocation_of_sizes_that_share_no_unit_stays_within_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    choices = {}
    for name in range(40):
        sizes = sorted(torch.randint(10**6, 10**8, (5,), generator=generator).tolist())
        choices[str(name)] = [Choice(str(i), size, 1 / size) for i, size in enumerate(sizes)]
    limit = 15 * 10**8
    plan = mixed.allocate(choices, limit)
    spent = sum(choices[name][int(spec)].bytes for name, spec in plan.items())
    assert 0.995 * limit < spent <= limit


@pytest.mark.parametrize("rounding", mixed.ROUNDING)
@pytest.mark.parametrize("place", ["down_proj", "v_proj", "embed_tokens"])
def test_harm_predicts_the_divergence_of_one_layer(rounding: str, place: str) -> None:
    """To second order: the divergence that packing one layer alone causes, on the same tokens."""
    model = tiny.model().eval()
    ids = tiny.batch(64, 24)
    config = MixedConfig(bits=4.0, offered=["uniform4/32"], rounding=rounding)
    modules = {n: m for n, m in mixed.places(model, config) if n.endswith(place)}
    torch.manual_seed(0)
    seen = mixed.look(model, modules, ids)
    found = mixed.harms(model, modules, config, ids, seen)
    name = next(iter(modules))
    before = model(ids).logits.log_softmax(-1)
    mixed._pack(model, {name: "uniform4/32"}, config, ids, seen)
    made: Any = model.get_submodule(name)
    plain = tiny.model().eval()
    weight: Any = plain.get_submodule(name).weight
    weight.data = made.unpacked()
    after = plain(ids).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    assert 0.5 < found[name][0].harm / divergence < 2, (found[name][0].harm, divergence)


def test_compensation_is_foreseen() -> None:
    """What a layer's harm is expected to be falls when its rounding is compensated, where inputs hang together."""
    model = tiny.model().eval()
    ids = tiny.batch(64, 24)
    modules = {n: m for n, m in mixed.places(model, mixed.example()) if n.endswith("o_proj")}
    seen = mixed.look(model, modules, ids)
    one, other = (
        mixed.harms(model, modules, MixedConfig(bits=4.0, offered=["uniform3/32"], rounding=rounding), ids, seen)
        for rounding in mixed.ROUNDING
    )
    assert all(one[name][0].harm < 0.9 * other[name][0].harm for name in modules)


def test_tokens_that_do_not_matter_do_not_count() -> None:
    """Of two kinds of inputs only one has gradients: errors go where the other lies."""
    torch.manual_seed(0)
    format = formats.parse("uniform2/32")
    weight = torch.randn(40, 64)
    x = torch.randn(256, 64)
    weights = (torch.arange(256) < 128).float()
    plain, weighted = (mixed.rounded(weight, (x * w[:, None]).T @ x, format) for w in (torch.ones(256), weights))
    errors = [(x[:128] @ (format.unpack(made, 64) - weight).T).norm() for made in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]


def test_compensation_lowers_the_error_at_the_output() -> None:
    torch.manual_seed(0)
    mix = torch.randn(64, 64) / 8
    x = torch.randn(512, 64) @ mix  # inputs that depend on each other are what it lives on
    weight, format = torch.randn(40, 64) / 8, formats.parse("uniform3/32")
    plain = format.unpack(format.pack(weight), 64)
    made = format.unpack(mixed.rounded(weight, x.T @ x, format), 64)
    held_out = torch.randn(512, 64) @ mix
    error, before = ((held_out @ (w - weight).T).norm() for w in (made, plain))
    assert error < 0.8 * before


def test_inputs_that_never_come_leave_rounding_finite() -> None:
    format = formats.parse("uniform2/32")
    made = mixed.rounded(torch.randn(8, 40), torch.zeros(40, 40), format)
    assert torch.isfinite(format.unpack(made, 40)).all()


@pytest.mark.parametrize("number", [torch.nan, 2.0])
def test_forms_without_an_inverse_leave_rounding_finite(number: float) -> None:
    """Gradients that overflow, and what float32 makes of inputs that are all but the same."""
    torch.manual_seed(0)
    form = torch.eye(64)
    form[0, 1] = form[1, 0] = number
    format = formats.parse("uniform4/32")
    weight = torch.randn(8, 64)
    back = format.unpack(mixed.rounded(weight, form, format), 64)
    assert torch.isfinite(back).all() and (back - weight).norm() < 0.2 * weight.norm()


def test_a_plan_of_ones_own(tmp_path: Path) -> None:
    places = [name for name, _ in mixed.places(tiny.model(), mixed.example())]
    plan = {name: "uniform4/32" for name in places if name.endswith("up_proj")}
    model = compressed(tmp_path, packing=plan)
    assert mixed.packed.packing_of(model) == plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "need a limit"),
        ({"bits": 4, "bytes": 9}, "need a limit"),
        ({"bits": -1}, "bits=-1 is no limit"),
        ({"bits": 4, "rounding": "up"}, "rounding='up'"),
        ({"bits": 4, "offered": []}, "no formats are offered"),
        ({"bits": 4, "offered": ["int5/64"]}, "int5/64"),
        ({"bits": 4, "offered": ["uniform7/64"]}, "uniform7/64"),
        ({"bits": 4, "offered": ["ternary/64"]}, "no plain rounding"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MixedConfig(**options)


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text to calibrate on"):
        mixed.compress(tiny.model(), MixedConfig(bits=5.0), [], Work(Ledger(), tmp_path))


def test_narrow_weights_are_computed_with_as_they_are_where_the_machine_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned from text is what float32 weights of the same values show; the weights stay narrow."""
    narrow, ids = tiny.model().bfloat16(), tiny.batch(4, 24)
    wide = copy.deepcopy(narrow).float()
    monkeypatch.setattr(mixed, "fast_bfloat16", lambda: False)
    monkeypatch.setattr(torch, "multinomial", lambda shares, count: shares.argmax(-1, keepdim=True))
    found, expected = (mixed.look(model, dict(mixed.places(model, mixed.example())), ids) for model in (narrow, wide))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for name, seen in expected.items():
        assert (found[name].columns - seen.columns).norm() < 0.01 * seen.columns.norm()
        assert (found[name].rows - seen.rows).norm() < 0.01 * seen.rows.norm()


def test_memory_is_that_of_the_model_and_one_block(tmp_path: Path) -> None:
    """The peak of a process of its own beyond the model: twice the logits of a window, their pieces, and free heap."""
    code = """
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from shoestring.core import probes
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.methods.quantizers import mixed

torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32768, hidden_size=256, intermediate_size=704, num_hidden_layers=12, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=256,
)
model = LlamaForCausalLM(config).bfloat16().eval()
rows = [{"input_ids": torch.randint(0, 32768, (256,)).tolist()} for _ in range(2)]
made = mixed.MixedConfig(bits=5.0, calibration=512, offered=["uniform4/64", "uniform5/64"])
mixed.give_back_holes()
assert probes.reset_high_water()
before = probes.resident()
mixed.compress(model, made, rows, Work(Ledger(), Path()))
print(probes.high_water() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 190e6  # 34 MB of model, as much of logits

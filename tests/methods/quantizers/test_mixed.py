"""Formats by layer: the limit holds, bytes go where they help most, and rounding makes up for its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.kernels import formats
from shoestring.lab import tiny
from shoestring.methods.quantizers import mixed
from shoestring.methods.quantizers.mixed import Choice, MixedConfig


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


def test_what_is_too_small_says_how_small_it_can_be(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="the smallest on offer take"):
        compressed(tmp_path, bits=1.0)
    with pytest.raises(DoesNotFit, match="no choice of formats"):
        from shoestring.models import shape_of

        mixed.price(shape_of(tiny.model()), {"bits": 1.0})


def test_allocation_is_the_best_one_of_all(tmp_path: Path) -> None:
    """On convex choices the steepest steps first are optimal for the bytes that they take: held against all plans."""
    from itertools import product

    generator = torch.Generator().manual_seed(0)
    choices = {}
    for name in "abcd":
        sizes = sorted(torch.randint(1, 40, (4,), generator=generator).unique().tolist())
        harm, slope, made = 10.0, 1.0, []
        for place, bytes in enumerate(sizes):
            if place:
                harm -= slope * (bytes - sizes[place - 1])
                slope *= float(torch.rand(1, generator=generator))
            made.append(Choice(f"{name}{place}", bytes, harm))
        choices[name] = made
    by_spec = {c.spec: c for some in choices.values() for c in some}
    for limit in range(sum(some[0].bytes for some in choices.values()), 160, 7):
        plan = mixed.allocate(choices, limit)
        taken = [by_spec[spec] for spec in plan.values()]
        spent, harm = sum(c.bytes for c in taken), sum(c.harm for c in taken)
        assert spent <= limit
        least = min(sum(c.harm for c in p) for p in product(*choices.values()) if sum(c.bytes for c in p) <= spent)
        worst_step = max(abs(a.harm - b.harm) for some in choices.values() for a, b in zip(some, some[1:]))
        assert harm <= least + worst_step, "off by no more than one step that did not fit"


def test_harm_predicts_the_divergence_of_one_layer(tmp_path: Path) -> None:
    """To second order: the divergence that packing one layer alone causes, on the same tokens."""
    model = tiny.model().eval()
    ids = tiny.batch(64, 24)
    config = MixedConfig(bits=4.0, offered=["uniform4/32"])
    name, module = next((n, m) for n, m in mixed.places(model, config) if n.endswith("down_proj"))
    torch.manual_seed(0)
    expected = mixed.harms(model, {name: module}, config, ids)[name][0].harm
    before = model(ids).logits.log_softmax(-1)
    format = formats.parse("uniform4/32")
    weight: Any = module.weight
    weight.data = format.unpack(format.pack(weight.data), weight.shape[1])
    after = model(ids).logits.log_softmax(-1)
    found = (before.exp() * (before - after)).sum(-1).mean().item()
    assert 0.3 < expected / found < 3, (expected, found)


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
        ({"bits": 4, "offered": ["ternary/64"]}, "no plain rounding"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MixedConfig(**options)


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text to calibrate on"):
        mixed.compress(tiny.model(), MixedConfig(bits=5.0), [], Work(Ledger(), tmp_path))

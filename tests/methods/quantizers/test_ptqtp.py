from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.kernels import formats
from shoestring.lab import tiny
from shoestring.methods.quantizers import ptqtp
from shoestring.models.packed import packed_modules


def back(found: ptqtp.Fit, cols: int, group: int) -> Tensor:
    format = formats.parse(f"tritplanes/{group}")
    return format.unpack(format.encode(found.first, found.second, found.scales), cols)  # type: ignore[attr-defined]


def relative(found: ptqtp.Fit, weight: Tensor, group: int) -> float:
    return float((back(found, weight.shape[1], group) - weight).norm() / weight.norm())


def heavy_tailed(rows: int, cols: int) -> Tensor:
    made = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    return 0.05 * made * (1 + made.abs() ** 2)


def gaussian(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weight", [gaussian(32, 256), heavy_tailed(32, 256)], ids=["gaussian", "heavy"])
def test_the_error_never_rises_from_one_iteration_to_the_next(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = weight.view(-1, 64)
    before = torch.full((len(cut),), torch.inf, dtype=torch.float64)
    for most in range(1, 20):
        monkeypatch.setattr(ptqtp, "MOST_ITERATIONS", most)
        scales, iterations = ptqtp._fit_scales(cut.abs(), torch.full((len(cut),), 64), 0.0)
        assert int(iterations.max()) <= most
        first, second = ptqtp.nearest(cut.double(), scales)
        error = ((first * scales[:, :1] + second * scales[:, 1:] - cut) ** 2).sum(1)
        assert (error <= before * (1 + 1e-9)).all(), most
        before = error
    assert torch.isfinite(before).all()


def test_gaussian_rows_come_to_the_error_they_should() -> None:
    weight = gaussian(128, 512)
    found = ptqtp.fit(weight, 64)
    assert relative(found, weight, 64) == pytest.approx(0.163, abs=0.004)
    assert 9 < float(found.iterations.float().mean()) < 15 and 20 <= int(found.iterations.max()) <= 40
    assert found.zeros == (pytest.approx(0.38, abs=0.02), pytest.approx(0.35, abs=0.02))


def test_planes_that_are_the_same_at_first_are_solved_all_the_same() -> None:
    """S'S is singular there; the ridge grows for the groups that need it and for no others."""
    n, off, p = (torch.tensor(v, dtype=torch.float64) for v in ([64.0, 64.0], [64.0, 3.0], [32.0, 20.0]))
    scales, ridge = ptqtp._solve(n, off, n, p, p, torch.full((2,), ptqtp.RIDGE, dtype=torch.float64))
    assert torch.allclose(scales[0], torch.tensor([0.25, 0.25], dtype=torch.float64), atol=1e-6)
    condition = (128 + 1e-8) / 1e-8
    assert ridge[0] == pytest.approx(1e-8 * (condition / 1e6) ** 0.5, rel=1e-6) and ridge[1] == ptqtp.RIDGE
    exact = torch.linalg.solve(torch.tensor([[64.0, 3], [3, 64]]), torch.tensor([20.0, 20]))
    assert torch.allclose(scales[1].float(), exact, atol=1e-6)
    # In float32 the same system is no system.
    a = torch.tensor([[64.0, 64], [64, 64]]) + 1e-8 * torch.eye(2)
    assert a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0] == 0


def test_the_ridge_has_a_limit() -> None:
    nothing = torch.zeros(1, dtype=torch.float64)
    one = nothing + 1
    _, ridge = ptqtp._solve(nothing + 1e30, nothing + 1e30, nothing + 1e30, one, one, nothing + 0.5)
    assert ridge == ptqtp.LARGEST_RIDGE


@pytest.mark.parametrize("ratio", [1.0, 1.3, 1.9, 2.0, 2.1, 3.0, 50.0])
def test_every_number_takes_the_nearest_of_nine_levels(ratio: float) -> None:
    pairs = torch.tensor(list(itertools.product((-1, 0, 1), repeat=2)), dtype=torch.float32)
    x = gaussian(40, 64) * 2
    x[0] = 0
    scales = torch.tensor([[ratio, 1.0]]).repeat(40, 1) * torch.rand(40, 1, generator=torch.Generator().manual_seed(2))
    first, second = ptqtp.nearest(x, scales)
    made = first * scales[:, :1] + second * scales[:, 1:]
    levels = scales @ pairs.t()
    best = (x.unsqueeze(2) - levels.unsqueeze(1)).abs().min(2).values
    assert torch.allclose((x - made).abs(), best, atol=1e-6)
    assert {*first.unique().tolist(), *second.unique().tolist()} <= {-1, 0, 1}


def test_groups_are_solved_alone_bit_for_bit() -> None:
    weight = heavy_tailed(300, 192)  # more than are fitted together
    found = ptqtp.fit(weight, 64)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    again = ptqtp.fit(weight[order], 64)
    alone = ptqtp.fit(weight[17:18, 64:128], 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    many = ptqtp.fit(weight, 64)
    torch.set_num_threads(threads)
    for name in ("first", "second", "scales", "iterations"):
        one = getattr(found, name)
        assert torch.equal(getattr(again, name), one[order]), name
        assert torch.equal(getattr(many, name), one), name
        part = one[17:18, 64:128] if name in ("first", "second") else one[17:18, 1:2]
        assert torch.equal(getattr(alone, name), part), name


def test_a_sum_of_two_planes_is_found_again() -> None:
    draw = torch.Generator().manual_seed(4)
    first, second = (torch.randint(-1, 2, (200, 64), generator=draw) for _ in range(2))
    scales = 0.5 + torch.rand(200, 1, 2, generator=draw)
    weight = first * scales[..., 0] + second * scales[..., 1]
    error = (back(ptqtp.fit(weight, 64), 64, 64) - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(error.median()) < 1e-3


@pytest.mark.parametrize("cols,group", [(64, 64), (100, 64), (1, 64), (200, 128), (33, 32)])
def test_filled_up_columns_do_not_count(cols: int, group: int) -> None:
    weight = gaussian(20, cols)
    found = ptqtp.fit(weight, group)
    last = weight[:, cols - (cols % group or group) :]
    size, real = last.abs(), torch.full((20,), last.shape[1])
    scales, iterations = ptqtp._fit_scales(size, real, 0.0)
    assert torch.equal(found.scales[:, -1], scales.half()) and torch.equal(found.iterations[:, -1], iterations)
    assert found.first.shape == weight.shape


def test_groups_that_are_constant_or_zero() -> None:
    weight = torch.zeros(4, 128)
    weight[1], weight[2, :64], weight[3, 5] = 0.25, -3.0, 7.0
    found = ptqtp.fit(weight, 64)
    assert (found.scales[0] == 0).all() and (found.first[0] == 0).all() and (found.second[0] == 0).all()
    assert (back(found, 128, 64) - weight).abs().max() < 2e-3
    assert (found.scales >= 0).all() and (found.scales[..., 0] >= found.scales[..., 1]).all()


def test_trits_are_chosen_against_the_scales_as_stored() -> None:
    weight = heavy_tailed(16, 128)
    found = ptqtp.fit(weight, 64)
    first, second = ptqtp.nearest(weight.view(-1, 64), found.scales.float().view(-1, 2))
    assert torch.equal(found.first, first.view(16, 128)) and torch.equal(found.second, second.view(16, 128))


def test_weighted_outliers_keep_their_size_and_the_plain_fit_cuts_them() -> None:
    weight = heavy_tailed(64, 512)
    rms = weight.view(-1, 64).pow(2).mean(1).sqrt().repeat_interleave(64).view_as(weight)
    large = weight.abs() > 3.5 * rms
    assert int(large.sum()) > 100
    kept = {}
    for w in (0.0, 5.0):
        made = back(ptqtp.fit(weight, 64, w), 512, 64)
        kept[w] = float((made[large].abs() / weight[large].abs()).mean())
    assert kept[0.0] < 0.9 and kept[5.0] > 0.97


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    weight = gaussian(4, 64)
    weight[2, 3] = bad
    with pytest.raises(UsageError, match="1 (NaN|infinite)"):
        ptqtp.fit(weight, 64)
    with pytest.raises(UsageError, match="beyond float16"):
        ptqtp.fit(torch.full((2, 64), 1e6), 64)


@pytest.mark.parametrize("options", [{"outlier_weight": -1.0}, {"outlier_weight": "5"}, {"group_size": 16}])
def test_values_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is not possible"):
        ptqtp.PtqtpConfig(**options)


def test_the_largest_group_that_divides_a_width_is_recorded_for_each_layer(tmp_path: Path) -> None:
    """Saved, read again, and as large as the formula says to the byte."""
    config = ptqtp.PtqtpConfig()
    assert [config.spec_of("x", 8, cols, False) for cols in (1536, 576, 96, 100)] == [
        "tritplanes/128", "tritplanes/64", "tritplanes/32", "tritplanes/32"
    ]  # fmt: skip
    assert config.spec_of("x", 8, 576, True) == "int8/64"
    tiny.model(intermediate_size=128).save_pretrained(tmp_path / "float")
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=catalog.load("ptqtp")(outlier_weight=5.0), dtype=torch.float32
    ).eval()
    config = model.hf_quantizer.quantization_config
    facts = config.facts()["layers"]
    assert len(facts) == 14 and "layers" not in model.config.to_dict()["quantization_config"]
    assert {layer["bits_per_weight"] for layer in facts.values()} == {4.25, 4.5}
    assert all(0.1 < layer["relative_error"] < 0.2 and layer["iterations"] > 2 for layer in facts.values())
    groups = {str(module.format) for _, module in packed_modules(model)}
    assert groups == {"tritplanes/128", "tritplanes/64", "int8/64"}
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        down = "model.layers.0.mlp.down_proj"
        sizes = [file.get_tensor(f"{down}.{name}").nbytes for name in ("weight", "scales")]
    assert sizes == [64 * 128 // 2, 64 * 1 * 2 * 2]
    assert sum(sizes) * 8 / (64 * 128) == 4 + 32 / 128


def test_compressing_says_how_well_each_layer_was_met(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "float")
    step = Step("compress", "ptqtp", {"group_size": 64})
    contract = catalog.contract("quantizers")
    facts = contract.apply(
        catalog.module("ptqtp"), step, tmp_path / "float", tmp_path / "packed", Work(Ledger(), tmp_path)
    )
    assert len(facts["layers"]) == 14


@pytest.mark.real
def test_the_default_model_loses_less_where_outliers_count() -> None:
    from shoestring import models

    original = models.load("smollm2").model
    weight: Any = original.get_submodule("model.layers.3.mlp.down_proj").weight.detach().float()
    plain, weighted = (relative(ptqtp.fit(weight, 64, w), weight, 64) for w in (0.0, 5.0))
    assert 0.14 < plain < 0.20 and weighted < plain
    three = formats.parse("uniform3/64")
    rounded = float((three.unpack(three.pack(weight), weight.shape[1]) - weight).norm() / weight.norm())
    assert plain < rounded

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shoestring.core.errors import UsageError
from shoestring.kernels import formats
from shoestring.lab import tiny
from shoestring.methods.quantizers import lut_gemm
from shoestring.methods.quantizers._shared import packed_modules

WEIGHTS = torch.randn(64, 192, generator=torch.Generator().manual_seed(0)) * 0.05


def sums(signs: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (signs * scales.unsqueeze(2)).sum(1)


def error(weight: torch.Tensor, spec: str, rounds: int, start: str = "greedy") -> float:
    format = formats.parse(spec)
    values = format.unpack(lut_gemm.fit(weight, format, rounds, start), weight.shape[1])  # type: ignore[arg-type]
    return float((values - weight).square().sum())


def packed(folder: Path, model: Any = None, **options: Any) -> Any:
    (model or tiny.model()).save_pretrained(folder)
    config = lut_gemm.LutGemmConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def test_greedy_takes_signs_and_mean_magnitudes_of_what_is_left() -> None:
    x = torch.tensor([[3.0, -1.0, 0.0, -2.0]])
    signs, scales = lut_gemm.greedy(x, 2)
    assert scales[0, 0] == 1.5 and torch.equal(signs[0, 0], torch.tensor([1.0, -1.0, 1.0, -1.0])), "zero counts as +"
    left = x - 1.5 * signs[:, 0]
    assert scales[0, 1] == left.abs().mean() and torch.equal(signs[0, 1], torch.where(left[0] < 0, -1.0, 1.0))


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_each_weight_gets_the_nearest_of_all_sums(planes: int) -> None:
    torch.manual_seed(planes)
    x, scales = torch.randn(20, 40), torch.rand(20, planes)
    scales[0] = 0.3  # planes coincide, and so do many sums
    signs = lut_gemm.nearest_signs(x, scales)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * planes)
    best = (x.unsqueeze(2) - (scales @ patterns.T).unsqueeze(1)).abs().amin(2)
    assert torch.allclose((x - sums(signs, scales)).abs(), best, atol=1e-6)


def test_conjugate_gradients_reach_least_squares() -> None:
    torch.manual_seed(1)
    x = torch.randn(50, 64)
    signs, scales = lut_gemm.greedy(x, 3)
    # Signs that are far from each other, so that the equations are well determined.
    signs = torch.where(torch.rand_like(signs) < 0.5, 1.0, -1.0)
    found = lut_gemm.least_squares(signs, x, scales)
    exact = torch.linalg.lstsq(signs.transpose(1, 2), x.unsqueeze(2)).solution.squeeze(2)
    assert torch.allclose(found, exact, atol=1e-4)


@pytest.mark.parametrize("start", lut_gemm.STARTS)
@pytest.mark.parametrize("planes", [2, 3, 4])
def test_no_round_raises_the_error(planes: int, start: str) -> None:
    """Neither half of a round, group by group, before scales are rounded for storage."""
    x = WEIGHTS.reshape(-1, 64)
    signs, scales = lut_gemm.greedy(x, planes)
    if start == "range":
        scales = x.abs().amax(1, keepdim=True) * 2.0 ** torch.arange(planes - 1, -1, -1) / (2**planes - 1)
        signs = lut_gemm.nearest_signs(x, scales)
    last = (x - sums(signs, scales)).square().sum(1)
    for _ in range(15):
        found = lut_gemm.least_squares(signs, x, scales)
        between = (x - sums(signs, found)).square().sum(1)
        assert (between <= last * (1 + 1e-5)).all()
        scales = found.abs().sort(1, descending=True).values
        signs = lut_gemm.nearest_signs(x, scales)
        last = (x - sums(signs, scales)).square().sum(1)
        assert (last <= between * (1 + 1e-5)).all()


def test_the_fit_beats_its_start_and_rounding_without_offset() -> None:
    for planes in (2, 3, 4):
        spec = f"binary{planes}/64"
        assert error(WEIGHTS, spec, 15) < error(WEIGHTS, spec, 1) < error(WEIGHTS, spec, 0)
        assert error(WEIGHTS, spec, 15, "range") < error(WEIGHTS, spec, 0, "range")
        plain = formats.parse(spec)
        rounded = (plain.unpack(plain.pack(WEIGHTS), 192) - WEIGHTS).square().sum()
        assert min(error(WEIGHTS, spec, 15, start) for start in lut_gemm.STARTS) < rounded
    assert error(WEIGHTS, "binary4/64", 15, "range") < error(WEIGHTS, "binary4/64", 15, "greedy")


@pytest.mark.parametrize("values", [(0.0,), (0.3,), (-0.2, 0.2), (0.0, 0.0, 0.5)])
@pytest.mark.parametrize("start", lut_gemm.STARTS)
def test_groups_in_which_planes_coincide(values: tuple[float, ...], start: str) -> None:
    """Constant and two-valued groups make the normal equations singular."""
    weight = torch.tensor(values).repeat(96 // len(values)).repeat(4, 1)
    format: Any = formats.parse("binary3/32")
    found = format.unpack(lut_gemm.fit(weight, format, 15, start), 96)
    assert torch.isfinite(found).all()
    assert (found - weight).norm() <= 1e-2 * weight.norm() + 1e-6


def test_a_short_last_group_is_fitted_by_itself() -> None:
    format: Any = formats.parse("binary2/64")
    tail = format.unpack(lut_gemm.fit(WEIGHTS[:, :70], format, 5), 70)[:, 64:]
    signs, scales = lut_gemm.fit_groups(WEIGHTS[:, 64:70], 2, 5)
    assert torch.allclose(tail, sums(signs, scales), atol=1e-6)


def test_the_default_gives_the_numbers_of_rounding_to_nearest(tmp_path: Path) -> None:
    """With an integer zero point: every number a whole multiple of its group's step, and zeros kept."""
    original = tiny.model()
    weight = original.model.layers[0].mlp.up_proj.weight
    weight.data[:, ::5] = 0
    model = packed(tmp_path, original, bits=3, group_size=32)
    layer = model.model.layers[0].mlp.up_proj
    values, numbers = layer.unpacked(), layer.scales.float()
    assert (values[:, ::5] == 0).all()
    step = (2 * numbers[..., 0]).repeat_interleave(32, 1)[:, : values.shape[1]]
    assert torch.equal(values / step, (values / step).round())
    assert ((values - weight.detach()).abs() <= 1.01 * step).all()


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128)])
@pytest.mark.parametrize("coding", lut_gemm.CODINGS)
def test_bytes_are_those_of_the_formula(bits: int, group: int, coding: str, tmp_path: Path) -> None:
    """Planes of signs, 16 bits of scale for each plane and group, 16 more for an offset."""
    model = packed(tmp_path, bits=bits, group_size=group, coding=coding, rounds=1)
    for name, layer in packed_modules(model):
        if isinstance(layer, nn.Embedding) or "lm_head" in name:
            continue
        groups = -(-layer.in_features // group)
        numbers = bits + (coding == "uniform")
        stored = sum(t.numel() * t.element_size() for t in layer.tensors().values())
        assert stored == layer.out_features * groups * (bits * group // 8 + 2 * numbers), name


@pytest.mark.parametrize("coding", lut_gemm.CODINGS)
def test_saved_and_read_again(coding: str, tmp_path: Path) -> None:
    model = packed(tmp_path / "float", bits=3, coding=coding, rounds=2, start="range")
    model.save_pretrained(tmp_path / "packed")
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (written["bits"], written["coding"], written["rounds"], written["start"]) == (3, coding, 2, "range")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_the_alternating_fit_packs_what_it_fitted(tmp_path: Path) -> None:
    original = tiny.model()
    model = packed(tmp_path, original, bits=4, coding="alternating", rounds=3)
    layer = model.model.layers[1].mlp.down_proj
    weight = original.model.layers[1].mlp.down_proj.weight.detach()
    tensors = lut_gemm.fit(weight, layer.format, 3)
    assert torch.equal(layer.unpacked(), layer.format.unpack(tensors, weight.shape[1]))
    assert "o/" not in str(layer.format)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits 5 is not possible. Use 2, 3 or 4"),
        ({"bits": True}, "bits True"),
        ({"coding": "uniformly"}, "uniform"),
        ({"start": "zero"}, "start 'zero'"),
        ({"rounds": -1}, "rounds -1"),
        ({"rounds": 1.5}, "rounds 1.5"),
        ({"group_size": 48}, "group_size 48"),
        ({"planes": 2}, "no option planes"),
    ],
)
def test_values_that_are_not_possible(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        lut_gemm.LutGemmConfig(**options)


@pytest.mark.parametrize("start", lut_gemm.STARTS)
def test_what_cannot_be_fitted_is_refused(start: str) -> None:
    format: Any = formats.parse("binary2/32")
    with pytest.raises(UsageError, match="NaN"):
        lut_gemm.fit(torch.full((2, 32), torch.nan), format, 1, start)
    with pytest.raises(UsageError, match="beyond float16"):
        lut_gemm.fit(torch.full((2, 32), 3e5), format, 1, start)


@pytest.mark.real
def test_a_matrix_of_the_default_model() -> None:
    """Groups of weights that were 4-bit once: planes coincide there, and the fit must not mind."""
    from shoestring import models

    weight: Any = models.load("smollm2").model.get_submodule("model.layers.3.mlp.down_proj").weight.detach().float()
    size = float(weight.square().sum())
    fitted, start = (error(weight, "binary3/64", rounds) / size for rounds in (15, 0))
    assert 0.17**2 < fitted < 0.21**2 and fitted < 0.85**2 * start
    format = formats.parse("binary4o/64")
    rounded = float((format.unpack(format.pack(weight), weight.shape[1]) - weight).square().sum())
    assert rounded < 0.11**2 * size

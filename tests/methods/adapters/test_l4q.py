from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import shoestring.methods.quantizers
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.jobs.merge import merge
from shoestring.kernels import formats
from shoestring.lab import tiny
from shoestring.methods.adapters import l4q
from shoestring.methods.adapters._rounded import RoundedProduct
from shoestring.methods.adapters.l4q import L4qConfig, L4qRule
from shoestring.models import packed
from shoestring.models.merging import plain_products
from shoestring.training import TrainOptions, train

assert shoestring.methods.quantizers  # makes packed folders readable


def wrapped(base: Any = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"bits": 3, "group_size": 32, "r": 4, "target_modules": "all-linear"} | options
    return get_peft_model(base or tiny.model(), L4qConfig(**settings, task_type="CAUSAL_LM")).eval()  # type: ignore[return-value]


def layers(model: nn.Module) -> dict[str, Any]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, l4q.L4qLinear)}


def fit(model: Any, steps: int = 4, rate: float = 1e-2) -> Any:
    model.train()
    optimizer = torch.optim.Adam(
        [{"params": [p for n, p in model.named_parameters() if p.requires_grad and ("_A" in n or "_B" in n)]},
         *model.base_model.parameter_groups(rate)], rate,
    )  # fmt: skip
    for _ in range(steps):
        optimizer.zero_grad()
        model(**tiny.inputs(model)).loss.backward()
        optimizer.step()
    return model.eval()


def parts(bits: int = 3, group: int = 8, rows: int = 6, columns: int = 16, r: int = 3) -> tuple[L4qRule, Any]:
    """A rule and (base, A, B, s, b) of which a third of the weights is clipped."""
    torch.manual_seed(4)
    rule = L4qRule(bits, group, 0.7)
    base, a, b = torch.randn(rows, columns), torch.randn(r, columns), torch.randn(rows, r)
    step, offset = rule.begin(base, "symmetric")
    scale, zero = rule.stored(step * 0.5), rule.stored(0.05 * torch.randn_like(offset))
    return rule, [base, a, b, scale, zero]


def by_autograd(rule: L4qRule, x: Any, base: Any, a: Any, b: Any, scale: Any, offset: Any) -> Any:
    """The product by torch's own autograd, the rounding counting as identity: the oracle."""
    weight = base + rule.scaling * (b @ a)
    cut = weight.unflatten(1, (-1, rule.group))
    level = ((cut - offset.unsqueeze(-1)) / scale.unsqueeze(-1)).clamp(rule.low, rule.high)
    code = level + (level.round() - level).detach()
    return F.linear(x, (code * scale.unsqueeze(-1) + offset.unsqueeze(-1)).flatten(1))


# ---------------------------------------------------------------- the closed forms


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_the_closed_forms(bits: int) -> None:
    rule, given = parts(bits)
    x, pull = torch.randn(5, 16), torch.randn(5, 6)
    ours, oracle = ([p.clone().requires_grad_() for p in (x, *given[1:])] for _ in range(2))
    y = RoundedProduct.apply(ours[0], None, rule, given[0], *ours[1:])
    z = by_autograd(rule, oracle[0], given[0], *oracle[1:])
    assert torch.equal(y, z)
    (y * pull).sum().backward()
    (z * pull).sum().backward()
    shrink = [1.0, 1.0, 1.0, 1 / math.sqrt(rule.group * rule.high), 1.0]
    for mine, other, factor in zip(ours, oracle, shrink):
        assert torch.allclose(mine.grad, factor * other.grad, atol=2e-5, rtol=1e-4)
    levels, _, _, _ = rule.rounded(slice(None), *given)
    outside = ~rule.inside(levels)
    assert 0.05 < outside.float().mean() < 0.95, "the case must have clipped weights and others"


def test_step_and_offset_by_finite_differences() -> None:
    """Where a weight is clipped the product is smooth in s and b, so that differences need no convention."""
    rule, (base, a, b, scale, offset) = parts()
    scale = torch.full_like(scale, 2.0**-6)  # every weight but tiny ones is clipped, and float16 steps are even
    base = base.sign() * (base.abs() + 1)
    x, pull = torch.randn(5, 16), torch.randn(5, 6)

    def loss(s: Any, o: Any) -> float:
        return float((RoundedProduct.apply(x, None, rule, base, 0 * a, b, s, o) * pull).sum())

    s, o = scale.clone().requires_grad_(), offset.clone().requires_grad_()
    (RoundedProduct.apply(x, None, rule, base, 0 * a, b, s, o) * pull).sum().backward()
    for place in ((0, 0), (3, 1), (5, 0)):
        for number, found, unit in ((scale, s.grad, 1 / math.sqrt(rule.group * rule.high)), (offset, o.grad, 1.0)):
            up, down = number.clone(), number.clone()
            up[place] += 2.0**-10
            down[place] -= 2.0**-10
            up, down = rule.stored(up), rule.stored(down)
            pair = [(up, offset), (down, offset)] if number is scale else [(scale, up), (scale, down)]
            difference = (loss(*pair[0]) - loss(*pair[1])) / float(up[place] - down[place])
            assert float(found[place]) == pytest.approx(unit * difference, rel=2e-2, abs=1e-2)


def test_clipped_weights_leave_the_adapter_alone() -> None:
    rule, (base, a, b, scale, offset) = parts()
    base[2] = 50.0 * base[2].sign()  # a row that is clipped as a whole
    a, b, scale, offset = (p.clone().requires_grad_() for p in (a, b, scale, offset))
    RoundedProduct.apply(torch.randn(5, 16), None, rule, base, a, b, scale, offset).square().sum().backward()
    assert torch.equal(b.grad[2], torch.zeros(3)) and (b.grad[[0, 1, 3, 4, 5]] != 0).any(1).all()
    assert (scale.grad[2] != 0).all() and (offset.grad[2] != 0).all()


@pytest.mark.parametrize("start", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_start_clips_nothing_and_can_be_stored(bits: int, start: str) -> None:
    torch.manual_seed(1)
    rule = L4qRule(bits, 16, 1.0)
    weight = torch.randn(40, 64) * torch.logspace(-3, 1, 40)[:, None] + 0.01
    weight[3, :16] = 0.0
    step, offset = rule.begin(weight, start)
    assert torch.equal(rule.stored(step), step) and torch.equal(rule.stored(offset), offset)
    cut = weight.unflatten(1, (-1, 16))
    levels = (cut - offset.unsqueeze(-1)) / step.unsqueeze(-1)
    assert rule.inside(levels).all()
    if start == "asymmetric":
        used = levels.amax(-1) - levels.amin(-1)
        assert (used[4:] > 0.98 * (rule.high - rule.low)).all(), "steps are not larger than they must be"
    if start == "symmetric":
        exact = torch.maximum(cut.amin(-1) / rule.low, cut.amax(-1) / rule.high)
        assert not offset.any() and torch.allclose(step[4:], exact[4:], rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_can_start_as_plain_rounding(bits: int) -> None:
    fmt = formats.parse(f"uniform{bits}/32")
    model, plain = wrapped(bits=bits, start="zero"), tiny.model()
    for name, layer in layers(model).items():
        weight = plain.get_submodule(name).weight.detach()
        rounded = layer.rules["default"].weight(torch.float32, *layer.parts("default"))
        assert torch.allclose(rounded, fmt.unpack(fmt.pack(weight), weight.shape[1]), atol=1e-6)


# ---------------------------------------------------------------- what merging ends in


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_merged_integers_are_the_weights_of_training(bits: int, group: int) -> None:
    base = tiny.model(intermediate_size=128)
    model = fit(wrapped(base, bits=bits, group_size=group))
    trained = {
        name: layer.rules["default"].weight(torch.float32, *layer.parts("default")).detach()
        for name, layer in layers(model).items()
    }
    out = tiny.logits(model)
    merged = model.merge_and_unload()
    found = dict(packed.packed_modules(merged))
    assert found.keys() == trained.keys() and len(found) == 14
    for name, weight in trained.items():
        assert torch.equal(found[name].unpacked(), weight), name
        assert len(weight.unflatten(1, (-1, group))[0, 0].unique()) <= 2**bits
    with plain_products(merged):
        assert torch.allclose(tiny.logits(merged), out, atol=1e-5)
    assert not any("l4q_" in name for name in merged.state_dict()), "nothing is left beside the integers"


def test_rounding_a_merged_lora_is_not_the_same() -> None:
    """The contrast: a LoRA beside a rounded base, merged and rounded again, has other weights than in training."""
    fmt = formats.parse("uniform3/32")
    base = tiny.model()
    linear: Any = base.model.layers[0].mlp.up_proj
    linear.weight.data = fmt.unpack(fmt.pack(linear.weight.data), 64)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj"]))
    lora: Any = model.base_model.model.model.layers[0].mlp.up_proj
    torch.manual_seed(2)
    lora.lora_B["default"].weight.data.normal_(std=0.05)
    trained = lora.get_base_layer().weight + lora.get_delta_weight("default")
    again = fmt.unpack(fmt.pack(trained.detach()), 64)
    assert (again - trained).abs().max() > 1e-3


def test_merging_in_place_is_exact_and_undone(tmp_path: Path) -> None:
    model = fit(wrapped())
    out = tiny.logits(model)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert torch.equal(tiny.logits(model), out), "the same weight in the same product"
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    model.merge_adapter()
    with plain_products(model.merge_and_unload()):
        pass


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_merged_folder_has_the_promised_bits(bits: int, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "base")
    model = fit(wrapped(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), bits=bits))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "out")
    assert result["formats"] == {f"uniform{bits}/32": 14} and result["difference"] < 1e-5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = dict(packed.packed_modules(again))
    for name, layer in layers(model).items():
        weight = layer.rules["default"].weight(torch.float32, *layer.parts("default"))
        assert torch.equal(found[name].unpacked(), weight)
        held = sum(t.numel() * t.element_size() for t in found[name].tensors().values())
        assert held * 8 == weight.numel() * (bits + 32 / 32)
    promised = l4q.price(shoestring.models.shape_of(tiny.model()), {"bits": bits})
    for weight in promised.shape.weights:
        if weight.name.removesuffix(".weight") in found:
            assert weight.stored * 8 == weight.count * (bits + 1)


def test_the_merged_model_can_be_tuned_further() -> None:
    merged = fit(wrapped()).merge_and_unload()
    torch.manual_seed(0)
    tuned = get_peft_model(merged, LoraConfig(r=4, target_modules="all-linear")).train()
    losses = []
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        loss = tuned(**tiny.inputs(tuned)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


# ---------------------------------------------------------------- memory


class Alive(TorchDispatchMode):
    """The most bytes of new tensors that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(a.untyped_storage()._cdata) for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage._cdata
                if place in known or place in self.seen or func.__name__.startswith(("view", "t.", "detach", "slice")):
                    continue
                size = storage.nbytes()
                self.seen.add(place)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, place, size)
        return out

    def _gone(self, place: int, size: int) -> None:
        self.seen.discard(place)
        self.now -= size


def saved(run: Any, least: int) -> tuple[int, Any]:
    """How many float tensors of at least `least` numbers autograd keeps that are no leaf, and the loss."""
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel() >= least and not tensor.is_leaf:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    return len(kept), loss


def test_no_number_of_the_weights_size_is_kept() -> None:
    rule, (base, a, b, scale, offset) = parts(rows=48, columns=64, group=16)
    x = torch.randn(4, 64)
    trained = [p.clone().requires_grad_() for p in (a, b, scale, offset)]
    ours, _ = saved(lambda: RoundedProduct.apply(x, None, rule, base, *trained).sum(), base.numel())
    plain, _ = saved(lambda: by_autograd(rule, x, base, *trained).sum(), base.numel())
    assert ours == 0 and plain >= 3


def test_a_step_takes_little_more_than_lora() -> None:
    """The base is frozen and there before: what comes on top, at its peak, is less than one and a half weights more."""
    size = 768
    peaks = {}
    for kind in ("lora", "l4q"):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False))
        config: Any = LoraConfig(r=4, target_modules=["0", "1"])
        if kind == "l4q":
            config = L4qConfig(r=4, group_size=64, target_modules=["0", "1"])
        model: Any = get_peft_model(base, config).train()  # type: ignore[arg-type]
        x = torch.randn(16, size)
        gc.collect()
        with Alive() as alive:
            model(x).square().sum().backward()
        peaks[kind] = alive.most
    weight = 4 * size * size
    assert peaks["l4q"] < peaks["lora"] + 1.5 * weight + 12 * 4 * (1 << 17)
    assert peaks["l4q"] < 3 * weight, "far from the four tensors a layer that plain autograd holds in two layers"


def test_the_base_has_no_optimizer_state() -> None:
    model = wrapped()
    assert all("l4q_" in n for n, p in model.named_parameters() if p.requires_grad)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("group", [0, 8, 16, 32])
def test_any_group_that_divides_trains(group: int) -> None:
    model = fit(wrapped(group_size=group), 2)
    for layer in layers(model).values():
        assert layer.l4q_scale["default"].shape == (
            layer.out_features,
            layer.in_features // (group or layer.in_features),
        )
    if group in (8, 16):
        with pytest.raises(ValueError, match=f"groups of {group} columns have no packed format"):
            model.merge_and_unload()
        assert layers(model), "nothing was replaced"
    else:
        merged = model.merge_and_unload()
        assert {str(m.format) for _, m in packed.packed_modules(merged)} <= {"uniform3/32", "uniform3/64"}


@pytest.mark.parametrize(
    ("options", "said"),
    [({"bits": 5}, "bits"), ({"bits": 1}, "bits"), ({"group_size": 48}, "group_size=48 does not divide"),
     ({"bits": 8, "train_offset": True}, "without offsets"), ({"start": "middle"}, "start"), ({"warmup": 1}, "warmup")],
)  # fmt: skip
def test_settings_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises((UsageError, ValueError), match=said):
        wrapped(**options)


def test_rank_and_alpha_are_those_of_the_file(tmp_path: Path) -> None:
    fit(wrapped()).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"r": 4', '"r": 8'))
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|shape"):
        PeftModel.from_pretrained(tiny.model(), str(tmp_path))


@pytest.mark.parametrize("fixed", ["train_scale", "train_offset", "both"])
def test_step_and_offset_can_be_frozen(fixed: str) -> None:
    names = ("train_scale", "train_offset") if fixed == "both" else (fixed,)
    model = wrapped(**dict.fromkeys(names, False))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    fit(model)
    moved = {n.split(".")[-2] for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    wanted = {"l4q_A", "l4q_B", "l4q_scale", "l4q_offset"} - {name.replace("train", "l4q") for name in names}
    assert moved == wanted


def test_several_adapters_do_not_act_together() -> None:
    model = wrapped()
    model.add_adapter("two", L4qConfig(bits=2, group_size=32, r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="cannot act together"):
        model.base_model.set_adapter(["default", "two"])
    model.set_adapter("two")
    assert len(next(iter(layers(fit(model)).values())).rules["two"].codes(
        *next(iter(layers(model).values())).parts("two")).unique()) <= 4  # fmt: skip


def test_numbers_stay_float32_in_bfloat16() -> None:
    model = fit(wrapped(tiny.model(dtype=torch.bfloat16)))
    kept = {n: p.clone() for n, p in model.state_dict().items() if "l4q_" in n}
    assert kept and all(p.dtype == torch.float32 for p in kept.values())
    model.to(torch.bfloat16)
    assert all(torch.equal(p, kept[n]) for n, p in model.state_dict().items() if n in kept)


def test_a_step_never_falls_to_zero() -> None:
    model = wrapped()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "l4q_scale" in n:
                p.fill_(-1.0)
    assert torch.isfinite(tiny.logits(model)).all()
    model.merge_and_unload()


# ---------------------------------------------------------------- the warm-up, and the training loop


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in tiny.batch(8, 10)]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For every training pass of a layer, whether the quantizer acted."""
    found: list[bool] = []
    plain = l4q.L4qLinear.adapted

    def watched(self: Any, x: Any, names: Any) -> Any:
        if self.training:
            found.append(self.rounds)
        return plain(self, x, names)

    monkeypatch.setattr(l4q.L4qLinear, "adapted", watched)
    yield found


def options(**changes: Any) -> TrainOptions:
    settings = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 0}
    return TrainOptions(**{**settings, **changes})


def test_the_quantizer_joins_after_the_warm_up(heard: list[bool], tmp_path: Path) -> None:
    model = wrapped(warmup=0.3)
    first = next(iter(layers(model).values()))
    before = first.l4q_scale["default"].clone()
    train(model, rows(), [], options(), tmp_path)
    passes = len(layers(model))
    # The loop looks once more at the first batch.
    assert heard == [False] * (4 * passes) + [True] * (7 * passes)
    assert not torch.equal(first.l4q_scale["default"], before)


def test_the_quantizer_starts_from_the_warmed_weight() -> None:
    model = wrapped(warmup=0.5)
    model.base_model.configure_schedule(4)
    layer = next(iter(layers(model).values()))
    with torch.no_grad():
        layer.l4q_B["default"].normal_(std=0.3)
    base, a, b, _, _ = layer.parts("default")
    model.base_model.update_and_allocate(0)
    assert not layer.rounds
    model.base_model.update_and_allocate(1)
    rule = layer.rules["default"]
    assert layer.rounds
    assert torch.equal(layer.l4q_scale["default"], rule.begin(base + rule.scaling * (b @ a), "zero")[0])


def test_while_it_warms_up_it_is_a_lora() -> None:
    model = wrapped(warmup=0.5)
    model.base_model.configure_schedule(4)
    model.train()
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.model())), "B is zero"
    assert not torch.allclose(tiny.logits(model.eval()), tiny.logits(tiny.model()), atol=1e-3), "answers are rounded"


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    whole = wrapped(warmup=0.4)
    train(whole, rows(), [], options(save_steps=2, save_total_limit=None), tmp_path / "whole")
    for step in (2, 6):
        again = wrapped(warmup=0.4)
        (tmp_path / f"part{step}").mkdir()
        (tmp_path / "whole" / f"checkpoint-{step}").rename(tmp_path / f"part{step}" / f"checkpoint-{step}")
        train(again, rows(), [], options(save_steps=2, save_total_limit=None), tmp_path / f"part{step}", resume=True)
        assert torch.equal(tiny.logits(again), tiny.logits(whole)), step


def test_steps_and_offsets_learn_slowly(tmp_path: Path) -> None:
    model = wrapped(scale_rate=0.25)
    (group,) = model.base_model.parameter_groups(8e-3)
    assert group["lr"] == 2e-3 and group["weight_decay"] == 0.0 and len(group["params"]) == 2 * 14


@pytest.mark.real
def test_on_the_default_model(tmp_path: Path) -> None:
    from shoestring import models

    loaded = models.load("smollm2")
    torch.manual_seed(0)
    adapters, module = catalog.contract("adapters"), catalog.module("l4q")
    ends = {"layers_to_transform": [0, 29], "target_modules": ["down_proj", "q_proj"], "bits": 3}
    model = adapters.wrap(module, loaded.model, ends)
    ids = loaded.tokenizer("def add(a, b):\n    return a + b\n", return_tensors="pt").input_ids
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    weights = {
        n: m.rules["default"].weight(torch.float32, *m.parts("default")).detach() for n, m in layers(model).items()
    }
    merged = model.eval().merge_and_unload()
    found = dict(packed.packed_modules(merged))
    assert len(found) == 4 and all(torch.equal(found[n].unpacked(), w) for n, w in weights.items())

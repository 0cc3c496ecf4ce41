"""LR-QAT: train a low-rank change inside the rounding of an int8 base, so that a plain low-bit weight comes out.

How it works
    Of each weight W0 (out x in), G consecutive inputs of a row share a step.
    1. At the start a step s0 is chosen for every group: of 100 ranges up to the largest magnitude the one with the
       least L4 norm of the rounding error, or that magnitude itself (`reach`).                             (eq. 1)
    2. The base is stored once and for all as P = clip(W0 / s0, Qn, Qp) in eight bits, b of them before the point and
       8 - b behind it (Q4.4 with b = 4); Qn = -2^(b-1), Qp = 2^(b-1) - 1. The floats are gone.             (eq. 2)
    3. Wq = s clip(round(P + (alpha / r) B A), Qn, Qp), y = x Wq^T. B A is in units of a step, not of the weight: a
       change of one is one step. A (r x in) starts Kaiming uniform, B (out x r) at zero, s at s0.          (eq. 3)
    4. With G = dL/dWq and c the codes, the rounding counting as identity and the clipping not,
       dL/ds = sum over the group of G c, and the product B A gets (alpha / r) s G where round(.) is inside
       [Qn, Qp]. s0 does not move, so s needs no correction.                                               (eq. 4)
    5. Kept for the backward pass are x and references; no float of the weight's size lives from the forward to the
       backward pass. Trained are A, B and s: a byte a weight, and the adapter, is what training holds.
    6. `merge_and_unload` keeps c in b bits and s in float16: an ordinary model of b bits.

Where it bends
    The paper's letters A and B are swapped here, as LoRA has them. s is computed with as it will be stored, from the
    first step, so the integer model is the one that was trained, bit for bit in the weights; its products then round
    activations to int8, as every packed format here does. The format has an offset beside every step, zero here:
    b + 32 / G bits a weight instead of b + 16 / G. 5 to 8 bits go into the format int8. In place, `merge_adapter` makes
    a float layer of the same weight, which `unmerge_adapter` takes off again.
    The base is eight bits as soon as there is an adapter: disabled or unloaded, the model answers with P s0, not with
    W0, and a second adapter must have the same bits, group and reach. `downcast` keeps P otherwise: "float32",
    "bfloat16" and "float16" without clipping, "int" as the codes of plain rounding. s is trained at `scale_rate` times
    the learning rate.
    Ranges are searched in two passes, every fifth and then around the best, relative to the group's own magnitude.
    The recomputation is this room's own, by blocks of rows, in place of torch's checkpointing of the expression. With
    scaling 1 / r and B at zero codes flip late: within few steps take a learning rate of 1e-2. The start from a
    singular value decomposition and rounded activations in training are left out. One adapter acts at a time.
    Making the weight costs the same for few tokens as for many: a step of 200 takes about twice a LoRA's time on a
    processor. For generating, merge: before that the weight is made anew for every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters import _rounded, _shared

METHOD = Method(
    paper=Paper(
        "Low-Rank Quantization-Aware Training for LLMs",
        "2024-06",
        arxiv="2406.06385",
        code="Qualcomm-AI-research/LR-QAT",
    ),
    provides="LrQatConfig",
    saves=("memory", "storage", "latency", "money"),
    combines={"quantizers": "it computes with the weights themselves and ends in packed integers of its own"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "with loss",
        "parameters": "r (in + out) and out in / G per weight",
    },
    expects={
        "check_starts_as_the_base_model": "it starts as the rounded base: the quantizer acts from the first step",
        "check_merge": "the weights are equal bit for bit, and products with packed integers round their activations",
        "check_disable": "the base is held in eight bits from the first adapter on; its floats are gone",
        "check_unload_restores_the_base": "the base is held in eight bits from the first adapter on",
    },
)
TRAINING = {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_ratio": 0.1}
NEEDS_FLOAT = True
REACHES = ("lp_p4", "minmax")
DOWNCASTS = ("fixed_point8", "int", "float32", "bfloat16", "float16")
CANDIDATES = 100


@dataclass
class LrQatConfig(_shared.AdapterConfig):
    """Settings of a low-rank change inside the rounding.

    Args:
        bits: b, of a code.
        group_size: G, inputs of a row that share a step; 0 for whole rows.
        r, alpha: rank of the change, which is scaled by alpha / r and counted in steps.
        reach: how far the levels reach at the start: "lp_p4", where the L4 norm of the error is least, or "minmax".
        downcast: how the frozen base is kept: "fixed_point8", "int", or a float type.
        scale_rate: learning rate of the steps, as a share of that of A and B.

    Raises:
        ValueError: a value that cannot be, or eight bits with "fixed_point8", which would leave none behind the point.
    """

    TYPE: ClassVar[str] = "lr_qat"

    bits: int = field(default=4, metadata={"help": "Bits of a code, 2 to 8"})
    group_size: int = field(default=64, metadata={"help": "Inputs that share a step; 0 for a row"})
    r: int = field(default=32, metadata={"help": "Rank of the change"})
    alpha: float = field(default=1.0, metadata={"help": "The change is scaled by alpha / r"})
    reach: str = field(default="lp_p4", metadata={"help": "Of the levels at the start: lp_p4 or minmax"})
    downcast: str = field(default="fixed_point8", metadata={"help": "How the frozen base is kept"})
    scale_rate: float = field(default=0.01, metadata={"help": "Learning rate of the steps as a share of A's and B's"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _shared.whole("bits", self.bits, 2)
        _shared.number("bits", self.bits, 2, 8)
        _shared.whole("r", self.r)
        _shared.whole("group_size", self.group_size, 0)
        _shared.number("alpha", self.alpha, 0)
        _shared.number("scale_rate", self.scale_rate, 0)
        for name, known in (("reach", REACHES), ("downcast", DOWNCASTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(known)}")
        if self.bits == 8 and self.downcast == "fixed_point8":
            raise ValueError("bits=8 leaves fixed_point8 no digit behind the point; give 2 to 7, or another downcast")


@dataclass(frozen=True)
class LrQatRule(_rounded.Rule):
    """The rounding of base and change, both counted in steps. `point` is the binary digits behind the base's point."""

    point: int = 0

    def levels(self, base: Tensor, change: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
        return change.add_(base, alpha=2.0**-self.point)  # (eq. 3)

    def inside(self, levels: Tensor) -> Tensor:
        near = levels.round()
        return near.clamp(self.low, self.high) == near

    def gradients(
        self, grad: Tensor, levels: Tensor, codes: Tensor, inside: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return (grad * inside).mul_(step), codes.mul_(grad).sum(-1), None  # (eq. 4)

    def begin(self, weight: Tensor, reach: str) -> Tensor:
        """s0 [rows, groups] for a weight [rows, columns], numbers that can be stored as they are."""
        found = []
        for rows in _rounded.blocks(weight):
            cut = weight[rows].float().unflatten(1, (-1, self.group))
            widest = cut.abs().amax(-1, keepdim=True) / self.high
            found.append(self.step(widest if reach == "minmax" else self._least_error(cut, widest))[..., 0, 0])
        return torch.cat(found)

    def _least_error(self, cut: Tensor, widest: Tensor) -> Tensor:
        """The candidate step [rows, groups, 1] with the least L4 norm of the rounding error."""
        best = torch.full_like(widest, torch.inf)
        share = torch.ones_like(widest)
        coarse = [torch.full_like(widest, k / CANDIDATES) for k in range(5, CANDIDATES + 1, 5)]
        for candidate in coarse:
            best, share = self._better(cut, widest, candidate, best, share)
        middle = share
        for k in (-4, -3, -2, -1, 1, 2, 3, 4):
            near = (middle + k / CANDIDATES).clamp(max=1.0)
            best, share = self._better(cut, widest, near, best, share)
        return widest * share

    def _better(
        self, cut: Tensor, widest: Tensor, candidate: Tensor, best: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        step = (widest * candidate).clamp(min=_rounded.LEAST)
        error = cut / step
        error = error.round().clamp_(self.low, self.high).sub_(error).square_()
        norm = torch.linalg.vecdot(error, error).unsqueeze(-1) * step**4  # (eq. 1)
        less = norm < best
        return torch.where(less, norm, best), torch.where(less, candidate, share)


class Held(nn.Module):
    """A linear layer whose frozen weight is counted in steps: `weight` (out, in) times 2^-point times `scales`.

    Attributes:
        kept: bits, group, reach and downcast, which all adapters of the layer share.
        dtype: of the weight that it was.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor

    def __init__(self, base: nn.Module, config: LrQatConfig) -> None:
        super().__init__()
        weight, bias = _shared.read_weight(base).detach(), _shared.read_bias(base)
        self.in_features, self.out_features = _shared.sizes(base)
        self.kept, self.dtype = _kept(config), weight.dtype
        self.group = config.group_size or self.in_features
        self.point = 8 - config.bits if config.downcast == "fixed_point8" else 0
        rule = LrQatRule(config.bits, self.group, 0.0)
        steps = rule.begin(weight, config.reach)
        whole = config.downcast in ("fixed_point8", "int")
        kind = torch.int8 if whole else getattr(torch, config.downcast)
        counted = torch.empty(weight.shape, dtype=kind, device=weight.device)
        for rows in _rounded.blocks(weight):
            part = weight[rows].float().unflatten(1, (-1, self.group)) / steps[rows].unsqueeze(-1)
            if whole:
                part = part.clamp_(rule.low, rule.high).mul_(2.0**self.point).round_()  # (eq. 2)
            counted[rows] = part.flatten(1).to(kind)
        # Registered by hand, because an adapter that waits for its file is made without memory and the base is not.
        self._parameters["weight"] = nn.Parameter(counted, requires_grad=False)
        self.register_buffer("scales", steps.to(rule.dtype))
        self._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def unpacked(self) -> Tensor:
        """The weight it stands for, float32 (out, in)."""
        steps = self.scales.float().unsqueeze(-1) * 2.0**-self.point
        return (self.weight.float().unflatten(1, (-1, self.group)) * steps).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        dtype = _shared.answer_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.unpacked().to(dtype), bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        own = self.weight.data, self.scales.data
        moved = super()._apply(fn, recurse)
        # `model.to(dtype)` is about activations; what stands for the weight only changes device.
        for now, before in zip((self.weight, self.scales), own):
            if now.dtype != before.dtype:
                now.data = before.to(now.device)
        return moved


class LrQatLinear(_rounded.RoundedLinear):
    """A linear layer whose base is counted in steps and rounded together with a low-rank change."""

    lrqat_A: nn.ParameterDict
    lrqat_B: nn.ParameterDict
    lrqat_scale: nn.ParameterDict
    adapter_layer_names = ("lrqat_A", "lrqat_B", "lrqat_scale")
    other_param_names = ("rules",)

    def fill(self, adapter_name: str, config: LrQatConfig, key: str, **shared: Any) -> None:
        if not isinstance(self._base(), Held):
            self.base_layer = Held(self._base(), config)
        held = self._base()
        if held.kept != _kept(config):
            said = ", ".join(f"{name}={value!r}" for name, value in held.kept.items())
            raise ValueError(
                f"{key} is held for adapters with {said}; give the new one the same, or load the base anew"
            )
        self.rules[adapter_name] = LrQatRule(config.bits, held.group, config.alpha / config.r, held.point)
        self.pair(adapter_name, config.r)
        self.lrqat_scale[adapter_name] = nn.Parameter(held.scales.float())

    def frozen(self) -> Tensor:
        return self._base().weight  # type: ignore[no-any-return]

    def plain(self) -> nn.Module:
        held = self._base()
        return _rounded.float_linear(held.unpacked().to(held.dtype), held.bias)

    @property
    def plain_dtype(self) -> torch.dtype:
        return self._base().dtype  # type: ignore[no-any-return]


class LrQatModel(_rounded.RoundedTuner):
    """peft's tuner for LR-QAT."""

    prefix = "lrqat_"
    tuner_layer_cls = LrQatLinear
    slow = ("lrqat_scale",)


def _kept(config: LrQatConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("bits", "group_size", "reach", "downcast")}


def register() -> None:
    _shared.join("lr_qat", LrQatConfig, LrQatModel)


def example() -> LrQatConfig:
    return LrQatConfig(**settings()[0], group_size=32)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, gentlest first."""
    return (
        {"bits": 4, "r": 16, "target_modules": "all-linear"},
        {"bits": 3, "r": 16, "target_modules": "all-linear"},
        {"bits": 2, "r": 32, "target_modules": "all-linear"},
    )


def fitted(shape: Shape) -> dict[str, Any]:
    return {"group_size": _rounded.fitted_group(shape)}


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) trained numbers a weight and one a group; merged, b bits a weight and 32 a group."""
    made = LrQatConfig(**{**settings()[0], **fitted(shape), **options})
    trained = 0
    for weight in _rounded.adapted_weights(shape):
        rows, columns = weight.dims
        trained += made.r * (rows + columns) + rows * columns // (made.group_size or columns)
    return Price(_rounded.merged_shape(shape, made.bits, made.group_size), trainable=trained, train_flops=3.0)

"""L4Q: train a LoRA through the quantizer and the quantizer with it, so that one plain low-bit weight comes out.

How it works
    W0 (out x in) is frozen; A (r x in), B (out x r), and for every G consecutive inputs of a row a step s and an offset
    b are trained.
    1. W = W0 + (alpha / r) B A; A starts Kaiming uniform, B at zero.                                       (eq. 1)
    2. w = (W - b) / s, and c = round(clip(w, Qn, Qp)), with Qn = -2^(n-1) and Qp = 2^(n-1) - 1.            (eq. 2)
    3. y = x Wq^T with Wq = s c + b: the quantizer stands behind the sum, so nothing is left beside it.     (eq. 3)
    4. At the start s = max(m / Qn, M / Qp) for a group from m to M and b = 0: neither end is clipped. The other
       starts reach from m to M; the default here also puts zero on a level.                                (eq. 4)
    5. With G = dL/dWq = g^T x and R = [Qn <= w <= Qp], the rounding counting as identity,
       dL/ds = sum over the group of G (c - w inside R, c outside), times 1 / sqrt(group Qp)                (eq. 5)
       dL/db = sum over the group of G outside R                                                           (eq. 6)
       dL/dB = (alpha / r) (G in R) A^T and dL/dA = (alpha / r) B^T (G in R).                               (eq. 7)
       Weights that are clipped pull s and b and leave A and B alone.
    6. Kept for the backward pass are x and references to W0, A, B, s, b; W, w, c, R and G are made there, some rows at
       a time.
    7. For the first share `warmup` of a run a plain LoRA is trained; then s and b start from what W is by then.
    8. `merge_and_unload` keeps c in n bits, s and b in float16: n + 32 / G bits a weight.

Where it bends
    s and b are computed with as float16 from the first step, so the integer model is the one that was trained, bit for
    bit in the weights; its products then round activations to int8 as every packed format here does. In place,
    `merge_adapter` makes a float layer of the same weight, which `unmerge_adapter` takes off again.
    The default starts with zero on a level ("zero"), near which many weights lie: at 3 bits the default model's
    perplexity begins several times lower than with the paper's conservative "symmetric".
    s is kept above 2^-24, the least float16. It and b are trained at `scale_rate` times the learning rate, without
    weight decay. 8 bits go into the format int8, whose codes start at -127, whose scales are bfloat16 and which has no
    offset. Groups are the largest of 64, 32 and 16 that the model's widths allow (128 in the paper, which not every
    width allows); those that 32 does not divide train and merge in place, but have no packed format. In evaluation the
    quantizer always acts, also during the warm-up, and in other training loops it does from the first step. Dropout is
    left out: with it W would not be the sum. One adapter acts at a time.
    Making the weight costs the same for few tokens as for many: a step of 200 takes about twice a LoRA's time on a
    processor. For generating, merge: before that the weight is made anew for every token.
"""

from __future__ import annotations

import math
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
        "L4Q: Parameter Efficient Quantization-Aware Training on Large Language Models via LoRA-wise LSQ",
        "2024-02",
        arxiv="2402.04902",
    ),
    provides="L4qConfig",
    saves=("storage", "memory", "compute"),
    combines={"quantizers": "it computes with the weights themselves and ends in packed integers of its own"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "with loss",
        "parameters": "r (in + out) and 2 out in / G per weight",
    },
    expects={
        "check_starts_as_the_base_model": "it starts as the rounded base: the quantizer acts from the first step",
        "check_merge": "the weights are equal bit for bit, and products with packed integers round their activations",
    },
)
TRAINING = {"learning_rate": 2e-3}
NEEDS_FLOAT = True
BITS = (2, 3, 4, 8)
STARTS = ("symmetric", "asymmetric", "zero")


@dataclass
class L4qConfig(_shared.AdapterConfig):
    """Settings of a LoRA behind whose sum a trained quantizer stands.

    Args:
        bits: n, of a code.
        group_size: G, inputs of a row that share s and b; 0 for whole rows.
        r, alpha: rank of the update, which is scaled by alpha / r.
        start: of s and b: "symmetric" around zero; "asymmetric", from the smallest to the largest of a group; or
            "zero", the same with zero on a level, which is plain rounding in the packed format.
        train_scale, train_offset: whether s and b are trained; with neither the quantizer is fixed.
        scale_rate: learning rate of s and b, as a share of that of A and B.
        warmup: share of a run in which a plain LoRA is trained.

    Raises:
        ValueError: a value that cannot be, or an offset with 8 bits.
    """

    TYPE: ClassVar[str] = "l4q"

    bits: int = field(default=3, metadata={"help": "Bits of a code: 2, 3, 4 or 8"})
    group_size: int = field(default=64, metadata={"help": "Inputs that share a step and an offset; 0 for a row"})
    r: int = field(default=4, metadata={"help": "Rank of the update"})
    alpha: float = field(default=8.0, metadata={"help": "The update is scaled by alpha / r"})
    start: str | None = field(default=None, metadata={"help": "Of s and b: symmetric, asymmetric or zero"})
    train_scale: bool = field(default=True, metadata={"help": "Train the steps"})
    train_offset: bool | None = field(default=None, metadata={"help": "Train the offsets; by itself not with 8 bits"})
    scale_rate: float = field(default=0.1, metadata={"help": "Learning rate of s and b as a share of A's and B's"})
    warmup: float = field(default=0.1, metadata={"help": "Share of a run that trains a plain LoRA"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r} is not possible; choose one of {', '.join(map(str, BITS))}")
        if self.start is None:
            self.start = "zero" if self.bits != 8 else "symmetric"
        if self.start not in STARTS:
            raise ValueError(f"start={self.start!r} is not known; choose one of {', '.join(STARTS)}")
        _shared.whole("r", self.r)
        _shared.whole("group_size", self.group_size, 0)
        _shared.number("alpha", self.alpha, 0)
        _shared.number("scale_rate", self.scale_rate, 0)
        _shared.number("warmup", self.warmup, 0, 0.9)
        if self.train_offset is None:
            self.train_offset = self.bits != 8
        if self.bits == 8 and (self.train_offset or self.start != "symmetric"):
            raise ValueError("8-bit codes are stored without offsets; leave train_offset and start as they are")


@dataclass(frozen=True)
class L4qRule(_rounded.Rule):
    """Learned steps and offsets (LSQ) of the sum of base and update."""

    def levels(self, base: Tensor, change: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
        change += base  # (eq. 1)
        return (change if offset is None else change.sub_(offset)).div_(step)  # (eq. 2)

    def inside(self, levels: Tensor) -> Tensor:
        return levels.clamp(self.low, self.high) == levels

    def gradients(
        self, grad: Tensor, levels: Tensor, codes: Tensor, inside: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        within = grad * inside
        pull = codes.sub_(levels.mul_(inside)).mul_(grad).sum(-1)  # (eq. 5)
        return within, pull / math.sqrt(self.group * self.high), (grad - within).sum(-1)  # (eq. 6)

    def begin(self, weight: Tensor, start: str) -> tuple[Tensor, Tensor]:
        """s and b, [rows, groups] each, for a weight [rows, columns]; numbers that can be stored as they are."""
        cut = weight.float().unflatten(1, (-1, self.group))
        least, most = cut.amin(-1), cut.amax(-1)
        if start == "symmetric":
            step = torch.maximum(least / self.low, most / self.high)  # (eq. 4)
            return self._not_less(step), torch.zeros_like(step)
        if start == "zero":
            least, most = least.clamp(max=0), most.clamp(min=0)
            step = self.stored(((most - least) / (self.high - self.low)).clamp(min=_rounded.LEAST))
            zero = (self.low - (least / step).round()).clamp(self.low, self.high)  # the code of zero
            return step, self.stored(-zero * step)
        step = (most - least) / (self.high - self.low)
        offset = self.stored(least - self.low * step)
        # Rounding the offset must not leave an end outside.
        reach = torch.maximum((least - offset) / self.low, (most - offset) / self.high)
        return self._not_less(torch.maximum(step, reach)), offset

    def _not_less(self, step: Tensor) -> Tensor:
        """The nearest number from `step` upwards that can be stored."""
        step = step.clamp(min=_rounded.LEAST)
        near = step.to(self.dtype)
        above = torch.nextafter(near, torch.full_like(near, math.inf))
        return torch.where(near.float() < step, above, near).float()


class L4qLinear(_rounded.RoundedLinear):
    """A linear layer whose sum of weight and update is rounded by a trained quantizer."""

    l4q_A: nn.ParameterDict
    l4q_B: nn.ParameterDict
    l4q_scale: nn.ParameterDict
    l4q_offset: nn.ParameterDict
    rules: dict[str, L4qRule]  # type: ignore[assignment]
    adapter_layer_names = ("l4q_A", "l4q_B", "l4q_scale", "l4q_offset")
    other_param_names = ("rules",)

    def containers(self) -> None:
        super().containers()
        self.rounds = True  # off while a plain LoRA is trained

    def fill(self, adapter_name: str, config: L4qConfig, key: str, **shared: Any) -> None:
        rule = L4qRule(config.bits, config.group_size or self.in_features, config.alpha / config.r)
        self.rules[adapter_name] = rule
        self.pair(adapter_name, config.r)
        step, offset = rule.begin(self.frozen().detach(), str(config.start))
        self.l4q_scale[adapter_name], self.l4q_offset[adapter_name] = nn.Parameter(step), nn.Parameter(offset)
        fixed = ("l4q_scale",) * (not config.train_scale) + ("l4q_offset",) * (not config.train_offset)
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: fixed}

    def settle(self, adapter_name: str, start: str) -> None:
        """Start the quantizer from what the weight has become."""
        rule = self.rules[adapter_name]
        base, a, b, scale, offset = self.parts(adapter_name)
        with torch.no_grad():
            step, zero = rule.begin(base.float() + rule.scaling * (b @ a), start)
            scale.copy_(step)
            offset.copy_(zero)

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        if self.rounds or not self.training:
            return super().adapted(x, names)
        y = self.base_layer(x)
        for name in names:
            a, b = self.l4q_A[name].to(y.dtype), self.l4q_B[name].to(y.dtype)
            y = y + F.linear(F.linear(x.to(y.dtype), a), b) * self.rules[name].scaling
        return y


class L4qModel(_rounded.RoundedTuner):
    """peft's tuner for L4Q; it switches the quantizer on when the warm-up is over."""

    prefix = "l4q_"
    tuner_layer_cls = L4qLinear
    slow = ("l4q_scale", "l4q_offset")
    _begun = False
    _until = 0

    def configure_schedule(self, total_steps: int) -> None:
        """Hear how long the run is; the first share of it is the warm-up."""
        self._until = int(total_steps * max(self._config(name).warmup for name in self.active_adapters))
        if not self._begun:
            self._switch(self._until == 0)

    def update_and_allocate(self, global_step: int) -> None:
        """Switch the quantizer on after the last step of the warm-up."""
        if global_step + 1 < self._until or all(layer.rounds for layer in self._layers()):
            return
        for layer in self._layers():
            for name in layer.acting:
                layer.settle(name, self._config(name).start)
        self._switch(True)

    def allocation_state(self) -> dict[str, Any]:
        return {"rounds": all(layer.rounds for layer in self._layers())}

    def load_allocation_state(self, state: Mapping[str, Any]) -> None:
        self._switch(bool(state["rounds"]))

    def _switch(self, on: bool) -> None:
        self._begun = True
        for layer in self._layers():
            layer.rounds = on

    def _config(self, name: str) -> Any:
        return self.peft_config[name]


def register() -> None:
    _shared.join("l4q", L4qConfig, L4qModel)


def example() -> L4qConfig:
    return L4qConfig(**settings()[0], group_size=32)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, gentlest first."""
    return (
        {"bits": 4, "r": 4, "alpha": 8.0, "target_modules": "all-linear"},
        {"bits": 3, "r": 4, "alpha": 8.0, "target_modules": "all-linear"},
        {"bits": 2, "r": 4, "alpha": 8.0, "target_modules": "all-linear"},
    )


def fitted(shape: Shape) -> dict[str, Any]:
    return {"group_size": _rounded.fitted_group(shape)}


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) trained numbers a weight and two a group; merged, n bits a weight and 32 a group."""
    made = L4qConfig(**{**settings()[0], **fitted(shape), **options})
    trained = 0
    for weight in _rounded.adapted_weights(shape):
        rows, columns = weight.dims
        groups = rows * columns // (made.group_size or columns)
        trained += made.r * (rows + columns) + groups * (bool(made.train_scale) + bool(made.train_offset))
    merged = _rounded.merged_shape(shape, made.bits, made.group_size)
    return Price(merged, trainable=trained, train_flops=3.0)

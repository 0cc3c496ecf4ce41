"""What tuners share that train a quantizer together with a low-rank change, and end in plain packed integers.

A method says in a `Rule` where a weight lies between its levels and where gradients go. The rest is here: a product
that keeps no number of the weight's size for its backward pass, in-place merging into a float layer that can be undone,
and `merge_and_unload` into packed layers, whose weights are those of training bit for bit.

Scales and offsets are computed with as they will be stored (float16, or bfloat16 where the format says so), and their
rounding counts as identity for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from shoestring.core.shape import PROJECTIONS, Shape, Weight
from shoestring.kernels import formats, layout
from shoestring.methods.adapters import _shared
from shoestring.methods.adapters._tied import shares_table
from shoestring.models import packed

BLOCK = 1 << 17  # numbers of a weight that are worked on at a time: they stay in a processor's cache
LEAST = 2.0**-24  # the smallest positive float16; a step is never below it
GROUPS = (64, 32, 16)  # what `fitted` tries


@dataclass(frozen=True)
class Rule:
    """How an adapter's numbers become levels. Weights come cut into groups, [rows, groups, group], in float32.

    Attributes:
        bits: of a code; codes go from `low` to `high`.
        group: columns that share a step.
        scaling: what the low-rank product is multiplied by.
    """

    bits: int
    group: int
    scaling: float

    @property
    def low(self) -> int:
        # 8-bit codes are those of the format int8, which leaves out the lowest.
        return -(2 ** (self.bits - 1)) + (self.bits == 8)

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def dtype(self) -> torch.dtype:
        """In which steps and offsets are stored."""
        return torch.float16 if self.bits <= 4 else torch.bfloat16

    def levels(self, base: Tensor, change: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
        """Where the changed weight lies, in steps. `change` may be written to."""
        raise NotImplementedError

    def inside(self, levels: Tensor) -> Tensor:
        """Where a gradient passes the rounding and the clipping."""
        raise NotImplementedError

    def gradients(
        self, grad: Tensor, levels: Tensor, codes: Tensor, inside: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the low-rank product before its scaling, [rows, groups, group], and of step and offset, [rows, groups].

        Args:
            grad: of the rounded weight.
        """
        raise NotImplementedError

    def stored(self, numbers: Tensor) -> Tensor:
        """Numbers as they will be stored, in float32."""
        return numbers.to(self.dtype).float()

    def step(self, scale: Tensor) -> Tensor:
        """The steps [rows, groups, 1] that parameters [rows, groups] stand for: positive, and as stored."""
        return self.stored(scale.clamp(min=LEAST)).unsqueeze(-1)

    def rounded(
        self, rows: slice, base: Tensor, a: Tensor, b: Tensor, scale: Tensor, offset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Levels, codes, steps and offsets of some rows of a weight."""
        # Under autocast the product would have eight bits, and merging would round other numbers.
        with torch.autocast(base.device.type, enabled=False):
            change = torch.mm(b[rows], a).mul_(self.scaling)
        step = self.step(scale[rows])
        zero = None if offset is None else self.stored(offset[rows]).unsqueeze(-1)
        levels = self.levels(self._cut(base[rows].float()), self._cut(change), step, zero)
        return levels, levels.round().clamp_(self.low, self.high), step, zero

    def weight(self, dtype: torch.dtype, *parts: Any) -> Tensor:
        """The rounded weight [rows, columns] of all parts: base, A, B, scale and offset."""
        base = parts[0]
        whole = torch.empty(base.shape, dtype=dtype, device=base.device)
        for rows in blocks(base):
            _, codes, step, zero = self.rounded(rows, *parts)
            whole[rows] = _value(codes, step, zero).flatten(1)
        return whole

    def codes(self, *parts: Any) -> Tensor:
        """The codes [rows, columns] of all parts, int8, from `low` to `high`."""
        base = parts[0]
        whole = torch.empty(base.shape, dtype=torch.int8, device=base.device)
        for rows in blocks(base):
            whole[rows] = self.rounded(rows, *parts)[1].flatten(1).to(torch.int8)
        return whole

    def stored_group(self) -> int:
        """Columns of a group in the packed format: the largest there is that divides the rule's own.

        Raises:
            ValueError: there is none.
        """
        fitting = [size for size in layout.GROUPS if self.group % size == 0]
        if not fitting:
            raise ValueError(
                f"groups of {self.group} columns have no packed format; train with a group_size that "
                f"{min(layout.GROUPS)} divides, or merge in place with merge_adapter()"
            )
        return max(fitting)

    def pack(self, *parts: Any) -> tuple[formats.Format, dict[str, Tensor]]:
        """The packed format and its tensors, which stand for `weight` bit for bit."""
        base, _, _, scale, offset = parts
        size = self.stored_group()
        step = self.step(scale).squeeze(-1).repeat_interleave(self.group // size, 1)
        codes = self.codes(*parts)
        if self.bits > 4:
            fmt = formats.parse(f"int8/{size}")
            dims = fmt.layout.tensors(*base.shape)["weight"][1]
            return fmt, {"weight": codes.view(dims), "scales": step.to(self.dtype)}
        fmt = formats.parse(f"uniform{self.bits}/{size}")
        zero = torch.zeros_like(scale) if offset is None else self.stored(offset)
        zeros = zero.repeat_interleave(self.group // size, 1)
        return fmt, fmt.encode(codes.short() - self.low, step, zeros)  # type: ignore[attr-defined]

    def _cut(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (-1, self.group))


def _value(codes: Tensor, step: Tensor, zero: Tensor | None) -> Tensor:
    return codes * step if zero is None else codes * step + zero


def blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight [rows, columns] that are worked on together."""
    count = max(1, BLOCK // weight.shape[1])
    return (slice(start, start + count) for start in range(0, weight.shape[0], count))


class RoundedProduct(torch.autograd.Function):
    """x [..., in] times the rounded weight's transpose, plus bias.

    Kept for the backward pass are x and the parts by reference; the weight is made again there, a block of rows at a
    time, and so is its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, rule: Rule, base: Tensor, a: Tensor, b: Tensor, scale: Tensor,
        offset: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, base, a, b, scale, offset)
        ctx.rule = rule
        return F.linear(x, rule.weight(x.dtype, base, a, b, scale, offset), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base, a, b, scale, offset = ctx.saved_tensors
        rule: Rule = ctx.rule
        rows_of_grad, tokens = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        trains = any(ctx.needs_input_grad[4:])
        whole = torch.empty(base.shape, dtype=x.dtype, device=x.device) if ctx.needs_input_grad[0] else None
        for_a, for_b, for_scale = torch.zeros_like(a), torch.empty_like(b), torch.empty_like(scale)
        for_offset = None if offset is None else torch.empty_like(offset)
        for rows in blocks(base):
            levels, codes, step, zero = rule.rounded(rows, base, a, b, scale, offset)
            if whole is not None:
                whole[rows] = _value(codes, step, zero).flatten(1)
            if trains:
                of_weight = (rows_of_grad[:, rows].t() @ tokens).float().unflatten(1, (-1, rule.group))
                change, for_scale[rows], zeros = rule.gradients(of_weight, levels, codes, rule.inside(levels), step)
                if for_offset is not None and zeros is not None:
                    for_offset[rows] = zeros
                change = change.flatten(1)
                for_b[rows] = (change @ a.t()).mul_(rule.scaling)
                for_a.addmm_(b[rows].t(), change, alpha=rule.scaling)
        for_x = None if whole is None else (rows_of_grad @ whole).view(x.shape)
        for_bias = rows_of_grad.sum(0) if ctx.needs_input_grad[1] else None
        if not trains:
            return for_x, for_bias, *(None,) * 6
        return for_x, for_bias, None, None, for_a, for_b, for_scale, for_offset


class RoundedLinear(_shared.LinearLayer):
    """A linear layer whose changed weight is rounded to levels that are trained with the change.

    A subclass names A, B, scale and, where it has one, offset in `adapter_layer_names`, makes them in `fill`, and puts
    the adapter's rule into `rules`.
    """

    def containers(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.rules: dict[str, Rule] = {}
        self._aside: list[nn.Module] = []  # the base, while a float layer stands in its place

    def pair(self, adapter_name: str, r: int) -> None:
        """Make A (r, in), Kaiming uniform, and B (out, r), zero."""
        device = self._base().weight.device
        a = torch.empty(r, self.in_features, device=device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        getattr(self, self.adapter_layer_names[0])[adapter_name] = nn.Parameter(a)
        zero = torch.zeros(self.out_features, r, device=device)
        getattr(self, self.adapter_layer_names[1])[adapter_name] = nn.Parameter(zero)

    def parts(self, adapter_name: str) -> tuple[Any, ...]:
        """Base (out, in), A (r, in), B (out, r), scale (out, groups), and offset (out, groups) or None."""
        own = [getattr(self, name)[adapter_name] for name in self.adapter_layer_names]
        return self.frozen(), *own, *([None] * (4 - len(own)))

    def frozen(self) -> Tensor:
        """The frozen numbers of the base as the rule takes them, (out, in)."""
        return _shared.read_weight(self._base())

    def plain(self) -> nn.Module:
        """The layer without an adapter, as it is left when the adapters are taken off."""
        return self._base()

    @property
    def plain_dtype(self) -> torch.dtype:
        """Of the weight that merging in place makes."""
        return self._base().weight.dtype

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        name, dtype, bias = _one(names), _shared.answer_dtype(x), _shared.read_bias(self._base())
        bias = None if bias is None else bias.to(dtype)
        # Rows go in and come out: models may add in place to what a layer gives, which no view made inside allows.
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        y = RoundedProduct.apply(rows, bias, self.rules[name], *self.parts(name))
        return y.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a float layer with the rounded weight in the base's place; the base comes back with `unmerge`.

        Raises:
            ValueError: several adapters, or (`safe_merge`) a weight that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        if not names:
            return
        name = _one(names + self.merged_adapters)
        with torch.no_grad():
            weight = self.rules[name].weight(self.plain_dtype, *self.parts(name))
            if safe_merge:
                _check_finite(weight, name)
            made = float_linear(weight, _shared.read_bias(self._base()))
        self._aside = [self._base()]
        self.base_layer = made.train(self.training)
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base back, which was never written to."""
        if self._aside:
            self.base_layer = self._aside.pop()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer that stands in this one's place afterwards: packed integers, or the one without an adapter."""
        names = self.acting_on_merge(adapter_names)
        self.unmerge()
        if merge and names:
            name = _one(names)
            with torch.no_grad():
                parts = self.parts(name)
                for part in parts[1:]:
                    _check_finite(part, name)
                fmt, tensors = self.rules[name].pack(*parts)
            bias = _shared.read_bias(self._base())
            self.base_layer = packed.linear(fmt, tensors, self.in_features, bias=bias, dtype=self.plain_dtype)
        else:
            self.base_layer = self.plain()
        return self.base_layer.train(self.training)

    def acting_on_merge(self, adapter_names: list[str] | None) -> list[str]:
        """The adapters that merging is about: those named, or merged in place already, or active."""
        wanted = adapter_names or self.merged_adapters or self.active_adapters
        return [name for name in wanted if self.has(name)]

    def _base(self) -> Any:
        return self._aside[0] if self._aside else self.get_base_layer()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # To the device alone: in the base's bfloat16 steps would lose the digits that decide on which side of a
        # boundary a weight lies.
        place = device or self._base().weight.device
        for name in self.adapter_layer_names:
            own = getattr(self, name)[adapter_name]
            if own.device != place and not own.is_meta:  # there is nothing to move before a file is read
                own.data = own.data.to(place)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        own = {p: p.data for name in self.adapter_layer_names for p in getattr(self, name).values()}
        for base in self._aside:
            base._apply(fn, recurse)
        moved = super()._apply(fn, recurse)
        for parameter, before in own.items():
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return moved


class RoundedTuner(_shared.LinearTuner):
    """A tuner of `RoundedLinear`s: one adapter acts at a time, and merging changes how the weights are stored.

    A config has `scale_rate`: the learning rate of scale and offset as a share of the others'.
    """

    tuner_layer_cls = RoundedLinear
    slow: ClassVar[tuple[str, ...]] = ()  # containers that are trained at `scale_rate`

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        named = peft_config.target_modules != "all-linear" or isinstance(peft_config.exclude_modules, str)
        if not named and self._read_past():
            peft_config.exclude_modules = sorted({*(peft_config.exclude_modules or ()), *self._read_past()})
        super()._prepare_model(peft_config, model)

    def _read_past(self) -> frozenset[str]:
        """Names of layers that the family computes in the type of their weight, which integers would be taken for."""
        return frozenset(getattr(self.model, "_keep_in_fp32_modules", None) or ())

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str):
            _one(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _layers(self) -> Iterator[Any]:
        return (module for module in self.model.modules() if isinstance(module, RoundedLinear))

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups of torch's for the scales and offsets, which want small steps and no weight decay."""
        groups = []
        for adapter_name, config in self.peft_config.items():
            own = [
                getattr(layer, name)[adapter_name]
                for layer in self._layers()
                for name in self.slow
                if adapter_name in getattr(layer, name)
            ]
            rate = learning_rate * config.scale_rate  # type: ignore[attr-defined]
            groups.append({"params": own, "lr": rate, "weight_decay": 0.0})
        return groups

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if shares_table(self.model, target):
            raise ValueError(
                f"{current_key} shares its weight with the input embeddings, which stay floats; leave it out of "
                "target_modules"
            )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        inputs = _shared.sizes(base)[0]
        if inputs % (peft_config.group_size or inputs):
            raise ValueError(
                f"group_size={peft_config.group_size} does not divide the {inputs} input columns of {current_key}; "
                "choose one that does, or leave the layer out with exclude_modules"
            )
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, *rest: Any, **given: Any) -> Any:
        if merge:  # before the first layer is replaced
            past = [name for name, module in self.model.named_modules() if isinstance(module, RoundedLinear)]
            past = [name for name in past if name.rpartition(".")[2] in self._read_past()]
            if past:
                raise ValueError(
                    f"{type(self.model).__name__} casts what enters {past[0]} to the type of its weight, which may not "
                    "become integers; train with exclude_modules for it, or keep the adapter beside"
                )
            for layer in self._layers():
                for name in layer.acting_on_merge(given.get("adapter_names")):
                    layer.rules[name].stored_group()
        model = super()._unload_and_optionally_merge(merge, *rest, **given)
        if merge and isinstance(model, PreTrainedModel) and any(True for _ in packed.packed_modules(model)):
            packed.mark(model)
        return model


def float_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer with this weight (out, in)."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def adapted_weights(shape: Shape) -> list[Weight]:
    """The matrices of the blocks, which "all-linear" reaches."""
    return [w for w in shape.of(*PROJECTIONS) if len(w.dims) == 2]


def fitted_group(shape: Shape) -> int:
    """The largest group that divides the input columns of every matrix of the blocks.

    Raises:
        ValueError: none of those that are tried does.
    """
    widths = {w.dims[1] for w in adapted_weights(shape)}
    for group in GROUPS:
        if all(width % group == 0 for width in widths):
            return group
    raise ValueError(f"no group of {', '.join(map(str, GROUPS))} columns divides widths of {sorted(widths)}")


def merged_shape(shape: Shape, bits: int, group: int) -> Shape:
    """The shape after merging: codes, and a stored step and offset a group; `group` 0 is a whole row."""

    def touch(weight: Weight) -> Weight:
        if weight not in adapted:
            return weight
        rule = Rule(bits, group or weight.dims[1], 1.0)
        try:
            spec = f"int8/{rule.stored_group()}" if bits > 4 else f"uniform{bits}/{rule.stored_group()}"
        except ValueError:
            return weight
        size = layout.parse(spec).bytes(*weight.dims)
        return Weight(weight.name, weight.role, weight.dims, size, size, weight.tied, weight.used)

    adapted = set(adapted_weights(shape))
    return shape.change(touch)


def _one(names: Any) -> str:
    names = list(dict.fromkeys(names))
    if len(names) != 1:
        raise ValueError(
            f"the adapters {', '.join(names)} cannot act together: a weight is rounded by one quantizer; activate one"
        )
    return names[0]  # type: ignore[no-any-return]


def _check_finite(numbers: Tensor | None, name: str) -> None:
    if numbers is not None and not numbers.isfinite().all():
        raise ValueError(f"the weight would not be finite; the adapter {name} seems to be broken")

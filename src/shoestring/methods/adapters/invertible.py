"""Invertible: bottlenecks and an invertible part at the embeddings teach a model a language; tasks stack on top.

How it works
    1. Behind the MLP of each block, u what the MLP gives and v the residual beside it, with the block's own norm LN
       frozen and used twice where the block ends with it (elsewhere LN is the identity):
       x = LN(u + v)                                                                                            (eq. 1)
       a = u + U relu(D x + b) + c        D (d / 16 x d), U (d x d / 16)                                        (eq. 2)
       and the block gives LN(a + v).                                                                           (eq. 3)
    2. What enters the first block is split in halves and coupled, and before the output embedding it is undone:
       y1 = x1 + F(x2),   y2 = x2 + G(y1)                                                                       (eq. 4)
       x2 = y2 - G(y1),   x1 = y1 - F(x2)                                                                       (eq. 5)
       F and G are bottlenecks of half the half's width. Both directions train them; the embeddings themselves, tied or
       not, stay as they are.
    3. A task adapter stacks on a language adapter: each reads what the one below it made, only the top one trains, and
       another language slips under the same task: model.base_model.set_adapter(["italian", "task"]).
    4. form="fusion" weighs several adapters in each block by attention, with x the block's output and o_i what adapter
       i would add; V starts as the identity:
       sum_i p_i V o_i,   p_i = softmax_i(Q x . K o_i)                                                          (eq. 6)

Where it bends
    Not mergeable: the bottlenecks are nonlinear. All weights start normal with spread .02, near the base model, unless
    init="zero", as in the settings here, starts exactly there with U and the second halves of F and G at zero.
    Equations 4 and 5 run in float32, so that they undo each other also in bfloat16. Two language adapters with an
    invertible part cannot act at once, and fused adapters have none: whose inverse would come last is not defined.
    Where a model has no output embedding, as a classifier, only equation 4 acts. Which blocks end with their norm is
    found by passing a few tokens. The paper's low-rank form is plain LoRA, and its full-size data are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._blocks import (
    ACTIVATIONS,
    SPREAD,
    Beside,
    BlockTuner,
    Bottleneck,
    changed,
    stream,
    width_of,
)
from shoestring.methods.adapters._shared import AdapterConfig, join, whole
from shoestring.models.anatomy import Block, closing_norms, inspect

METHOD = Method(
    paper=Paper(
        "Small Models, Big Impact: Efficient Corpus and Graph-Based Adaptation of Small Multilingual Language Models "
        "for Low-Resource Languages",
        "2025-02",
        code="d-gurgurov/Knowledge-Driven-Adaptation-LLMs",
        licence="Apache-2.0",
    ),
    provides="InvertibleConfig",
    saves=("parameters", "storage", "compute", "money"),
    combines={"quantizers": "yes"},
    traits={
        "family": "additive",
        "acts_on": "activation",
        "merges": "no",
        "parameters": "layers (2 d^2 / 16 + d / 16 + d) + d^2 / 2 + 3 d / 2",
    },
    expects={
        "check_merge": "the adapter is nonlinear, so that no weight of the base can hold it",
        "check_unmerge_restores_the_base": "the adapter is nonlinear and never merges",
    },
)
TRAINING = {"learning_rate": 1e-3}
FORMS = ("seq_bn", "seq_bn_inv", "fusion")


@dataclass
class InvertibleConfig(AdapterConfig):
    """Bottlenecks behind the MLPs, with or without the invertible part, or a fusion of such adapters.

    Args:
        form: seq_bn, seq_bn_inv (with the invertible part) or fusion.
        reduction: the hidden width by the bottleneck's.
        coupling_reduction: half the hidden width by the inner width of F and G.
        activation: relu or gelu.
        init: "normal", or "zero" for a start at the base model itself.
        fuse: names of the adapters that a fusion weighs; they must have been loaded, each of form seq_bn.
        target_modules: names or endings of whole blocks; None is every block.

    Raises:
        ValueError: a value that cannot be.
    """

    TYPE = "invertible"

    form: str = field(default="seq_bn_inv", metadata={"help": "seq_bn, seq_bn_inv or fusion"})
    reduction: int = field(default=16, metadata={"help": "Hidden width by bottleneck width"})
    coupling_reduction: int = field(default=2, metadata={"help": "Half the hidden width by the inner width of F and G"})
    activation: str = field(default="relu", metadata={"help": "relu or gelu"})
    init: str = field(default="normal", metadata={"help": "normal or zero"})
    fuse: list[str] | None = field(default=None, metadata={"help": "Adapters that a fusion weighs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("reduction", self.reduction)
        whole("coupling_reduction", self.coupling_reduction)
        for name, known in (("form", FORMS), ("init", ("normal", "zero")), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible; it is one of {', '.join(known)}")
        if (self.form == "fusion") != bool(self.fuse):
            raise ValueError(f"form={self.form!r} with fuse={self.fuse!r}; a fusion, and nothing else, names adapters")


class Fusion(nn.Module):
    """Attention over what several adapters would add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, width) * SPREAD)
        self.key = nn.Parameter(torch.randn(width, width) * SPREAD)
        self.value = nn.Parameter(torch.eye(width))

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        """(..., width) for x (..., width) and added (..., adapters, width)."""
        linear, dtype = nn.functional.linear, self.query.dtype
        query, each = linear(x.to(dtype), self.query), added.to(dtype)
        weights = (linear(each, self.key) @ query[..., None]).softmax(-2)  # (..., adapters, 1)
        return (weights * linear(each, self.value)).sum(-2).to(x.dtype)  # eq. 6


class Stacked(Beside):
    """Active adapters stand on one another in the order they are named; only the top one trains."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.set_requires_grad(self.active_adapters[:-1], False)


class InvertibleBlock(Stacked):
    """The bottlenecks of one block. `norm` is the block's closing normalisation, None where it ends by adding."""

    child = "invertible"
    adapter_layer_names = ("adapter", "fusion")
    other_param_names = ("fused",)

    def __init__(self, block: nn.Module, norm: nn.Module | None) -> None:
        super().__init__(block)
        self.adapter, self.fusion = nn.ModuleDict(), nn.ModuleDict()
        self.fused: dict[str, list[str]] = {}
        self.plain = self.takes_over(block, self.around) if norm is None else self.takes_over(norm, self.normed)

    def around(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of a block that ends by adding: LN is the identity."""
        return changed(self.plain(*args, **kwargs), lambda s: self.stacked(s, lambda x: x))

    def normed(self, s: Tensor) -> Tensor:
        """Forward of a block's closing norm, which gets u + v."""
        return self.plain(self.stacked(s, self.plain))  # eq. 3

    def stacked(self, s: Tensor, norm: Any) -> Tensor:
        """u + v after every active adapter, one upon the other."""
        for name in self.acting:
            x = norm(s)  # eq. 1
            if name in self.fusion:
                s = s + self.fusion[name](x, torch.stack([self.adapter[n](x) for n in self.fused[name]], -2))
            else:
                s = s + self.adapter[name](x)  # eq. 2, v on both sides
        return s


class Coupling(Stacked):
    """The invertible part: what enters the first blocks is coupled, what enters the output embedding is uncoupled."""

    child = "coupling"
    adapter_layer_names = ("f", "g")

    def __init__(self, firsts: list[nn.Module], head: nn.Module | None) -> None:
        super().__init__(firsts[0])
        self.f, self.g = nn.ModuleDict(), nn.ModuleDict()
        self.entries = [Entry(self, first) for first in firsts]
        if head is not None:
            self.plain_head = self.takes_over(head, self.head)

    def couple(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), in float32 inside."""
        for name in self.acting:
            x1, x2 = x.float().chunk(2, -1)
            y1 = x1 + self.f[name](x2)
            x = torch.cat([y1, x2 + self.g[name](y1)], -1).to(x.dtype)  # eq. 4
        return x

    def uncouple(self, y: Tensor) -> Tensor:
        """The inverse of `couple`."""
        for name in reversed(self.acting):
            y1, y2 = y.float().chunk(2, -1)
            x2 = y2 - self.g[name](y1)
            y = torch.cat([y1 - self.f[name](x2), x2], -1).to(y.dtype)  # eq. 5
        return y

    def head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.plain_head(self.uncouple(x), *args, **kwargs)


class Entry:
    """The first block of a stack, which gets coupled states."""

    def __init__(self, coupling: Coupling, block: nn.Module) -> None:
        self.coupling = coupling
        self.plain = coupling.takes_over(block, self.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = self.coupling.couple(stream(args, kwargs))
        return self.plain(x, *args[1:], **kwargs) if args else self.plain(**{**kwargs, "hidden_states": x})


class InvertibleModel(BlockTuner):
    prefix = "invertible_"
    tuner_layer_cls = Stacked
    peft_config: dict[str, Any]
    closing: dict[str, str]

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        for name in config.fuse or []:
            known = self.peft_config.get(name)
            if known is None or known.form != "seq_bn":
                why = "is not loaded" if known is None else f"has form={known.form!r}"
                raise ValueError(
                    f"the fusion of {', '.join(config.fuse)} needs {name}, which {why}; load it, as seq_bn"
                )

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if not hasattr(self, "closing"):
            self.closing = closing_norms(model)

    def attach(self, name: str, config: Any, block: Block) -> None:
        if config.form == "seq_bn_inv":
            self._couple(name, config)
        layer: Any = getattr(block.module, InvertibleBlock.child, None)
        if layer is None:
            closing = self.closing.get(block.name)
            layer = InvertibleBlock(block.module, self.model.get_submodule(closing) if closing else None)
        width = width_of(self.model, block)
        if config.form == "fusion":
            lacking = [n for n in config.fuse if n not in layer.adapter]
            if lacking:
                raise ValueError(f"{block.name} has no adapter {', '.join(lacking)} to fuse; leave the block out")
            layer.fused[name] = list(config.fuse)
            layer.put("fusion", name, Fusion(width), block.module)
            return
        inner = max(1, width // config.reduction)
        layer.put("adapter", name, Bottleneck(width, inner, config.activation, config.init == "zero"), block.module)

    def _couple(self, name: str, config: Any) -> None:
        """Give the model the invertible part of the adapter, once."""
        firsts = [block for block in self.blocks.values() if block.index == 0]
        coupling: Any = getattr(firsts[0].module, Coupling.child, None)
        if coupling is not None and name in coupling.f:
            return
        half, odd = divmod(width_of(self.model, firsts[0]), 2)
        if odd:
            raise ValueError(f'the hidden width {2 * half + 1} has no halves; use form="seq_bn"')
        if coupling is None:
            head = inspect(self.model).head
            coupling = Coupling([b.module for b in firsts], self.model.get_submodule(head) if head else None)
        inner = max(1, half // config.coupling_reduction)
        for part in ("f", "g"):
            coupling.put(part, name, Bottleneck(half, inner, config.activation, config.init == "zero"), nn.Identity())

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active, the first below the others; all but the last are frozen.

        Raises:
            ValueError: two of them have an invertible part.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        coupled = [name for name in names if self.peft_config[name].form == "seq_bn_inv"]
        if len(coupled) > 1:
            raise ValueError(
                f"{' and '.join(coupled)} each have an invertible part, and only one may be active; whose inverse "
                "comes last is not defined"
            )
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        users = [name for name, config in self.peft_config.items() if adapter_name in (config.fuse or ())]
        if users:
            raise ValueError(f"{adapter_name} is fused by {', '.join(users)}; delete the fusion first")
        super().delete_adapter(adapter_name)


def register() -> None:
    join("invertible", InvertibleConfig, InvertibleModel)


def example() -> InvertibleConfig:
    return InvertibleConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"form": "seq_bn_inv", "init": "zero"}, {"form": "seq_bn", "init": "zero"})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """2 d r + r + d parameters a block, r = d / reduction; the invertible part has d (d + 3) / 2 with its defaults."""
    asked = {"reduction": 16, "coupling_reduction": 2, **settings()[0], **options}
    width, half = shape.hidden, shape.hidden // 2
    if asked["form"] == "fusion":
        return Price(shape, trainable=shape.layers * 3 * width * width, train_flops=2.0)
    inner, narrow = max(1, width // asked["reduction"]), max(1, half // asked["coupling_reduction"])
    trained = shape.layers * (2 * width * inner + inner + width)
    if asked["form"] == "seq_bn_inv":
        trained += 2 * (2 * half * narrow + narrow + half)
    return Price(shape, trainable=trained, train_flops=2.0)

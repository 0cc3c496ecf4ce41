"""PaCA: train a few input columns of each frozen weight in place, with no adapter layer and little kept for backward.

How it works
    1. Of each chosen weight W (out x in), r of the input columns are drawn once, without repetition; every layer
       draws its own. Their numbers c are saved with the adapter.                                              (eq. 1)
    2. Trained is D (out x r), from zero; the columns become W[:, c] + s D with s = alpha / r, the others stay. (eq. 2)
    3. Forward: these columns are written into the weight itself, then one dense product y = W x + b.          (eq. 3)
    4. Kept for the backward pass are x[c], r numbers a token, not x; W and D are there anyway.                (eq. 4)
    5. Backward: grad x = W^T grad y by the same weight; grad D = s grad y x[c]^T, which is what full fine-tuning gives
       these columns; nothing is computed for the others.                                                      (eq. 5)
    6. Merging writes the columns for good: a plain linear layer with the very weight that was trained.

Where it bends
    The paper trains P = W[:, c] / s + D, the columns themselves. Gradients and steps are equal; D starts at the base
    bit for bit, is a change and not a mix when it meets another base, and weight decay draws it to the base, not to
    zero. The columns are written for the time of a product and put back after it, forward and backward (two writes
    of out x r numbers beside a product of tokens x in x out): the base is always whole, so adapters, tied modules,
    recomputation and saving need no care.
    Outside training, over packed integers (the paper's QPaCA), with several adapters active, under torch.compile, on
    a weight that trains too or a layer with hooks, y = base(x) + (s D) x[c] is computed: the same function, and it
    too keeps only x[c].
    On a bfloat16 base the columns of training are rounded to it, as merged ones are; before merging, answers are not.
    Columns are drawn at random, or by the largest or smallest norm; choosing by gradients is left out. One adapter
    trains in one thread at a time. On narrow layers there is little time to win; memory is saved everywhere.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import PROJECTIONS, Shape
from shoestring.methods.adapters import _shared
from shoestring.methods.adapters._tied import shares_table

METHOD = Method(
    paper=Paper(
        "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning",
        "2025-02",
        arxiv="2503.01905",
        code="WooSunghyeon/paca",
        licence="MIT",
    ),
    provides="PacaConfig",
    saves=("memory", "latency", "compute", "parameters", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "selective",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r out per weight",
    },
)
TRAINING = {"learning_rate": 1e-3}
SELECTIONS = ("random", "largest", "smallest")
BIASES = ("none", "all", "paca_only")

# A weight holds an adapter's columns only while a product runs, and only one thread may write into it.
_writing = threading.RLock()


@dataclass
class PacaConfig(_shared.AdapterConfig):
    """Settings of partial connections.

    Args:
        r: how many input columns of each weight are trained.
        alpha: the columns move alpha / r times as far as their parameters, which works like a learning rate.
        select: which columns: "random", or those of the "largest" or "smallest" norm.
        bias: which biases are trained too: "none", "all" of the model, or "paca_only", those of adapted layers.

    Raises:
        ValueError: a value that cannot be.
    """

    TYPE: ClassVar[str] = "paca"

    r: int = field(default=8, metadata={"help": "Trained input columns of each weight"})
    alpha: float = field(default=8.0, metadata={"help": "Columns move alpha / r times as far as their parameters"})
    select: str = field(default="random", metadata={"help": "Which columns: random, largest or smallest"})
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or paca_only"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _shared.whole("r", self.r)
        _shared.number("alpha", self.alpha, 1e-6)
        for name, known in (("select", SELECTIONS), ("bias", BIASES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(known)}")


class _Columns(torch.autograd.Function):
    """The product with a weight (out, in) of which some columns are trained and nothing else is.

    Two products in all: y = x W^T and grad x = grad y W; no gradient of the weight is ever made.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, change: Tensor, columns: Tensor, scale: float
    ) -> Tensor:
        few = _take(x.reshape(-1, x.shape[-1]), columns)
        ctx.save_for_backward(few, weight, change, columns)  # (eq. 4)
        ctx.scale = scale
        with _written(weight, change, columns, scale, x.dtype) as whole:
            return nn.functional.linear(x, whole, bias)  # (eq. 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacking raises if the weight or the change was altered since, as an optimizer step in between would.
        few, weight, change, columns = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        for_x = for_bias = for_change = None
        if ctx.needs_input_grad[0]:
            with _written(weight, change, columns, ctx.scale, grad.dtype) as whole:
                for_x = (rows @ whole).view(*grad.shape[:-1], whole.shape[1])  # (eq. 5)
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        if ctx.needs_input_grad[3]:
            # This way round the product is several times faster than rows.T @ few.
            for_change = (few.t() @ rows).t().to(change.dtype) * ctx.scale  # (eq. 5)
        return for_x, None, for_bias, for_change, None, None


@contextmanager
def _written(weight: Tensor, change: Tensor, columns: Tensor, scale: float, dtype: torch.dtype) -> Iterator[Tensor]:
    """The weight (out, in) in `dtype` with the adapter's columns; its own are back afterwards, bit for bit."""
    # Nobody sees the weight changed, so its version, which tells autograd of changes, must not count these writes.
    held = weight.data
    with _writing:
        own = _take(held, columns)
        trained = _trained(own, change, scale)
        if held.dtype != dtype:
            yield held.to(dtype).index_copy_(1, columns, trained.to(dtype))
            return
        try:
            held.index_copy_(1, columns, trained)
            yield held
        finally:
            held.index_copy_(1, columns, own)


def _take(matrix: Tensor, columns: Tensor) -> Tensor:
    """The columns of a matrix, contiguous."""
    # index_select would copy all of a matrix that lies transposed, and is slow in bfloat16.
    return matrix.gather(1, columns.expand(len(matrix), -1))


def _trained(own: Tensor, change: Tensor, scale: float) -> Tensor:
    """The columns (out, r) under the adapter, rounded once to the type of the base's `own`."""
    return torch.add(own.to(change.dtype), change, alpha=scale).to(own.dtype)  # (eq. 2)


def _plain(base: Any) -> bool:
    """Whether the layer is the product with its weight and no more: not packed, offloaded or watched."""
    product = type(base).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(base)
    return product and not base._forward_hooks and not base._forward_pre_hooks


class PacaLinear(_shared.LinearLayer):
    """A linear layer some of whose input columns are trained."""

    adapter_layer_names = ("paca_change",)
    other_param_names = ("paca_columns", "paca_width", "scaling")

    def containers(self) -> None:
        self.paca_change = nn.ParameterDict()
        self.paca_columns = BufferDict(persistent=True)
        self.paca_width = BufferDict(persistent=True)
        self.scaling: dict[str, float] = {}

    def fill(self, adapter_name: str, config: PacaConfig, key: str, **shared: Any) -> None:
        base = self.get_base_layer()
        if config.r > self.in_features:
            raise ValueError(
                f"r={config.r} is more than the {self.in_features} input columns of {key}; give at most that, or "
                "leave the layer out with exclude_modules"
            )
        self.paca_columns[adapter_name] = choose(config, base, self.in_features)
        self.paca_width[adapter_name] = torch.tensor(self.in_features)
        self.paca_change[adapter_name] = nn.Parameter(
            torch.zeros(self.out_features, config.r, dtype=_shared.compute_dtype(base))
        )
        self.scaling[adapter_name] = config.alpha / config.r

    def changed(self, adapter_name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        columns = self.paca_columns[adapter_name]
        own = _take(weight, columns)
        trained = _trained(own, self.paca_change[adapter_name], self.scaling[adapter_name])
        return weight.index_copy(1, columns, trained), bias

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        base: Any = self.get_base_layer()
        if len(names) > 1 or not self._writes(base):
            y = self.base_layer(x)
            for name in names:
                few = x.index_select(-1, self.paca_columns[name])
                y = y + nn.functional.linear(few, (self.scaling[name] * self.paca_change[name]).to(few.dtype))
            return y
        name, dtype, bias = names[0], _shared.answer_dtype(x), _shared.read_bias(base)
        # Rows go in and come out: models may add in place to what a layer gives, which no view made inside allows.
        y = _Columns.apply(
            x.to(dtype).reshape(-1, x.shape[-1]),
            _shared.read_weight(base),
            None if bias is None else bias.to(dtype),
            self.paca_change[name],
            self.paca_columns[name],
            self.scaling[name],
        )
        return y.view(*x.shape[:-1], -1)

    def _writes(self, base: Any) -> bool:
        """Whether the columns are written into the weight: in training alone, and where it does nothing else."""
        training = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return training and not base.weight.requires_grad and _plain(base)


class PacaModel(_shared.LinearTuner):
    """peft's tuner for PaCA."""

    prefix = "paca_"
    tuner_layer_cls = PacaLinear

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
                f"{current_key} shares its weight with the input embeddings, which would change with it; leave it out "
                "of target_modules, or load the model with tie_word_embeddings=False"
            )
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for key, columns in found.items():
            layer, _, rest = key.partition(".paca_columns.")
            if rest == adapter_name:
                width = found[f"{layer}.paca_width.{adapter_name}"]
                _check_columns(layer, columns, width, model.get_submodule(layer).in_features, config.r)  # type: ignore[arg-type]
        return found


def choose(config: PacaConfig, base: nn.Module, inputs: int) -> Tensor:
    """Numbers of the trained columns, (r,) int64, ascending; random ones follow `torch.manual_seed`."""
    if config.select == "random":
        return torch.randperm(inputs)[: config.r].sort().values  # (eq. 1)
    norms = _shared.read_weight(base).detach().float().norm(dim=0)
    return norms.topk(config.r, largest=config.select == "largest").indices.sort().values


def register() -> None:
    _shared.join("paca", PacaConfig, PacaModel)


def example() -> PacaConfig:
    return PacaConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 32, "alpha": 32.0, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r out trainable parameters per adapted weight, and biases if asked for; merged it costs what the base does."""
    chosen = {"bias": "none", **settings()[0], **options}
    adapted = [w for w in shape.of(*PROJECTIONS) if len(w.dims) == 2]
    trained = sum(int(chosen["r"]) * w.dims[0] for w in adapted)
    owners = {w.name.removesuffix("weight") + "bias" for w in adapted}
    for weight in shape.weights:
        if weight.name.endswith(".bias") and (chosen["bias"] == "all" or weight.name in owners):
            trained += weight.count * (chosen["bias"] != "none")
    return Price(shape, trainable=trained, train_flops=2.0)


def as_lora(folder: Path, out: Path) -> None:
    """Write the adapter in `folder` to `out` as an ordinary LoRA: B is the change, A picks the columns.

    Raises:
        ValueError: the adapter trained biases, which a LoRA beside others on one base cannot have.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config["bias"] != "none":
        raise ValueError(f"{folder} holds trained biases (bias={config['bias']!r}); merge it into its base instead")
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {}
    for key in [key for key in tensors if key.endswith(".paca_change")]:
        layer = key.removesuffix(".paca_change")
        change, columns, width = (tensors.pop(f"{layer}.paca_{part}") for part in ("change", "columns", "width"))
        _check_columns(layer, columns, width, int(width), config["r"])
        picks = torch.zeros(len(columns), int(width), dtype=change.dtype)
        picks[torch.arange(len(columns)), columns] = 1.0
        pairs[layer.removeprefix("base_model.model.")] = picks, change
    _shared.write_lora(out, config, pairs, dict.fromkeys(pairs, config["alpha"]), tensors)


def _check_columns(layer: str, columns: Tensor, width: Tensor, inputs: int, r: int) -> None:
    """Raises ValueError unless a file's columns are `r` different ones of a layer with `inputs` of them."""
    if width.numel() != 1 or int(width) != inputs:
        raise ValueError(
            f"the adapter's file is for a {layer} of {width.tolist()} input columns, and this one has {inputs}; use "
            "the base it was trained on"
        )
    whole = columns.dtype == torch.int64 and columns.shape == (r,)
    if not whole or columns.min() < 0 or columns.max() >= inputs or len(columns.unique()) < r:
        raise ValueError(f"the adapter's file does not name {r} different columns of {layer}; save the adapter again")

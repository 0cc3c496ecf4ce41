"""TriAdaptLoRA: start every low-rank update at one rank, and add ranks during training where its inner matrix grows.

How it works
    1. Beside each frozen W (out x in) lie lists of blocks, one block for each time the layer grew (by a_i, to R_i):
       A_i (a_i x in), B_i (out x a_i), row_i (a_i x R_i), col_i (R_i x a_i). All of them train.              (eq. 1)
    2. Stacked and padded with zeros the rows are a lower, the columns an upper triangle of blocks; their sum is the
       inner matrix C (R x R).                                                                               (eq. 2)
    3. h = W x + alpha / (R + 1e-5) B C A dropout(x), with the present R.                                      (eq. 3)
    4. At an event a layer's importance is n = ||C|| / blocks, its score what n gained since the last event.  (eq. 4)
    5. Events come every `incre_interval` steps after `init_warmup`, while all ranks together are below
       `target_total_rank`. With c the share of the remaining steps that is over and d the ranks still missing,
       k = int(d c), or int(exp(c ln d)) for non-linear growth, within 1 ... layers.                          (eq. 5)
    6. Every layer that scores no less than the k-th best grows by `incre_rank_num`.                          (eq. 6)
    7. The loss may get `orth_reg_weight` times the mean of ||A A' - I|| and ||B' B - I|| over all layers.     (eq. 7)

    `shoestring train` lets it grow by itself. With transformers' `Trainer` give `callbacks=[TriAdaptLoraCallback()]`;
    in a loop of your own set `total_step` and call `model.base_model.update_and_allocate(step)` after each optimizer
    step, the first being 0, and hand its new parameters to the optimizer.

Where it bends
    - The published start has B and C at zero, where every gradient is exactly zero and nothing is ever learned, and
      the same in each new block. Here C starts random as A does, and new blocks have random A, row and own diagonal;
      B at zero keeps the output. `init="paper-file"` gives the published zeros.
    - Growth divides by the larger R, so the update would shrink at once; `keep_scale` multiplies B to undo it.
    - The published score falls when a layer grows, because n counts blocks, and rises by the random start of the new
      one. `reset_score` compares with n as it is after growing. False for both gives the published rule.
    - Left out, warm-up is a tenth of the steps and the interval a twentieth (published: 0 and 1, which grows some layer
      at every step of a short run); half the reference rank is rounded down where it is odd; there is no event after
      the last step, whose ranks would never train.
    - A new block joins the optimizer's group of its like, at the present rate and weight decay, in place of a group of
      its own, so that a checkpoint's optimizer fits the model that is made anew from it.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_parameter_names

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import PROJECTIONS, Shape
from shoestring.methods.adapters import _shared
from shoestring.training.between_steps import BetweenSteps

METHOD = Method(
    paper=Paper(
        "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
        "2025-01",
    ),
    provides="TriAdaptLoraConfig",
    saves=("parameters", "compute"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "R (in + out) + 2 sum of a_i R_i a layer, R growing from init_rank",
    },
)
TRAINING = {"learning_rate": 1e-2}
SPREAD = 0.02  # of random starts
TINY = 1e-5


@dataclass
class TriAdaptLoraConfig(_shared.AdapterConfig):
    """Settings of an update that grows.

    Args:
        reference_rank: the mean rank to grow to, and where the next two come from.
        target_total_rank: growth ends when all ranks together reach it; left out, reference_rank times layers.
        incre_rank_num: ranks that a growing layer gets at an event; left out, half of reference_rank.
        init_rank: rank of every layer at the start.
        init_warmup: steps before the first event; left out, a tenth of all.
        incre_interval: steps between events; left out, a twentieth of all.
        total_step: steps of the whole run; trainers fill it in.
        rank_growth_model: "linear" or "non-linear", how many layers grow as time passes.
        alpha: the update is scaled by alpha / R.
        dropout: share of the inputs of A that is dropped in training.
        orth_reg_weight: weight of the orthogonality term in the loss; 0 leaves it out.
        keep_scale: whether a layer's output stays as it is when the layer grows.
        reset_score: whether a layer that grew is scored against what it is after growing.
        init: "random", or "paper-file" for the published zeros, with which nothing is learned.

    Raises:
        ValueError: numbers that cannot be.
    """

    TYPE: ClassVar[str] = "triadapt_lora"

    reference_rank: int = field(default=8, metadata={"help": "Mean rank to grow to"})
    target_total_rank: int | None = field(default=None, metadata={"help": "Sum of ranks at which growth ends"})
    incre_rank_num: int | None = field(default=None, metadata={"help": "Ranks a growing layer gets"})
    init_rank: int = field(default=1, metadata={"help": "Rank at the start"})
    init_warmup: int | None = field(default=None, metadata={"help": "Steps before the first event"})
    incre_interval: int | None = field(default=None, metadata={"help": "Steps between events"})
    total_step: int | None = field(default=None, metadata={"help": "Steps of the run; trainers fill it in"})
    rank_growth_model: str = field(default="linear", metadata={"help": "linear or non-linear"})
    alpha: float = field(default=16.0, metadata={"help": "The update is scaled by alpha / R"})
    dropout: float = field(default=0.0, metadata={"help": "Dropout before A"})
    orth_reg_weight: float = field(default=0.5, metadata={"help": "Weight of the orthogonality term"})
    keep_scale: bool = field(default=True, metadata={"help": "Growing leaves the output as it is"})
    reset_score: bool = field(default=True, metadata={"help": "Score against the state after growing"})
    init: str = field(default="random", metadata={"help": "random or paper-file"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reference_rank", "init_rank"):
            _shared.whole(name, getattr(self, name))
        for name, least in (("target_total_rank", 1), ("incre_rank_num", 1), ("init_warmup", 0), ("incre_interval", 1)):
            if getattr(self, name) is not None:
                _shared.whole(name, getattr(self, name), least)
        _shared.number("alpha", self.alpha, 0)
        _shared.number("dropout", self.dropout, 0, 0.999)
        _shared.number("orth_reg_weight", self.orth_reg_weight, 0)
        for name, known in (("rank_growth_model", ("linear", "non-linear")), ("init", ("random", "paper-file"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose {' or '.join(known)}")
        if self.init_rank > self.reference_rank:
            raise ValueError(
                f"init_rank={self.init_rank} is more than reference_rank={self.reference_rank}, which it grows to; "
                f"give at most {self.reference_rank}"
            )
        if self.init == "paper-file":
            warnings.warn('init="paper-file": every gradient is exactly zero, and nothing is learned', stacklevel=3)

    @property
    def grows_by(self) -> int:
        return self.incre_rank_num or max(1, self.reference_rank // 2)

    def target(self, layers: int) -> int:
        """Sum of ranks at which growth ends."""
        return self.target_total_rank or self.reference_rank * layers

    def schedule(self) -> tuple[int, int, int]:
        """(warm-up, interval, total) in steps.

        Raises:
            ValueError: the number of steps is not known, or the warm-up takes all of them.
        """
        total = self.total_step
        if total is None or total < 1:
            raise ValueError(f"total_step={total}: when ranks grow depends on it; give the number of training steps")
        warmup = total // 10 if self.init_warmup is None else self.init_warmup
        if warmup >= total:
            raise ValueError(f"init_warmup={warmup} leaves none of {total} steps; give less")
        return warmup, self.incre_interval or max(1, total // 20), total

    def how_many(self, step: int, missing: int, layers: int) -> int:
        """How many layers grow after `step` steps, with `missing` ranks left to give: from 1 to `layers`."""
        warmup, _, total = self.schedule()
        over = (step - warmup) / (total - warmup)
        if self.rank_growth_model == "linear":
            wanted = int(missing * over)  # (eq. 5)
        else:
            wanted = int(math.exp(over * math.log(max(1, missing))))
        return min(max(wanted, 1), layers)


class TriAdaptLoraLinear(_shared.LinearLayer):
    """A linear layer beside which lie lists of blocks. `triadapt_norm` is n at the last event, (), float32."""

    adapter_layer_names = ("triadapt_A", "triadapt_B", "triadapt_row", "triadapt_col")
    other_param_names = ("triadapt_dropout", "alpha", "init")
    cast_input_dtype_enabled = True
    triadapt_A: Any
    triadapt_B: Any
    triadapt_row: Any
    triadapt_col: Any
    triadapt_dropout: Any

    def containers(self) -> None:
        for name in (*self.adapter_layer_names, "triadapt_dropout"):
            setattr(self, name, nn.ModuleDict())
        # Not among the parameters' names, because peft would round it to the base's number type.
        self.triadapt_norm = BufferDict(persistent=True)
        self.alpha: dict[str, float] = {}
        self.init: dict[str, str] = {}

    def fill(self, adapter_name: str, config: Any, key: str, **shared: Any) -> None:
        self.alpha[adapter_name], self.init[adapter_name] = config.alpha, config.init
        self.triadapt_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        for blocks in self._containers():
            blocks[adapter_name] = nn.ParameterList()
        self._append(adapter_name, config.init_rank, torch.float32, self.get_base_layer().weight.device)

    def update_layer(self, adapter_name: str, config: Any, key: str, **shared: Any) -> None:
        super().update_layer(adapter_name, config, key, **shared)
        self.remember(adapter_name)

    def _containers(self) -> list[Any]:
        return [getattr(self, name) for name in self.adapter_layer_names]

    def blocks(self, adapter_name: str) -> tuple[Any, Any, Any, Any]:
        """The lists of A_i, B_i, row_i and col_i."""
        first, second, rows, cols = (container[adapter_name] for container in self._containers())
        return first, second, rows, cols

    def sizes(self, adapter_name: str) -> list[int]:
        """a_i, the ranks of the blocks."""
        return [len(block) for block in self.triadapt_A[adapter_name]]

    def _append(self, adapter_name: str, ranks: int, dtype: torch.dtype, device: Any, trains: bool = True) -> None:
        """Add a block that leaves the update as it is, but for its scale, and that gradients reach."""
        old = sum(self.sizes(adapter_name))
        a = SPREAD * torch.randn(ranks, self.in_features)
        b = torch.zeros(self.out_features, ranks)
        row, col = torch.zeros(ranks, old + ranks), torch.zeros(old + ranks, ranks)
        if self.init[adapter_name] == "random":
            row, col[old:] = SPREAD * torch.randn(ranks, old + ranks), SPREAD * torch.randn(ranks, ranks)
        elif old:
            a.zero_()
        for block, made in zip(self.blocks(adapter_name), (a, b, row, col)):
            block.append(nn.Parameter(made.to(device, dtype), requires_grad=trains))

    def grow(self, adapter_name: str, ranks: int, keep_scale: bool) -> None:
        """Give the adapter `ranks` more ranks in this layer."""
        newest = self.triadapt_A[adapter_name][-1]
        old = sum(self.sizes(adapter_name))
        if keep_scale:
            with torch.no_grad():
                for b in self.triadapt_B[adapter_name]:
                    b.mul_((old + ranks + TINY) / (old + TINY))
        self._append(adapter_name, ranks, newest.dtype, newest.device, newest.requires_grad)

    def resize(self, adapter_name: str, sizes: list[int]) -> None:
        """Make the blocks have the ranks `sizes`; values of blocks that change are to be loaded afterwards."""
        now = self.sizes(adapter_name)
        same = next((i for i, (a, b) in enumerate(zip(now, sizes)) if a != b), min(len(now), len(sizes)))
        newest = self.triadapt_A[adapter_name][-1]
        for container in self._containers():
            container[adapter_name] = nn.ParameterList(list(container[adapter_name])[:same])
        for ranks in sizes[same:]:
            self._append(adapter_name, ranks, newest.dtype, newest.device, newest.requires_grad)

    def inner(self, adapter_name: str) -> Tensor:
        """C (R, R); gradients flow to the blocks."""
        _, _, rows, cols = self.blocks(adapter_name)
        rank = sum(self.sizes(adapter_name))
        lower = torch.cat([nn.functional.pad(row, (0, rank - row.shape[1])) for row in rows])
        upper = torch.cat([nn.functional.pad(col, (0, 0, 0, rank - col.shape[0])) for col in cols], 1)
        return lower + upper  # (eq. 2)

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A (R, in), B (out, R) and C (R, R)."""
        first, second, _, _ = self.blocks(adapter_name)
        return torch.cat(list(first)), torch.cat(list(second), 1), self.inner(adapter_name)

    def scaling(self, adapter_name: str) -> float:
        return self.alpha[adapter_name] / (sum(self.sizes(adapter_name)) + TINY)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        a, b, c = self.matrices(adapter_name)
        return b @ (c @ a) * self.scaling(adapter_name)

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        out = self.base_layer(x)
        for name in names:
            a, b, c = self.matrices(name)
            x = self._cast_input_dtype(x, a.dtype)
            inner = nn.functional.linear(nn.functional.linear(self.triadapt_dropout[name](x), a), c)
            out = out + nn.functional.linear(inner * self.scaling(name), b)  # (eq. 3)
        return out

    def importance(self, adapter_name: str) -> float:
        """n, the inner matrix' norm over how often the layer grew."""
        with torch.no_grad():
            return float(self.inner(adapter_name).float().norm()) / len(self.triadapt_A[adapter_name])

    def score(self, adapter_name: str) -> float:
        """What the importance gained since it was last remembered."""
        return self.importance(adapter_name) - float(self.triadapt_norm[adapter_name])  # (eq. 4)

    def remember(self, adapter_name: str) -> None:
        meta = any(p.is_meta for p in self.triadapt_A[adapter_name])
        self.triadapt_norm[adapter_name] = torch.tensor(0.0 if meta else self.importance(adapter_name))

    def orthogonality(self, adapter_name: str) -> list[Tensor]:
        """How far the rows of A and the columns of B are from orthonormal."""
        a, b, _ = self.matrices(adapter_name)
        identity = torch.eye(len(a), device=a.device)
        return [torch.linalg.norm((half @ half.T).float() - identity) for half in (a, b.T)]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.triadapt_norm:
            del self.triadapt_norm[adapter_name]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class TriAdaptLoraModel(_shared.LinearTuner):
    """The tuner, which also decides who grows."""

    prefix = "triadapt_"
    tuner_layer_cls = TriAdaptLoraLinear
    _told = False

    def grown(self, adapter_name: str = "default") -> dict[str, list[int]]:
        """Layer -> ranks of its blocks; their sum is the layer's rank."""
        return {key: layer.sizes(adapter_name) for key, layer in self._layers(adapter_name).items()}

    def _layers(self, adapter_name: str) -> dict[str, TriAdaptLoraLinear]:
        found = ((key, m) for key, m in self.model.named_modules() if isinstance(m, TriAdaptLoraLinear))
        return {key: layer for key, layer in found if layer.has(adapter_name)}

    def _growing(self) -> str | None:
        """The adapter that trains, if any.

        Raises:
            ValueError: several do; the budget is that of one.
        """
        training = [
            name for name in self.active_adapters
            if any(layer.triadapt_A[name][0].requires_grad for layer in self._layers(name).values())
        ]  # fmt: skip
        if len(training) > 1:
            raise ValueError(f"{' and '.join(training)} train at once, and one adapter can grow; activate one of them")
        return training[0] if training else None

    def configure_schedule(self, total_steps: int) -> None:
        """Say how many steps the run has; it may be said again.

        Raises:
            ValueError: the run has no end, or the warm-up takes all of it.
        """
        name = self._growing()
        if name is None:
            return
        if not 0 < total_steps < 2**31:
            raise ValueError(f"a run of {total_steps} steps has no end to grow towards; set max_steps")
        config: Any = self.peft_config[name]
        config.total_step = total_steps
        config.schedule()

    def update_and_allocate(self, global_step: int) -> None:
        """Grow layers, if there is an event after the optimizer step of number `global_step`, the first being 0.

        Raises:
            ValueError: the number of steps of the run is not known, or several adapters train.
        """
        name = self._growing()
        if name is None:
            return
        config: Any = self.peft_config[name]
        warmup, interval, total = config.schedule()
        self._told = True
        step, layers = global_step + 1, self._layers(name)
        missing = config.target(len(layers)) - sum(sum(sizes) for sizes in self.grown(name).values())
        if step <= warmup or step % interval or step >= total or missing <= 0:
            return
        scores = {key: layer.score(name) for key, layer in layers.items()}
        enough = sorted(scores.values(), reverse=True)[config.how_many(step, missing, len(layers)) - 1]
        for key, layer in layers.items():
            layer.remember(name)
            if scores[key] >= enough:  # (eq. 6)
                layer.grow(name, config.grows_by, config.keep_scale)
                if config.reset_score:
                    layer.remember(name)

    def allocation_state(self) -> dict[str, Any]:
        """Blocks and remembered importances of all adapters, to go on from a checkpoint."""
        return {
            name: {
                key: [layer.sizes(name), float(layer.triadapt_norm[name])] for key, layer in self._layers(name).items()
            }
            for name in self.peft_config
        }

    def load_allocation_state(self, state: Mapping[str, Any]) -> None:
        for name, kept in state.items():
            for key, (sizes, importance) in kept.items():
                layer = self._layers(name)[key]
                layer.resize(name, sizes)
                layer.triadapt_norm[name] = torch.tensor(importance)

    def auxiliary_loss(self) -> Tensor | None:
        """The orthogonality term of the adapter that trains, with its weight; None where there is none."""
        name = self._growing() if self.training else None
        config: Any = self.peft_config[name] if name else None
        if not name or not config.orth_reg_weight:
            return None
        terms = [term for layer in self._layers(name).values() for term in layer.orthogonality(name)]
        return config.orth_reg_weight * torch.stack(terms).mean()  # (eq. 7)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # Only some of peft's models go through the tuner on their way to the wrapped one.
        self._hook = model.register_forward_hook(self._after_forward, with_kwargs=True)

    def _after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        self._warn_once()
        extra = self.auxiliary_loss() if kwargs.get("labels") is not None else None
        if extra is not None and getattr(out, "loss", None) is not None:
            out.loss = out.loss + extra

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        self._hook.remove()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _warn_once(self) -> None:
        name = None if self._told else self._growing()
        config: Any = self.peft_config[name] if name else None
        if name and config.total_step is None:
            warnings.warn(
                "ranks do not grow in this training: give TriAdaptLoraCallback to Trainer, or set total_step and call "
                "model.base_model.update_and_allocate(step) after each optimizer step",
                stacklevel=2,
            )
        self._told = self._told or name is not None

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        for key, layer in model.named_modules():
            if isinstance(layer, TriAdaptLoraLinear) and layer.has(adapter_name):
                sizes = _sizes_in(state_dict, key)
                if sizes != layer.sizes(adapter_name):
                    layer.resize(adapter_name, sizes)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class TriAdaptLoraCallback(TrainerCallback):
    """Lets the adapter grow in a plain `Trainer`; saving and resuming are the Trainer's own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if args.world_size > 1 or args.torch_compile:
            raise ValueError(
                "an adapter that grows gets new parameters while it trains, which several processes and compiled "
                "models would not see; train in one process, without torch_compile"
            )
        self.between_steps = BetweenSteps(model)
        self.between_steps.begin(state.max_steps)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        # The names that Trainer applies weight decay to; only that blocks are among them matters here.
        self.between_steps.act(
            state.global_step, optimizer, lambda: get_parameter_names(model, [nn.LayerNorm], [r"bias", r"norm"])
        )


def _sizes_in(tensors: Mapping[str, Tensor], layer: str) -> list[int]:
    """Ranks of a layer's blocks in an adapter's file.

    Raises:
        ValueError: the blocks are not numbered from 0, or one is empty.
    """
    wanted = re.compile(rf"(?:base_model\.model\.)?{re.escape(layer)}\.triadapt_A\.(\d{{1,6}})")
    found = {int(match[1]): len(t) for name, t in tensors.items() if (match := wanted.fullmatch(name)) and t.dim() == 2}
    sizes = [found[number] for number in sorted(found)]
    if not sizes or sorted(found) != list(range(len(found))) or min(sizes) < 1:
        raise ValueError(f"the adapter's file has no whole list of blocks for {layer}; use an intact file")
    return sizes


def register() -> None:
    _shared.join("triadapt_lora", TriAdaptLoraConfig, TriAdaptLoraModel)


def example() -> TriAdaptLoraConfig:
    return TriAdaptLoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"reference_rank": 8, "alpha": 16.0, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """R (in + out) + 2 R^2 parameters per adapted weight at the start, where R is `init_rank`."""
    rank = int({"init_rank": 1, **settings()[0], **options}["init_rank"])
    weights = [w for w in shape.of(*PROJECTIONS) if len(w.dims) == 2]
    return Price(shape, trainable=sum(rank * sum(w.dims) + 2 * rank**2 for w in weights), train_flops=2.0)


def as_lora(folder: Path, out: Path) -> None:
    """Write the adapter in `folder` to `out` as an ordinary LoRA of as many ranks as each layer grew: B and C A."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    suffix = ".triadapt_A.0"
    pairs = {}
    for key in [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]:
        numbers = range(len(_sizes_in(tensors, key)))
        a = torch.cat([tensors.pop(f"{key}.triadapt_A.{i}") for i in numbers])
        b = torch.cat([tensors.pop(f"{key}.triadapt_B.{i}") for i in numbers], 1)
        c = torch.zeros(len(a), len(a))
        done = 0
        for i in numbers:
            row, col = tensors.pop(f"{key}.triadapt_row.{i}"), tensors.pop(f"{key}.triadapt_col.{i}")
            c[done : row.shape[1], : row.shape[1]] += row
            c[: row.shape[1], done : row.shape[1]] += col
            done = row.shape[1]
        del tensors[f"{key}.triadapt_norm"]
        # LoRA divides by R, not by R + 1e-5.
        pairs[key.removeprefix("base_model.model.")] = c @ a * (len(a) / (len(a) + TINY)), b
    _shared.write_lora(out, config, pairs, dict.fromkeys(pairs, config["alpha"]), tensors)

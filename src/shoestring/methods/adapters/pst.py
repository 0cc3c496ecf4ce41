"""PST: prune a weight while a low-rank update trains, by scores that are low-rank as well.

How it works
    W0 (out x in) is frozen. Trained are U (out x r), V (r x in), A (out x q), B (q x in), R (out) and C (in).
    1. W = W0 + beta U V; U starts normal, V at zero.                                                       (eq. 1)
    2. S = |W| + a1 A B + a2 (R 1^T + 1 C^T): the size of the weight as it now is, what the data say of single weights,
       and what they say of whole rows and columns. A starts normal; B, R and C at zero.                    (eq. 2)
    3. M is 0 for the floor(s out in) smallest scores of the matrix and 1 elsewhere; s is the present sparsity. (eq. 3)
    4. y = x (M o W)^T + bias, with o entry by entry.                                                       (eq. 4)
    5. With G = dL/d(M o W) the mask's gradient passes to the scores as it is, also where weights are pruned, so that
       these can come back:
       dL/dS = G o W, hence dL/dA = a1 dS B^T, dL/dB = a1 A^T dS, dL/dR and dL/dC = a2 times its row and column sums;
                                                                                                            (eq. 5)
       dL/dW = G o M + sign(W) o dL/dS, hence dL/dU = beta dW V^T and dL/dV = beta U^T dW.                   (eq. 6)
    6. Step t of T: s is `initial_sparsity` until 0.1 T and `sparsity` in the last 0.3 T; between, with p from 0 to 1,
       s = sparsity + (initial_sparsity - sparsity) (1 - p)^3.                                              (eq. 7)
    7. `merge_and_unload` leaves plain linear layers of the weight M o W. A bitmap and the values in bfloat16 take
       1 + 16 (1 - s) bits a weight: 9 at one half, 2.6 at nine tenths.

Where it bends
    U and A are drawn with variance 1 / r and 1 / q in place of 1; the authors' small learning rates, 1e-4 for a
    decoder, become three times as large here. A, B, R and C train at `score_rate` times the learning rate, without
    weight decay; in short runs the scores hardly move at the rate of the weights, and pruning is then by size.
    Of equal scores those that come first in the matrix are pruned. Numbers are compared in float32.
    Kept for the backward pass are x, references to the parameters and the score at which the mask cuts: W and S are
    made anew there. For generating, merge: before that the weight is made anew for every token.
    How long a run is comes from the training loop; in transformers' own `Trainer` pass `PstCallback()`, in a loop of
    your own call `model.base_model.configure_schedule(steps)` once and `model.base_model.update_and_allocate(step)`
    after each step. Without either nothing is pruned, and merging says so. Sparsity never falls: an adapter that is
    trained again keeps what it has. There is no dropout: with it W would not be the sum. One adapter acts at a time.
    Zeros of the merged weight are lost when another adapter is merged into it; `merge_within_zeros` keeps them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import TrainerCallback

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import PROJECTIONS, Shape
from shoestring.methods.adapters import _shared
from shoestring.methods.adapters._tied import shares_table
from shoestring.training.between_steps import BetweenSteps

METHOD = Method(
    paper=Paper(
        "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning",
        "2022-05",
        arxiv="2205.11005",
        code="alibaba/AliceMind",
    ),
    provides="PstConfig",
    saves=("parameters", "memory", "storage"),
    combines={"quantizers": "it computes with the weights themselves; prune first and quantize the merged model"},
    traits={
        "family": "hybrid",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "(r + q + 1) (in + out) per weight",
    },
)
TRAINING = {"learning_rate": 3e-4}
NEEDS_FLOAT = True


@dataclass
class PstConfig(_shared.AdapterConfig):
    """Settings of a low-rank update that prunes its weight while it trains.

    Args:
        sparsity: share of zeros in every adapted matrix when training ends.
        initial_sparsity: the same when it begins.
        r: rank of the update U V.
        beta: the update is multiplied by it.
        score_rank: q, rank of the scores A B.
        score_scale: a1, weight of A B among the scores.
        line_scale: a2, weight of the rows' and columns' scores. With a1 and a2 zero pruning is by size alone.
        score_rate: learning rate of the scores, as a share of that of U and V.
        begin: share of a run before sparsity rises.
        hold: share of a run at its end in which sparsity stays.

    Raises:
        ValueError: a value that cannot be, such as a sparsity of 1 or one that falls.
    """

    TYPE: ClassVar[str] = "pst"

    sparsity: float = field(default=0.5, metadata={"help": "Share of zeros at the end"})
    initial_sparsity: float = field(default=0.0, metadata={"help": "Share of zeros at the beginning"})
    r: int = field(default=8, metadata={"help": "Rank of the update"})
    beta: float = field(default=1.0, metadata={"help": "The update is multiplied by it"})
    score_rank: int = field(default=8, metadata={"help": "Rank of the scores"})
    score_scale: float = field(default=1.0, metadata={"help": "Weight of the low-rank scores"})
    line_scale: float = field(default=1.0, metadata={"help": "Weight of the scores of rows and columns"})
    score_rate: float = field(default=1.0, metadata={"help": "Learning rate of the scores as a share of the update's"})
    begin: float = field(default=0.1, metadata={"help": "Share of a run before sparsity rises"})
    hold: float = field(default=0.3, metadata={"help": "Share of a run at its end in which sparsity stays"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "score_rank"):
            _shared.whole(name, getattr(self, name))
        for name in ("beta", "score_scale", "line_scale", "score_rate"):
            _shared.number(name, getattr(self, name), 0)
        for name in ("sparsity", "initial_sparsity", "begin", "hold"):
            _shared.number(name, getattr(self, name), 0, 1)
        if self.sparsity >= 1:
            raise ValueError(f"sparsity={self.sparsity!r} is not possible; some weights must be left, so give below 1")
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity={self.initial_sparsity} is more than sparsity={self.sparsity}, to which it rises"
            )
        if self.begin + self.hold > 1:
            raise ValueError(f"begin={self.begin} and hold={self.hold} are together more than the run")

    def sparsity_at(self, step: int, total: int) -> float:
        """The sparsity with which step number `step` of `total` computes; the first is 0, and `total` is the end."""
        if step >= (1 - self.hold) * total:
            return self.sparsity
        if step <= self.begin * total:
            return self.initial_sparsity
        part = (step - self.begin * total) / ((1 - self.begin - self.hold) * total)
        return self.sparsity + (self.initial_sparsity - self.sparsity) * (1 - part) ** 3  # (eq. 7)


@dataclass(frozen=True)
class Rule:
    """Weight and scores from an adapter's tensors: beta, a1 and a2."""

    beta: float
    score_scale: float
    line_scale: float

    def weight(self, base: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """W (out, in) in float32, a tensor of its own."""
        # Under autocast the product would have eight bits, and merging would keep other weights.
        with torch.autocast(base.device.type, enabled=False):
            return torch.addmm(base.float(), u, v, alpha=self.beta)  # (eq. 1)

    def scores(self, weight: Tensor, a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """S (out, in) in float32."""
        with torch.autocast(weight.device.type, enabled=False):
            scores = torch.addmm(weight.abs(), a, b, alpha=self.score_scale)  # (eq. 2)
        return scores.add_(rows.unsqueeze(1), alpha=self.line_scale).add_(columns, alpha=self.line_scale)

    def masked(self, zeros: int, base: Tensor, u: Tensor, v: Tensor, *of_scores: Tensor) -> tuple[Tensor, Cut]:
        """M o W (out, in) in float32 with `zeros` weights pruned, and where the mask cuts."""
        weight = self.weight(base, u, v)
        if not zeros:
            return weight, Cut(-math.inf, 0)
        scores = self.scores(weight, *of_scores)
        cut = cut_at(scores, zeros)
        return weight.masked_fill_(pruned(scores, cut), 0.0), cut


@dataclass(frozen=True)
class Cut:
    """Scores below `score` are pruned, and of those that equal it the first `ties`."""

    score: float
    ties: int


def cut_at(scores: Tensor, zeros: int) -> Cut:
    """Where to cut the float32 `scores` so that exactly `zeros` of them, from 1 to all, are pruned."""
    flat = scores.detach().reshape(-1)
    if flat.device.type == "cpu":
        least: Any = np.partition(flat.numpy(), zeros - 1)[zeros - 1]  # the same selection, ten times as fast
    else:
        least = np.float32(flat.kthvalue(zeros).values.item())
    score = float(least)
    ties = zeros - int((flat < score).sum())
    if ties == int((flat == score).sum()):
        return Cut(float(np.nextafter(least, np.float32(np.inf))), 0)
    return Cut(score, ties)


def pruned(scores: Tensor, cut: Cut) -> Tensor:
    """Which weights are pruned, bool (out, in). What is not a number is kept, so that it shows."""
    gone = scores < cut.score
    if cut.ties:
        gone.view(-1)[(scores == cut.score).view(-1).nonzero()[: cut.ties, 0]] = True
    return gone


class MaskedProduct(torch.autograd.Function):
    """x [..., in] times the masked weight's transpose, plus bias.

    Kept for the backward pass are x, the tensors by reference, and the cut; weight and scores are made again there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, rule: Rule, zeros: int, base: Tensor, *own: Tensor
    ) -> Tensor:  # fmt: skip
        weight, ctx.cut = rule.masked(zeros, base, *own)
        ctx.save_for_backward(x, base, *own)
        ctx.rule = rule
        return F.linear(x, weight.to(x.dtype), bias)  # (eq. 4)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base, u, v, a, b, rows, columns = ctx.saved_tensors
        rule: Rule = ctx.rule
        flat, tokens = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        weight = rule.weight(base, u, v)
        gone = pruned(rule.scores(weight, a, b, rows, columns), ctx.cut)
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = (flat @ weight.masked_fill(gone, 0.0).to(x.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            for_bias = flat.sum(0)
        if not any(ctx.needs_input_grad[5:]):
            return for_x, for_bias, *(None,) * 9
        of_weight = (flat.t() @ tokens).float()
        of_scores = of_weight * weight
        for_a = (of_scores @ b.t()).mul_(rule.score_scale)  # (eq. 5)
        for_b = (a.t() @ of_scores).mul_(rule.score_scale)
        for_rows, for_columns = of_scores.sum(1).mul_(rule.line_scale), of_scores.sum(0).mul_(rule.line_scale)
        of_weight.masked_fill_(gone, 0.0).addcmul_(weight.sign_(), of_scores)  # (eq. 6)
        for_u, for_v = (of_weight @ v.t()).mul_(rule.beta), (u.t() @ of_weight).mul_(rule.beta)
        return for_x, for_bias, None, None, None, for_u, for_v, for_a, for_b, for_rows, for_columns


class PstLinear(_shared.LinearLayer):
    """A linear layer of which an adapter prunes the weight. `pst_zeros` is how many weights are zero, (), int64."""

    adapter_layer_names = ("pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C")
    other_param_names = ("pst_zeros", "rules")

    def containers(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        # A whole number is saved with the adapter and is not rounded when the model is cast.
        self.pst_zeros = BufferDict(persistent=True)
        self.rules: dict[str, Rule] = {}

    def fill(self, adapter_name: str, config: PstConfig, key: str, **shared: Any) -> None:
        base: Any = self.get_base_layer()
        rows, columns, device = self.out_features, self.in_features, base.weight.device
        zeros = _zeros(config.sparsity, rows * columns)
        if (config.sparsity and not zeros) or zeros >= rows * columns:
            raise ValueError(
                f"sparsity={config.sparsity} of the {rows} x {columns} weights of {key} are {zeros} zeros; leave the "
                "layer out with exclude_modules"
            )
        self.rules[adapter_name] = Rule(config.beta, config.score_scale, config.line_scale)
        started = {
            "pst_U": torch.randn(rows, config.r, device=device) / math.sqrt(config.r),
            "pst_V": torch.zeros(config.r, columns, device=device),
            "pst_A": torch.randn(rows, config.score_rank, device=device) / math.sqrt(config.score_rank),
            "pst_B": torch.zeros(config.score_rank, columns, device=device),
            "pst_R": torch.zeros(rows, device=device),
            "pst_C": torch.zeros(columns, device=device),
        }
        for name, value in started.items():
            getattr(self, name)[adapter_name] = nn.Parameter(value)
        self.pst_zeros[adapter_name] = torch.tensor(_zeros(config.initial_sparsity, rows * columns), device=device)

    def parts(self, adapter_name: str) -> tuple[Tensor, ...]:
        """W0 (out, in), then U, V, A, B, R and C in float32; gradients flow."""
        own = (getattr(self, name)[adapter_name].float() for name in self.adapter_layer_names)
        return _shared.read_weight(self.get_base_layer()), *own

    def raise_sparsity(self, adapter_name: str, sparsity: float) -> None:
        """Prune this share of the weights from now on, if fewer are pruned."""
        zeros = _zeros(sparsity, self.out_features * self.in_features)
        self.pst_zeros[adapter_name].clamp_(min=zeros)

    def changed(self, adapter_name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        zeros = int(self.pst_zeros[adapter_name])
        return self.rules[adapter_name].masked(zeros, weight, *self.parts(adapter_name)[1:])[0], bias

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        name, dtype, bias = _one(names), _shared.answer_dtype(x), _shared.read_bias(self.get_base_layer())
        bias = None if bias is None else bias.to(dtype)
        # Rows go in and come out: models may add in place to what a layer gives, which no view made inside allows.
        rows, zeros = x.to(dtype).reshape(-1, x.shape[-1]), int(self.pst_zeros[name])
        y = MaskedProduct.apply(rows, bias, self.rules[name], zeros, *self.parts(name))
        return y.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        wanted = self.active_adapters if adapter_names is None else adapter_names
        if names := [*self.merged_adapters, *(name for name in wanted if self.has(name))]:
            _one(names)
        super().merge(safe_merge, adapter_names)


class PstModel(_shared.LinearTuner):
    """The tuner; it raises the sparsity between steps."""

    prefix = "pst_"
    tuner_layer_cls = PstLinear
    _total = 0
    _step = 0

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str):
            _one(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def configure_schedule(self, total_steps: int) -> None:
        """Hear how long the run is; it may be said again.

        Raises:
            ValueError: the run has no end.
        """
        if not 0 < total_steps < 2**31:
            raise ValueError(f"a run of {total_steps} steps has no end to reach a sparsity by; set max_steps")
        self._total = total_steps
        self._follow()

    def update_and_allocate(self, global_step: int) -> None:
        """Set the sparsity for the step after that of number `global_step`, the first being 0.

        Raises:
            ValueError: nobody said how long the run is.
        """
        if not self._total:
            raise ValueError("the sparsity depends on how long the run is; call configure_schedule(total_steps) first")
        self._step = global_step + 1
        self._follow()

    def _follow(self) -> None:
        for name in self.active_adapters:
            config: Any = self.peft_config[name]
            self.raise_sparsity(config.sparsity_at(self._step, self._total), name)

    def raise_sparsity(self, sparsity: float, adapter_name: str = "default") -> None:
        """Prune this share of every adapted matrix from now on; where more is pruned, it stays so.

        Raises:
            ValueError: below 0, or 1 and above.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity!r} is not possible; it must be from 0 to below 1")
        for layer in self._layers(adapter_name):
            layer.raise_sparsity(adapter_name, sparsity)

    def _layers(self, adapter_name: str) -> Iterator[PstLinear]:
        found = (module for module in self.model.modules() if isinstance(module, PstLinear))
        return (layer for layer in found if layer.has(adapter_name))

    def allocation_state(self) -> dict[str, Any]:
        """Zeros of every layer by adapter, to go on from a checkpoint."""
        zeros = {name: [int(layer.pst_zeros[name]) for layer in self._layers(name)] for name in self.peft_config}
        return {"step": self._step, "zeros": zeros}

    def load_allocation_state(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        for name, kept in state["zeros"].items():
            for layer, zeros in zip(self._layers(name), kept, strict=True):
                layer.pst_zeros[name].fill_(zeros)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """A parameter group of torch's for the scores of each adapter."""
        return [
            {
                "params": [
                    getattr(layer, score)[name]
                    for layer in self._layers(name)
                    for score in ("pst_A", "pst_B", "pst_R", "pst_C")
                ],
                "lr": learning_rate * config.score_rate,  # type: ignore[attr-defined]
                "weight_decay": 0.0,
            }
            for name, config in self.peft_config.items()
        ]

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
                f"{current_key} shares its weight with the input embeddings, which would lose rows with it; leave it "
                "out of target_modules"
            )
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, *rest: Any, **given: Any) -> Any:
        for name in (given.get("adapter_names") or self.active_adapters) if merge else ():
            config: Any = self.peft_config[name]
            least = min((int(m.pst_zeros[name]) / m.weight.numel() for m in self._layers(name)), default=1.0)
            if least < 0.99 * config.sparsity:
                warnings.warn(
                    f"only {least:.0%} of the weights are pruned, of {config.sparsity:.0%} wanted: the training loop "
                    "did not say how long it is, or ended before; see PstCallback",
                    stacklevel=3,
                )
        return super()._unload_and_optionally_merge(merge, *rest, **given)


class PstCallback(TrainerCallback):
    """Raises the sparsity in a plain `Trainer`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.between_steps = BetweenSteps(model)
        self.between_steps.begin(state.max_steps)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        self.between_steps.act(state.global_step, optimizer, tuple)


@torch.no_grad()
def merge_within_zeros(model: PeftModel) -> nn.Module:
    """`model.merge_and_unload()` for an adapter on a pruned model: what was zero in an adapted weight stays zero.

    The model then answers otherwise than with the adapter beside it, by what the adapter put in these places.

    Raises:
        ValueError: an adapter is merged already, so that the zeros are gone.
    """
    tuned: Any = model.base_model.model
    zeros = {}
    for name, layer in tuned.named_modules():
        if isinstance(layer, BaseTunerLayer):
            if layer.merged:
                raise ValueError(f"{name} has an adapter merged already, which filled its zeros; unmerge it first")
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is not None:
                zeros[name] = weight == 0
    merged: Any = model.merge_and_unload()  # type: ignore[operator]
    for name, gone in zeros.items():
        merged.get_submodule(name).weight.masked_fill_(gone, 0.0)
    return merged  # type: ignore[no-any-return]


def _zeros(sparsity: float, count: int) -> int:
    return math.floor(sparsity * count)  # (eq. 3)


def _one(names: Any) -> str:
    names = list(dict.fromkeys(names))
    if len(names) != 1:
        raise ValueError(
            f"the adapters {', '.join(names)} cannot act together: a weight is pruned by one mask; activate one"
        )
    return names[0]  # type: ignore[no-any-return]


def register() -> None:
    _shared.join("pst", PstConfig, PstModel)


def example() -> PstConfig:
    return PstConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, gentlest first."""
    return (
        {"sparsity": 0.5, "r": 8, "score_rank": 8, "target_modules": "all-linear"},
        {"sparsity": 0.7, "r": 8, "score_rank": 8, "target_modules": "all-linear"},
        {"sparsity": 0.9, "r": 8, "score_rank": 8, "target_modules": "all-linear"},
    )


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """(r + q + 1) (in + out) trainable numbers a weight; merged it is as large as the base, its zeros included."""
    made = PstConfig(**{**settings()[0], **options})
    ranks = made.r + made.score_rank + 1
    trained = sum(ranks * sum(w.dims) for w in shape.of(*PROJECTIONS) if len(w.dims) == 2)
    return Price(shape, trainable=trained, train_flops=3.0)

"""MixLoRA: send every token through the few of many low-rank feed-forward experts that a trained router picks for it.

How it works
    1. The model stays frozen. An expert j of a layer is the layer's feed-forward block with a low-rank pair of its own
       beside each linear layer m; A starts random, B at zero:
       W_jm = W_m + s B_jm A_jm,   s = alpha / r   (alpha / sqrt r with rsLoRA; rows rescaled with DoRA)         (eq. 1)
    2. A router G (E x d), in float32, gives each token x its probabilities, and k of E experts work on it:
       p = softmax(G x),   w_j = p_j / (sum of the k largest p) for these, else 0                                (eq. 2)
       y = sum_j w_j expert_j(x) + (1 - sum_j w_j) FFN(x)                                                        (eq. 3)
    3. The experts differ by their pairs alone, so the frozen products are shared. W_gate x and W_up x are computed once
       for all tokens; expert j adds its pairs on the rows routed to it, which gives h_j; and what leaves the block goes
       through W_down once, because that is linear:
       y = W_down (sum_j w_j h_j) + sum_j w_j s B_j A_j h_j                                                      (eq. 4)
    4. So that no expert starves, training adds a coefficient times, over the tokens of all layers but padding,
       E sum_e f_e P_e,   f_e share of tokens sent to e, P_e mean p_e;   k when even, E when collapsed           (eq. 5)
    5. The attention's projections get one pair each, of their own rank, with experts or without.
    6. Other routings. "mixlora-dynamic" keeps experts in falling order of p until their sum passes `top_p`, with
       w_j = p_j. "mixlora-switch" keeps the likeliest, w = p, unless `expert_capacity` tokens of the same text went to
       it before; a token too many gets FFN(x). It adds the mean squared log-sum-exp of the logits to the loss.

Where it bends
    The last product of a block runs once a token, not k times as in the authors' code (with DoRA on it: k times). The
    rest of eq. 3, 1 - sum w, goes to the frozen block; the authors leave it out for the two other routings, which
    shrinks the block's output before anything is learnt. Capacity is counted over the tokens of a text that one call
    sees, and padding takes none. `jitter_noise` reaches the router alone, in training alone. A temperature
    divides the logits. One adapter acts on a row of a batch: rows are assigned with `adapter_names`, in training as
    well. Folders are written and read in the authors' layout. No merging: which weights a token meets depends on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers.activations import ACT2FN

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape, Weight
from shoestring.methods.adapters import _shared as shared
from shoestring.models.anatomy import FEED_FORWARDS, FeedForward

METHOD = Method(
    paper=Paper(
        "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA based Mixture of Experts",
        "2024-04",
        arxiv="2404.15159",
        code="TUDB-Labs/MixLoRA",
        licence="Apache-2.0",
    ),
    provides="MixLoraConfig",
    saves=("parameters", "memory", "latency", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "additive",
        "acts_on": "weight",
        "merges": "no",
        "parameters": "per layer E d + E r sum (in + out) over the feed-forward block, and r (in + out) in attention",
    },
    expects={
        "check_merge": "which experts work on a token depends on the token, so no one weight replaces them",
        "check_unmerge_restores_the_base": "nothing can be merged: which experts work depends on the token",
    },
)
TRAINING = {"learning_rate": 1e-3}
BASE = "__base__"  # peft's word for a row of a batch without an adapter
_LINEARS = {name for form in FEED_FORWARDS.values() for name in form.linears}
_UNMERGEABLE = "MixLoRA cannot be merged: which experts work on a token depends on the token; keep it beside its base"


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairSettings:
    """What a low-rank pair is made of."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass
class MixLoraConfig(shared.AdapterConfig):
    """Settings of a MixLoRA adapter; the names are those of the authors' files.

    Args:
        r, lora_alpha, lora_dropout, use_rslora, use_dora: of the pairs in attention and, unless `expert_lora` says
            otherwise, of the experts.
        expert_lora: any of these five, for the experts alone.
        routing_strategy: "mixlora" (the `top_k` likeliest), "mixlora-dynamic" (`top_p`) or "mixlora-switch" (one, with
            `expert_capacity`).
        num_experts: experts in each layer.
        router_loss: whether training adds the balance term, times `router_aux_loss_coef`.
        router_z_loss_coef: of the second term of "mixlora-switch".
        router_init_range: standard deviation of a new router; None means 0.02, and 1 for "mixlora-switch".
        jitter_noise: in training the router's input is multiplied by numbers from 1 - j to 1 + j; None means 0, and
            0.01 for "mixlora-switch".
        temperature: divides the logits of "mixlora-dynamic"; 0 leaves them as they are.
        act_fn: name of an activation that the experts use in place of the model's own.

    `target_modules` names projections of the attention and of the feed-forward block, at least one of the latter; None
    means all of them.
    """

    TYPE = "mixlora"

    r: int = field(default=8, metadata={"help": "Rank of a pair"})
    lora_alpha: float = field(default=16, metadata={"help": "A pair is scaled by alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before a pair"})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt r"})
    use_dora: bool = field(default=False, metadata={"help": "Learn the rows' lengths apart"})
    expert_lora: dict[str, Any] | None = field(default=None, metadata={"help": "What differs for the experts' pairs"})
    routing_strategy: str = field(default="mixlora", metadata={"help": "How experts are picked"})
    num_experts: int = field(default=8, metadata={"help": "Experts in each layer"})
    top_k: int = field(default=2, metadata={"help": "Experts for each token"})
    top_p: float = field(default=0.8, metadata={"help": "Probability that the picked experts cover"})
    temperature: float = field(default=0.0, metadata={"help": "Divides the logits"})
    expert_capacity: int = field(default=32, metadata={"help": "Tokens of a text that an expert takes"})
    router_loss: bool = field(default=True, metadata={"help": "Train towards even load"})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Coefficient of the balance term"})
    router_z_loss_coef: float = field(default=0.001, metadata={"help": "Coefficient of the logits' size"})
    router_init_range: float | None = field(default=None, metadata={"help": "Deviation of a new router"})
    jitter_noise: float | None = field(default=None, metadata={"help": "Noise on the router's input"})
    act_fn: str | None = field(default=None, metadata={"help": "Activation of the experts"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routing_strategy not in ROUTES:
            raise ValueError(
                f"routing_strategy={self.routing_strategy!r} is not known; it is one of {', '.join(map(repr, ROUTES))}"
            )
        switch = self.routing_strategy == "mixlora-switch"
        if self.router_init_range is None:
            self.router_init_range = 1.0 if switch else 0.02
        if self.jitter_noise is None:
            self.jitter_noise = 0.01 if switch else 0.0
        stray = set(self.expert_lora or {}) - set(PairSettings.__dataclass_fields__)
        if stray:
            raise ValueError(
                f"expert_lora has no setting {', '.join(sorted(stray))}; it takes "
                + ", ".join(PairSettings.__dataclass_fields__)
            )
        for where, pair in (("", self.pair()), ("expert_lora: ", self.pair(experts=True))):
            shared.whole(f"{where}r", pair.r)
            shared.number(f"{where}lora_dropout", pair.lora_dropout, 0.0, 0.999)
            shared.number(f"{where}lora_alpha", pair.lora_alpha, 0.0)
        for name in ("num_experts", "top_k", "expert_capacity"):
            shared.whole(name, getattr(self, name))
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than the {self.num_experts} experts; lower it")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_init_range", "temperature"):
            shared.number(name, getattr(self, name), 0.0)
        shared.number("jitter_noise", self.jitter_noise, 0.0, 0.999)
        shared.number("top_p", self.top_p, 0.0, 1.0)
        if not self.top_p:
            raise ValueError("top_p=0 keeps no expert; it must be above 0, and at most 1")
        if self.act_fn is not None and self.act_fn not in ACT2FN:
            raise ValueError(f"act_fn={self.act_fn!r} is no activation of transformers; leave it out for the model's")

    def pair(self, *, experts: bool = False) -> PairSettings:
        """What the pairs in attention, or those of the experts, are made of."""
        own = {name: getattr(self, name) for name in PairSettings.__dataclass_fields__}
        return PairSettings(**(own | (self.expert_lora or {}) if experts else own))

    def to_dict(self) -> dict[str, Any]:
        """As the authors' reader wants it: without `expert_lora` where there is none."""
        made = {k: v for k, v in super().to_dict().items() if v is not None or k != "expert_lora"}
        if isinstance(self.target_modules, set):
            made["target_modules"] = sorted(self.target_modules)
        return made

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Take the fields of the authors' files that have no meaning here, where they have the one possible value."""
        for name, only in (("bias", "none"), ("sparse_step", None)):
            if (value := kwargs.pop(name, only)) != only:
                raise ValueError(f"the adapter was saved with {name}={value!r}, and only {only!r} can be read")
        if kwargs.get("expert_lora"):
            beside = ("bias", "task_type", "base_model_name_or_path")
            kwargs["expert_lora"] = {k: v for k, v in kwargs["expert_lora"].items() if k not in beside}
        return super().check_kwargs(**kwargs)


# --- routing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """Where tokens go: `chosen` (tokens, E) booleans, `weights` (tokens, E), `rest` (tokens,) for the frozen block."""

    chosen: Tensor
    weights: Tensor
    rest: Tensor


def _likeliest(logits: Tensor, config: MixLoraConfig) -> Routing:
    p = logits.softmax(-1)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(config.top_k).indices, True)
    kept = p * chosen
    return Routing(chosen, kept / kept.sum(-1, keepdim=True), p.new_zeros(len(p)))  # (eq. 2)


def _until_covered(logits: Tensor, config: MixLoraConfig) -> Routing:
    p = (logits / config.temperature if config.temperature else logits).softmax(-1)
    falling, order = p.sort(dim=-1, descending=True)
    before = F.pad(falling.cumsum(-1)[:, :-1], (1, 0))
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, before <= config.top_p)
    return Routing(chosen, p * chosen, 1 - (p * chosen).sum(-1))


def _likeliest_one(logits: Tensor, config: MixLoraConfig) -> Routing:
    p = logits.softmax(-1)
    chosen = F.one_hot(p.argmax(-1), p.shape[-1]).bool()
    return Routing(chosen, p * chosen, 1 - (p * chosen).sum(-1))


ROUTES: dict[str, Callable[[Tensor, MixLoraConfig], Routing]] = {
    "mixlora": _likeliest,
    "mixlora-dynamic": _until_covered,
    "mixlora-switch": _likeliest_one,
}


def within_capacity(routing: Routing, capacity: int, real: Tensor, begins: Tensor) -> Routing:
    """`routing` without the tokens that come to an expert after `capacity` others of the same text.

    Args:
        real: (tokens,) False for padding, which takes no place.
        begins: (tokens,) True where a text begins.
    """
    taking = routing.chosen & real[:, None]
    taken = taking.long().cumsum(0)
    index = torch.arange(len(begins), device=begins.device)
    start = torch.where(begins, index, 0).cummax(0).values
    within = (taken - (taken - taking.long())[start]) <= capacity
    weights = routing.weights * within
    return Routing(routing.chosen, weights, 1 - weights.sum(-1))


@dataclass(frozen=True)
class Load:
    """What a layer's router did in one pass: sums over the tokens that are not padding.

    Attributes:
        tokens: how many there were.
        chosen: (E,) how many were sent to each expert, before any limit of capacity.
        probability: (E,) sum of p.
        squared: sum of the squared log-sum-exp of the logits.
        trained: whether it was a pass to train on; gradients flow then.
        learns: whether the router itself is being trained.
    """

    tokens: Tensor
    chosen: Tensor
    probability: Tensor
    squared: Tensor
    trained: bool
    learns: bool = True


def balance(loads: Sequence[Load]) -> Tensor:
    """The balance term over the tokens of all layers, a scalar (eq. 5)."""
    tokens = torch.stack([load.tokens for load in loads]).sum().clamp(min=1)
    share = torch.stack([load.chosen for load in loads]).sum(0) / tokens
    probability = torch.stack([load.probability for load in loads]).sum(0) / tokens
    return len(share) * (share * probability).sum()


@dataclass
class Call:
    """What the layers must know of the pass they take part in, beside their input; one object for a whole model.

    Attributes:
        assigned: an adapter's name for each row of the batches to come; None for the active adapter.
        rows: that of the present pass, which stays for what a checkpoint computes anew.
        mask: (rows, length so far) 0 for padding, as the model was given it.
        positions: (rows, length) of the tokens in their texts.
        loads: adapter -> decoder layer's number -> what its router did.
        open: within the model's forward; outside it, a layer that runs is computed anew and counts no more.
    """

    assigned: list[str] | None = None
    rows: list[str] | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    loads: dict[str, dict[int, Load]] = field(default_factory=dict)
    open: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Call, ()  # a copied or stored model starts without a past

    def real(self, x: Tensor) -> Tensor | None:
        """(tokens,) False for padding; None when there is none. `x` is (rows, length, width) or (tokens, width)."""
        mask = self.mask
        if mask is None or mask.dim() != 2 or x.dim() != 3 or mask.shape[0] != len(x) or mask.shape[1] < x.shape[1]:
            return None
        found = mask[:, mask.shape[1] - x.shape[1] :].reshape(-1) != 0
        return None if found.all() else found

    def begins(self, x: Tensor) -> Tensor:
        """(tokens,) True where another text begins than the token before belongs to."""
        rows, length = (len(x), x.shape[1]) if x.dim() == 3 else (1, len(x))
        found = torch.zeros(rows, length, dtype=torch.bool, device=x.device)
        found[:, 0] = True
        if self.positions is not None and self.positions.shape[-1] == length and len(self.positions) in (1, rows):
            found[:, 1:] |= (self.positions.diff() != 1).to(x.device)
        return found.reshape(-1)


# --- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """One adapter's pairs beside one linear layer, of one expert or of several.

    Attributes:
        a: (r, in) of each expert; `b`: (out, r); `magnitude`: (out,), with DoRA.
        dropout: of this pass.
    """

    base: nn.Module
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    magnitude: tuple[Tensor, ...] | None
    scale: float
    dropout: float

    def added(self, expert: int, x: Tensor) -> Tensor:
        """s B A x, (rows, out)."""
        a, b = self.a[expert], self.b[expert]
        x = F.dropout(x.to(a.dtype), self.dropout) if self.dropout else x.to(a.dtype)
        return F.linear(F.linear(x, a), b) * self.scale  # (eq. 1)

    def output(self, expert: int, x: Tensor, plain: Tensor) -> Tensor:
        """What the changed layer gives for `x`, where `plain` is what the base gives."""
        if self.magnitude is None:
            return (plain + self.added(expert, x)).to(plain.dtype)
        bias = shared.read_bias(self.base)
        bare = plain if bias is None else plain - bias
        out = (bare + self.added(expert, x)) * (self.magnitude[expert] / self._lengths(expert))
        return (out if bias is None else out + bias).to(plain.dtype)

    @torch.no_grad()
    def _lengths(self, expert: int) -> Tensor:
        """Lengths of the rows of W + s B A, (out,), without making it."""
        a, b, s = self.a[expert].float(), self.b[expert].float(), self.scale
        weight = shared.read_weight(self.base).float()
        squared = weight.square().sum(1) + 2 * s * ((weight @ a.T) * b).sum(1) + s * s * (b @ (a @ a.T) * b).sum(1)
        return squared.clamp(min=0).sqrt()


def _new_pairs(base: Any, settings: PairSettings, count: int) -> dict[str, nn.Parameter]:
    """A, B and perhaps the rows' lengths of `count` pairs, one below the other."""
    (wide, out), r = shared.sizes(base), settings.r
    like = dict(device=base.weight.device, dtype=shared.compute_dtype(base))
    bound = 1 / math.sqrt(wide)  # what kaiming_uniform_ with a = sqrt 5 comes to
    made = {
        "A": nn.Parameter(torch.empty(count * r, wide, **like).uniform_(-bound, bound)),
        "B": nn.Parameter(torch.zeros(count * out, r, **like)),
    }
    if settings.use_dora:
        with torch.no_grad():
            lengths = shared.read_weight(base).float().square().sum(1).sqrt()
            made["magnitude"] = nn.Parameter(lengths.to(like["dtype"]).repeat(count))
    return made


_SAVED_AS = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}


class MixLoraLayer(BaseTunerLayer):
    """What both kinds of layer share. `call` belongs to the tuner; `layer` is the decoder layer's number."""

    call: Call
    layer: int
    configs: dict[str, MixLoraConfig]

    def places(self, adapter_name: str) -> Iterator[tuple[str, list[str]]]:
        """(container, names in the authors' files): the rows of the container's tensor are cut evenly among them."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise NotImplementedError(_UNMERGEABLE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def assigned(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """(adapter, its rows) of a batch whose rows are assigned to adapters."""
        rows = self.call.rows or []
        if len(rows) != len(x):
            raise ValueError(f"adapter_names has {len(rows)} names for a batch of {len(x)} rows; give one for each row")
        where = {name: [i for i, own in enumerate(rows) if own == name] for name in rows}
        return [(name, torch.tensor(found, device=x.device)) for name, found in where.items()]


class MixLoraLinear(MixLoraLayer, shared.LinearLayer):  # type: ignore[misc]
    """A projection of the attention with one pair for each adapter."""

    adapter_layer_names = ("mixlora_A", "mixlora_B", "mixlora_magnitude")
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MixLoraConfig, key: str, call: Call) -> None:
        self.layer, self.projection, self.call = _number(key), key.rpartition(".")[2], call
        super().__init__(base_layer, adapter_name, config, key)

    def containers(self) -> None:
        self.mixlora_A, self.mixlora_B, self.mixlora_magnitude = (nn.ParameterDict() for _ in range(3))
        self.configs = {}

    def fill(self, adapter_name: str, config: MixLoraConfig, key: str, **_: Any) -> None:
        for part, values in _new_pairs(self.get_base_layer(), config.pair(), 1).items():
            getattr(self, f"mixlora_{part}")[adapter_name] = values
        self.configs[adapter_name] = config

    def places(self, adapter_name: str) -> Iterator[tuple[str, list[str]]]:
        for part, word in _SAVED_AS.items():
            if adapter_name in getattr(self, f"mixlora_{part}"):
                yield f"mixlora_{part}", [f"mixlora.layers.{self.layer}.self_attn.{self.projection}.{word}.weight"]

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        out = self.base_layer(x)
        for name in names:
            settings = self.configs[name].pair()
            magnitude = (self.mixlora_magnitude[name],) if settings.use_dora else None
            pairs = Pairs(
                self.get_base_layer(), (self.mixlora_A[name],), (self.mixlora_B[name],), magnitude, settings.scale,
                settings.lora_dropout if self.training else 0.0,
            )  # fmt: skip
            out = pairs.output(0, x, out)
        return out

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.call.rows is None or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        groups = self.assigned(x)
        parts = [self.adapted(x[rows], [name] if name in self.configs else []) for name, rows in groups]
        order = torch.cat([rows for _, rows in groups])
        return torch.cat(parts).to(x.dtype)[order.argsort()]


class MixLoraBlock(nn.Module, MixLoraLayer):
    """A feed-forward block with a router and experts for each adapter; the base block keeps its linear layers."""

    other_param_names = ("configs",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MixLoraConfig, key: str, form: FeedForward, call: Call
    ) -> None:
        super().__init__()
        self.base_layer, self.form, self.call, self.layer = base_layer, form, call, _number(key)
        self._disable_adapters, self._active_adapter = False, adapter_name
        self.merged_adapters = []
        self.configs = {}
        self.mixlora_router = nn.ParameterDict()
        containers = [f"mixlora_{part}_{name}" for name in form.linears for part in _SAVED_AS]
        for container in containers:
            self.add_module(container, nn.ParameterDict())
        self.adapter_layer_names = ("mixlora_router", *containers)
        self.update_layer(adapter_name, config, key)

    def update_layer(self, adapter_name: str, config: MixLoraConfig, key: str) -> None:
        """Add an adapter to the block, or make it anew."""
        first: Any = getattr(self.base_layer, self.form.inner[0])
        router = torch.empty(config.num_experts, shared.sizes(first)[0], dtype=torch.float32,
                             device=first.weight.device)  # fmt: skip
        self.mixlora_router[adapter_name] = nn.Parameter(router.normal_(0.0, config.router_init_range or 0.0))
        for name in self.form.linears:
            if check_target_module_exists(config, f"{key}.{name}"):
                base = getattr(self.base_layer, name)
                for part, values in _new_pairs(base, config.pair(experts=True), config.num_experts).items():
                    getattr(self, f"mixlora_{part}_{name}")[adapter_name] = values
        self.configs[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def places(self, adapter_name: str) -> Iterator[tuple[str, list[str]]]:
        if adapter_name not in self.configs:
            return
        yield "mixlora_router", [f"mixlora.layers.{self.layer}.mlp.moe_gate.weight"]
        experts = range(self.configs[adapter_name].num_experts)
        for name in self.form.linears:
            for part, word in _SAVED_AS.items():
                if adapter_name in getattr(self, f"mixlora_{part}_{name}"):
                    start = f"mixlora.layers.{self.layer}.mlp.{name}.experts"
                    yield f"mixlora_{part}_{name}", [f"{start}.{j}.{word}.weight" for j in experts]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        groups = [] if self.disable_adapters else self._groups(x)
        if not groups:
            return self.base_layer(x, *args, **kwargs)
        flat, form, block = x.reshape(-1, x.shape[-1]), self.form, self.base_layer
        shared_parts = [getattr(block, name)(flat) for name in form.inner]  # once for all experts of all adapters
        own_activation, down = getattr(block, form.activation), getattr(block, form.down)
        real, begins = self.call.real(x), self.call.begins(x)
        sums = _Sums(len(flat), torch.promote_types(x.dtype, torch.float32))
        rest = torch.ones(len(flat), dtype=sums.dtype, device=x.device)
        for name, tokens in groups:
            config = self.configs[name]
            routing = self._route(name, flat[tokens], None if real is None else real[tokens], begins[tokens])
            rest = rest.index_copy(0, tokens, routing.rest.to(rest.dtype))
            activation = ACT2FN[config.act_fn] if config.act_fn else own_activation
            pairs = {linear: self._pairs(name, linear) for linear in form.linears}
            for expert, working in enumerate((routing.weights.detach() != 0).unbind(1)):
                rows = working.nonzero()[:, 0]
                if not len(rows):
                    continue
                at, weight = tokens[rows], routing.weights[rows, expert, None]
                own = flat[at]
                parts = [
                    part[at] if (pair := pairs[linear]) is None else pair.output(expert, own, part[at])
                    for linear, part in zip(form.inner, shared_parts)
                ]
                middle = form.middle(activation, parts)
                last = pairs[form.down]
                if last is not None and last.magnitude is not None:
                    sums.add("out", at, weight * _without_bias(last.output(expert, middle, down(middle)), down))
                    continue
                sums.add("middle", at, weight * middle)
                if last is not None:
                    sums.add("out", at, weight * last.added(expert, middle))
        over = (rest.detach() != 0).nonzero()[:, 0]
        if len(over):
            middle = form.middle(own_activation, [part[over] for part in shared_parts])
            sums.add("middle", over, rest[over, None] * middle)  # (eq. 3)
        return self._finish(sums, down, x)

    def _finish(self, sums: _Sums, down: Any, x: Tensor) -> Tensor:
        middle, out = sums.of.get("middle"), sums.of.get("out")
        if middle is not None:
            through = down(middle.to(x.dtype))  # (eq. 4)
            out = through if out is None else through + out
        else:
            assert out is not None  # every token has an expert or the frozen block
            bias = shared.read_bias(down)
            out = out if bias is None else out + bias
        return out.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _groups(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """(adapter, its tokens) of the batch."""
        index = torch.arange(x.numel() // x.shape[-1], device=x.device)
        if self.call.rows is None:
            return [(name, index) for name in self.active_adapters if name in self.configs]
        tokens = index.view(len(x), -1)
        return [(name, tokens[rows].flatten()) for name, rows in self.assigned(x) if name in self.configs]

    def _route(self, name: str, x: Tensor, real: Tensor | None, begins: Tensor) -> Routing:
        config, x = self.configs[name], x.float()
        if self.training and config.jitter_noise:
            x = x * torch.empty_like(x).uniform_(1 - config.jitter_noise, 1 + config.jitter_noise)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x, self.mixlora_router[name].float())
        routing = ROUTES[config.routing_strategy](logits, config)
        load = self._load(name, logits, routing.chosen, real)
        if self.call.open:  # a checkpoint computes the same anew, and its load is of no pass
            self.call.loads.setdefault(name, {})[self.layer] = load
        if config.routing_strategy == "mixlora-switch":
            everywhere = torch.ones(len(x), dtype=torch.bool, device=x.device)
            routing = within_capacity(routing, config.expert_capacity, everywhere if real is None else real, begins)
        return routing

    def _load(self, name: str, logits: Tensor, chosen: Tensor, real: Tensor | None) -> Load:
        if not self.training:
            logits = logits.detach()
        if real is not None:
            logits, chosen = logits[real], chosen[real]
        squared = logits.logsumexp(-1).square().sum()
        tokens = torch.tensor(float(len(logits)), device=logits.device)
        learns = self.mixlora_router[name].requires_grad
        return Load(tokens, chosen.sum(0).float(), logits.softmax(-1).sum(0), squared, self.training, learns)

    def _pairs(self, name: str, linear: str) -> Pairs | None:
        """The experts' pairs beside one linear layer; None where the adapter has none."""
        a, b, magnitude = (getattr(self, f"mixlora_{part}_{linear}") for part in _SAVED_AS)
        if name not in a:
            return None
        config = self.configs[name]
        settings, count = config.pair(experts=True), config.num_experts
        return Pairs(
            getattr(self.base_layer, linear), a[name].chunk(count), b[name].chunk(count),
            magnitude[name].chunk(count) if name in magnitude else None, settings.scale,
            settings.lora_dropout if self.training else 0.0,
        )  # fmt: skip


class _Sums:
    """Rows that several experts add to, made when the first one does."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self.of: dict[str, Tensor] = {}

    def add(self, name: str, at: Tensor, values: Tensor) -> None:
        if name not in self.of:
            self.of[name] = torch.zeros(self.rows, values.shape[1], dtype=self.dtype, device=values.device)
        self.of[name].index_add_(0, at, values.to(self.dtype))


# --- the tuner --------------------------------------------------------------------------------------------------------


class MixLoraModel(shared.Guard):
    """The tuner. It listens to the model's own forward, so that every way of calling it is heard."""

    prefix = "mixlora_"
    tuner_layer_cls = MixLoraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.call = Call()
        super().__init__(model, *args, **kwargs)
        body = getattr(model, "base_model", model)
        self.listening = [
            body.register_forward_pre_hook(self._begin, with_kwargs=True),
            body.register_forward_hook(self._end),
            model.register_forward_hook(self._add_to_loss, with_kwargs=True),
        ]

    # ---- what is adapted

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        family = model_config.get("model_type")
        if family not in FEED_FORWARDS:
            raise ValueError(
                f"MixLoRA does not know the feed-forward block of {type(self.model).__name__} ({family}); it knows "
                f"those of {', '.join(sorted(FEED_FORWARDS))}"
            )
        if peft_config.target_modules in (None, "all-linear"):
            peft_config.target_modules = {*FEED_FORWARDS[family].attention, *FEED_FORWARDS[family].linears}
        if peft_config.act_fn is None:
            # The model's own; the authors' reader wants it by name.
            peft_config.act_fn = model_config.get("hidden_activation") or model_config.get("hidden_act")
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        blocks = (name for name, _ in model.named_modules() if name.endswith(".mlp"))
        if not any(self._check_target_module_exists(peft_config, name) for name in blocks):
            raise ValueError(
                f"target_modules={peft_config.target_modules} reaches no feed-forward block; name at least one of "
                f"{', '.join(self._form().linears)}, or take a method without experts"
            )

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        name = key.rpartition(".")[2]
        if name in _LINEARS:
            return False  # it is adapted with its block
        if name == "mlp":
            return any(check_target_module_exists(peft_config, f"{key}.{linear}") for linear in _LINEARS)
        return bool(check_target_module_exists(peft_config, key))

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
        form = self._form()
        made: nn.Module
        if isinstance(target, MixLoraBlock | MixLoraLinear):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        if target_name == "mlp":
            made = MixLoraBlock(target, adapter_name, peft_config, current_key, form, self.call)
        elif target_name in form.attention:
            self._check_target(target, current_key, (nn.Linear,), "linear layers")
            made = MixLoraLinear(target, adapter_name, peft_config, current_key, self.call)
        else:
            raise TypeError(f"{current_key} is no projection of attention or feed-forward block, and has no place here")
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)

    def _form(self) -> FeedForward:
        return FEED_FORWARDS[self.get_model_config(self.model)["model_type"]]

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, MixLoraBlock):
            setattr(parent, child_name, new_module)  # peft would look for the weight of a layer
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let one adapter act.

        Raises:
            ValueError: several are named; a token cannot follow two routers.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(
                f"MixLoRA adapters do not act together ({', '.join(adapter_name)}): a token follows one router; assign "
                "rows of a batch to adapters with adapter_names"
            )
        super().set_adapter(adapter_name, inference_mode)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(_UNMERGEABLE)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for handle in self.listening:
            handle.remove()
        return model

    # ---- a pass of the model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is not None:
            unknown = sorted(set(names) - set(self.peft_config) - {BASE})
            if unknown:
                raise ValueError(f"adapter_names has {', '.join(unknown)}; known: {', '.join(self.peft_config)}")
            beams = kwargs.get("num_beams") or 1
            self.call.assigned = [name for name in names for _ in range(beams)]
        try:
            yield
        finally:
            self.call.assigned = None

    def _begin(self, _body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: Call = self.call
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        call.mask = mask if isinstance(mask, Tensor) else None
        call.positions, call.rows, call.loads, call.open = kwargs.get("position_ids"), call.assigned, {}, True

    def _end(self, *_: Any) -> None:
        self.call.open = False

    def _add_to_loss(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        labels = kwargs.get("labels")
        extra = self.auxiliary_loss() if labels is not None else None
        if labels is None or extra is None:
            return None
        items = kwargs.get("num_items_in_batch")
        if items is not None:
            extra = extra * (labels[..., 1:] != -100).sum() / items
        if isinstance(output, tuple):
            return (output[0] + extra, *output[1:])
        output.loss, output.aux_loss = output.loss + extra, extra.detach()
        return output

    def auxiliary_loss(self) -> Tensor | None:
        """What the last pass adds to the loss: the balance term of each adapter in it, times its coefficient.

        None after a pass that was not to be trained on. A plain `transformers.Trainer` needs no call: where the model
        is given labels, `output.loss` has the term in it, and `output.aux_loss` says what it was.

        Raises:
            ValueError: gradient checkpointing of the kind that cuts the routers off the loss.
        """
        found: list[Tensor] = []
        configs: Mapping[str, Any] = self.peft_config
        for name, by_layer in self.call.loads.items():
            config, loads = configs[name], list(by_layer.values())
            if not config.router_loss or not loads[0].trained:
                continue
            term = config.router_aux_loss_coef * balance(loads)
            if config.routing_strategy == "mixlora-switch":
                squared = torch.stack([load.squared for load in loads]).sum()
                tokens = torch.stack([load.tokens for load in loads]).sum().clamp(min=1)
                term = term + config.router_z_loss_coef * squared / tokens
            if torch.is_grad_enabled() and loads[0].learns and not term.requires_grad:
                raise ValueError(
                    "gradient checkpointing with use_reentrant=True cuts the routers off the balance term; enable it "
                    "with use_reentrant=False, or set router_loss=False"
                )
            found.append(term)
        return torch.stack(found).sum() if found else None

    def expert_load(self, adapter_name: str | None = None) -> list[dict[str, Any]]:
        """How the last pass of the model, in training or not, loaded the experts, layer by layer.

        Returns:
            For each layer {"layer": its number, "tokens": tokens sent to each expert, "share": the same as shares of
            their sum, "entropy": of the shares, 1 when even and 0 when one expert has all}; padding is not counted.
        """
        name = adapter_name or self.active_adapters[0]
        report: list[dict[str, Any]] = []
        for layer, load in self.call.loads.get(name, {}).items():
            tokens = load.chosen
            share = tokens / tokens.sum().clamp(min=1)
            entropy = float(-(share * share.clamp(min=1e-12).log()).sum()) / math.log(max(2, len(share)))
            counts = [int(n) for n in tokens]
            report.append({"layer": layer, "tokens": counts, "share": share.tolist(), "entropy": entropy})
        return report

    # ---- files, in the authors' layout

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key if key.startswith("mixlora.layers.") else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return {
            name: part.clone()
            for key, names in _places(model, adapter_name)
            for name, part in zip(names, state_dict[key].chunk(len(names)))
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        left, made, own = dict(state_dict), {}, model.state_dict()
        _same_experts(left, config.num_experts)
        for key, names in _places(model, adapter_name):
            lacking = [name for name in names if name not in left]
            if lacking:
                raise ValueError(f"the adapter's file lacks {lacking[0]}; save the adapter again")
            made[key] = torch.cat([left.pop(name) for name in names])
            if made[key].shape != own[key].shape:
                raise ValueError(
                    f"{names[0]} in the adapter's file has another size than this model and config take (all experts "
                    f"{tuple(made[key].shape)}, not {tuple(own[key].shape)}); use the base it was trained on"
                )
        foreign = sorted(key for key in left if not shared.saved_beside(key, model))
        if foreign:
            raise ValueError(
                f"the adapter's file holds {foreign[0][:120]}, which MixLoraConfig does not have on this model; use "
                "the base it was trained on, and an intact file"
            )
        return left | made


def _places(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, list[str]]]:
    """(name in the model's state, names in the authors' files) of every tensor of an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, MixLoraLayer):
            for container, names in module.places(adapter_name):
                yield f"{path}.{container}.{adapter_name}", names


def _same_experts(tensors: Mapping[str, Tensor], wanted: int) -> None:
    """Raises ValueError when a file holds another number of experts than the adapter was made with."""
    numbers = [int(m[1]) for key in tensors if (m := re.search(r"^mixlora\..*\.experts\.(\d+)\.", key))]
    if numbers and max(numbers) + 1 != wanted:
        raise ValueError(
            f"the adapter's file holds {max(numbers) + 1} experts a layer, and its config says num_experts={wanted}; "
            "the number is fixed when an adapter is made"
        )


def _number(key: str) -> int:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    if not found:
        raise ValueError(f"{key} is in no numbered layer, so its place in a file would be unknown")
    return int(found[1])


def _without_bias(out: Tensor, base: Any) -> Tensor:
    bias = shared.read_bias(base)
    return out if bias is None else out - bias


# --- the method's words -----------------------------------------------------------------------------------------------


def register() -> None:
    shared.join("mixlora", MixLoraConfig, MixLoraModel)


def example() -> MixLoraConfig:
    return MixLoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return (
        {"r": 4, "lora_alpha": 8, "num_experts": 8, "top_k": 2},
        {"r": 4, "lora_alpha": 8, "num_experts": 4, "top_k": 2},
    )


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """E d + E r sum (in + out) parameters a layer, and r (in + out) for each projection of the attention.

    The experts stay beside the model, in float32, and k of E work on a token.
    """
    config = MixLoraConfig(**{**settings()[0], **options})
    form, pair, expert = FEED_FORWARDS.get(shape.family, FeedForward()), config.pair(), config.pair(experts=True)
    made: list[Weight] = []

    def add(name: str, rows: int, columns: int, experts: int = 1) -> None:
        dims, used = (experts * rows, columns), config.top_k / config.num_experts if experts > 1 else 1.0
        size = 4 * rows * columns * experts
        made.append(Weight(name, "expert" if experts > 1 else "other", dims, size, size, used=used))

    chosen = copy(config)
    chosen.target_modules = config.target_modules or {*form.attention, *form.linears}  # type: ignore[assignment]
    blocks: set[str] = set()
    for weight in shape.weights:
        key = weight.name.removesuffix(".weight")
        path, _, name = key.rpartition(".")
        if len(weight.dims) != 2 or not check_target_module_exists(chosen, key):
            continue
        out, wide = weight.dims
        if name in form.linears:
            if path not in blocks:
                add(f"{path}.router", config.num_experts, shape.hidden)
                blocks.add(path)
            add(f"{key}.pairs", out + wide, expert.r, config.num_experts)
            if expert.use_dora:
                add(f"{key}.lengths", out, 1, config.num_experts)
        elif name in form.attention:
            add(f"{key}.pair", out + wide, pair.r)
            if pair.use_dora:
                add(f"{key}.lengths", out, 1)
    whole = Shape(**{**vars(shape), "weights": (*shape.weights, *made)})
    return Price(whole, trainable=sum(w.count for w in made), train_flops=2.0)

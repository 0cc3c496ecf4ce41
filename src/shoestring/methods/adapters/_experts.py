"""Layers under low-rank experts: which tokens go to which, the pairs that make an expert, and the two kinds of layer.

Equations are numbered as in `mixlora`, and `config` is its `MixLoraConfig`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from shoestring.methods.adapters import _shared as shared
from shoestring.models.anatomy import FeedForward

UNMERGEABLE = "MixLoRA cannot be merged: which experts work on a token depends on the token; keep it beside its base"


# --- routing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """Where tokens go: `chosen` (tokens, E) booleans, `weights` (tokens, E), `rest` (tokens,) for the frozen block."""

    chosen: Tensor
    weights: Tensor
    rest: Tensor


def _likeliest(logits: Tensor, config: Any) -> Routing:
    p = logits.softmax(-1)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(config.top_k).indices, True)
    kept = p * chosen
    return Routing(chosen, kept / kept.sum(-1, keepdim=True), p.new_zeros(len(p)))  # (eq. 2)


def _until_covered(logits: Tensor, config: Any) -> Routing:
    p = (logits / config.temperature if config.temperature else logits).softmax(-1)
    falling, order = p.sort(dim=-1, descending=True)
    before = F.pad(falling.cumsum(-1)[:, :-1], (1, 0))
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, before <= config.top_p)
    return Routing(chosen, p * chosen, 1 - (p * chosen).sum(-1))


def _likeliest_one(logits: Tensor, config: Any) -> Routing:
    p = logits.softmax(-1)
    chosen = F.one_hot(p.argmax(-1), p.shape[-1]).bool()
    return Routing(chosen, p * chosen, 1 - (p * chosen).sum(-1))


ROUTES: dict[str, Callable[[Tensor, Any], Routing]] = {
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
    configs: dict[str, Any]

    def places(self, adapter_name: str) -> Iterator[tuple[str, list[str]]]:
        """(container, names in the authors' files): the rows of the container's tensor are cut evenly among them."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise NotImplementedError(UNMERGEABLE)

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

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, key: str, call: Call) -> None:
        self.layer, self.projection, self.call = _number(key), key.rpartition(".")[2], call
        super().__init__(base_layer, adapter_name, config, key)

    def containers(self) -> None:
        self.mixlora_A, self.mixlora_B, self.mixlora_magnitude = (nn.ParameterDict() for _ in range(3))
        self.configs = {}

    def fill(self, adapter_name: str, config: Any, key: str, **_: Any) -> None:
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
        self, base_layer: nn.Module, adapter_name: str, config: Any, key: str, form: FeedForward, call: Call
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

    def update_layer(self, adapter_name: str, config: Any, key: str) -> None:
        """Add an adapter to the block, or make it anew."""
        first: Any = getattr(self.base_layer, self.form.inner[0])
        router = torch.empty(config.num_experts, shared.sizes(first)[0], dtype=torch.float32,
                             device=first.weight.device)  # fmt: skip
        self.mixlora_router[adapter_name] = nn.Parameter(router.normal_(0.0, config.router_init_range or 0.0))
        for name in self.form.linears:
            if shared.reaches(config, f"{key}.{name}"):
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


def _number(key: str) -> int:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    if not found:
        raise ValueError(f"{key} is in no numbered layer, so its place in a file would be unknown")
    return int(found[1])


def _without_bias(out: Tensor, base: Any) -> Tensor:
    bias = shared.read_bias(base)
    return out if bias is None else out - bias

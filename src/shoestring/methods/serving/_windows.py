"""Training of low-rank adapters by windows of tokens, over weights that somebody else keeps.

Work is cut into units, a window of tokens in one layer. `Pass.units` is a generator that names each unit before it is
done and goes on whenever it is asked, a moment or an hour later, with a window of the size that is then wanted.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoestring.core.errors import UsageError, nearest
from shoestring.engine.low_rank import model_name
from shoestring.methods.serving._frozen import Frozen, Rooms, view
from shoestring.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shoestring.models.llama_like import PROJECTIONS, LlamaLike

IGNORED = -100
REMATERIALISE = ("nothing", "cheap", "all")
_KEEP = ("q", "k", "v", "o", "gate", "up")  # products that a backward pass reads; what `down` gives it does not
_VOCAB_ROWS = 512  # the fewest rows of the head that are worth a unit
_LOSS_TOKENS = 512  # whose logits for some of the head's rows are there at a time
_FINE, _COARSE = 16, 64  # rows of a product are a multiple of one or the other
_PREFIX = "base_model.model."

Windows = Callable[[str, int], int]  # (kind of unit, position) -> tokens of the next window


# ---- what is trained ----


@dataclass(frozen=True)
class Shape:
    """Of a LoRA: rank, alpha, dropout and the projections that carry one."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        unknown = [role for role in self.targets if role not in PROJECTIONS]
        if unknown or not self.targets:
            raise UsageError(
                f"{', '.join(unknown) or 'nothing'} cannot carry a LoRA", remedy=nearest(" ".join(unknown), PROJECTIONS)
            )
        if self.rank < 1 or not 0 <= self.dropout < 1 or self.alpha <= 0:
            raise UsageError(
                f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout} is no LoRA",
                remedy="The rank is at least 1, alpha above 0, dropout in 0..1",
            )


class LowRank:
    """The trained pairs y += alpha / rank * B A x: (layer, role) -> A [rank, in], B [out, rank], float32."""

    def __init__(self, shape: Shape, model: LlamaLike, seed: int = 0) -> None:
        self.shape, self.scale = shape, shape.alpha / shape.rank
        self.layers = model.layers
        draw = torch.Generator().manual_seed(seed)
        self.pairs: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        for layer in range(model.layers):
            for role in (role for role in PROJECTIONS if role in shape.targets):
                out, inside = model.shape_of(role, layer)
                a = torch.empty(shape.rank, inside).uniform_(
                    -1 / math.sqrt(inside), 1 / math.sqrt(inside), generator=draw
                )
                self.pairs[layer, role] = a.requires_grad_(), torch.zeros(out, shape.rank, requires_grad=True)

    def of(self, layer: int) -> list[Tensor]:
        return [half for (at, _), pair in self.pairs.items() if at == layer for half in pair]

    def parameters(self) -> list[Tensor]:
        return [half for pair in self.pairs.values() for half in pair]

    def state(self) -> dict[str, Tensor]:
        """As peft names them."""
        return {
            f"{_PREFIX}{model_name(layer, role)}.lora_{half}.weight": tensor.detach()
            for (layer, role), pair in self.pairs.items()
            for half, tensor in zip("AB", pair)
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises UsageError when they are not those of `state`."""
        own = self.state()
        if set(own) != set(tensors) or any(own[name].shape != tensors[name].shape for name in own):
            raise UsageError("The stored adapter is not of this job's shape", remedy="Start the job again")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def save(self, folder: Path, base: str, state: Mapping[str, Tensor] | None = None) -> None:
        """A folder that peft and the engine load."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.shape.rank,
            "lora_alpha": self.shape.alpha,
            "lora_dropout": self.shape.dropout,
            "target_modules": [model_name(0, role).rpartition(".")[2] for role in self.shape.targets],
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
        }
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file({name: t.contiguous() for name, t in (state or self.state()).items()}, folder / ADAPTER_WEIGHTS)

    def read(self, folder: Path) -> None:
        self.load(load_file(folder / ADAPTER_WEIGHTS))


def dropped(tokens: Tensor, width: int, seed: int, share: float) -> Tensor:
    """float32 [tokens, width]: 0 or 1 / (1 - share), drawn from nothing but seed, place and column.

    A window that is computed again, or cut elsewhere, drops the same.
    """
    # A mix of multiplications and shifts (MurmurHash3's finish) over a counter, in 64 bits that stay below 2^63.
    mask = (1 << 32) - 1
    x = (tokens.to(torch.int64)[:, None] * 0x9E3779B1 + torch.arange(width)[None, :] * 0x85EBCA77 + seed) & mask
    for shift, factor in ((16, 0x45D9F3B), (13, 0x2C1B3C6D), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return (x >= int(share * (1 << 32))).float() / (1 - share)


# ---- one linear layer ----


def _gradients(outs: Sequence[Tensor], wanted: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Any, ...]:
    """Those of `wanted`, None where there is none, from those of `outs`.

    Through one number: to compare the shapes of given gradients torch loads 35 MB of algebra.
    """
    with torch.enable_grad():
        number = torch.stack([torch.dot(out.flatten(), grown.flatten()) for out, grown in zip(outs, given)]).sum()
    return torch.autograd.grad(number, wanted, allow_unused=True)


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias in float32, by oneDNN where torch has it: on some processors twice as fast as torch's own choice.

    It writes and keeps a program for every number of rows, half a megabyte each: they are rounded up to a few numbers.
    """
    rows = len(x)
    if _ONE_DNN is None or rows < _FINE or min(w.shape) < _FINE:
        return F.linear(x, w, bias)
    step = _FINE if rows <= _COARSE else _COARSE
    if rows % step:
        whole = x.new_zeros(-(-rows // step) * step, x.shape[1])
        whole[:rows] = x
        x = whole
    y: Tensor = _ONE_DNN(x, w, bias, "none", [], "")
    return y[:rows]


def _one_dnn() -> Callable[..., Any] | None:
    """What compiled graphs call for a linear layer."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONE_DNN = _one_dnn()


@dataclass(frozen=True)
class _Use:
    """How a linear layer is applied; no tensor that autograd should see.

    Attributes:
        known: its product, where that was kept and need not be computed again.
        dropout: makes the mask of its inputs, or None.
        prune: keep nothing for frozen weights.
    """

    frozen: Frozen
    layer: int
    role: str
    scale: float
    known: Tensor | None
    dropout: Callable[[int], Tensor] | None
    prune: bool


class _Linear(torch.autograd.Function):
    """y = W x + scale * B A x with W frozen: what is kept is x alone, and that only where a LoRA reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, use: _Use) -> Tensor:
        ctx.use = use
        if a is not None or not use.prune:
            ctx.save_for_backward(x, a, b)
        if use.known is not None:
            return use.known.detach()
        y = product(x, use.frozen.matrix(use.layer, use.role), use.frozen.bias(use.layer, use.role))
        if a is not None and b is not None:
            inside = x * use.dropout(x.shape[1]) if use.dropout else x
            y = y.add_(product(product(inside, a), b), alpha=use.scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        use: _Use = ctx.use
        wants = ctx.needs_input_grad
        dx = product(dy, use.frozen.matrix(use.layer, use.role).T) if wants[0] else None
        if not wants[1]:
            return dx, None, None, None
        x, a, b = ctx.saved_tensors
        mask = use.dropout(x.shape[1]) if use.dropout else None
        inside = x if mask is None else x * mask
        low = use.scale * product(dy, b.T)
        da, db = low.T @ inside, use.scale * product(product(inside, a).T, dy.T).T
        if dx is not None:
            dx = dx.addmm_(low, a) if mask is None else dx + (low @ a) * mask
        return dx, da, db, None


# ---- one pass over some examples ----


@dataclass(frozen=True)
class Example:
    """Token ids, and labels of the same length: IGNORED where nothing is learned. labels[i] is learned from ids[:i]."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def targets(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class Totals:
    """Sums over the tokens that are learned: their loss in nats before it is divided, and how many were right."""

    loss: float = 0.0
    right: int = 0
    targets: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Unit:
    """The piece of work that comes next, at a position of the examples. How large it is, is decided when it begins."""

    kind: str
    position: int = 0


@dataclass
class Bytes:
    """Activations, counted: `held` at most between units, `peak` at most with those of the unit that was computed."""

    held: int = 0
    peak: int = 0
    kept: int = 0  # now
    own: Counter[int] = field(default_factory=Counter)  # storages of what is kept anyway, and of what is trained
    within: dict[int, int] = field(default_factory=dict)

    def keep(self, tensors: Iterable[Tensor | None], sign: int = 1) -> None:
        for tensor in tensors:
            if tensor is not None:
                self.kept += sign * tensor.nbytes
                self.own[tensor.untyped_storage().data_ptr()] += sign
        self.held = max(self.held, self.kept)

    def unit(self) -> Any:
        """Counts what autograd keeps inside."""
        self.within = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not self.own[storage.data_ptr()]:
                self.within[storage.data_ptr()] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def note(self, more: int = 0) -> None:
        self.peak = max(self.peak, self.kept + sum(self.within.values()) + more)
        self.within = {}


class Pass:
    """Forward, loss and backward of some examples that lie end to end, one window in one layer at a time.

    The examples do not see each other. Gradients are added to `grad` of the pairs; the loss is divided by `targets`.

    Args:
        targets: tokens that are learned in the whole step, of which these examples may be a part.
        window: how many tokens the next window may have, at least 1; asked when a unit begins.
        prune: keep no inputs of frozen weights.
        rematerialise: what is computed a second time in the backward pass: "all" but the input of each layer and its
            keys and values; "cheap": norms, activations, attention and products of rank r, not those of large matrices;
            "nothing".
        most: bytes of products that "cheap" keeps; layers whose products do not fit are computed as with "all".
        rooms: where activations lie; not those of another pass that is under way.
        seed: of dropout; the same for both directions.
        train: False computes the loss alone.
        count: where to count bytes of activations.

    Attributes:
        did: tokens of the latest unit.
    """

    def __init__(
        self,
        frozen: Frozen,
        low_rank: LowRank | None,
        examples: Sequence[Example],
        *,
        targets: int,
        window: Windows,
        prune: bool = True,
        rematerialise: str = "cheap",
        most: int = 1 << 62,
        rooms: Rooms | None = None,
        seed: int = 0,
        train: bool = True,
        count: Bytes | None = None,
    ) -> None:
        self.frozen, self.low_rank, self.window = frozen, low_rank, window
        self.targets, self.prune, self.rematerialise, self.train = targets, prune, rematerialise, train
        self.most, self.rooms = most, rooms or Rooms()
        self.seed, self.count = seed, count
        self.totals, self.did = Totals(), 0
        if count and low_rank:
            count.own.update(half.untyped_storage().data_ptr() for half in low_rank.parameters())
        ids: list[int] = []
        wanted: list[int] = []  # the token that follows, at the place that predicts it
        self.starts: list[int] = []  # where the example of each token begins
        for example in examples:
            last = max((i for i, label in enumerate(example.labels) if i and label != IGNORED), default=0)
            self.starts += [len(ids)] * last
            ids += example.ids[:last]  # what comes after the last label, and that one's own place, teaches nothing
            wanted += example.labels[1 : last + 1]
        self.ids, self.wanted = torch.tensor(ids, dtype=torch.int32), torch.tensor(wanted, dtype=torch.int64)
        self.size = len(ids)
        self.rows = torch.tensor([i for i, label in enumerate(wanted) if label != IGNORED], dtype=torch.int64)
        places = torch.tensor([i - start for i, start in enumerate(self.starts)])
        tables = frozen.model.tables(int(places.max()) + 1 if self.size else 1)
        self.cos, self.sin = (torch.from_numpy(table)[places] for table in tables)
        # By layer: what entered it, keys and values [tokens, heads, head_dim], and products worth keeping.
        self.entered: list[Tensor | None] = []
        self.keys: list[Tensor | None] = []
        self.values: list[Tensor | None] = []
        self.products: list[dict[str, Tensor]] = []
        self.graphs: dict[int, list[tuple[int, int, list[Tensor], tuple[Tensor, ...]]]] = {}

    @property
    def graph(self) -> bool:
        return self.train and self.rematerialise == "nothing"

    def units(self) -> Iterator[Unit]:
        """All the work. What has been done when it ends is in `totals` and in the pairs' gradients."""
        if not self.size:
            return
        self.totals.tokens = self.size
        self._room()
        states = self.frozen.embedded(self.ids)
        yield from self._forward(states)
        yield from self._loss(states)
        if self.train:
            yield from self._backward(states)

    # ---- forward ----

    def _room(self) -> None:
        model, size = self.frozen.model, self.size
        left = self.most if self.train and self.rematerialise == "cheap" else 0
        shapes: list[tuple[int, ...]] = []
        kept: list[tuple[str, ...]] = []
        for layer in range(model.layers):
            widths = {role: model.shape_of(role, layer)[0] for role in _KEEP}
            taken = 4 * size * sum(widths.values())
            kept.append(_KEEP if taken <= left else ())
            left -= taken if kept[-1] else 0
            key = (size, self.frozen.heads(layer)[1], model.head_dim)
            shapes += [key, key, (size, model.hidden), *((size, widths[role]) for role in kept[-1])]
        parts = iter(self.rooms.take("activations", *shapes))
        for roles in kept:
            self.keys.append(next(parts))
            self.values.append(next(parts))
            entered = next(parts)
            self.entered.append(entered if self.train else None)
            self.products.append({role: next(parts) for role in roles})
            if self.count:
                self.count.keep([self.keys[-1], self.values[-1], self.entered[-1], *self.products[-1].values()])

    def _forward(self, states: Tensor) -> Iterator[Unit]:
        """What enters the first layer becomes, in its place, what leaves the last.

        A layer is finished before the next begins: packed weights are unpacked once, however small the windows are.
        """
        for layer in range(self.frozen.model.layers):
            begin = 0
            while begin < self.size:
                yield Unit("forward", begin)
                end = min(self.size, begin + self.window("forward", begin))
                x, entered = states[begin:end], self.entered[layer]
                if entered is not None:
                    entered[begin:end] = x
                # A graph that is kept must find its input as it was.
                states[begin:end] = self._unit_forward(layer, begin, end, x.clone() if self.graph else x)
                self.did, begin = end - begin, end
            if not self.train:
                self._drop(layer)

    def _unit_forward(self, layer: int, begin: int, end: int, x: Tensor) -> Tensor:
        leaves = self._leaves(layer, begin, end, x)
        if self.graph:
            with torch.enable_grad(), self.count.unit() if self.count else _Nothing():
                given = self._block(layer, begin, end, leaves, {})
            self.graphs.setdefault(layer, []).append((begin, end, leaves, given))
            if self.count:
                self.count.kept += sum(self.count.within.values())
                self.count.keep(())
                self.count.note()
        else:
            with torch.no_grad():
                given = self._block(layer, begin, end, leaves, self.products[layer])
            if self.count:
                self.count.note()
        y, k, v = (part.detach() for part in given)
        self._of(self.keys, layer)[begin:end], self._of(self.values, layer)[begin:end] = k, v
        return y

    # ---- loss ----

    def _loss(self, out: Tensor) -> Iterator[Unit]:
        """Loss of the learned tokens, and its gradient at the last layer's output, which takes the place of `out`.

        The head's rows are passed over once: probabilities are summed under a running maximum, and so is what they make
        of the head, which is rescaled when the maximum rises. No logits are kept.
        """
        frozen, weights = self.frozen, self.frozen.weights
        vocab, scale = weights.vocab, weights.logit_scale
        norm = view(weights.final_norm)
        grown = torch.zeros_like(out) if self.train else None
        begin = 0
        while begin < len(self.rows):
            rows = self.rows[begin : begin + _LOSS_TOKENS]
            wanted = self.wanted[rows]
            x = out[rows].requires_grad_(self.train)
            with torch.enable_grad() if self.train else torch.no_grad():
                normed = rms(x, norm, frozen.model.epsilon)
            h = normed.detach()
            peak = torch.full((len(rows),), -math.inf)
            # Of all tokens but the wanted one: added later and taken away again, it would leave nothing but rounding
            # where the model is nearly sure of it.
            others, mean = torch.zeros(len(rows)), torch.zeros_like(h)
            chosen, best = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
            first = 0
            while first < vocab:
                yield Unit("loss")
                # As many rows of the head as make this unit as large as one of a layer.
                most = self.window("loss", 0)
                fair = most * frozen.size(0) // (len(rows) * frozen.model.hidden)
                last = min(vocab, first + max(_VOCAB_ROWS, fair))
                head = frozen.head(first, last)
                logits = product(h, head).mul_(scale)
                high, at = logits.max(1)
                best = torch.where(high > peak, at + first, best)
                inside = (wanted >= first) & (wanted < last)
                own = torch.where(inside, wanted - first, 0)
                chosen = torch.where(inside, logits.gather(1, own[:, None])[:, 0], chosen)
                new = torch.maximum(peak, high)
                shrink = (peak - new).exp()
                parts = logits.sub_(new[:, None]).exp_()
                parts[inside, own[inside]] = 0
                others = others * shrink + parts.sum(1)
                if self.train:
                    mean.mul_(shrink[:, None]).add_(product(parts, head.T))
                    if self.count:
                        self.count.note(logits.nbytes + head.nbytes)
                peak, first = new, last
                self.did = most
            total = others + (chosen - peak).exp()
            self.totals.loss += float((peak + total.log() - chosen).sum(dtype=torch.float64))
            self.totals.right += int((best == wanted).sum())
            self.totals.targets += len(rows)
            if grown is not None:
                target = torch.from_numpy(weights.head.rows_of(wanted.numpy()))
                dh = (mean - others[:, None] * target) / total[:, None] * (scale / self.targets)
                (dx,) = _gradients([normed], [x], [dh])
                grown[rows] = dx
            begin += len(rows)
        if grown is not None:
            out.copy_(grown)

    # ---- backward ----

    def _backward(self, dy: Tensor) -> Iterator[Unit]:
        for layer in reversed(range(self.frozen.model.layers)):
            grown_k, grown_v = (torch.zeros_like(self._of(part, layer)) for part in (self.keys, self.values))
            end = self.size
            while end:  # from the last tokens to the first: keys and values collect from all later queries
                yield Unit("backward", end - 1)
                # A graph that was kept has the window it was made with.
                begin = self.graphs[layer][-1][0] if self.graph else max(0, end - self.window("backward", end - 1))
                self._unit_backward(layer, begin, end, dy, grown_k, grown_v)
                self.did, end = end - begin, begin
            self._drop(layer)

    def _unit_backward(self, layer: int, begin: int, end: int, dy: Tensor, grown_k: Tensor, grown_v: Tensor) -> None:
        if self.graph:
            _, _, leaves, given = self.graphs[layer].pop()
        else:
            leaves = self._leaves(layer, begin, end, self._of(self.entered, layer)[begin:end])
            with torch.enable_grad(), self.count.unit() if self.count else _Nothing():
                given = self._block(layer, begin, end, leaves, self.products[layer], again=True)
            if self.count:
                self.count.note(grown_k.nbytes + grown_v.nbytes)
        own = self.low_rank.of(layer) if self.low_rank else []
        before = self.starts[begin]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        flowing = [
            (out, d)
            for out, d in zip(given, (dy[begin:end], grown_k[begin:end], grown_v[begin:end]))
            if out.requires_grad
        ]
        if not flowing:  # the first layer, and no LoRA in it
            return
        outs, grown = zip(*flowing)
        found = _gradients(outs, [*wanted, *own], grown)
        for leaf, gradient in zip([*wanted, *own], found):
            if gradient is None:
                continue
            if leaf is leaves[0]:
                dy[begin:end] = gradient  # becomes dy of the layer below
            elif leaf is leaves[1]:
                grown_k[before:begin] += gradient
            elif leaf is leaves[2]:
                grown_v[before:begin] += gradient
            else:
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)

    def _drop(self, layer: int) -> None:
        if self.count:
            gone = [self.keys[layer], self.values[layer], self.entered[layer], *self.products[layer].values()]
            self.count.keep(gone, -1)
        self.keys[layer] = self.values[layer] = self.entered[layer] = None
        self.products[layer] = {}

    # ---- one layer over one window ----

    def _leaves(self, layer: int, begin: int, end: int, x: Tensor) -> list[Tensor]:
        """Input of the window, and keys and values that its first example had before it."""
        before = self.starts[begin]
        past = (self._of(part, layer)[before:begin] for part in (self.keys, self.values))
        return [
            x.detach().requires_grad_(self.train and layer > 0),  # nothing is trained below the first layer
            *(part.detach().requires_grad_(self.train and begin > before) for part in past),
        ]

    def _block(
        self, layer: int, begin: int, end: int, leaves: list[Tensor], kept: dict[str, Tensor], again: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, keys and values of the window. `kept` receives products, or with `again` gives them back."""
        frozen, model = self.frozen, self.frozen.model
        x, past_k, past_v = leaves
        norm = lambda value, role: rms(value, frozen.norm(layer, role), model.epsilon)

        def linear(value: Tensor, role: str) -> Tensor:
            known = kept[role][begin:end] if again and role in kept else None
            if again and role == "down":  # nobody reads its product, only what flows back through it
                known = value.new_zeros(()).expand(end - begin, model.hidden)
            pair = self.low_rank.pairs.get((layer, role), (None, None)) if self.low_rank else (None, None)
            scale = self.low_rank.scale if self.low_rank else 0.0
            use = _Use(frozen, layer, role, scale, known, self._dropout(layer, role, begin, end), self.prune)
            y: Tensor = _Linear.apply(value, *pair, use)
            if kept and not again and role in kept:
                kept[role][begin:end] = y
            return y

        heads, kv_heads = frozen.heads(layer)
        entered = norm(x, "attention_norm")
        q = linear(entered, "q").view(-1, heads, model.head_dim)
        k = linear(entered, "k").view(-1, kv_heads, model.head_dim)
        v = linear(entered, "v").view(-1, kv_heads, model.head_dim)
        if model.head_norms:
            q, k = norm(q, "q_norm"), norm(k, "k_norm")
        if model.rotates[layer]:
            cos, sin = self.cos[begin:end, None], self.sin[begin:end, None]
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = self._attention(layer, begin, end, q, torch.cat([past_k, k]), torch.cat([past_v, v]))
        x = x + model.residual_scale * linear(mixed, "o")
        entered = norm(x, "mlp_norm")
        gate = linear(entered, "gate")
        active = F.silu(gate) if model.activation == "silu" else F.gelu(gate, approximate="tanh")
        x = x + model.residual_scale * linear(active * linear(entered, "up"), "down")
        return x, k, v

    def _attention(self, layer: int, begin: int, end: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[tokens, heads * head_dim]. Keys and values begin where the window's first example does."""
        model, base = self.frozen.model, self.starts[begin]
        group = q.shape[1] // k.shape[1]
        parts, at = [], begin
        while at < end:
            start = self.starts[at]
            until = next((i for i in range(at, end) if self.starts[i] != start), end)
            queries = q[at - begin : until - begin].transpose(0, 1)[None]
            keys, values = (
                part[start - base : until - base].transpose(0, 1).repeat_interleave(group, 0)[None] for part in (k, v)
            )
            mask = self._mask(layer, at - start, until - start)
            mixed = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=model.attention_scale
            )
            parts.append(mixed[0].transpose(0, 1).reshape(until - at, -1))
            at = until
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mask(self, layer: int, begin: int, end: int) -> Tensor | None:
        """What queries begin..end-1 see of the keys 0..end-1; None for the plain triangle."""
        window = self.frozen.model.windows[layer]
        if not begin and (not window or end <= window):
            return None
        seen = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)
        return seen.triu(begin - window + 1) if window else seen

    def _dropout(self, layer: int, role: str, begin: int, end: int) -> Callable[[int], Tensor] | None:
        if not (self.train and self.low_rank and self.low_rank.shape.dropout):
            return None
        seed = (self.seed * 1_000_003 + layer * len(PROJECTIONS) + PROJECTIONS.index(role)) * 0x27D4EB2F & 0xFFFFFFFF
        share, tokens = self.low_rank.shape.dropout, torch.arange(begin, end)
        return lambda width: dropped(tokens, width, seed, share)

    @staticmethod
    def _of(parts: list[Tensor | None], layer: int) -> Tensor:
        part = parts[layer]
        assert part is not None, "a layer is not computed again once it is done"
        return part


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[tokens, heads, head_dim] with the leading dimensions turned in halves."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

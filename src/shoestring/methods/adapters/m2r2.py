"""M2R2: a second, faster residual stream inside the same layers says early what the model says at its end.

How it works
    1. Gates stand behind the blocks e_1 < e_2 < ...; behind each gate the fast stream starts anew as the slow one:
       p := h.                                                                                                 (eq. 1)
    2. In each block between gates, n = norm1(p), m = norm2(p):
       p := p + Attn(q from n; keys and values of the slow stream) + A n,   A n = U phi(V n)                   (eq. 2)
       p := p + MLP(m) + B m                                                                                   (eq. 3)
       U = 0 at the start, so that p = h; V makes V n about 1. Keys and values are those of h: the cache does not grow,
       and one pass computes both streams, so that weights are read once.
    3. Training freezes the base and minimises sum_k w_k KL(p_L || p_k), p_k = softmax(head(norm_k(p at e_k))), with
       norm_k a trained copy of the last norm; all positions at once. One in eight only fits a temperature, on the
       way and once more at the end: how sure a gate says it is shall be how often it is right.                (eq. 4)
    4. A router tells from the fast stream whether a token may leave: c = W p, a small attention of the newest token
       over the latents c of the last few, and a logistic unit on both, trained on whether gate and model agree. (eq. 5)
    5. Used as an exit, a token leaves where router or calibrated confidence reach the threshold; keys and values above
       are computed if a later token needs them. Used as a draft (exact=true), the layers below the first gate guess
       several tokens by p, those above verify all in one pass, and the answer is that of plain decoding.
    6. In a mixture of experts p meets those that h meets, with the same gates, so that each is read once. Where experts
       come from slow memory, those to read ahead while l computes are top-k(router_(l+j)(m)), m = norm2(p).    (eq. 6)

Where it bends
    The fast stream starts as a copy of one that says little in the middle of a model: with a few minutes of training it
    guesses about as well as a plain head behind the same block, and is more reliable where it is sure; in a mixture of
    few layers it names the next experts about as well as the slow one. Both streams pass through the torch runner; on a
    CPU a pass over few rows is not free, so drafts pay only where most are right.
    Where a block norms what attention and MLP give, A and B add before that norm. A model that scales or caps its
    logits after its head is refused. The narrower MLP that the paper mentions for large models is not here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoestring import models
from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.engine.exits import ConfidentExit, drafts, largest
from shoestring.engine.hooks import Hooks
from shoestring.methods.adapters._blocks import SPREAD, Beside, changed, stream, width_of
from shoestring.methods.adapters._exits import (
    ExitConfig,
    ExitPlug,
    ExitTuner,
    Gate,
    at_rest,
    final_norm,
    gates_of,
    kept_rows,
    wanted_rows,
    whole_pass,
)
from shoestring.methods.adapters._shared import join, whole
from shoestring.models.anatomy import Block, halves
from shoestring.models.streams import side_by_side, tokens_of_first

if TYPE_CHECKING:
    from shoestring.engine.open import Opened
    from shoestring.engine.runner import Runner
    from shoestring.engine.sequence import Sequence as Answer

METHOD = Method(
    paper=Paper("M2R2: Mixture of Multi-Rate Residuals for Efficient Transformer Inference", "2025-02"),
    provides="M2R2Config",
    saves=("latency", "compute", "energy"),
    combines={"quantizers": "the fast stream is trained on the model as it was and stands beside it, not in it"},
    traits={
        "family": "additive",
        "acts_on": "activation",
        "merges": "no",
        "parameters": "blocks below the last gate (4 r d) + gates (d + 1 + 2 d c + 2 c + 1)",
        "plugs": "exit, drafter",
    },
    expects={
        "check_learns": "the loss is a divergence from the model itself, next to nothing for a tiny random one",
        "check_merge": "a stream of its own is no change of a weight",
        "check_unmerge_restores_the_base": "a stream of its own is no change of a weight",
        "check_two_adapters": "the fast stream changes nothing of what the model itself answers",
        "check_transformers_trainer": "the fast stream changes nothing of what the model itself answers",
    },
)
TRAINING = {"learning_rate": 5e-3}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@dataclass
class M2R2Config(ExitConfig):
    """Gates, and what moves the fast stream.

    Args:
        r: rank of each addition A and B.
        activation: phi: silu, gelu or relu.
        latent: c, width of the router's latents.
        window: newest tokens, the present one among them, that the router attends to.

    Raises:
        ValueError: a value that cannot be.
    """

    TYPE = "m2r2"

    r: int = field(default=48, metadata={"help": "Rank of each addition"})
    activation: str = field(default="silu", metadata={"help": "silu, gelu or relu"})
    latent: int = field(default=16, metadata={"help": "Width of the router's latents"})
    window: int = field(default=16, metadata={"help": "Tokens that the router attends to"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "latent", "window"):
            whole(name, getattr(self, name))
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not possible; it is one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class M2R2Plug(ExitPlug):
    """How a trained fast stream is used in serving.

    Attributes:
        streams: the adapter's folder.
        by: who decides whether a token leaves: router or confidence.
    """

    streams: str = ""
    by: str = "confidence"

    def __post_init__(self) -> None:
        if not self.streams:
            raise UsageError("m2r2 needs streams=FOLDER", remedy="`shoestring train --method m2r2` makes one")
        if self.by not in ("router", "confidence"):
            raise UsageError(f"by={self.by} is unknown", remedy="Give router or confidence")
        super().__post_init__()


PLUG = M2R2Plug


class Addition(nn.Module):
    """x -> U phi(V x), with U zero at the start and V of a `spread` that makes V x about 1."""

    def __init__(self, width: int, rank: int, activation: str, spread: float) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Parameter(torch.randn(rank, width) * spread)
        self.up = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return (ACTIVATIONS[self.activation](x.to(self.down.dtype) @ self.down.T) @ self.up.T).to(x.dtype)


class FastGate(Gate):
    """A gate with the router that says whether a token may leave."""

    def __init__(self, norm: nn.Module, width: int, latent: int, window: int) -> None:
        super().__init__(norm)
        self.window = window
        self.latent = nn.Parameter(torch.randn(latent, width) * SPREAD)
        self.query = nn.Parameter(torch.randn(latent, width) * SPREAD)
        self.decide = nn.Parameter(torch.zeros(2 * latent + 1))

    def latents(self, p: Tensor) -> Tensor:
        return p.to(self.latent.dtype) @ self.latent.T

    def decision(self, p: Tensor, before: Tensor, mask: Tensor) -> Tensor:
        """Logits (..., tokens) from states p (..., tokens, width), latents (..., seen, c), mask (tokens, seen)."""
        query = p.to(self.query.dtype) @ self.query.T
        scores = (query @ before.transpose(-1, -2)) * query.shape[-1] ** -0.5
        met = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ before
        both = torch.cat([met, self.latents(p)], -1)
        return both @ self.decide[:-1] + self.decide[-1]  # eq. 5

    def whole(self, p: Tensor) -> Tensor:
        """Logits (batch, length) of texts (batch, length, width)."""
        place = torch.arange(p.shape[1], device=p.device)
        back = place[:, None] - place
        return self.decision(p, self.latents(p), (back >= 0) & (back < self.window))


class StreamBlock(Beside):
    """What one block adds to the fast stream, and the gate behind it if there is one."""

    child = "stream"
    adapter_layer_names = ("attention", "mlp", "gate")

    def __init__(self, block: Block, model: nn.Module) -> None:
        parts = {part: model.get_submodule(half.module) for part, half in halves(block, plain=False).items()}
        super().__init__(block.module)
        self.attention, self.mlp, self.gate = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.seen: list[dict[str, Any]] | None = None  # what the block was called with, by name
        self.plain = self.takes_over(block.module, self.watched)
        self.plain_attention = self.takes_over(parts["attention"], self.attends)
        self.plain_mlp = self.takes_over(parts["mlp"], self.feeds)
        self.feeding = False
        if "router" in block.projections:
            self.plain_router = self.takes_over(model.get_submodule(block.projections["router"]), self.chooses)

    def watched(self, *args: Any, **kwargs: Any) -> Any:
        if self.seen is not None:
            self.seen.append(kwargs | dict(zip(signature(self.plain).parameters, args)))
        return self.plain(*args, **kwargs)

    @property
    def saving(self) -> bool:
        """Whether gradient checkpointing is on."""
        block = getattr(self.plain, "__self__", None)
        return self.training and bool(getattr(block, "gradient_checkpointing", False))

    def both(self, tokens: int, kwargs: dict[str, Any], x: Tensor) -> Tensor:
        """The block's own forward on two streams of so many tokens each; it may be called again in the backward pass,
        so the block's own checkpointing, which would not know of the streams, is off inside."""
        block: Any = getattr(self.plain, "__self__", None)
        saving = self.saving
        if saving:
            block.gradient_checkpointing = False
        try:
            with side_by_side(tokens), at_rest(block):
                out = self.plain(x, **kwargs)
        finally:
            if saving:
                block.gradient_checkpointing = True
        return out[0] if isinstance(out, tuple) else out

    def attends(self, *args: Any, **kwargs: Any) -> Any:
        out = self.plain_attention(*args, **kwargs)
        added = self._added(self.attention, stream(args, kwargs), out[0])  # eq. 2
        return (added, *out[1:])

    def feeds(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        self.feeding = True
        try:
            out = self.plain_mlp(*args, **kwargs)
        finally:
            self.feeding = False
        return changed(out, lambda made: self._added(self.mlp, x, made))  # eq. 3

    def chooses(self, *args: Any, **kwargs: Any) -> Any:
        """What the router says, to both streams what it says of the first; others may ask it too, of any rows."""
        out, tokens = self.plain_router(*args, **kwargs), tokens_of_first()
        if tokens is None or not self.feeding:
            return out

        def as_first(rows: Tensor) -> Tensor:
            both = rows.reshape(-1, 2, tokens, rows.shape[-1])
            return both[:, :1].expand_as(both).reshape(rows.shape)

        return as_first(out) if isinstance(out, Tensor) else tuple(map(as_first, out))

    def _added(self, additions: nn.ModuleDict, x: Tensor, out: Tensor) -> Tensor:
        slow = tokens_of_first()
        names = self.acting
        if slow is None or not names:
            return out
        fast = x[..., slow:, :]
        more = torch.stack([additions[name](fast) for name in names]).sum(0)
        return torch.cat([out[..., :slow, :], out[..., slow:, :] + more], -2)


class M2R2Model(ExitTuner):
    prefix = "stream_"
    tuner_layer_cls = StreamBlock

    def reached(self, config: Any) -> Sequence[int]:
        return range(1, config.gates[-1] + 1)

    def attach(self, name: str, config: Any, block: Block) -> None:
        layer: Any = getattr(block.module, StreamBlock.child, None) or StreamBlock(block, self.model)
        width = width_of(self.model, block)
        for part, half in halves(block, plain=False).items():
            spread = 1 / (width**0.5 * _size(self.model.get_submodule(half.norm), width))
            layer.put(part, name, Addition(width, config.r, config.activation, spread), block.module)
        if block.index + 1 in config.gates:
            gate = FastGate(final_norm(self.model), width, config.latent, config.window)
            layer.put("gate", name, gate, block.module)

    def layers(self, name: str) -> list[StreamBlock]:
        """Of the blocks below the last gate, in order."""
        config: Any = self.peft_config[name]
        by_place = {block.index: block.module for block in self.blocks.values()}
        return [getattr(by_place[i], StreamBlock.child) for i in range(config.gates[-1])]

    def fast(self, name: str, batch: dict[str, Any]) -> tuple[dict[int, Tensor], Tensor, nn.Module]:
        """The fast stream (batch, length, width) at each gate, what the head gets at the end, and the head."""
        config: Any = self.peft_config[name]
        layers = self.layers(name)
        for layer in layers:
            layer.seen = []
        try:
            final, head = whole_pass(self.model, {**batch, "use_cache": False})
            calls = [layer.seen[0] for layer in layers if layer.seen]
        finally:
            for layer in layers:
                layer.seen = None
        found, start = {}, 0
        for gate in config.gates:
            slow = calls[start]["hidden_states"]
            x = torch.cat([slow, slow], 1)  # eq. 1
            for layer, given in zip(layers[start:gate], calls[start:gate]):
                run = partial(layer.both, slow.shape[1], _doubled(slow, given))
                x = checkpoint(run, x, use_reentrant=False) if layer.saving else run(x)
            found[gate], start = x[:, slow.shape[1] :], gate
        return found, final, head

    def loss(self, name: str, batch: dict[str, Any], labels: Tensor) -> Tensor:
        config: Any = self.peft_config[name]
        found, final, head = self.fast(name, batch)
        gates: list[Any] = [self.layers(name)[gate - 1].gate[name] for gate in config.gates]
        rows = wanted_rows(labels)
        states = [found[gate][rows] for gate in config.gates]
        kept = kept_rows(batch["input_ids"])[rows]
        loss, agree = self.taught(name, gates, states, final[rows], head, kept)  # eq. 4
        decided = [gate.whole(found[at].detach())[rows] for gate, at in zip(gates, config.gates)]
        routed = sum(
            F.binary_cross_entropy_with_logits(one.float(), right.float()) for one, right in zip(decided, agree)
        )
        return loss + routed - routed.detach()  # type: ignore[union-attr]


def _size(norm: nn.Module, width: int) -> float:
    """Root mean square of what a norm gives: some families' norms shrink what they pass on to a twentieth."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return 1.0
    sign = torch.ones(width, dtype=weight.dtype, device=weight.device)
    sign[1::2] = -1
    with torch.no_grad():
        return max(float(norm(sign).float().square().mean().sqrt()), 1e-3)


def _doubled(slow: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """What a block is called with beside its states, for two streams of which the second sees the first's keys."""
    length = slow.shape[1]
    given = {name: value for name, value in given.items() if name != "hidden_states"}
    mask = given.get("attention_mask")
    if mask is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=slow.device).tril()[None, None]
    else:
        seen = mask if mask.dtype == torch.bool else mask >= 0
    whole = torch.cat([seen, seen], 2)
    whole = torch.cat([whole, torch.zeros_like(whole)], 3)
    least = torch.finfo(slow.dtype).min
    given["attention_mask"] = torch.zeros(whole.shape, dtype=slow.dtype, device=slow.device).masked_fill(~whole, least)
    if given.get("position_embeddings") is not None:
        given["position_embeddings"] = tuple(torch.cat([part, part], 1) for part in given["position_embeddings"])
    if given.get("position_ids") is not None:
        given["position_ids"] = torch.cat([given["position_ids"]] * 2, -1)
    return {**given, "past_key_values": None, "use_cache": False}


def register() -> None:
    join("m2r2", M2R2Config, M2R2Model)


def example() -> M2R2Config:
    return M2R2Config(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 48}, {"r": 8})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """4 r d a block below the last gate; norm, temperature and router a gate."""
    asked = {"latent": 16, **settings()[0], **options}
    gates, width, latent = asked.get("gates") or gates_of(shape.layers), shape.hidden, asked["latent"]
    each = width + 1 + 2 * latent * width + 2 * latent + 1
    return Price(shape, trainable=gates[-1] * 4 * asked["r"] * width + len(gates) * each, train_flops=3.0)


# --- at work ------------------------------------------------------------------------------------------------------


def load(config: M2R2Plug, folder: Path, *, read: Callable[..., Any] = models.load, **options: Any) -> Any:
    """The model, however it is read, with the fast stream in it."""
    from dataclasses import replace

    from peft import PeftModel

    from shoestring.models.folder import check_adapter
    from shoestring.models.load import refuse_strays

    register()
    where = Path(config.streams)
    if check_adapter(where).get("peft_type") != "M2R2":
        raise UsageError(f"{where} holds no fast stream", remedy="`shoestring train --method m2r2` makes one")
    loaded = read(folder, **options)
    model = PeftModel.from_pretrained(loaded.model, str(where)).eval()
    refuse_strays(model, where)
    return replace(loaded, model=model)


def plug(config: M2R2Plug, opened: Opened) -> Hooks:
    """An exit policy, or drafter and decoder.

    Raises:
        UsageError: a fast stream that was never trained.
    """
    model: Any = opened.runner.model  # type: ignore[attr-defined]
    blocks = [module for module in model.modules() if isinstance(module, StreamBlock)]
    if not any(p.any() for block in blocks for n, p in block.attention.named_parameters() if n.endswith("up")):
        raise UsageError(f"The fast stream in {config.streams} was never trained", remedy="Train it first")
    modules: dict[int, Any] = {i: b.gate["default"] for i, b in enumerate(blocks, 1) if "default" in b.gate}
    gates = FastGates(opened.runner, modules)
    if config.exact:
        return drafts(gates, config.length, config.sure, streams=2)
    return Hooks(exit=(RoutedExit if config.by == "router" else ConfidentExit)(gates, config.threshold, streams=2))


class FastGates:
    """The gates of a fast stream, which is the second of those that come to them."""

    def __init__(self, runner: Runner, modules: Mapping[int, Any]) -> None:
        self.runner, self.modules = runner, dict(modules)

    @property
    def layers(self) -> Sequence[int]:
        return tuple(self.modules)

    @torch.inference_mode()
    def logits(self, layer: int, hidden: Tensor) -> np.ndarray:
        return self.runner.head(self.modules[layer](hidden[:, 1]).float().cpu().numpy())

    def confidence(self, layer: int, logits: np.ndarray) -> np.ndarray:
        return largest(logits, self.modules[layer].temperature.item())


class RoutedExit(ConfidentExit):
    """Leaves where the router of a gate says so."""

    gates: FastGates

    def __init__(self, gates: FastGates, threshold: float, streams: int) -> None:
        super().__init__(gates, threshold, streams)
        self._past: dict[tuple[Answer, int], deque[tuple[int, Tensor]]] = {}

    @torch.inference_mode()
    def sure(self, layer: int, hidden: Tensor, logits: np.ndarray, answers: Sequence[Answer]) -> Sequence[float]:
        return [self._routed(layer, p, answer) for p, answer in zip(hidden[:, 1], answers)]

    def ended(self, answer: Answer) -> None:
        for layer in self.layers:
            self._past.pop((answer, layer), None)

    def _routed(self, layer: int, p: Tensor, answer: Answer) -> float:
        gate = self.gates.modules[layer]
        past = self._past.setdefault((answer, layer), deque(maxlen=gate.window))
        now = len(answer.tokens)
        while past and past[-1][0] >= now:  # computed again after a preemption
            past.pop()
        past.append((now, gate.latents(p)))
        before = torch.stack([latent for _, latent in past])
        seen = torch.ones(1, len(past), dtype=torch.bool)
        return float(gate.decision(p[None], before, seen).sigmoid())

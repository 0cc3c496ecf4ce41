"""What tuners of exits share: gates behind blocks, their training against what the whole model says, and their serving.

A gate reads the hidden state behind a block and says what the model would say at its end. Nothing it does changes the
model: the base answers as ever, before training and after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from shoestring.core.errors import UsageError
from shoestring.engine.exits import WARMTH
from shoestring.methods.adapters._blocks import Beside, BlockTuner
from shoestring.methods.adapters._shared import AdapterConfig, number, whole
from shoestring.models.anatomy import inspect, norm_offset
from shoestring.training.loss import IGNORED, last_hidden_and_head

_PRIMES = (1, 1_000_003, 998_244_353, 754_974_721)
_CHUNK = 1 << 25  # bytes of one set of logits; some of them are there at the same time
_NEWEST = 2048  # rows that temperatures are fitted on in the end: enough to know one within a percent


@dataclass
class ExitConfig(AdapterConfig):
    """Gates and how they are trained.

    Args:
        gates: the blocks behind which a gate stands, counted from 1, ascending, each below the last block.
        weights: of the gates' losses; None weighs them alike.
        temperature: T of both distributions in the loss.
        epsilon, offset: of the model's last norm, which the gates copy: what it adds to the mean square, and to its
            weight; read from the model.

    Raises:
        ValueError: a value that cannot be.
    """

    gates: list[int] | None = field(default=None, metadata={"help": "Blocks behind which a gate stands, from 1"})
    weights: list[float] | None = field(default=None, metadata={"help": "Weights of the gates' losses"})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the distributions in the loss"})
    epsilon: float | None = field(default=None, metadata={"help": "Of the model's last norm; read from the model"})
    offset: float | None = field(default=None, metadata={"help": "Of the model's last norm; read from the model"})

    def __post_init__(self) -> None:
        super().__post_init__()
        # peft asks the tuner for the loss only where it knows the task.
        self.task_type = self.task_type or "CAUSAL_LM"
        number("temperature", self.temperature, 1e-3)
        if self.gates is not None:
            if not self.gates:
                raise ValueError("gates is empty; name the blocks behind which a gate stands")
            for gate in self.gates:
                whole("gates", gate)
            if sorted(set(self.gates)) != list(self.gates):
                raise ValueError(f"gates={self.gates} is not ascending")
        if self.weights is not None and len(self.weights) != len(self.gates or ()):
            raise ValueError(f"weights={self.weights} are not as many as gates={self.gates}")


@dataclass(frozen=True)
class ExitPlug:
    """How trained gates are used in serving.

    Attributes:
        threshold: how sure a gate must be for a token to leave; 1 is never.
        exact: draft with the layers below the first gate instead, and verify; the answer is that of plain decoding.
        length: most tokens of a draft.
        sure: how sure the gate must be of each. In layers, a guess pays that is right more often than the share of
            the layers below the gate.
    """

    threshold: float = 0.9
    exact: bool = False
    length: int = 4
    sure: float = 0.4

    def __post_init__(self) -> None:
        for name in ("threshold", "sure"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)} is not a confidence", remedy="Give 0 to 1")
        if self.length < 1:
            raise UsageError(f"length={self.length} drafts nothing", remedy="Give at least 1")


class Gate(nn.Module):
    """x -> norm(x), the norm a trained copy of the model's last one; beside it the temperature of its confidence."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = deepcopy(norm).requires_grad_(True)
        self.warmth = nn.Parameter(torch.zeros(1))

    @property
    def temperature(self) -> Tensor:
        return (WARMTH * self.warmth.float()).exp()

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width): what the model's head is applied to."""
        return self.norm(x.to(next(self.norm.parameters()).dtype))


class ExitTuner(BlockTuner):
    """Keeps gates behind blocks. A call with labels trains them; one without is the base model's own.

    Where it hears how long a run is (`training/between_steps.py`), it ends the run by fitting every temperature to the
    gates as they then are: step by step, a temperature follows gates that still change, at the rate of their weights.
    """

    uses_shared_state = True
    _total = 0
    _step = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By adapter: of the newest rows that are kept from the gates what each reads, (gates + 1, rows, width); the
        # gates and the head.
        self._newest: dict[str, Tensor] = {}
        self._reading: dict[str, tuple[list[Gate], nn.Module]] = {}

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        config: Any = peft_config
        anatomy = inspect(model)
        if anatomy.kind != "causal" or not (anatomy.head and anatomy.final_norm):
            raise ValueError(f"{type(model).__name__} predicts no next token from its last norm and head")
        layers = len(self.blocks)
        config.gates = config.gates or gates_of(layers)
        config.epsilon, config.offset = _form_of(final_norm(model))
        if not config.gates or config.gates[-1] >= layers:
            raise ValueError(f"gates={config.gates} do not stand below the last of {layers} blocks")

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        found = super()._check_target_module_exists(peft_config, key)
        return found and self.blocks[key].index + 1 in self.reached(peft_config)

    def reached(self, config: Any) -> Sequence[int]:
        """Blocks, counted from 1, that have a part of the adapter."""
        return config.gates

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        names = [name for name in self.active_adapters if name in self.peft_config]
        if labels is None or not names or self.disabled:
            return self.model(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        batch = {**kwargs, **({"input_ids": args[0]} if args else {})}
        batch.pop("use_cache", None)
        loss = sum(self.loss(name, batch, labels) for name in names)
        return CausalLMOutput(loss=loss, logits=torch.zeros(0, device=labels.device, requires_grad=True))  # type: ignore[arg-type]

    @property
    def disabled(self) -> bool:
        return any(m.disable_adapters for m in self.model.modules() if isinstance(m, Beside))

    def loss(self, name: str, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """The adapter's loss on the positions that a label follows."""
        raise NotImplementedError

    def taught(
        self, name: str, gates: Sequence[Gate], states: Sequence[Tensor], final: Tensor, head: nn.Module, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`gates_loss` of an adapter's gates, weighed as its config says."""
        config: Any = self.peft_config[name]
        if self.training and self._total:
            rows = torch.stack([x.detach()[kept].to(final.dtype) for x in (*states, final)])
            before = self._newest.get(name, rows[:, :0]).to(rows)
            self._newest[name] = torch.cat([before, rows], 1)[:, -_NEWEST:]
            self._reading[name] = list(gates), head
        weights = config.weights or [1.0] * len(gates)
        return gates_loss(gates, states, weights, head, final, config.temperature, kept)

    def configure_schedule(self, total_steps: int) -> None:
        """Hear how long the run is; it may be said again."""
        self._total = total_steps
        self._end()

    def update_and_allocate(self, global_step: int) -> None:
        """Fit the temperatures after the last step; the first is number 0."""
        self._step = global_step + 1
        self._end()

    def _end(self) -> None:
        if self._step >= self._total:
            for name, (gates, head) in self._reading.items():
                fit_temperatures(gates, self._newest[name], head)
            self._newest, self._reading = {}, {}

    def allocation_state(self) -> dict[str, Any]:
        """The newest rows of every adapter, to go on from a checkpoint."""
        return {"step": self._step, "newest": self._newest}

    def load_allocation_state(self, state: Mapping[str, Any]) -> None:
        self._step, self._newest = int(state["step"]), dict(state["newest"])


@torch.no_grad()
def fit_temperatures(gates: Sequence[Gate], read: Tensor, head: Any) -> None:
    """Give each gate the temperature at which its cross-entropy with the whole model's first choice is least.

    Args:
        read: (gates + 1, rows, width): what stands behind each gate's block, and what the head is applied to.
        head: a linear layer.
    """
    read = read.to(head.weight.dtype)
    parts = range(0, read.shape[1], _at_once(head))
    best = [head(read[-1, start : start + parts.step]).argmax(-1, keepdim=True) for start in parts]
    for gate, states in zip(gates, read[:-1] if best else ()):
        warmth = gate.temperature.log()
        for _ in range(20):  # Fisher's scoring: two or three bring it home from where training left it
            slope, bend = torch.zeros_like(warmth), torch.zeros_like(warmth)
            for start, right in zip(parts, best):
                x = gate(states[start : start + parts.step]).to(read.dtype)
                scaled = head(x).float() / warmth.exp()
                q = scaled.softmax(-1)
                mean = (q * scaled).sum(-1, keepdim=True)
                slope += (scaled.gather(-1, right) - mean).sum()
                bend += (q * (scaled - mean).square()).sum()
            step = (slope / bend.clamp_min(1e-9)).clamp(-1, 1)
            warmth = (warmth - step).clamp(-3, 3)  # a gate that is never wrong could be as sure as one likes
            if abs(step.item()) < 1e-3:
                break
        gate.warmth.copy_(warmth / WARMTH)


def wanted_rows(labels: Tensor) -> Tensor:
    """bool (batch, length): whether the position's next token is one to learn from."""
    after = torch.zeros_like(labels, dtype=torch.bool)
    after[:, :-1] = labels[:, 1:] != IGNORED
    return after


def kept_rows(ids: Tensor) -> Tensor:
    """bool, as ids (batch, length): one position in eight, the same ones whenever a text comes again.

    Gates learn at the others. At these their temperatures are fitted, so that a gate is judged where it was not taught.
    """
    last_four = torch.zeros_like(ids)
    for back, prime in enumerate(_PRIMES):
        last_four = last_four + (torch.roll(ids, back, 1) + 1) * prime
    return (last_four * 0x9E3779B1 & 0xFFFFFFFF) >> 29 == 0


def gates_loss(
    gates: Sequence[Any], states: Sequence[Tensor], weights: Sequence[float], head: Any, final: Tensor, at: float,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean over rows of sum_k w_k KL(final || gate k), beside the cross-entropies that teach the gates' temperatures;
    and (gates, rows) whether a gate's first choice is the model's.

    Args:
        states: what stands behind each gate's block, (rows, width) each.
        head: a linear layer; nothing flows into its weight.
        final: (rows, width), what the head is applied to at the model's end.
        at: T of both distributions.
        kept: bool (rows): those that teach the temperatures, and the temperatures alone.
    """
    read = torch.stack([gate(x).to(final.dtype) for gate, x in zip(gates, states)])
    warmth = WARMTH * torch.cat([gate.warmth.float() for gate in gates])
    divergence, calibration, agree = _Divergence.apply(read, warmth, final, head, at, kept)
    weigh = torch.tensor(weights, device=read.device)
    count = kept.sum()
    calibration = calibration.sum() / count.clamp_min(1)
    # Of the calibration only the gradient counts: what a gate is sure of is no part of how well it guesses.
    loss = (divergence * weigh).sum() / (len(kept) - count).clamp_min(1) + calibration - calibration.detach()
    return loss, agree


class _Divergence(torch.autograd.Function):
    """Summed divergences and calibrations, one a gate; gradients are made in the forward pass, where the logits are.

    Of calibration k, cross-entropy of the gate's logits g / t with the whole model's first choice y, only log t has a
    gradient: (g_y - sum_i q_i g_i) / t, q what the gate says at t.
    """

    @staticmethod
    def forward(ctx: Any, read: Tensor, warmth: Tensor, final: Tensor, head: Any, at: float, kept: Tensor) -> Any:
        count = len(read)
        sums, sure, into_warmth = (torch.zeros(count, device=read.device) for _ in range(3))
        into_read = torch.zeros_like(read)
        agree = torch.zeros(read.shape[:2], dtype=torch.bool, device=read.device)
        rows = _at_once(head)
        for start in range(0, len(final), rows):
            here = slice(start, start + rows)
            said = head(final[here]).float()
            best = said.argmax(-1, keepdim=True)
            said = (said / at).log_softmax(-1)
            chance = said.exp()
            judges = kept[here].float()
            taught = 1 - judges
            for k in range(count):
                guess = head(read[k, here]).float()
                agree[k, here] = guess.argmax(-1) == best[:, 0]
                scaled = guess / warmth[k].exp()
                q = scaled.softmax(-1)
                sure[k] -= (scaled.log_softmax(-1).gather(-1, best)[:, 0] * judges).sum()
                into_warmth[k] += ((scaled.gather(-1, best)[:, 0] - (q * scaled).sum(-1)) * judges).sum()
                guess = (guess / at).log_softmax(-1)
                sums[k] += ((chance * (said - guess)).sum(-1) * taught).sum()
                into_read[k, here] = ((guess.exp() - chance) * taught[:, None] / at).to(read.dtype) @ head.weight
        ctx.save_for_backward(into_read, into_warmth)
        ctx.mark_non_differentiable(agree)
        return sums, sure, agree

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        into_read, into_warmth = ctx.saved_tensors
        return (into_read * grads[0][:, None, None]).to(into_read.dtype), into_warmth * grads[1], None, None, None, None


def _at_once(head: Any) -> int:
    """Rows whose logits are there at the same time."""
    return max(16, _CHUNK // (4 * head.out_features))


def gates_of(layers: int) -> list[int]:
    """A third and two thirds of the way up."""
    return sorted({g for g in (round(layers / 3), round(2 * layers / 3)) if 1 <= g < layers} or {max(1, layers - 1)})


def final_norm(model: nn.Module) -> nn.Module:
    return model.get_submodule(inspect(model).final_norm)


def whole_pass(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, nn.Module]:
    """What the head is applied to, (batch, length, width), and the head; without gradients.

    Raises:
        UsageError: the model scales or caps its logits after the head, which gates do not.
    """
    with torch.no_grad(), at_rest(model):
        hidden, head, output = last_hidden_and_head(model, batch)
        told, ours = output.logits[:, -1].float(), head(hidden[:, -1]).float()
    if not torch.allclose(told, ours, rtol=0.02, atol=0.02 * float(ours.abs().max())):
        raise UsageError(
            f"{type(model).__name__} changes its logits after its head", "gates would learn other chances than it has"
        )
    return hidden, head


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """As it answers, without dropout."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _form_of(norm: nn.Module) -> tuple[float, float]:
    """What a norm adds to the mean square, and to its weight.

    Raises:
        ValueError: it is neither a norm of the root mean square nor one of the deviation.
    """
    epsilon = float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 1e-5)
    offset, weight, bias = norm_offset(norm), norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        return epsilon, offset
    sign = torch.ones_like(weight)
    sign[1::2] = -1
    with torch.no_grad():
        scale = (norm(sign) - (0 if bias is None else bias)) * sign  # of numbers with mean 0 and deviation 1
    if not torch.allclose(scale.float(), weight.float() + offset, rtol=0.02, atol=0.02):
        raise ValueError(f"{type(norm).__name__} is no norm that a gate can copy")
    return epsilon, offset

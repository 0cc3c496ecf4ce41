"""Hard concrete gates on the heads, neurons and dimensions of a model, and the price they pay for its size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.models import uneven
from shoestring.models.anatomy import Anatomy

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
SURE = math.log(100)  # a stays within -SURE and SURE
STARTS = {"groups": 10.0, "neurons": math.log(0.99 / 0.01), "dimensions": 10.0}
BIAS = TEMPERATURE * math.log(-LOW / HIGH)


@dataclass(frozen=True)
class Decision:
    """Multipliers of all parts, 0 for what is not there: of the groups and neurons of each block, and of the stream."""

    groups: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    dimensions: Tensor | None = None


class Gates(nn.Module):
    """The gates of a model, its size as they expect it, and the multipliers of the present batch.

    Training calls `auxiliary_loss`, `configure_schedule`, `update_and_allocate` and the two that save its state.

    Args:
        sizes: of the model.
        sparsity: the share of its weights that is to go.
        hidden: whether dimensions of the stream have gates.
        warmup: share of the steps over which the target rises.
    """

    def __init__(self, sizes: uneven.Sizes, sparsity: float, hidden: bool = False, warmup: float = 0.5) -> None:
        super().__init__()
        self.sizes, self.sparsity, self.warmup = sizes, sparsity, warmup
        self.groups = nn.ParameterList(_start("groups", size.groups) for size in sizes.blocks)
        self.neurons = nn.ParameterList(_start("neurons", size.neurons) for size in sizes.blocks)
        self.dimensions = _start("dimensions", sizes.hidden) if hidden else None
        self.prices = nn.Parameter(torch.zeros(2))  # lambda_1 and lambda_2
        self.step, self.total_steps = 0, 1
        self.now: Decision | None = None
        self.learning = False
        self.clamp()

    def gates(self) -> list[nn.Parameter]:
        """The a of all gates, a vector for each block and kind."""
        own = [] if self.dimensions is None else [self.dimensions]
        return [*self.groups, *self.neurons, *own]

    @torch.no_grad()
    def clamp(self) -> None:
        for gate in self.gates():
            gate.clamp_(-SURE, SURE)

    def begin(self, learning: bool) -> None:
        """Draw the multipliers of a batch, or take the settled ones where nothing is to be learned from it."""
        self.learning = learning
        self.now = self.draw() if learning else self.settle()

    def draw(self) -> Decision:
        """Multipliers at random, differentiable in a."""
        stream = None if self.dimensions is None else draw(self.dimensions)
        return Decision(tuple(map(draw, self.groups)), tuple(map(draw, self.neurons)), stream)

    @torch.no_grad()
    def settle(self, of_groups: float = 0.0, of_neurons: float = 0.0) -> Decision:
        """The multipliers that stay. Shifts are added to a where it is decided how many parts of a kind go."""
        stream = None if self.dimensions is None else settled(self.dimensions)
        return Decision(
            tuple(settled(gate, of_groups) for gate in self.groups),
            tuple(settled(gate, of_neurons) for gate in self.neurons),
            stream,
        )

    def expected_sparsity(self) -> Tensor:
        """The share of the weights that is expected to go."""
        groups, neurons = (
            torch.stack([likely(gate).sum() for gate in kind]).sum() for kind in (self.groups, self.neurons)
        )
        left = groups * self.sizes.group_cost + neurons * self.sizes.neuron_cost
        if self.dimensions is not None:
            left = left * likely(self.dimensions).mean()
        return 1 - left / self.sizes.weights  # (eq. 3)

    def target(self) -> float:
        """The share that is to be gone by now."""
        rising = self.warmup * self.total_steps
        return self.sparsity * min(1.0, self.step / rising if rising else 1.0)

    def on_budget(self) -> Decision:
        """What stays, with the neurons that meet the budget: the share of weights of whole parts, to the neuron."""
        both = self._shift(lambda shift: self.settle(shift, shift))
        neurons = self._shift(lambda shift: self.settle(both, shift))
        return _with_a_head(self.settle(both, neurons), self.groups)

    def _shift(self, decide: Any) -> float:
        """The smallest shift, up to sign, with which what is decided has the size that it should."""
        low, high = -4 * SURE, 4 * SURE
        wanted = (1 - self.sparsity) * self.sizes.weights
        if abs(weights_left(decide(0.0), self.sizes) - wanted) <= self.sizes.neuron_cost / 2:
            return 0.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if weights_left(decide(middle), self.sizes) < wanted else (low, middle)
        return min((low, high), key=lambda shift: abs(weights_left(decide(shift), self.sizes) - wanted))

    # ---- what training calls

    def auxiliary_loss(self) -> Tensor | None:
        if not self.learning:
            return None
        over = self.expected_sparsity() - self.target()
        return self.prices[0] * over + self.prices[1] * over**2  # (eq. 4)

    def configure_schedule(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def update_and_allocate(self, global_step: int) -> None:
        self.step = global_step
        self.clamp()

    def allocation_state(self) -> dict[str, int]:
        return {"step": self.step, "total_steps": self.total_steps}

    def load_allocation_state(self, state: dict[str, int]) -> None:
        self.step, self.total_steps = state["step"], state["total_steps"]


class Adam(torch.optim.AdamW):
    """AdamW for adapter and gates: gates keep their own learning rate, prices climb.

    Args:
        groups: of all trained parameters, as the training loop makes them.
        gates: those among them that belong to gates.
        rate: of gates and prices.
    """

    def __init__(self, groups: list[dict[str, Any]], gates: Gates, rate: float) -> None:
        own = {id(p) for p in gates.parameters()}
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups]
        steady = {"lr": rate, "steady": rate, "weight_decay": 0.0}
        super().__init__(
            [*(group for group in rest if group["params"]), {"params": gates.gates(), **steady},
             {"params": [gates.prices], "maximize": True, **steady}]
        )  # fmt: skip

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = group.get("steady", group["lr"])  # a schedule is for the adapter
        return super().step(closure)


@contextmanager
def gated(model: nn.Module, anatomy: Anatomy, gates: Gates) -> Iterator[None]:
    """Within the block the outputs of heads, neurons and what enters the stream are multiplied by their gates.

    A forward pass draws if the model is in training mode and gradients are kept, else it takes what is settled.
    """
    wide = gates.sizes.head_dim * gates.sizes.group_heads

    def heads(_: nn.Module, given: tuple[Tensor, ...], block: int) -> tuple[Tensor, ...]:
        z = _now(gates).groups[block].repeat_interleave(wide)
        return (given[0] * z.to(given[0].dtype), *given[1:])

    def neurons(_: nn.Module, given: Any, out: Tensor, block: int) -> Tensor:
        return out * _now(gates).neurons[block].to(out.dtype)

    def stream(_: nn.Module, given: Any, out: Tensor) -> Tensor:
        z = _now(gates).dimensions
        assert z is not None
        return out * z.to(out.dtype)

    def begin(module: nn.Module, *_: Any) -> None:
        gates.begin(module.training and torch.is_grad_enabled())

    hooks = [model.register_forward_pre_hook(begin)]
    for place, block in enumerate(anatomy.blocks):
        named = {role: model.get_submodule(name) for role, name in block.projections.items()}
        if "o" in named:
            hooks.append(named["o"].register_forward_pre_hook(partial(heads, block=place)))
        hooks += [named[r].register_forward_hook(partial(neurons, block=place)) for r in ("gate", "up") if r in named]
        if gates.dimensions is not None:
            hooks += [named[role].register_forward_hook(stream) for role in ("o", "down") if role in named]
    if gates.dimensions is not None:
        hooks.append(model.get_submodule(anatomy.embeddings).register_forward_hook(stream))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def draw(a: Tensor) -> Tensor:
    """A fresh multiplier in [0, 1] for every gate."""
    u = torch.empty_like(a).uniform_(1e-6, 1 - 1e-6)
    y = torch.sigmoid((u.logit() + a) / TEMPERATURE)
    return (y * (HIGH - LOW) + LOW).clamp(0, 1)  # (eq. 1)


def likely(a: Tensor) -> Tensor:
    """The probability that a gate's multiplier is above 0."""
    return torch.sigmoid(a - BIAS)  # (eq. 2)


def settled(a: Tensor, shift: float = 0.0) -> Tensor:
    """The multipliers that stay: 0 for the smallest, as many as are expected to be."""
    soft = torch.sigmoid(0.8 * a / TEMPERATURE)
    gone = round(float((1 - likely(a + shift)).sum()))
    soft[a.argsort(stable=True)[:gone]] = 0
    return soft  # (eq. 5)


def weights_left(decision: Decision, sizes: uneven.Sizes) -> float:
    """Weights of the blocks' matrices that a decision leaves."""
    groups, neurons = (sum(int((z > 0).sum()) for z in kind) for kind in (decision.groups, decision.neurons))
    share = 1.0 if decision.dimensions is None else float((decision.dimensions > 0).float().mean())
    return share * (groups * sizes.group_cost + neurons * sizes.neuron_cost)


def _with_a_head(decision: Decision, gates: Any) -> Decision:
    """A model without any attention could not count its tokens: the likeliest group stays."""
    if any(bool((z > 0).any()) for z in decision.groups):
        return decision
    best = max((block for block, gate in enumerate(gates) if len(gate)), key=lambda block: gates[block].max().item())
    groups = list(decision.groups)
    groups[best] = groups[best].clone()
    groups[best][int(gates[best].argmax())] = 1.0
    return Decision(tuple(groups), decision.neurons, decision.dimensions)


def _now(gates: Gates) -> Decision:
    assert gates.now is not None
    return gates.now


def _start(kind: str, count: int) -> nn.Parameter:
    return nn.Parameter(torch.full((count,), STARTS[kind]) + 0.01 * torch.randn(count))

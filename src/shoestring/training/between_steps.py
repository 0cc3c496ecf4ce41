"""Adapters that act between the steps of a run: move their budget about, or grow; and learning rates of their own.

A tuner, the module in which peft keeps a method's adapters, joins by defining methods; where peft's own tuners have one
of them, it has that name:

    update_and_allocate(global_step)   called after every optimizer step, while its gradients are still there; the
                                       first step is 0
    configure_schedule(total_steps)    optional; called before the first step, and again whenever a time limit
                                       shortens the run. A tuner without it whose config has a field `total_step` gets
                                       the number of steps written there, once, before the first step
    allocation_state()                 optional; what it must remember beside its weights to go on from a checkpoint: a
                                       tree of dicts, lists, numbers, strings, tensors
    load_allocation_state(state)       optional; takes that back on a fresh tuner. Afterwards its parameters must have
                                       the names and shapes they had then; their values are loaded by the trainer

Any module may also define

    parameter_groups(learning_rate)    a list of torch's parameter groups, {"params": [...], "lr": ..., ...}, for those
                                       of its parameters that are not to be trained at the run's own learning rate or
                                       with its weight decay; the schedule scales every group's rate alike

Between steps parameters may appear, vanish, change their shape in place (`p.data = larger`) or give their name to
another parameter. The optimizer follows: what it holds of a parameter stays with the name, new entries of a grown one
start at zero behind the old ones, and a new parameter joins the others at their present learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.core.errors import ShoestringError


class BetweenSteps:
    """The tuners of `model` that act between steps, and the optimizer that has to follow them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # A peft model hands unknown names on to what it wraps, so only what a class itself defines counts.
        self.tuners = {n: m for n, m in model.named_modules() if hasattr(type(m), "update_and_allocate")}
        self._known: dict[str, tuple[nn.Parameter, torch.Size]] = {}

    def begin(self, total_steps: int) -> None:
        """Tell the tuners how long the run is."""
        self._known = self._trained()
        for tuner in self.tuners.values():
            if hasattr(type(tuner), "configure_schedule"):
                tuner.configure_schedule(total_steps)  # type: ignore[operator]
                continue
            for config in getattr(tuner, "peft_config", {}).values():
                if hasattr(config, "total_step"):
                    config.total_step = total_steps

    def shorten(self, total_steps: int) -> None:
        """Tell them that it ends earlier."""
        for tuner in self.tuners.values():
            if hasattr(type(tuner), "configure_schedule"):
                tuner.configure_schedule(total_steps)  # type: ignore[operator]

    def act(self, step: int, optimizer: Any, decayed: Callable[[], Collection[str]]) -> None:
        """Let the tuners act after optimizer step number `step`, the first being 0.

        Args:
            decayed: gives the names of the parameters that weight decay applies to; asked when parameters changed.
        """
        if not self.tuners:
            return
        for tuner in self.tuners.values():
            tuner.update_and_allocate(step)  # type: ignore[operator]
        now = self._trained()
        same = now.keys() == self._known.keys() and all(
            parameter is self._known[name][0] and shape == self._known[name][1]
            for name, (parameter, shape) in now.items()
        )
        if not same:
            # accelerate wraps the optimizer; its state is that of the one inside.
            _follow(getattr(optimizer, "optimizer", optimizer), self._known, now, decayed())
            self._known = now

    def state(self) -> dict[str, Any]:
        return {n: t.allocation_state() for n, t in self.tuners.items() if hasattr(type(t), "allocation_state")}  # type: ignore[operator]

    def load(self, state: Mapping[str, Any]) -> None:
        for name, kept in state.items():
            self.tuners[name].load_allocation_state(kept)  # type: ignore[operator]

    def _trained(self) -> dict[str, tuple[nn.Parameter, torch.Size]]:
        return {n: (p, p.shape) for n, p in self.model.named_parameters() if p.requires_grad}


def own_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """The parameter groups that modules of `model` ask for, without parameters that do not train."""
    asked = [m for m in model.modules() if hasattr(type(m), "parameter_groups")]
    groups = [dict(group) for module in asked for group in module.parameter_groups(learning_rate)]  # type: ignore[operator]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return [group for group in groups if group["params"]]


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's trained weights into the model.

    Raises:
        ShoestringError: the model has no such parameter, or one of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        have = tuple(parameters[name].shape) if name in parameters else None
        if have != tuple(value.shape):
            raise ShoestringError(
                f"The checkpoint's {name} has the shape {tuple(value.shape)}, the model's {have}",
                "the adapter changed while it was trained and does not say how to become what it was",
                "Start again without resuming, or give the tuner allocation_state and load_allocation_state",
            )
        with torch.no_grad():
            parameters[name].copy_(value)


def _follow(
    optimizer: torch.optim.Optimizer,
    before: Mapping[str, tuple[nn.Parameter, torch.Size]],
    now: Mapping[str, tuple[nn.Parameter, torch.Size]],
    decayed: Collection[str],
) -> None:
    """Make `optimizer` hold the parameters `now` in place of those of `before`.

    Their order stays that of the model, as in an optimizer made anew, so that a checkpoint's state finds its owners.
    """
    named = {id(p): name for name, (p, _) in before.items()}
    groups = [[named[id(p)] for p in group["params"] if id(p) in named] for group in optimizer.param_groups]
    place = {name: number for number, names in enumerate(groups) for name in names}
    of_kind = {name in decayed: number for name, number in place.items()}
    kept = {name: optimizer.state.pop(p, {}) for name, (p, _) in before.items()}
    for group in optimizer.param_groups:
        group["params"] = []
    for name, (parameter, shape) in now.items():
        number = place.get(name, of_kind.get(name in decayed, len(groups) - 1))
        optimizer.param_groups[number]["params"].append(parameter)
        if kept.get(name):
            old = before[name][1]
            optimizer.state[parameter] = {k: _grown(v, old, shape) for k, v in kept[name].items()}


def _grown(value: Any, old: torch.Size, new: torch.Size) -> Any:
    """`value` as it is, or when it belongs entry by entry to a parameter of shape `old`, cut or padded to `new`."""
    if not isinstance(value, Tensor) or value.shape != old or old == new:
        return value
    if len(old) != len(new):
        return value.new_zeros(new)
    common = tuple(slice(min(a, b)) for a, b in zip(old, new))
    made = value.new_zeros(new)
    made[common] = value[common]
    return made

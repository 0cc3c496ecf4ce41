"""What can be cut out of the width of layers: inputs that hardly vary can stand as their mean, which is a bias.

Equations of FLAP (An et al., 2023), as pruning for several widths uses them: over all layers together, whole groups of
heads that share keys and values, and single neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Mean and variance over tokens of a layer's inputs, both (in,) float32."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Width:
    """What stays at one width: for each layer bool (groups,) for its groups of heads and bool (neurons,)."""

    groups: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]


class RunningMoments:
    """Mean and variance in one pass over batches of any size, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Take in `values` (..., in)."""
        values = values.detach().double().flatten(0, -2)
        more, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        if self.count == 0:
            self.count, self.mean, self.squares = more, mean, squares
            return
        total, apart = self.count + more, mean - self.mean
        self.mean = self.mean + apart * (more / total)
        self.squares = self.squares + squares + apart.square() * (self.count * more / total)
        self.count = total

    def moments(self) -> Moments:
        return Moments(self.mean.float(), (self.squares / self.count).float())


@torch.no_grad()
def watch(model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]]) -> dict[str, Moments]:
    """Moments of the inputs of the modules `names` while `model` reads `batches`, whose every position counts."""
    running = {name: RunningMoments() for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, r=found: r.add(args[0]))
        for name, found in running.items()
    ]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found.moments() for name, found in running.items()}


def scores(weight: Tensor, variance: Tensor, groups: int = 0) -> Tensor:
    """How much each input of a layer matters beside the others of that layer: standardized, (in,) or (groups,).

    Args:
        weight: (out, in).
        variance: (in,), the fluctuation of each input.
        groups: of heads, for the output of attention: squared once more, then averaged within each.
    """
    score = variance.double() * weight.double().square().sum(0)
    if groups:
        score = score.square()
    spread = score.std()
    # All inputs of a layer alike: none stands out.
    score = (score - score.mean()) / spread if spread > 0 else torch.zeros_like(score)
    return score.view(groups, -1).mean(1) if groups else score  # (eq. 2)


def choose(
    attention: Sequence[Tensor], neurons: Sequence[Tensor], weight: float, ratios: Sequence[float]
) -> tuple[Width, ...]:
    """What stays at each of `ratios`: the best of all layers together, until their parameters reach the ratio.

    Args:
        attention: scores of the groups of heads of each layer.
        neurons: scores of the neurons of each layer.
        weight: parameters of a group of heads / those of a neuron.

    Returns:
        one width per ratio; of two, the smaller is part of the larger.
    """
    pooled = torch.cat([*attention, *neurons])
    count = sum(map(len, attention))
    weights = torch.ones_like(pooled)
    weights[:count] = weight
    order = pooled.argsort(descending=True, stable=True)
    reached = weights[order].cumsum(0) / weights.sum()
    widths = []
    for ratio in ratios:
        stays = torch.zeros(len(pooled), dtype=torch.bool)
        # The number of best units whose share is nearest to the ratio (eq. 3).
        stays[order[: 1 + int((reached - ratio).abs().argmin())]] = True
        parts = stays.split([len(part) for part in (*attention, *neurons)])
        widths.append(Width(tuple(parts[: len(attention)]), tuple(parts[len(attention) :])))
    return tuple(widths)


def compensation(weight: Tensor, mean: Tensor, removed: Tensor) -> Tensor:
    """The bias (out,) that stands for the removed inputs at their means: W[:, removed] @ mean[removed]."""
    return weight[:, removed].float() @ mean[removed].float()  # (eq. 4)

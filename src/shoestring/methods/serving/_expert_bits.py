"""How many bits each expert gets when they are few on average: more for those whose errors count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.core.errors import UsageError
from shoestring.models.anatomy import mixtures
from shoestring.models.routing import Trace

BITS = (2, 3, 4, 5, 6)
GROUP = 32


def rounded(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Each group of columns on an even grid of 2^bits values between its ends."""
    parts = weight.float().reshape(len(weight), -1, min(group, weight.shape[1]))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return ((parts - low) / step).round().mul(step).add(low).view_as(weight).to(weight.dtype)


def errors(model: nn.Module, trace: Trace) -> list[list[dict[int, float]]]:
    """Of each layer and expert, for each number of bits, how much its rounding counts.

    The sum of the gates it gets times the squared error of its weights over their squares: an expert that nobody meets
    may be rough, and so may one whose weights round well.
    """
    found = []
    for mixture, mass in zip(mixtures(model), trace.masses()):
        experts: Any = model.get_submodule(mixture.experts)
        rows = []
        for expert in range(mixture.count):
            own = [w for n in mixture.tensors if (w := experts.get_parameter(n)[expert].detach().float()).dim() == 2]
            square = sum(float(w.square().sum()) for w in own)
            rows.append(
                {
                    bits: float(mass[expert]) * sum(float((rounded(w, bits) - w).square().sum()) for w in own) / square
                    for bits in BITS
                }
            )
        found.append(rows)
    return found


def allocate(costs: Sequence[Sequence[dict[int, float]]], average: float) -> list[list[int]]:
    """Bits of each expert of each layer: one more at a time where that helps most, until the average is reached.

    Raises:
        UsageError: an average outside what there is.
    """
    if not BITS[0] <= average <= BITS[-1]:
        raise UsageError(f"{average} bits on average are not possible", f"there are {BITS[0]} to {BITS[-1]}")
    bits = [[BITS[0]] * len(layer) for layer in costs]
    left = round((average - BITS[0]) * sum(map(len, costs)))
    for _ in range(left):
        may = [(n, e) for n, layer in enumerate(bits) for e, b in enumerate(layer) if b < BITS[-1]]
        n, e = max(may, key=lambda at: costs[at[0]][at[1]][b := bits[at[0]][at[1]]] - costs[at[0]][at[1]][b + 1])
        bits[n][e] += 1
    return bits


@torch.no_grad()
def round_experts(model: nn.Module, bits: Sequence[Sequence[int]]) -> float:
    """Round the experts of a loaded model in place; returns the bits of a weight on average."""
    total = count = 0
    for mixture, layer in zip(mixtures(model), bits):
        experts: Any = model.get_submodule(mixture.experts)
        for expert, number in enumerate(layer):
            for name in mixture.tensors:
                weight = experts.get_parameter(name)[expert]
                if weight.dim() == 2:
                    weight.copy_(rounded(weight, number))
                    total, count = total + number * weight.numel(), count + weight.numel()
    return total / count

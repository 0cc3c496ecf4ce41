"""A mixture of low-rank updates whose blend depends on the subnet, not on the token; it folds into one plain update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.models.anatomy import features, inspect
from shoestring.models.surgery import replace_module

HIDDEN = 16


class ShapeRouter(nn.Module):
    """Gates of the experts from the shape of a subnet: which layers it has, and which of the widths.

    Args:
        layers: of the whole model.
        widths: how many there are.
        experts, top: how many experts there are, and how many take part.
    """

    def __init__(self, layers: int, widths: int, experts: int, top: int) -> None:
        super().__init__()
        self.layers, self.widths, self.top = layers, widths, top
        self.score = nn.Sequential(nn.Linear(layers + widths, HIDDEN), nn.Linear(HIDDEN, experts))
        self.noise = nn.Linear(layers + widths, experts)

    def forward(self, keep: Sequence[bool], width: int) -> Tensor:
        """(experts,) that sum to 1, 0 for all but `top`. In training a fresh noise is added to what decides."""
        device = self.noise.weight.device
        one_hot = [float(place == width) for place in range(self.widths)]
        shape = torch.tensor([*map(float, keep), *one_hot], device=device)
        with torch.autocast(device.type, enabled=False):  # gates blend float32 matrices
            logits = self.score(shape)
            if self.training:
                logits = logits + torch.randn_like(logits) * F.softplus(self.noise(shape))
            best, places = logits.topk(self.top)
            return torch.zeros_like(logits).scatter(0, places, best.softmax(0))  # (eq. 6)


class MixedLinear(nn.Module):
    """A frozen linear layer with a mixture of low-rank updates, of whose inputs some may be absent.

    Attributes:
        gates: (experts,) of the subnet that is active; None leaves the update out.
        mask: (in,) of 0 and 1, or None: inputs that the subnet has not.
        shift: (out,) or None, added to the output: what stands for the absent inputs.
    """

    cast_input_dtype_enabled = True

    def __init__(self, base: nn.Module, experts: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.base_layer = base
        inputs, outputs = features(base)
        self.scaling = alpha / rank
        bound = 1 / math.sqrt(inputs)  # kaiming's with a = sqrt(5), as a plain low-rank adapter starts
        device: Any = base.weight.device
        self.A = nn.Parameter(torch.empty(experts, rank, inputs, device=device).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(experts, outputs, rank, device=device))
        self.gates: Tensor | None = None
        self.mask: Tensor | None = None
        self.shift: Tensor | None = None

    def blended(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank): each the sum of the experts' own by their gates, so their product has cross
        terms."""
        return torch.tensordot(gates, self.A, 1), torch.tensordot(gates, self.B, 1)  # (eq. 5)

    def update(self, gates: Tensor) -> Tensor:
        """What the mixture adds to the weight, (out, in) float32."""
        a, b = self.blended(gates)
        return self.scaling * (b @ a)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is not None:
            x = x * self.mask.to(x.dtype)
        out = self.base_layer(x)
        if self.gates is not None:
            a, b = self.blended(self.gates)
            low = F.linear(x.to(a.dtype) if self.cast_input_dtype_enabled else x, a)
            out = out + (self.scaling * F.linear(low, b)).to(out.dtype)
        return out if self.shift is None else out + self.shift.to(out.dtype)


def attach(model: nn.Module, experts: int, rank: int, alpha: float) -> dict[str, MixedLinear]:
    """Give every linear layer of the blocks a mixture, and let nothing else train; returns them by the layer's name."""
    model.requires_grad_(False)
    made = {}
    for name, module, _ in list(inspect(model).linears()):
        made[name] = MixedLinear(module, experts, rank, alpha)
        replace_module(model, name, made[name])
    return made

"""PTQTP: write a weight matrix as the sum of two ternary matrices with scales per group, fitted without any data.

How it works
    Every row of a weight matrix is cut into groups of neighbours along the input dimension, each fitted alone:
        x ~ a1 t1 + a2 t2,   t1, t2 in {-1, 0, +1}.                                                       (1)
    1. Start: t1 = t2 = sign(x), where zero counts as positive; a = (1, 1).                               (2)
    2. Scales, with S = [t1 t2] and in float64: a = (S'S + r I)^-1 S'x.                                   (3)
       The ridge r, 1e-8 at first, is the group's own: where the condition number k of S'S + r I reaches
       1e6, it grows to min(r sqrt(k / 1e6), 1) before the system is solved.                              (4)
    3. Trits: every number takes the nearest of the nine levels a1 c1 + a2 c2.                            (5)
    4. Repeat 2 and 3 until a moves by less than 1e-4, or 50 times.
    5. Round a to float16 and choose the trits once more, against the scales as they are stored.
    `outlier_weight` w counts element j in (3) as 1 + w x_j^2 / mean(x^2) elements. Large weights, which the plain fit
    cuts off by a third, then keep their size; perplexity is far better for it (w = 5), the squared error no worse.
    Only the numbers of a group that lie above the four midpoints between non-negative levels, and their sums, enter
    (3). So a group is sorted by magnitude once, and an iteration takes four binary searches in running sums.

Where it bends
    4 + 32 / group_size bits per weight as stored here (4.25 for 128), not "2 x 1.58". At that size rounding to 4 bits
    is better; the form is for products made of additions, and its 9 levels compare with 3 bits. A layer whose width 128
    does not divide takes groups of 64, or of 32. The limit 1e-4 is absolute, as in the paper: tiny weights stop
    earlier. Scales below 6e-8 are zero in float16. Signs move from scales into trits and the larger scale comes first,
    so that one fit has one form. Not for embeddings, the head, or the routers of a mixture, whose experts are fitted
    one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.kernels import reference
from shoestring.kernels.formats import Format
from shoestring.kernels.formats.tritplanes import Tritplanes
from shoestring.methods.quantizers import _shared

METHOD = Method(
    paper=Paper(
        "PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models", "2025-09", arxiv="2509.16989"
    ),
    provides="PtqtpConfig",
    saves=("storage", "memory", "latency", "energy"),
    combines={"adapters": "yes", "pruners": "yes", "quantizers": "the weights are codes already"},
    expects={"check_error_bound": "least squares bound no single weight: those beyond the top level are cut"},
)

RIDGE, LARGEST_RIDGE, WORST_CONDITION = 1e-8, 1.0, 1e6
NEAR, MOST_ITERATIONS = 1e-4, 50
# The trits of the five non-negative levels in rising order, where a1 < 2 a2 and where a1 >= 2 a2.
_FIRST = ((0, 1, 0, 1, 1), (0, 0, 1, 1, 1))
_SECOND = ((0, -1, 1, 0, 1), (0, 1, -1, 0, 1))
_TOGETHER = 1 << 18  # weights that are fitted at one time


class PtqtpConfig(_shared.FormatConfig):
    """`AutoModelForCausalLM.from_pretrained(model, quantization_config=PtqtpConfig())`.

    Args:
        group_size: weights that share two scales, 128, 64 or 32; smaller where it does not divide a layer's width.
        outlier_weight: how much more a large weight counts when scales are fitted; 0 is the paper's method.
        embeddings: bits of the embedding table and of a head tied to it (8 or 4); None leaves them as they are.
        modules_to_not_convert: names, or parts of names, of modules to leave alone.
    """

    method = "ptqtp"

    def __init__(self, group_size: int = 128, outlier_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(group_size, **kwargs)
        self.outlier_weight = outlier_weight
        self.layers: dict[str, dict[str, Any]] = {}
        if not isinstance(outlier_weight, int | float) or not 0 <= outlier_weight < float("inf"):
            raise UsageError(f"outlier_weight {outlier_weight!r} is not possible", remedy="Use 0 or more, such as 5")

    @property
    def format(self) -> str:
        return f"tritplanes/{self.group_size}"

    def spec_of(self, name: str, rows: int, columns: int, embedding: bool) -> str | None:
        spec = super().spec_of(name, rows, columns, embedding)
        # A group that does not divide the width would be filled up with zeros.
        fitting = [group for group in self.groups if group <= self.group_size and columns % group == 0]
        return spec and f"{spec.partition('/')[0]}/{max(fitting, default=min(self.groups))}"

    def pack(self, weight: Tensor, format: Format, name: str) -> dict[str, Tensor]:
        if not isinstance(format, Tritplanes):
            return format.pack(weight)
        found = fit(weight, format.layout.group, self.outlier_weight)
        tensors = format.encode(found.first, found.second, found.scales)
        error = (format.unpack(tensors, weight.shape[1]) - weight).double().norm() / weight.double().norm()
        self.layers[name] = {
            "relative_error": float(error),
            "zeros": found.zeros,
            "iterations": float(found.iterations.double().mean()),
            "bits_per_weight": 8 * sum(tensor.nbytes for tensor in tensors.values()) / weight.numel(),
        }
        return tensors

    def facts(self) -> dict[str, Any]:
        """How well each layer was met."""
        return {"layers": self.layers}

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "layers"}


@dataclass(frozen=True)
class Fit:
    """What stands for a matrix [rows, cols].

    Attributes:
        first, second: the planes, int8 [rows, cols].
        scales: float16 [rows, groups, 2], the larger first, none negative.
        iterations: how often the scales were solved for, int64 [rows, groups].
    """

    first: Tensor
    second: Tensor
    scales: Tensor
    iterations: Tensor

    @property
    def zeros(self) -> tuple[float, float]:
        """The share of zeros in each plane."""
        return float((self.first == 0).float().mean()), float((self.second == 0).float().mean())


def fit(weight: Tensor, group: int, outlier_weight: float = 0.0) -> Fit:
    """Fit every group of a float matrix [rows, cols]; rows and groups do not touch each other.

    Raises:
        UsageError: not a matrix, not finite, or scales that float16 cannot hold.
    """
    reference.check_matrix(weight)
    rows, cols = weight.shape
    groups = -(-cols // group)
    parts = []
    step = max(1, _TOGETHER // (groups * group))
    for start in range(0, rows, step):
        part = weight.detach()[start : start + step].float()
        reference.refuse_not_finite(part)
        cut = torch.nn.functional.pad(part, (0, groups * group - cols)).view(-1, group)
        real = torch.full((groups,), group, device=weight.device)
        real[-1] -= groups * group - cols
        scales, iterations = _fit_scales(cut.abs(), real.repeat(len(part)), outlier_weight)
        stored = scales.half()
        if not torch.isfinite(stored).all():
            raise UsageError("A group's scale is beyond float16", remedy="Divide the weights by a constant first")
        first, second = nearest(cut, stored.float())
        planes = (first.view(len(part), -1)[:, :cols], second.view(len(part), -1)[:, :cols])
        parts.append((*planes, stored.view(len(part), groups, 2), iterations.view(len(part), groups)))
    return Fit(*(torch.cat(pieces) for pieces in zip(*parts)))


def nearest(x: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The trits of the nearest levels to x [n, group] under scales a1 >= a2 >= 0 [n, 2]: two of int8 [n, group]."""
    size, wide = x.abs(), _wide(scales)
    # How many midpoints lie below tells the level; trits of the second kind of order stand five places further.
    level = 5 * wide.to(torch.int8).unsqueeze(1).expand(-1, x.shape[1])
    for middle in _midpoints(scales).unbind(1):  # (5)
        level = level + (size > middle.unsqueeze(1))
    sign = x.sign().to(torch.int8)
    tables = (torch.tensor(table, dtype=torch.int8, device=x.device).flatten() for table in (_FIRST, _SECOND))
    first, second = (table[level.int()] * sign for table in tables)
    return first, second


def _fit_scales(size: Tensor, real: Tensor, outlier_weight: float) -> tuple[Tensor, Tensor]:
    """Scales float64 [n, 2] and iterations [n] of groups of magnitudes [n, group], `real` [n] of which count."""
    # Largest first, negated: searching wants rising numbers. Filled-up columns come last, as zeros.
    order = (-size).sort(1).values
    x = -order.double()
    weight = (torch.arange(x.shape[1], device=x.device) < real.unsqueeze(1)).double()
    if outlier_weight:
        mean = ((x * x).sum(1) / real).clamp(min=1e-300)
        weight = weight * (1 + outlier_weight * x * x / mean.unsqueeze(1))
    # Sums over the k largest numbers, k = 0..group: of weights, and of weighted numbers.
    counts, sums = (torch.nn.functional.pad(v.cumsum(1), (1, 0)) for v in (weight, weight * x))
    scales = torch.ones(len(x), 2, dtype=torch.float64, device=x.device)
    iterations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    running = torch.arange(len(x), device=x.device)
    ridge = torch.full((len(x),), RIDGE, dtype=torch.float64, device=x.device)
    n11 = n22 = n12 = counts[:, -1]  # (2)
    p1 = p2 = sums[:, -1]
    for _ in range(MOST_ITERATIONS):
        found, ridge = _solve(n11, n12, n22, p1, p2, ridge)
        iterations[running] += 1
        moved = (found - scales[running]).norm(dim=1) >= NEAR
        scales[running] = found
        running, found, ridge = running[moved], found[moved], ridge[moved]
        if not len(running):
            break
        if not moved.all():
            order, counts, sums = order[moved], counts[moved], sums[moved]
        above = torch.searchsorted(order, -_midpoints(found).to(order.dtype))
        # Of each level but zero: how many numbers it is nearest to, and their sum.
        here, total = (v.gather(1, above).diff(dim=1, append=v[:, :1]).neg() for v in (counts, sums))
        wide = _wide(found).long()
        first, second = (torch.tensor(t, dtype=torch.float64, device=x.device)[:, 1:][wide] for t in (_FIRST, _SECOND))
        n11, n12, n22 = (
            _row_sum(here * first * first),
            _row_sum(here * first * second),
            _row_sum(here * second * second),
        )
        p1, p2 = _row_sum(total * first), _row_sum(total * second)
    return scales, iterations


def _solve(n11: Tensor, n12: Tensor, n22: Tensor, p1: Tensor, p2: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """(3) for every group, the larger magnitude first and without signs; and the ridges it took."""
    half, off = (n11 + n22) / 2, (((n11 - n22) / 2) ** 2 + n12**2).sqrt()
    condition = (half + ridge + off) / torch.maximum(half + ridge - off, ridge)
    larger = (ridge * (condition / WORST_CONDITION).sqrt()).clamp(max=LARGEST_RIDGE)
    ridge = torch.where(condition >= WORST_CONDITION, larger, ridge)  # (4)
    d1, d2 = n11 + ridge, n22 + ridge
    determinant = d1 * d2 - n12 * n12
    scales = torch.stack((d2 * p1 - n12 * p2, d1 * p2 - n12 * p1), 1) / determinant.unsqueeze(1)
    # The levels stay the same ones: signs and places of the scales move into the trits.
    return scales.abs().sort(1, descending=True).values, ridge


def _wide(scales: Tensor) -> Tensor:
    """Whether a1 >= 2 a2, so that a2 is the smallest level above zero."""
    return scales[:, 0] >= 2 * scales[:, 1]


def _midpoints(scales: Tensor) -> Tensor:
    """Between the levels 0 <= ... <= a1 + a2: [n, 4]."""
    high, low = scales.unbind(1)
    levels = torch.stack((torch.minimum(low, high - low), torch.maximum(low, high - low), high, high + low), 1)
    return torch.stack((levels[:, 0] / 2, *((levels[:, i] + levels[:, i + 1]) / 2 for i in range(3))), 1)


def _row_sum(v: Tensor) -> Tensor:
    """The sum of four columns, in an order that does not depend on how many rows there are."""
    return v[:, 0] + v[:, 1] + v[:, 2] + v[:, 3]


def example() -> PtqtpConfig:
    return PtqtpConfig(group_size=64)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most bits first."""
    return tuple({"group_size": group, "outlier_weight": 5.0} for group in (64, 128))


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    return Price(_shared.price(shape, PtqtpConfig(**options)))

"""LUT-GEMM: store weights as sums of a few signs and multiply by looking sums up, never making the weights.

How it works
    1. Binary coding. In a group of `group_size` neighbours along the input dimension a weight is
       w = z + sum_{i=1..q} a_i b_i with signs b_i of its own and with scales a_i and an offset z of the group. q is
       `bits`; q + 16 q / group_size bits per weight, and 16 / group_size more where there are offsets.
    2. Conversion, `coding="uniform"`: any evenly spaced code is such a sum. A code c in 0..2^q - 1 with step s and zero
       point p, s (c - p), has a_i = s 2^(i-1) / 2, b_i = 2 bit_i(c) - 1 and z = sum_i a_i - s p. Rounding to nearest
       with an integer zero point is converted, and exactly: the same numbers, zeros among them.
    3. Alternating fit, `coding="alternating"`, without offset. It starts greedily (b_i = sign(r), a_i = mean|r|,
       r -= a_i b_i, from r = w) or from the range (a_i = max|w| 2^(q-i) / (2^q - 1)); then in every one of `rounds`
       (a) the scales by least squares, (B'B) a = B'w, by conjugate gradients; magnitudes, largest first;
       (b) the signs: of the 2^q sums of +-a_i each weight takes the nearest.
    4. Look-up. The activations of a token are rounded to int8. For every four inputs a table of the 16 sums that their
       signs can give is made once, for all rows and for all layers that share the input; a product adds up entries,
       one shuffle for 64 of them, and multiplies by a_i once a group. Sums are exact integers.

Where it bends
    The paper's tables have 256 float entries, in the shared memory of a GPU; here they have 16 of 10 bits, split into
    two halves of 5, which a register holds. A row's last group may be short. Evenly spaced codes take fewer bytes as a
    uniform format; what this one is for are scales that are free, and a machine without integer dot products.
    Smaller squared error is not lower perplexity: a code without offset has no zero, and the fit cuts large weights
    off. Conversion is the default for that reason; start at the range for the alternating fit at 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoestring.core.errors import UsageError, nearest
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.kernels import reference
from shoestring.kernels.formats.binary import Binary
from shoestring.methods.quantizers import _shared

METHOD = Method(
    paper=Paper(
        "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient Inference in Large-Scale Generative "
        "Language Models",
        "2022-06",
        arxiv="2206.09557",
        code="naver-aics/lut-gemm",
    ),
    provides="LutGemmConfig",
    saves=("storage", "memory", "latency", "energy"),
    combines={"adapters": "yes", "quantizers": "the weights are codes already"},
)
CODINGS = ("uniform", "alternating")
STARTS = ("greedy", "range")
_TOGETHER = 1 << 17  # weights that are fitted at one time, in a processor's cache
_TINY = 1e-6  # in the denominators of the conjugate gradients


class LutGemmConfig(_shared.FormatConfig):
    """`AutoModelForCausalLM.from_pretrained(model, quantization_config=LutGemmConfig(bits=3))`.

    Args:
        bits: planes of signs, 2 to 4.
        coding: `uniform` converts rounding to nearest, `alternating` is the paper's fit.
        rounds: of the alternating fit; 0 leaves its start as it is.
        start: of the alternating fit, `greedy` or `range`.
        group_size, embeddings, modules_to_not_convert: as for every format.
    """

    method = "lut_gemm"

    def __init__(
        self, bits: int = 4, coding: str = "uniform", rounds: int = 15, start: str = "greedy", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.bits, self.coding, self.rounds, self.start = bits, coding, rounds, start
        if bits not in (2, 3, 4) or isinstance(bits, bool):
            raise UsageError(f"bits {bits!r} is not possible", remedy="Use 2, 3 or 4")
        for name, value, known in (("coding", coding, CODINGS), ("start", start, STARTS)):
            if value not in known:
                raise UsageError(f"{name} {value!r} is not possible", remedy=nearest(str(value), known))
        if not isinstance(rounds, int) or rounds < 0:
            raise UsageError(f"rounds {rounds!r} is not possible", remedy="Use 0 or more; the paper's fit takes 15")

    @property
    def format(self) -> str:
        return f"binary{self.bits}{'o' if self.coding == 'uniform' else ''}/{self.group_size}"

    def fit(self, weight: Tensor, format: Any, name: str) -> dict[str, Tensor]:
        if self.coding == "uniform":
            return super().fit(weight, format, name)
        return fit(weight, format, self.rounds, self.start)


def fit(weight: Tensor, format: Binary, rounds: int = 15, start: str = "greedy") -> dict[str, Tensor]:
    """The tensors of a float matrix [rows, columns], by the alternating fit.

    Raises:
        UsageError: not a matrix, or not finite.
    """
    reference.check_matrix(weight)
    rows, columns = weight.shape
    group, planes = format.layout.group, format.planes
    whole = columns // group * group
    parts = []
    for block in weight.detach().split(max(1, _TOGETHER // columns)):
        block = block.float()
        reference.refuse_not_finite(block)
        bits, scales = [], []
        # A short last group is fitted by itself, so that no filling counts.
        for cut in (block[:, :whole].reshape(-1, group), block[:, whole:]):
            if cut.numel():
                signs, found = fit_groups(cut, planes, rounds, start)
                bits.append((signs > 0).view(len(block), -1, planes, cut.shape[1]).transpose(1, 2).flatten(2))
                scales.append(found.view(len(block), -1, planes))
        parts.append(format.encode(torch.cat(bits, -1), torch.cat(scales, 1)))
    return {name: torch.cat([part[name] for part in parts]) for name in ("weight", "scales")}


def fit_groups(x: Tensor, planes: int, rounds: int = 15, start: str = "greedy") -> tuple[Tensor, Tensor]:
    """Signs [groups, planes, width] and scales [groups, planes], as float16 has them, of x [groups, width]."""
    if start == "range":
        weights = 2.0 ** torch.arange(planes - 1, -1, -1) / ((1 << planes) - 1)
        scales = x.abs().amax(1, keepdim=True) * weights
        signs = nearest_signs(x, scales)
    else:
        signs, scales = greedy(x, planes)
    for _ in range(rounds):
        scales = least_squares(signs, x, scales).abs().sort(1, descending=True).values  # 2a
        signs = nearest_signs(x, scales)  # 2b
    scales = scales.half().float()
    return nearest_signs(x, scales) if rounds else signs, scales


def greedy(x: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Plane by plane: the signs of what is left, and its mean magnitude."""
    left = x
    signs, scales = [], []
    for _ in range(planes):
        signs.append(torch.where(left < 0, -1.0, 1.0))  # sign(0) is +: a sign is never 0
        scales.append(left.abs().mean(1))
        left = left - scales[-1].unsqueeze(1) * signs[-1]
    return torch.stack(signs, 1), torch.stack(scales, 1)


def least_squares(signs: Tensor, x: Tensor, scales: Tensor) -> Tensor:
    """Scales [groups, planes] that bring the sums of signs closer to x: a step of conjugate gradients for each plane.

    From `scales`, and so never further away, even where planes coincide and the normal equations are singular.
    """
    gram = (signs @ signs.transpose(1, 2)).double()
    found = scales.double()
    left = (signs @ x.unsqueeze(2)).squeeze(2).double() - (gram @ found.unsqueeze(2)).squeeze(2)
    direction, size = left, left.square().sum(1, keepdim=True)
    for _ in range(signs.shape[1]):
        image = (gram @ direction.unsqueeze(2)).squeeze(2)
        length = size / ((direction * image).sum(1, keepdim=True) + _TINY)
        found = found + length * direction
        left = left - length * image
        before, size = size, left.square().sum(1, keepdim=True)
        direction = left + size / (before + _TINY) * direction
    return found.float()


def nearest_signs(x: Tensor, scales: Tensor) -> Tensor:
    """The signs [groups, planes, width] whose sums lie nearest to x [groups, width]."""
    planes = scales.shape[1]
    patterns = torch.arange(1 << planes).unsqueeze(1) >> torch.arange(planes) & 1
    patterns = patterns.float() * 2 - 1  # [2^planes, planes]
    levels, order = (scales @ patterns.T).sort(1)
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    rising = patterns[order]  # [groups, 2^planes, planes], from the lowest sum to the highest
    # The signs of the lowest sum, and at every midpoint that lies below what changes there: quicker than to look up.
    below = (x.unsqueeze(1) > middles.unsqueeze(2)).to(x.dtype)
    return torch.baddbmm(rising[:, 0].unsqueeze(2), rising.diff(dim=1).transpose(1, 2), below)


def example() -> LutGemmConfig:
    return LutGemmConfig(bits=4)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most bits first."""
    sizes = ((4, 32), (4, 64), (4, 128), (3, 32), (3, 64), (3, 128), (2, 32))
    return tuple({"bits": bits, "group_size": group} for bits, group in sizes)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    return Price(_shared.price(shape, LutGemmConfig(**options)))

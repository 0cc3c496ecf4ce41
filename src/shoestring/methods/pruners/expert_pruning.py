"""Expert pruning: takes out the experts of a mixture that a text needs least, or the weights inside them.

How it works
    1. Calibration text runs through the model; of every layer the inputs x of its router are kept, the tokens that met
       each expert, and the sum of their gates.
    2. `frequency` keeps the experts that most tokens met, `mass` those with the largest sum of gates, `random` any.
    3. `search` chooses, layer by layer, the subset C whose output on the calibration inputs is nearest to the whole
       layer's: min_C || F(x) - F_C(x) ||_F, where the router chooses among C alone and its gates are normalised as the
       family does. All subsets are tried where there are at most `subsets`; otherwise experts leave one at a time, each
       time the one whose absence shows least.
    4. Rows of the router leave with their experts. With `uneven` layers lose different numbers: experts leave one at a
       time from whichever layer's relative error || F - F_C ||_F / || F ||_F grows least.
    5. `weights` takes no expert out but zeroes, in every row of every expert's matrices, the share `drop` of weights
       with the lowest |W_ij| * || x_j g ||, where x_j g are the inputs of that expert times the gate they get; with
       `pattern` N:M the N of each M consecutive weights that are highest stay instead.
    6. The result is a plain model of its family with fewer experts. Where layers differ it is one of
       `shoestring.models.regrouped`, which its card says how to load.

Where it bends
    Inputs are those of the whole model, also behind layers that have lost experts. Zeroed weights take as many bytes as
    before. What is seen of the text decides: experts of other domains go first, so calibrate on what will be asked.
    Gates of families that do not normalise them (`norm_topk_prob` false) come from a softmax over fewer experts and are
    larger than before. A layer keeps at least as many experts as a token meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoestring import models
from shoestring.core.errors import UsageError, nearest
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.core.step import Work
from shoestring.methods.pruners import _experts, _shared
from shoestring.methods.pruners._experts import Seen
from shoestring.models.anatomy import expert_reads, route
from shoestring.models.regrouped import regroup

METHOD = Method(
    paper=Paper(
        "A Survey on Inference Optimization Techniques for Mixture of Experts Models",
        "2024-12",
        arxiv="2412.14219",
        code="MoE-Inf/awesome-moe-inference",
    ),  # fmt: skip
    provides="ExpertPruningOptions",
    saves=("parameters", "storage", "memory"),
    combines={"quantizers": "yes", "adapters": "yes", "pruners": "choose one of them to take experts out"},
    expects={"check_reaches_the_budget": "experts go whole, and the checks' model has but four in a layer"},
)
NEEDS_DATA = True
ROLES = ("expert",)
WAYS = ("search", "frequency", "mass", "random", "weights")
base = _experts.base


@dataclass(frozen=True)
class ExpertPruningOptions(_shared.PrunerOptions):
    """Which experts go.

    Args:
        sparsity: share of the experts that go, rounded to whole experts of each layer; with `weights`, of the weights.
        way: search, frequency, mass, random or weights.
        tokens: of the calibration text.
        subsets: the most that are all tried.
        uneven: let layers lose different numbers of experts; with `search` only.
        pattern: with `weights`, N:M such as 2:4 in place of `sparsity`.

    Raises:
        UsageError: values that are not possible.
    """

    sparsity: float = 0.25
    way: str = "search"
    tokens: int = 1024
    subsets: int = 1000
    uneven: bool = False
    pattern: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.way not in WAYS:
            raise UsageError(f"way {self.way!r} is unknown", remedy=nearest(self.way, WAYS))
        for name in ("tokens", "subsets"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} {value!r} is not possible", "it is a whole number of at least 1")
        if self.uneven and self.way != "search":
            raise UsageError(f"uneven does not go with way={self.way}", "errors of layers are compared", "Use search")
        if self.pattern and self.way != "weights":
            raise UsageError("pattern is for way=weights alone")
        if self.pattern:
            read_pattern(self.pattern)


def example() -> ExpertPruningOptions:
    """The configuration that checks, documentation and the first-time user run."""
    return ExpertPruningOptions(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, the gentlest first."""
    return ({"sparsity": 0.25}, {"sparsity": 0.5})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """Experts and their routers' rows go; zeroed weights cost what they did.

    Raises:
        UsageError: a model without experts.
    """
    said = ExpertPruningOptions(**{**settings()[0], **options})
    share = 0.0 if said.way == "weights" else said.sparsity
    return Price(_experts.lessened(shape, share, share))


def prune(
    loaded: models.Loaded, options: ExpertPruningOptions, rows: _shared.Rows, valid: _shared.Rows, work: Work
) -> _shared.Pruned:
    """Watch the experts, choose, and take out."""
    model = loaded.model
    seen, trace = _experts.watched(model, rows, options.tokens)
    _experts.refuse_shared_choices(model)
    facts = _experts.entropy_facts(trace)
    if options.way == "weights":
        share = zero_weights(model, seen, options.sparsity, options.pattern)
        return _shared.Pruned(model, {**facts, "zeroed": share})
    kept = chosen(model, seen, options)
    new = [_experts.slices(model, s.mixture, k) for s, k in zip(seen, kept)]
    small = regroup(model, kept, [list(range(len(k))) for k in kept], new)
    errors = [error(model, s, k) for s, k in zip(seen, kept)]
    return _shared.Pruned(small, {**facts, "kept": kept, "layer_errors": errors})


def chosen(model: PreTrainedModel, seen: list[Seen], options: ExpertPruningOptions) -> list[list[int]]:
    """Of each layer, the experts that stay, ascending.

    Raises:
        UsageError: fewer would stay than a token meets.
    """
    counts = [s.mixture.count - round(options.sparsity * s.mixture.count) for s in seen]
    for s, count in zip(seen, counts):
        if count < s.mixture.chosen:
            raise UsageError(
                f"{count} of {s.mixture.count} experts would stay, and a token meets {s.mixture.chosen}",
                remedy=f"Take out a share of at most {1 - s.mixture.chosen / s.mixture.count:g}",
            )
    if options.uneven:
        return unevenly(model, seen, sum(counts))
    pick: Callable[[Seen, int], list[int]] = {
        "search": lambda s, count: search(model, s, count, options.subsets),
        "frequency": lambda s, count: s.load.argsort(descending=True, stable=True)[:count].tolist(),
        "mass": lambda s, count: s.mass.argsort(descending=True, stable=True)[:count].tolist(),
        "random": lambda s, count: torch.randperm(s.mixture.count)[:count].tolist(),
    }[options.way]
    return [sorted(pick(s, count)) for s, count in zip(seen, counts)]


def error(model: PreTrainedModel, seen: Seen, kept: list[int]) -> float:
    """|| F(x) - F_C(x) ||_F of a layer on the calibration inputs."""
    return float((seen.output - _experts.layer_output(model, seen.mixture, seen.inputs, kept)).norm())


def search(model: PreTrainedModel, seen: Seen, count: int, subsets: int) -> list[int]:
    """The subset of `count` experts with the least error: of all where they are few, else by leaving out one by one."""
    experts = list(range(seen.mixture.count))
    if math.comb(len(experts), count) <= subsets:
        return list(min(combinations(experts, count), key=lambda kept: error(model, seen, list(kept))))
    while len(experts) > count:
        experts.remove(min(experts, key=lambda gone: error(model, seen, [e for e in experts if e != gone])))
    return experts


def unevenly(model: PreTrainedModel, seen: list[Seen], total: int) -> list[list[int]]:
    """Experts of all layers, `total` together: one leaves at a time, where the relative error grows least."""
    kept = [list(range(s.mixture.count)) for s in seen]
    norms = [float(s.output.norm()) or 1.0 for s in seen]
    now = [0.0] * len(seen)
    steps: dict[int, tuple[float, int]] = {}  # the best that each layer offers: growth and expert
    while sum(map(len, kept)) > total:
        for n, s in enumerate(seen):
            if n not in steps and len(kept[n]) > s.mixture.chosen:
                tried = {e: error(model, s, [k for k in kept[n] if k != e]) / norms[n] for e in kept[n]}
                gone = min(tried, key=tried.__getitem__)
                steps[n] = tried[gone] - now[n], gone
        best = min(steps, key=lambda n: steps[n][0])
        growth, gone = steps.pop(best)
        now[best] += growth
        kept[best].remove(gone)
    return kept


# --- weights inside experts -------------------------------------------------------------------------------------------


@torch.no_grad()
def zero_weights(model: PreTrainedModel, seen: list[Seen], share: float, pattern: str = "") -> float:
    """Zero weights of the experts in place, row by row; returns the share of all their weights that is 0 now."""
    zeros = total = 0
    for s in seen:
        experts: Any = model.get_submodule(s.mixture.experts)
        _, gates, choices = route(model.get_submodule(s.mixture.router), s.inputs)
        for expert in range(s.mixture.count):
            token, place = torch.where(choices == expert)
            gate = gates[token, place, None].float()
            for name, read in expert_reads(experts, expert, s.inputs[token]).items():
                weight = experts.get_parameter(name)[expert]
                hint = (read.float() * gate).norm(dim=0) if len(token) else torch.ones(weight.shape[1])
                mask = lowest(weight.float().abs() * hint, share, pattern)
                weight.masked_fill_(mask, 0)
                zeros, total = zeros + int(mask.sum()), total + mask.numel()
    return zeros / total


def lowest(scores: Tensor, share: float, pattern: str = "") -> Tensor:
    """Which entries of each row go: the share with the lowest scores, or all but the N highest of each M."""
    if pattern:
        n, m = read_pattern(pattern)
        if scores.shape[1] % m:
            raise UsageError(
                f"Rows of {scores.shape[1]} weights do not divide into groups of {m}", remedy="Use another M"
            )
        groups = scores.view(len(scores), -1, m)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.topk(n, -1).indices, True)
        return ~kept.view_as(scores)
    count = round(share * scores.shape[1])
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(count, 1, largest=False).indices, True)


def read_pattern(pattern: str) -> tuple[int, int]:
    """N and M of `N:M`. Raises UsageError for anything else."""
    n, _, m = pattern.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise UsageError(f"pattern {pattern!r} is not N:M", remedy="Write 2:4, for example")
    return int(n), int(m)

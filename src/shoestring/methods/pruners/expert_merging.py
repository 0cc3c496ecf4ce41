"""Expert merging: joins experts of a mixture that are alike into one, neuron by neuron, and lets the router as it is.

How it works
    1. Calibration text runs through the model. Experts of a layer are alike by `router`, the logits that the router
       gives them over the tokens, or by `outputs`, their mean outputs; 1 - cosine is the distance, and average linkage
       groups them until as many groups are left as experts shall stay.
    2. A SwiGLU expert is the same when the rows of G and U and the columns of D are permuted alike. Each expert of a
       group is aligned to the one that most tokens met: the permutation P maximises the sum of the inner products of
       rows, tr(P^T (G_a G_b^T + U_a U_b^T + D_a^T D_b)), an assignment problem.
    3. W = sum_e n_e P_e W_e / sum_e n_e, with n_e the tokens that met e (`weighting`), or equal weights.
    4. All rows of the router stay, and those of a group choose the joint expert; a token that chooses two of them meets
       it with the sum of both gates, so the probabilities of a group add up.
    5. With `distil` steps the joint experts then learn from the whole model on the text: KL of the logits plus the mean
       square of the hidden states' differences over that of the hidden states. With all but one expert gone a layer is
       a dense MLP, and this is what makes it one.
    6. The result is one of `shoestring.models.regrouped`, which its card says how to load.

Where it bends
    One expert chosen twice is computed twice: joining saves bytes, not FLOPs. Alignment helps as far as experts learned
    the same neurons in another order; experts that learned different things average badly however they are aligned.
    Differences from the joint expert are not kept in low rank. The assignment takes time with the cube of an expert's
    width. Experts with biases, or stored transposed, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from shoestring import models
from shoestring.core.errors import UsageError, nearest
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.core.step import Work
from shoestring.methods.pruners import _experts, _shared
from shoestring.methods.pruners._experts import Seen
from shoestring.models.anatomy import DOWN, GATE_UP, mixtures, route
from shoestring.models.regrouped import regroup

METHOD = Method(
    paper=Paper(
        "A Survey on Inference Optimization Techniques for Mixture of Experts Models",
        "2024-12",
        arxiv="2412.14219",
        code="MoE-Inf/awesome-moe-inference",
    ),  # fmt: skip
    provides="ExpertMergingOptions",
    saves=("parameters", "storage", "memory"),
    combines={
        "quantizers": "yes",
        "adapters": "yes",
        "pruners": "what has been joined cannot be weighed one by one; take experts out before",
    },
    expects={"check_reaches_the_budget": "experts go whole, and the checks' model has but four in a layer"},
)
NEEDS_DATA = True
ROLES = ("expert",)
LIKENESS = ("router", "outputs")
base = _experts.base


@dataclass(frozen=True)
class ExpertMergingOptions(_shared.PrunerOptions):
    """How many experts are left, and how they are joined.

    Args:
        sparsity: share of the experts that go, rounded to whole experts of each layer; one stays at least.
        alike: by what experts are grouped: outputs or router.
        align: permute neurons before the average.
        weighting: by how many tokens met an expert; if not, all count alike.
        tokens: of the calibration text.
        distil: steps of distillation afterwards; 0 for none.
        distil_rate: its learning rate.

    Raises:
        UsageError: values that are not possible.
    """

    sparsity: float = 0.5
    alike: str = "outputs"
    align: bool = True
    weighting: bool = True
    tokens: int = 1024
    distil: int = 0
    distil_rate: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alike not in LIKENESS:
            raise UsageError(f"alike {self.alike!r} is unknown", remedy=nearest(self.alike, LIKENESS))
        for name, least in (("tokens", 1), ("distil", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} {value!r} is not possible", f"it is a whole number of at least {least}")
        if not self.distil_rate > 0:
            raise UsageError(f"distil_rate {self.distil_rate!r} is not possible", "it must be above 0")


def example() -> ExpertMergingOptions:
    """The configuration that checks, documentation and the first-time user run."""
    return ExpertMergingOptions()


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, the gentlest first."""
    return ({"sparsity": 0.25}, {"sparsity": 0.5})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """Experts go, their rows of the router stay.

    Raises:
        UsageError: a model without experts.
    """
    said = ExpertMergingOptions(**{**settings()[0], **options})
    return Price(_experts.lessened(shape, said.sparsity, 0.0), train_flops=4.0 if said.distil else 0.0)


def prune(
    loaded: models.Loaded, options: ExpertMergingOptions, rows: _shared.Rows, valid: _shared.Rows, work: Work
) -> _shared.Pruned:
    """Watch the experts, group, align and join them, and let them learn if asked."""
    model = loaded.model
    seen, trace = _experts.watched(model, rows, options.tokens)
    _experts.refuse_shared_choices(model)
    groups = [
        grouped(model, s, max(1, s.mixture.count - round(options.sparsity * s.mixture.count)), options) for s in seen
    ]
    joined = [
        joint(_experts.slices(model, s.mixture, range(s.mixture.count)), s.load.tolist(), g, options)
        for s, g in zip(seen, groups)
    ]
    targets = [
        [next(n for n, group in enumerate(g) if e in group) for e in range(s.mixture.count)]
        for s, g in zip(seen, groups)
    ]
    small = regroup(model, [list(range(s.mixture.count)) for s in seen], targets, joined)
    facts: dict[str, Any] = {**_experts.entropy_facts(trace), "groups": groups}
    if options.distil:
        facts["distil_loss"] = distil(model, small, rows, options, work.seed)
    return _shared.Pruned(small, facts)


@torch.no_grad()
def grouped(model: PreTrainedModel, seen: Seen, count: int, options: ExpertMergingOptions) -> list[list[int]]:
    """The experts of a layer in `count` groups, each ascending, ordered by their first."""
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import pdist

    if options.alike == "router":
        profile = route(model.get_submodule(seen.mixture.router), seen.inputs)[0].float().T
        profile = profile - profile.mean(0)
    else:
        profile = _experts.each_output(model, seen.mixture, seen.inputs).mean(1)
    tree = linkage(pdist(profile.double().numpy(), "cosine"), "average")
    labels = cut_tree(tree, n_clusters=count)[:, 0].tolist()
    found: dict[int, list[int]] = {}
    for expert, label in enumerate(labels):
        found.setdefault(label, []).append(expert)
    return list(found.values())


@torch.no_grad()
def joint(
    tensors: Mapping[str, Tensor], load: Sequence[float], groups: Sequence[Sequence[int]], options: ExpertMergingOptions
) -> dict[str, Tensor]:
    """The joint experts' parameters, (groups, ...), from those of all experts, (experts, ...).

    Raises:
        UsageError: experts of another build than gate_up (2 inner, width) and down (width, inner).
    """
    if set(tensors) != {GATE_UP, DOWN} or tensors[GATE_UP].shape[1] != 2 * tensors[DOWN].shape[2]:
        raise UsageError("The experts are of another build than Mixtral's", "their neurons cannot be told apart")
    gate_up, down = tensors[GATE_UP].float(), tensors[DOWN].float()
    outer, inner = [], []
    for group in groups:
        lead = max(group, key=lambda e: load[e])
        given = (
            [load[e] for e in group] if options.weighting and any(load[e] > 0 for e in group) else [1.0] * len(group)
        )
        wide, narrow = torch.zeros_like(gate_up[0]), torch.zeros_like(down[0])
        for expert, weight in zip(group, given):
            order = torch.arange(down.shape[2])
            if options.align and expert != lead:
                order = alignment(gate_up[lead], down[lead], gate_up[expert], down[expert])
            both = torch.cat([order, order + len(order)])
            wide += weight / sum(given) * gate_up[expert][both]
            narrow += weight / sum(given) * down[expert][:, order]
        outer.append(wide)
        inner.append(narrow)
    made = {GATE_UP: torch.stack(outer), DOWN: torch.stack(inner)}
    return {name: tensor.to(tensors[name].dtype) for name, tensor in made.items()}


def alignment(wide: Tensor, narrow: Tensor, other_wide: Tensor, other_narrow: Tensor) -> Tensor:
    """Which neuron of the other expert stands for each neuron of this one, (inner,): step 2."""
    from scipy.optimize import linear_sum_assignment

    gate, up = wide.chunk(2)
    other_gate, other_up = other_wide.chunk(2)
    likeness = gate @ other_gate.T + up @ other_up.T + narrow.T @ other_narrow
    return torch.from_numpy(linear_sum_assignment(likeness.double().numpy(), maximize=True)[1])


def distil(
    teacher: PreTrainedModel, student: PreTrainedModel, rows: _shared.Rows, options: ExpertMergingOptions, seed: int
) -> float:
    """Train the experts of `student` to do as `teacher` on the rows; the mean loss of the last quarter of the steps."""
    weights = []
    student.requires_grad_(False)
    for mixture in mixtures(student):
        experts = student.get_submodule(mixture.experts)
        weights += [experts.get_parameter(name).requires_grad_(True) for name in mixture.tensors]
    teacher.eval()
    optimizer = torch.optim.AdamW(weights, options.distil_rate, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(options.distil):
        for group in optimizer.param_groups:
            group["lr"] = options.distil_rate * (1 - step / options.distil)
        row = rows[int(torch.randint(len(rows), (1,), generator=draw))]
        ids = torch.tensor([list(row["input_ids"])[:512]])
        with torch.no_grad():
            wanted: Any = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
        found: Any = student(input_ids=ids, use_cache=False, output_hidden_states=True)
        log, target = (out.logits.float().log_softmax(-1) for out in (found, wanted))
        loss = F.kl_div(log[0], target[0], log_target=True, reduction="batchmean")
        for own, theirs in zip(found.hidden_states[1:], wanted.hidden_states[1:]):
            loss = loss + F.mse_loss(own.float(), theirs.float()) / theirs.float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    student.requires_grad_(True)
    last = losses[-max(1, len(losses) // 4) :]
    return sum(last) / len(last)

"""MoLE: experts of a mixture share one projection into a latent space and keep only small matrices of their own.

How it works
    n is the hidden size, m an expert's inner size, N the number of experts, k how many of them make a group, r the
    latent size (m unless said otherwise).
    1. A standard expert is E_i(x) = W_down^i (act(W_gate^i x) * (W_up^i x)).
    2. A latent one has W_up^i = A_up^i B_up^g and W_gate^i = A_gate^i B_gate^g, where B [r, n] belongs to the group g
       and A [m, r] to the expert. h_up = B_up x and h_gate = B_gate x are computed once for a token and group, then
       each expert it goes to multiplies by its small A. W_down stays whole; with `factor_down` it is B_down^g A_down^i,
       and the sum over a token's experts is taken before B_down. Router and all else of the family stay untouched.
    3. A layer has N (2 m r + m n) + (N / k) 2 r n expert parameters in place of 3 N m n. That is fewer where n > m and
       groups are large; where it is not, the conversion is refused.
    4. A new model draws B from N(0, 1/n) and A from N(0, s^2 n / r), so that A B has the variance s^2 of the family's
       own experts.
    5. A trained model is converted group by group, gate and up apart: S is the group's matrices W^i on top of each
       other, S = U Sigma V^T, B = V_r^T and A^i = W^i B^T, the least-squares optimum for this B; the error is the sum
       of the squared singular values left out. With `rank` every W^i is first cut to that rank, as in the paper, when B
       is looked for; A comes from the whole W^i all the same.
    6. Optionally A and B are healed by a short training.

Where it bends
    With `weighted` the error is measured on the inputs the layer really sees, S C^(1/2) with C = E[x x^T]: not in the
    paper. Experts are grouped as they are stored. Independently trained experts have no row space in common: k = N and
    r = m keeps little more than m / n of their energy, so look at `kept` in the facts before using what comes out, and
    at `spectrum` to choose k and r. Experts stand in fused tensors without biases (Mixtral, OLMoE, Qwen-MoE); lists of
    modules are not converted. B serves a whole group: adapters on it, or fewer bits for it, hurt more than on A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape, Weight
from shoestring.core.step import Work
from shoestring.lab import tiny_mixture
from shoestring.methods.architectures import _shared
from shoestring.models.anatomy import DOWN, GATE_UP, stacked
from shoestring.models.surgery import replace_module
from shoestring.training import TrainOptions, train

METHOD = Method(
    paper=Paper(
        "Beyond Standard MoE: Mixture of Latent Experts for Resource-Efficient Language Models", "2025-03", "2503.23100"
    ),
    provides="MoLEMixtralConfig",
    saves=("parameters", "storage", "memory", "compute", "network"),
    combines={
        "adapters": "yes",
        "quantizers": "formats of linear layers do not reach matrices that stand in stacks",
        "architectures": "it is made from a plain model of its family",
    },
)
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
# Each expert a group of its own, and a latent size that holds all of its rows.
NEUTRAL: dict[str, Any] = {"experts_per_group": 1, "latent_dim": None, "weighted": False, "allow_growth": True}
NEUTRAL_ERROR = 1e-5
TRAINING = {"learning_rate": 1e-3, "warmup_ratio": 0.1}
SPECTRUM = 8  # steps of the table of errors over latent sizes


@dataclass(frozen=True)
class MoLEOptions:
    """What may be said about a conversion.

    Attributes:
        experts_per_group: k, which must divide the number of experts; None puts all into one group.
        latent_dim: r; None is the inner size of an expert.
        factor_down: the down projections too share a matrix.
        rank: t of the paper's first phase; None leaves it out.
        weighted: measure the error on the inputs of the layer; needs text.
        heal: train A and B afterwards, where there is text.
        allow_growth: convert even where it saves no parameters.
    """

    experts_per_group: int | None = None
    latent_dim: int | None = None
    factor_down: bool = False
    rank: int | None = None
    weighted: bool = False
    heal: bool = True
    allow_growth: bool = False

    def __post_init__(self) -> None:
        for name in ("experts_per_group", "latent_dim", "rank"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} is {value!r}", "it is a whole number of at least 1")


@dataclass(frozen=True)
class Sizes:
    """Of one layer: experts N, their inner size m, hidden size n, group size k, latent size r.

    Raises:
        UsageError: k does not divide N, or r is larger than the matrices it stands for.
    """

    experts: int
    inner: int
    hidden: int
    group: int
    latent: int
    down: bool

    def __post_init__(self) -> None:
        if self.experts % self.group:
            raise UsageError(
                f"{self.experts} experts do not make groups of {self.group}", remedy="Give a divisor of their number"
            )
        if self.latent > min(self.group * self.inner, self.hidden):
            raise UsageError(
                f"latent_dim {self.latent} is more than the {min(self.group * self.inner, self.hidden)} directions "
                f"that {self.group} experts of {self.inner} x {self.hidden} have"
            )

    @property
    def groups(self) -> int:
        return self.experts // self.group

    def tensors(self) -> dict[str, tuple[int, int, int]]:
        """Name -> dimensions of the parameters (step 2)."""
        made = {
            "own_gate": (self.experts, self.inner, self.latent),
            "own_up": (self.experts, self.inner, self.latent),
            "shared_gate": (self.groups, self.latent, self.hidden),
            "shared_up": (self.groups, self.latent, self.hidden),
        }
        if self.down:
            own, shared = (self.experts, self.latent, self.inner), (self.groups, self.hidden, self.latent)
            return {**made, "own_down": own, "shared_down": shared}
        return {**made, DOWN: (self.experts, self.hidden, self.inner)}

    @property
    def parameters(self) -> int:
        return sum(a * b * c for a, b, c in self.tensors().values())

    @property
    def before(self) -> int:
        return 3 * self.experts * self.inner * self.hidden


def sizes_of(dims: tuple[int, ...], group: int | None, latent: int | None, down: bool) -> Sizes:
    """From the dimensions of a family's own stack of gates and ups."""
    experts, wide, hidden = dims
    k = group or experts
    return Sizes(experts, wide // 2, hidden, k, latent or min(wide // 2, hidden), down)


# --- the model --------------------------------------------------------------------------------------------------------


class LatentExperts(nn.Module):
    """The experts of a layer; what it is called with and returns is what the family's own experts are and do."""

    def __init__(self, family: nn.Module, sizes: Sizes, deviation: float) -> None:
        super().__init__()
        self.sizes, self.num_experts = sizes, sizes.experts
        for name, dims in sizes.tensors().items():
            setattr(self, name, nn.Parameter(torch.empty(dims)))
        # The family's own module has the activation; its weights are gone, and no one shall look for them.
        delattr(family, GATE_UP)
        delattr(family, DOWN)
        self._family: tuple[Any] = (family,)
        self.draw(deviation)

    @torch.no_grad()
    def draw(self, deviation: float) -> None:
        """New random weights, whose products vary as matrices of this standard deviation do (step 4)."""
        s = self.sizes
        for name, parameter in self.named_parameters():
            fan = {"shared": s.hidden**-0.5, "own": deviation * (s.hidden / s.latent) ** 0.5}
            if name == "shared_down":
                fan["shared"] = s.latent**-0.5
            if name == "own_down":
                fan["own"] = deviation
            parameter.normal_(0.0, fan.get(name.partition("_")[0], deviation))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        own: Any = self._parameters
        s, out = self.sizes, torch.zeros_like(hidden_states)
        for group in range(s.groups):
            members = range(group * s.group, (group + 1) * s.group)
            tokens = torch.where(((top_k_index >= members.start) & (top_k_index < members.stop)).any(1))[0]
            if not len(tokens):
                continue
            x, routes, weights = hidden_states[tokens], top_k_index[tokens], top_k_weights[tokens]
            # Once for a token and group (step 2).
            gates, ups = x @ own["shared_gate"][group].T, x @ own["shared_up"][group].T
            summed = x.new_zeros(len(tokens), s.latent if s.down else s.hidden)
            for expert in members:
                rows, place = torch.where(routes == expert)
                if not len(rows):
                    continue
                both = torch.cat((gates[rows] @ own["own_gate"][expert].T, ups[rows] @ own["own_up"][expert].T), -1)
                inner = self._family[0]._apply_gate(both)
                outer = inner @ own["own_down" if s.down else DOWN][expert].T
                summed = summed.index_add(0, rows, (outer * weights[rows, place, None]).to(summed.dtype))
            out = out.index_add(0, tokens, summed @ own["shared_down"][group].T if s.down else summed)
        return out


class _Latent:
    """Goes before a family's own model class: its experts are latent ones."""

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for name, experts in experts_of(self):  # type: ignore[arg-type]
            given = config.experts_per_group, config.latent_dim, config.factor_down
            sizes = sizes_of(tuple(experts.get_parameter(GATE_UP).shape), *given)
            replace_module(self, name, LatentExperts(experts, sizes, config.initializer_range))  # type: ignore[arg-type]


def experts_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Full name and module of each layer's experts that stand in fused tensors without biases."""
    return [
        (n, m) for n, m in stacked(model) if m.get_parameter(GATE_UP).dim() == 3 and not getattr(m, "has_bias", False)
    ]


FIELDS: dict[str, tuple[Any, Any]] = {
    "latent_dim": (int | None, None), "experts_per_group": (int | None, None), "factor_down": (bool, False),
}  # fmt: skip
MODELS = tuple(_shared.derive(family, __name__, "MoLE", _Latent, FIELDS) for family in FAMILIES)
globals().update({made.__name__: made for pair in MODELS for made in pair})


def example() -> MoLEOptions:
    """The configuration that checks, documentation and the first-time user run."""
    return MoLEOptions(experts_per_group=2)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, the gentlest first."""
    return tuple({"experts_per_group": k, "weighted": True} for k in (4, 8, 16, None))


def base() -> PreTrainedModel:
    """A tiny mixture whose experts are narrow enough for latent ones to save something."""
    return tiny_mixture.model(intermediate_size=24, tie_word_embeddings=True)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """Step 3, layer by layer. Raises UsageError for a model without experts, where nothing is saved, and as `Sizes`."""
    if not any(len(weight.dims) == 3 for weight in shape.of("expert")):
        raise _dense(f"a {shape.family} model")
    known = {name: value for name, value in options.items() if name in MoLEOptions.__dataclass_fields__}
    chosen = MoLEOptions(**{**settings()[0], **known})
    weights: list[Weight] = []
    for weight in shape.weights:
        owner, _, tensor = weight.name.rpartition(".")
        if weight.role != "expert" or tensor not in (GATE_UP, DOWN) or len(weight.dims) != 3:
            weights.append(weight)
        elif tensor == GATE_UP:
            sizes = sizes_of(weight.dims, chosen.experts_per_group, chosen.latent_dim, chosen.factor_down)
            _refuse_growth(owner, sizes, chosen)
            each, held = weight.stored / weight.count, weight.resident / weight.count
            for name, dims in sizes.tensors().items():
                count = dims[0] * dims[1] * dims[2]
                # A token meets its experts' own matrices, and at most as many groups as experts.
                used = min(1.0, weight.used * sizes.experts / dims[0]) if name.startswith("shared") else weight.used
                weights.append(
                    Weight(f"{owner}.{name}", "expert", dims, round(count * each), round(count * held), "", used)
                )
    made = replace(shape, weights=tuple(weights))
    latent = sum(w.count for w in made.of("expert"))
    return Price(made, trainable=latent if chosen.heal else 0, train_flops=3.0)


# --- conversion -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """A group's matrices as products: own [k, rows, r] @ shared [r, columns].

    Attributes:
        kept: share of their energy, in the norm that was asked for.
        values: energy of each direction of the stack, largest first, as shares that sum to 1.
    """

    own: Tensor
    shared: Tensor
    kept: float
    values: Tensor


def factor(weights: Tensor, latent: int, *, rank: int | None = None, moment: Tensor | None = None) -> Factors:
    """The best common row space of a group's matrices [k, rows, columns] (step 5), in float64.

    Args:
        rank: cut each matrix to this rank when the space is looked for.
        moment: [columns, columns], mean of x x^T of the inputs in whose norm errors count.
    """
    target = weights.double()
    if moment is not None:
        power, axes = torch.linalg.eigh(moment.double())
        power = (power.clamp_min(0) + 1e-4 * power.mean()).sqrt()
        target = target @ (axes * power) @ axes.T
    seen = target
    if rank is not None:
        u, sigma, v = torch.linalg.svd(target, full_matrices=False)
        seen = (u[..., :rank] * sigma[..., None, :rank]) @ v[..., :rank, :]
    stack = seen.flatten(0, 1)
    values, vectors = torch.linalg.eigh(stack.T @ stack)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    space = vectors[:, :latent]
    own = target @ space  # from the whole matrices, whatever `rank` is
    shared = space.T
    energy = target.square().sum()
    kept = float(own.square().sum() / energy) if energy > 0 else 1.0
    if moment is not None:
        shared = shared @ (axes / power) @ axes.T
    return Factors(own, shared, kept, values / values.sum().clamp_min(1e-300))


def convert(model: PreTrainedModel, options: MoLEOptions, rows: _shared.Rows) -> _shared.Converted:
    """The same model with latent experts, and for each layer what was kept and what other latent sizes would keep.

    Raises:
        UsageError: a model of another family, sizes that do not fit, nothing to save, or no text where it is needed.
    """
    family = getattr(model.config, "model_type", "")
    found = experts_of(model)
    if family not in FAMILIES or not found:
        raise _dense(type(model).__name__)
    if options.weighted and not rows:
        raise UsageError("The weighted conversion measures on text, and there is none", remedy="Add --data FILE")
    moments = _moments(model, rows) if options.weighted else {}
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    facts: dict[str, Any] = {"before": 0, "after": 0, "layers": []}
    for name, experts in found:
        dims = tuple(experts.get_parameter(GATE_UP).shape)
        sizes = sizes_of(dims, options.experts_per_group, options.latent_dim, options.factor_down)
        _refuse_growth(name, sizes, options)
        tensors, told = _converted(experts, sizes, options, moments.get(name))
        del state[f"{name}.{GATE_UP}"], state[f"{name}.{DOWN}"]
        state |= {f"{name}.{key}": value.to(model.dtype) for key, value in tensors.items()}
        facts["before"] += sizes.before
        facts["after"] += sizes.parameters
        facts["layers"].append({"name": name, **told})
    own = {name: getattr(options, name) for name in FIELDS}
    return _shared.Converted(_shared.built(MODELS[FAMILIES.index(family)], model, state, **own), facts)


def _refuse_growth(name: str, sizes: Sizes, options: MoLEOptions) -> None:
    if sizes.parameters >= sizes.before and not options.allow_growth:
        raise UsageError(
            f"Latent experts would not save parameters in {name}: {sizes.parameters:,} for {sizes.before:,}",
            f"experts of {sizes.inner} x {sizes.hidden} in groups of {sizes.group} with latent size {sizes.latent}",
            "Raise experts_per_group or lower latent_dim",
        )


def _dense(name: str) -> UsageError:
    return UsageError(
        f"MoLE does not convert {name}",
        "it rebuilds the experts of mixtures that keep them in fused tensors",
        f"Take a model of one of {', '.join(FAMILIES)}",
    )


def heal(
    converted: _shared.Converted,
    base: PreTrainedModel,
    options: MoLEOptions,
    rows: _shared.Rows,
    valid: _shared.Rows,
    work: Work,
) -> dict[str, Any]:
    """Train the experts' matrices on the text, everything else frozen (step 6)."""
    if not options.heal:
        return {"steps": 0}
    model = converted.model
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LatentExperts):
            module.requires_grad_(True)
    settings = TrainOptions(**{"seed": work.seed, **work.training})
    result = train(model, list(rows), list(valid), settings, work.folder, ledger=work.ledger, resume=work.resume)
    model.requires_grad_(True)
    return {"steps": result.steps, "tokens": result.tokens}


def _converted(
    experts: Any, sizes: Sizes, options: MoLEOptions, moment: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters of one layer, and what is told of it."""
    gate, up = experts.get_parameter(GATE_UP).detach().chunk(2, 1)
    tensors, told = {}, {}
    for part, weight in {"gate": gate, "up": up}.items():
        made = [factor(w, sizes.latent, rank=options.rank, moment=moment) for w in weight.split(sizes.group)]
        tensors[f"own_{part}"] = torch.cat([f.own for f in made])
        tensors[f"shared_{part}"] = torch.stack([f.shared for f in made])
        told[part] = _told(made, sizes.hidden)
    down = experts.get_parameter(DOWN).detach()
    if not sizes.down:
        return {**tensors, DOWN: down.clone()}, told
    # Down projections share what they write, so it is their columns that are looked at.
    made = [factor(w.mT, sizes.latent, rank=options.rank) for w in down.split(sizes.group)]
    tensors["own_down"] = torch.cat([f.own.mT for f in made])
    tensors["shared_down"] = torch.stack([f.shared.T for f in made])
    return tensors, {**told, "down": _told(made, sizes.hidden)}


def _told(made: list[Factors], width: int) -> dict[str, Any]:
    """`kept` is the share of energy; `spectrum` says what is lost at other latent sizes."""
    values = torch.stack([f.values for f in made]).mean(0)
    lost = (1 - values.cumsum(0)).clamp_min(0)
    places = sorted({max(1, width * step // SPECTRUM) for step in range(1, SPECTRUM + 1)})
    kept = sum(f.kept for f in made) / len(made)
    return {"kept": kept, "spectrum": {str(r): round(float(lost[r - 1]), 6) for r in places}}


@torch.no_grad()
def _moments(model: PreTrainedModel, rows: _shared.Rows) -> dict[str, Tensor]:
    """Mean of x x^T over the tokens that reach each layer's experts."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, experts in experts_of(model):

        def look(_: nn.Module, args: tuple, name: str = name) -> None:
            x = args[0].float()
            sums[name] = sums.get(name, torch.zeros(())) + x.T @ x

        hooks.append(experts.register_forward_pre_hook(look))
    try:
        for row in rows[:128]:
            model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sums

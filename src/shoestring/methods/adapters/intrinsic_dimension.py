"""Intrinsic dimension: train a model inside a random subspace of d dimensions, and measure how small d may be.

How it works
    1. theta = theta_0 + P v: theta_0 (D,) are the frozen weights of all covered layers, one after another; P (D, d) is
       random and fixed by a seed; v (d,), zero at first, is all that trains and, with the seed, all that is saved.
                                                                                                                 (eq. 1)
    2. Every column of P has unit norm over the whole model, not over a layer, so that all weights move alike.
       Dense: entries normal(0, 1), then each column is divided by its norm                                     (eq. 2)
    3. Sparse: a tensor of n weights has density 1 / sqrt(n), its non-zeros are +-sqrt(1 / (density d)); then as in 2
                                                                                                                 (eq. 3)
    4. Fastfood: P v = the first D entries of H G Pi H B v / (sqrt(L sum G^2) sqrt(D / L)), with L the next power of
       two, v padded with zeros to L, B random signs, H the Walsh-Hadamard transform, Pi a permutation, and G
       normal(0, 1): memory O(D), time O(D log D)                                                               (eq. 4)
    5. The gradient of v is P^T times that of theta; for Fastfood the chain of 4 backwards                      (eq. 5)
    6. `measure`: d90 is the smallest d whose mean score over seeds reaches 0.9 of what training all covered weights
       reaches; d is raised on a logarithmic grid until it does, then refined between the last two             (eq. 6)
       Its options: grid, refine, seeds, share, baseline, steps, batch, rate, direct_rate, examples, projection,
       target_modules; fewer seeds, steps and examples take less time.

Where it bends
    Above 4 million weights one Fastfood transform a tensor is taken instead of one for the model, with the same v; each
    is multiplied by sqrt(n / D), so the columns still have unit norm over the model (`per_tensor` decides). Tensors of
    equal size share Pi and G and differ in B. As v fills only the first entries of L, the first H is that of v alone,
    repeated; the arithmetic is the same. The published method trains from random weights and scores accuracy. Here
    theta_0 is a trained model, so the score is the share of the fall in held-out loss that direct training brings.
    Layers with running statistics are refused: they would move without being saved. peft's relatives (vera, unilora,
    fourierft) project low-rank factors or frequencies, layer by layer, where this projects the weights themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.core.step import Work
from shoestring.methods.adapters import _meter, _shared
from shoestring.methods.adapters._projections import Projection, dense, fastfood, project, sparse, to
from shoestring.methods.adapters._shared import answer_dtype, is_packed, read_bias, read_weight, whole

METHOD = Method(
    paper=Paper(
        "Measuring the Intrinsic Dimension of Objective Landscapes",
        "2018-04",
        arxiv="1804.08838",
        code="uber-research/intrinsic-dimension",
        licence="MIT",
    ),
    provides="RandomSubspaceConfig",
    saves=("parameters", "storage", "network"),
    combines={"quantizers": "yes"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "d for the whole model",
    },
)
# A step of v moves a weight by about sqrt(d / D) of its size, so v takes far larger ones than weights do.
TRAINING = {"learning_rate": 0.2}
_PROJECTIONS = ("fastfood", "dense", "sparse", "orthonormal")
_ATTENTION = frozenset({"q", "k", "v", "qkv", "o"})
_LARGE = 4_000_000


@dataclass
class RandomSubspaceConfig(_shared.AdapterConfig):
    """Training in a random subspace.

    `target_modules` None takes the attention projections, "all" everything that has weights: linear layers, norms and
    embeddings, a tied one once.

    Args:
        d: dimensions of the subspace; at most the number of covered weights.
        projection: fastfood, dense (memory d D), sparse (about d sqrt(D)), or orthonormal (dense; for d = D).
        projection_seed: of P; with v it is the whole adapter.
        per_tensor: one Fastfood transform for each tensor; None for that above 4 million weights.
        layer_scalars: train a factor for each block's share of P v too.
        exclude_parameters: names or endings of parameters to leave alone, such as "bias".
        covered: filled in: every covered tensor with its shape, for a loaded adapter to be held against.
    """

    TYPE = "intrinsic_dimension"

    d: int = field(default=2000, metadata={"help": "Dimensions of the subspace"})
    projection: str = field(default="fastfood", metadata={"help": "fastfood, dense, sparse or orthonormal"})
    projection_seed: int = field(default=0, metadata={"help": "Seed of the projection"})
    per_tensor: bool | None = field(default=None, metadata={"help": "One transform a tensor; None: large models"})
    layer_scalars: bool = field(default=False, metadata={"help": "Train a factor for each block too"})
    exclude_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to leave alone"})
    covered: dict[str, list[int]] | None = field(default=None, metadata={"help": "Filled in: covered tensors"})

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("d", self.d)
        whole("projection_seed", self.projection_seed, 0)
        if self.projection_seed >= 2**32:
            raise ValueError(f"projection_seed={self.projection_seed} is not possible; it must be below 2^32")
        if self.projection not in _PROJECTIONS:
            raise ValueError(f"projection={self.projection!r} is not known; it is one of {', '.join(_PROJECTIONS)}")


class Subspace:
    """One adapter's P over all covered tensors of a model, and what v makes of it.

    A plain object that the tuner and all its layers share; v itself is the tuner's parameter.
    """

    def __init__(self, config: RandomSubspaceConfig, name: str, vectors: nn.ParameterDict) -> None:
        self.config, self.name, self.vectors = config, name, vectors
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scalars: nn.ParameterDict | None = None
        self.groups: dict[str, int] = {}
        self.parts: list[Projection] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._now: Tensor | None = None
        self._kept: tuple[list[Tensor], dict[str, Tensor]] | None = None

    def build(self) -> None:
        """Make P for the tensors in `shapes`.

        Raises:
            ValueError: d is larger than the number of covered weights.
        """
        config, counts = self.config, {name: math.prod(shape) for name, shape in self.shapes.items()}
        total, start = sum(counts.values()), 0
        if config.d > total:
            raise ValueError(f"d={config.d} is more than the {total} covered weights; choose a smaller d")
        self.groups = {group: i for i, group in enumerate(dict.fromkeys(map(_group, counts)))}
        for index, (name, count) in enumerate(counts.items()):
            self._places[name] = (index, start)
            start += count
        seed, sizes = config.projection_seed, list(counts.values())
        if config.projection == "sparse":
            self.parts = [sparse(sizes, config.d, seed)]  # eq. 3
        elif config.projection != "fastfood":
            self.parts = [dense(total, config.d, seed, config.projection == "orthonormal")]  # eq. 2
        elif total > _LARGE if config.per_tensor is None else config.per_tensor:
            self.parts = [*fastfood(sizes, config.d, seed)]
        else:
            self.parts = [*fastfood([total], config.d, seed)]  # eq. 4

    @property
    def single(self) -> bool:
        return len(self.parts) == 1

    def begin(self) -> None:
        """Before the model runs: where one P covers all, P v is made once for all layers."""
        self._now = project(self.vectors[self.name], self.parts[0]) if self.single and torch.is_grad_enabled() else None

    def end(self) -> None:
        self._now = None

    def delta(self, name: str) -> Tensor:
        """What the tensor `name` gets from P v, in its shape; kept between calls while v stays and nothing trains."""
        if torch.is_grad_enabled():
            return self._delta(name)
        now = [self.vectors[self.name], *([] if self.scalars is None else [self.scalars[self.name]])]
        if self._kept is None or not all(map(torch.equal, now, self._kept[0])):
            self._kept = [p.detach().clone() for p in now], {}
        kept = self._kept[1]
        if name not in kept:
            if self.single:  # all at once: the transform is the same for each
                flat = project(self.vectors[self.name], self.parts[0])
                kept.update({other: self._scaled(other, self._cut(other, flat)) for other in self.shapes})
            else:
                kept[name] = self._delta(name)
        return kept[name]

    def _delta(self, name: str) -> Tensor:
        v = self.vectors[self.name]
        if not self.single:
            return self._scaled(name, project(v, self.parts[self._places[name][0]]).view(self.shapes[name]))
        flat = project(v, self.parts[0]) if self._now is None else self._now
        return self._scaled(name, self._cut(name, flat))

    def _cut(self, name: str, flat: Tensor) -> Tensor:
        start, shape = self._places[name][1], self.shapes[name]
        return flat[start : start + math.prod(shape)].view(shape)

    def _scaled(self, name: str, delta: Tensor) -> Tensor:
        return delta if self.scalars is None else delta * self.scalars[self.name][self.groups[_group(name)]]


class SubspaceSite(_shared.LinearLayer):
    """A layer whose weight and bias get their slices of P v."""

    other_param_names = ("spaces", "names")

    def containers(self) -> None:
        self.spaces: dict[str, Subspace] = {}
        self.names: dict[str, dict[str, str]] = {}  # adapter -> parameter -> the name its tensor is covered under
        self.first: SubspaceSite | None = None  # the layer that the base's weight was first met in, where it is tied

    def fill(self, adapter_name: str, config: RandomSubspaceConfig, key: str, **shared: Any) -> None:
        base: Any = self.get_base_layer()
        space: Subspace = shared["space"]
        found = {"weight": tuple(read_weight(base).shape)}
        if read_bias(base) is not None:
            found["bias"] = tuple(base.bias.shape)
        self.first = shared["first"]
        names = {part: f"{key}.{part}" for part in found if not _excluded(f"{key}.{part}", config.exclude_parameters)}
        if self.first is not None and "weight" in names:
            names["weight"] = self.first.names[adapter_name].get("weight", "")
        self.names[adapter_name] = {part: name for part, name in names.items() if name}
        self.spaces[adapter_name] = space
        space.shapes |= {n: found[part] for part, n in self.names[adapter_name].items() if n not in space.shapes}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or not self.acting:
            return self.base_layer(x, *args, **kwargs)
        deltas = self._deltas(self.acting)
        if isinstance(base, nn.Linear | Conv1D):
            # In a type of few digits, or in packed integers, the sum of weight and slice would lose the slice.
            if is_packed(base) or {base.weight.dtype, answer_dtype(x)} != {torch.float32}:
                out = self.base_layer(x, *args, **kwargs)
                if "weight" in deltas:
                    out = out + nn.functional.linear(x, deltas["weight"].to(x.dtype))
                return out + deltas["bias"].to(out.dtype) if "bias" in deltas else out
            weight, bias = self.changed_by(deltas, read_weight(base), read_bias(base))
            return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        weight, bias = self.changed_by(deltas, base.weight, read_bias(base))
        new = {"weight": weight.to(base.weight.dtype), **({} if bias is None else {"bias": bias.to(base.bias.dtype)})}
        return torch.func.functional_call(base, new, (x, *args), kwargs)

    def changed(self, adapter_name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        changed, shift = self.changed_by(self._deltas([adapter_name]), weight, bias)
        return changed.to(weight.dtype), None if shift is None or bias is None else shift.to(bias.dtype)

    def changed_by(
        self, deltas: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """theta_0 + P v of this layer, in float32."""
        weight = weight + deltas["weight"] if "weight" in deltas else weight  # eq. 1
        return weight, bias + deltas["bias"] if bias is not None and "bias" in deltas else bias

    def _deltas(self, adapters: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for adapter in adapters:
            for part, name in self.names[adapter].items():
                delta = self.spaces[adapter].delta(name)
                found[part] = found[part] + delta if part in found else delta
        return found

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if self.first is not None and self.first.get_base_layer().weight is self.get_base_layer().weight:
            self.merged_adapters.extend(n for n in adapter_names or self.active_adapters if self.has(n))
            return  # the tensor is one, and is changed where it was first met
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        if self.merged and self._kept is None:
            self.merged_adapters.clear()
            return
        super().unmerge()


class SubspaceLinear(SubspaceSite):
    """A linear layer; peft tells linear layers from others by the class name."""


class RandomSubspaceModel(_shared.Guard):
    """The tuner: it holds v, and gives every layer its slice of P v."""

    prefix = "intrinsic_dimension_"
    tuner_layer_cls = SubspaceSite
    target_module_mapping = {}
    uses_shared_state = True
    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: RandomSubspaceConfig = self.peft_config[adapter_name]
        if "intrinsic_dimension_v" not in self._modules:
            self.intrinsic_dimension_v, self.intrinsic_dimension_scalars = nn.ParameterDict(), nn.ParameterDict()
            self.spaces: dict[str, Subspace] = {}
            self._standing: dict[str, tuple[str, ...]] = {}
            self._hooks: list[Any] = []
        space = self.spaces[adapter_name] = Subspace(config, adapter_name, self.intrinsic_dimension_v)
        self._met: dict[int, SubspaceSite] = {}
        device = next((p.device for p in model.parameters()), None)
        self.intrinsic_dimension_v[adapter_name] = nn.Parameter(torch.zeros(config.d, device=device))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        found = {name: list(shape) for name, shape in space.shapes.items()}
        if config.covered is not None and config.covered != found:
            unlike = sorted(set(map(str, config.covered.items())) ^ set(map(str, found.items())))
            raise ValueError(
                f"the adapter covers other tensors than this model has: {', '.join(unlike[:3])}; use the base it was "
                "trained on, or make a new config"
            )
        config.covered = found
        space.build()
        space.parts = [to(part, device) for part in space.parts]
        if config.layer_scalars:
            space.scalars = self.intrinsic_dimension_scalars
            self.intrinsic_dimension_scalars[adapter_name] = nn.Parameter(torch.ones(len(space.groups), device=device))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if not self._hooks:  # a model that could not be adapted keeps none
            self._hooks = [model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after)]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules in (None, "all"):
            wanted = "all" if peft_config.target_modules else "attention"
            if wanted not in self._standing:
                self._standing[wanted] = tuple(_everything(self.model) if wanted == "all" else _attention(self.model))
            peft_config.target_modules = set(self._standing[wanted])
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        site = isinstance(target, SubspaceSite)
        base: Any = target.get_base_layer() if isinstance(target, SubspaceSite) else target
        if not _has_weights(base):
            self._check_target(
                base, current_key, (), "linear layers, convolutions, norms without running statistics and embeddings"
            )
        shared = {"space": self.spaces[adapter_name], "first": self._met.get(id(base.weight))}
        if site:
            target.update_layer(adapter_name, peft_config, current_key, **shared)  # type: ignore[operator]
        else:
            kind = SubspaceLinear if isinstance(base, nn.Linear | Conv1D) else SubspaceSite
            made = kind(target, adapter_name, peft_config, current_key, **shared)
            self._replace_module(parent, target_name, made, target)
            target = made
        self._met.setdefault(id(base.weight), target)  # type: ignore[arg-type]

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        for vectors in (self.intrinsic_dimension_v, self.intrinsic_dimension_scalars):
            for name, vector in vectors.items():
                vector.requires_grad_(name in self.active_adapters and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for vectors in (self.intrinsic_dimension_v, self.intrinsic_dimension_scalars, self.spaces):
            if adapter_name in vectors:
                del vectors[adapter_name]

    def _before(self, *_: Any) -> None:
        for name in self.active_adapters:
            if name in self.spaces and self.spaces[name].parts:
                self.spaces[name].begin()

    def _after(self, *_: Any) -> None:
        for space in self.spaces.values():
            space.end()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[func-returns-value]
        for hook in self._hooks:
            hook.remove()
        return model


def _group(name: str) -> str:
    """The block that a tensor stands in, by the first number in its name; what stands in none is a group of its own."""
    found = re.search(r"(^|.*?\.)\d+(?=\.)", name)
    return found[0] if found else ""


def _excluded(name: str, words: Sequence[str] | None) -> bool:
    return any(name == word or name.endswith(f".{word}") for word in words or ())


def _has_weights(module: nn.Module) -> bool:
    """Whether the module is a layer with a weight, perhaps a bias, and nothing else of its own that training moves."""
    weight = getattr(module, "weight", None)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    kinds = nn.Linear | Conv1D | nn.Embedding | nn.Conv1d | nn.Conv2d
    if not isinstance(weight, Tensor) or list(module.children()) or getattr(module, "running_mean", None) is not None:
        return False
    return isinstance(module, kinds) or weight.dim() == 1 and own <= {"weight", "bias"}


def _everything(model: nn.Module) -> Iterator[str]:
    held = {name for name, module in model.named_modules() if isinstance(module, SubspaceSite)}
    for name, module in model.named_modules():
        if name in held or name and name.rpartition(".")[0] not in held and _has_weights(module):
            yield name


def _attention(model: nn.Module) -> Iterator[str]:
    from shoestring.models.anatomy import inspect

    yield from (name for name, _, role in inspect(model).linears() if role in _ATTENTION)  # type: ignore[arg-type]


def register() -> None:
    _shared.join("intrinsic_dimension", RandomSubspaceConfig, RandomSubspaceModel)


def example() -> RandomSubspaceConfig:
    return RandomSubspaceConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"d": 2000}, {"d": 200})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """d trainable parameters, and one more a block with `layer_scalars`; the merged model costs what the base does."""
    chosen = {**settings()[0], **options}
    return Price(shape, trainable=int(chosen["d"]) + shape.layers * bool(chosen.get("layer_scalars")), train_flops=3.0)


def measure(source: Path, options: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """d90 of a task on a model, and what it says of a LoRA's rank; see `_meter.measure`."""
    register()
    return _meter.measure(RandomSubspaceConfig, source, options, work)

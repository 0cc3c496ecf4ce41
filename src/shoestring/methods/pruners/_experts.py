"""What the pruners of mixtures share: what experts see and give on calibration text, and layers with fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoestring.core.errors import UsageError
from shoestring.core.shape import Shape, Weight
from shoestring.lab import tiny_mixture
from shoestring.methods.pruners._shared import Rows
from shoestring.models.anatomy import Mixture, mixtures, route
from shoestring.models.regrouped import family_of, maps, router_rows
from shoestring.models.routing import Trace, watch


@dataclass(frozen=True)
class Seen:
    """What calibration text showed of one layer.

    Attributes:
        inputs: what router and experts read, (tokens, width).
        load, mass: of each expert, the tokens that met it and the sum of their gates, (experts,).
        output: what the layer's chosen experts add, (tokens, width), experts that all tokens share left out.
    """

    mixture: Mixture
    inputs: Tensor
    load: Tensor
    mass: Tensor
    output: Tensor


@torch.no_grad()
def watched(model: PreTrainedModel, rows: Rows, tokens: int) -> tuple[list[Seen], Trace]:
    """Every layer on the first `tokens` tokens of the rows.

    Raises:
        UsageError: a model whose experts cannot be taken out, or no text.
    """
    family_of(model)
    if not rows:
        raise UsageError("What experts do is learned from text, and there is none", remedy="Add --data FILE")
    left = tokens
    with watch(model, hidden=True) as recorder:
        for row in rows:
            ids = list(row["input_ids"])[:left]
            if not ids:
                break
            model(input_ids=torch.tensor([ids]), use_cache=False)
            left -= len(ids)
    trace = recorder.trace()
    found = []
    for number, mixture in enumerate(mixtures(model)):
        x = recorder.states(number).to(model.dtype)
        load, mass = (torch.from_numpy(np.asarray(v[number], np.float64)) for v in (trace.loads(), trace.masses()))
        found.append(Seen(mixture, x, load, mass, layer_output(model, mixture, x)))
    return found, trace


@torch.no_grad()
def layer_output(model: nn.Module, mixture: Mixture, x: Tensor, kept: Sequence[int] | None = None) -> Tensor:
    """What the chosen experts add for x (tokens, width), float32, when only `kept` may be chosen (None: all)."""
    router, experts = model.get_submodule(mixture.router), model.get_submodule(mixture.experts)
    if kept is None:
        _, gates, choices = route(router, x)
    else:
        _, gates, choices = route(fewer(router, kept), x)
        choices = torch.tensor(list(kept))[choices]
    return experts(x, choices, gates).float()  # type: ignore[no-any-return]


@torch.no_grad()
def each_output(model: nn.Module, mixture: Mixture, x: Tensor) -> Tensor:
    """What every expert makes of every token, float32 (experts, tokens, width), without gates."""
    experts, ones = model.get_submodule(mixture.experts), x.new_ones(len(x), 1)
    numbers = torch.zeros(len(x), 1, dtype=torch.long)
    return torch.stack([experts(x, numbers + expert, ones).float() for expert in range(mixture.count)])


def fewer(router: nn.Module, kept: Sequence[int]) -> Any:
    """A copy of a router that chooses among some of its rows; its choices count these alone."""
    made: Any = copy.deepcopy(router)
    rows, index = router_rows(router), torch.tensor(list(kept))
    for name, tensor in list(made._parameters.items()):
        if tensor is not None and len(tensor) == rows:
            made._parameters[name] = nn.Parameter(tensor.detach()[index], requires_grad=False)
    for name, tensor in list(made._buffers.items()):
        if tensor is not None and len(tensor) == rows:
            made._buffers[name] = tensor[index]
    made.num_experts = len(kept)
    return made


def slices(model: nn.Module, mixture: Mixture, kept: Sequence[int]) -> dict[str, Tensor]:
    """Copies of the parameters of some experts, (kept, ...)."""
    experts, index = model.get_submodule(mixture.experts), torch.tensor(list(kept))
    return {name: experts.get_parameter(name).detach()[index].clone() for name in mixture.tensors}


def refuse_shared_choices(model: nn.Module) -> None:
    """Raises UsageError for a model some of whose choices stand for one expert already."""
    if any(list(to) != list(range(len(to))) for to in maps(model)):
        raise UsageError(
            f"The experts of this {type(model).__name__} have been joined already", remedy="Start from the whole model"
        )


def entropy_facts(trace: Trace) -> dict[str, Any]:
    """How even the experts' loads were on the calibration text: without it no figure of a mixture means much."""
    return {"routing_entropy": trace.entropy(), "calibration_tokens": len(trace.steps)}


def lessened(shape: Shape, experts: float, routers: float) -> Shape:
    """The shape when a share of the experts, and of the routers' rows, is gone; one of each stays at least.

    Raises:
        UsageError: a shape without experts.
    """
    total = next((w.dims[0] for w in shape.of("expert") if len(w.dims) == 3), 0)
    if not total:
        raise UsageError(f"A {shape.family} model has no experts", remedy="Use Mixtral, OLMoE or their kin")

    def touch(weight: Weight) -> Weight:
        share = 0.0
        if weight.role == "expert" and len(weight.dims) == 3:
            share = experts
        elif weight.role == "other" and weight.dims == (total, shape.hidden):
            share = routers
        if not share:
            return weight
        left = max(1, round(total * (1 - share)))
        part = left / weight.dims[0]
        used = min(1.0, weight.used / part) if weight.role == "expert" else weight.used
        return Weight(
            weight.name, weight.role, (left, *weight.dims[1:]), round(weight.stored * part),
            round(weight.resident * part), weight.tied, used,
        )  # fmt: skip

    return shape.change(touch)


def base(**changes: Any) -> PreTrainedModel:
    """A tiny mixture of four experts, two of which each token meets."""
    return tiny_mixture.model(**{"tie_word_embeddings": True, **changes})

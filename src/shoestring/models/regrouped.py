"""Mixtures of which some experts are gone or stand for several: each layer with as many as it has left.

`regroup` makes such a model out of a larger one. Where every layer keeps equally many experts, and each of them has one
row of its router, it is a plain model of its family. Otherwise its class derives from the family's own and is known to
transformers' Auto classes once this module has been imported; others stop at its `model_type`, or at a seal.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoestring.core.errors import UsageError
from shoestring.models import surgery
from shoestring.models.anatomy import mixtures, set_experts
from shoestring.models.derived import derive, plain
from shoestring.models.load import REGROUPED, quiet

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def family_of(model: nn.Module) -> str:
    """The family of a mixture that can be regrouped.

    Raises:
        UsageError: any other; its class is named.
    """
    mixtures(model)  # a dense model is told that it has no experts
    for family in FAMILIES:
        if type(model) in (plain(family), _MODELS[family]):
            return family
    raise UsageError(
        f"The experts of {type(model).__name__} cannot be taken out or joined",
        "its router is not known to work with fewer",
        "Use " + ", ".join(plain(family).__name__ for family in FAMILIES),
    )


def maps(model: nn.Module) -> list[list[int]]:
    """Of each layer, the expert that each row of its router chooses."""
    return getattr(model.config, "layer_expert_maps", None) or [list(range(m.count)) for m in mixtures(model)]  # type: ignore[union-attr]


def regroup(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    to: Sequence[Sequence[int]],
    tensors: Sequence[Mapping[str, Tensor]],
) -> PreTrainedModel:
    """A new model with other experts. `model` stays as it is.

    Args:
        rows: of each layer, the rows of its router that stay.
        to: of each layer, the new expert that each of these rows chooses; a token that chooses two rows of one expert
            meets it with the sum of both gates.
        tensors: of each layer, the experts' parameters by name, each (new experts, ...).

    Raises:
        UsageError: a model that cannot be regrouped, or a layer with fewer rows than a token chooses.
    """
    family, found = family_of(model), mixtures(model)
    for number, (mixture, kept, target, new) in enumerate(zip(found, rows, to, tensors, strict=True)):
        count = max(target) + 1
        if len(kept) != len(target) or sorted(set(target)) != list(range(count)):
            raise UsageError(f"Layer {number}: the rows and what they choose do not fit each other")
        if len(kept) < mixture.chosen:
            raise UsageError(
                f"Layer {number} would keep {len(kept)} choices, and a token makes {mixture.chosen}",
                remedy="Keep as many as a token chooses",
            )
        if any(len(tensor) != count for tensor in new.values()) or set(new) != set(mixture.tensors):
            raise UsageError(f"Layer {number}: the tensors are not those of {count} experts")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for mixture, kept, new in zip(found, rows, tensors):
        router, index = model.get_submodule(mixture.router), torch.tensor(list(kept))
        choices = router_rows(router)
        for name, tensor in router.state_dict().items():
            if len(tensor) == choices:
                state[f"{mixture.router}.{name}"] = tensor.detach()[index].clone()
        for name, tensor in new.items():
            state[f"{mixture.experts}.{name}"] = tensor.detach().clone()
    even = len({len(kept) for kept in rows}) == 1 and all(list(t) == list(range(len(t))) for t in to)
    config = _config(model, family, [list(target) for target in to], even)
    kind = plain(family) if even else _MODELS[family]
    with quiet():
        made, report = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype, output_loading_info=True
        )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()  # type: ignore[no-any-return]


def router_rows(router: nn.Module) -> int:
    """How many choices a router has."""
    return len(router.get_parameter("weight"))


def _config(model: PreTrainedModel, family: str, to: list[list[int]], even: bool) -> Any:
    values = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("model_type", "architectures", "transformers_version", "layer_expert_maps")
    }
    config = CONFIG_MAPPING[family](**values) if even else _CONFIGS[family](**values, layer_expert_maps=to)
    set_experts(config, max(map(len, to)))
    config._experts_implementation = model.config._experts_implementation
    return config


# ---- the classes -------------------------------------------------------------------------------------------------


def _build(model: Any, config: Any) -> None:
    """Put routers and experts of the listed sizes in the place of equal ones."""
    found = mixtures(model)
    if len(config.layer_expert_maps) != len(found):
        raise ValueError(f"layer_expert_maps has {len(config.layer_expert_maps)} lists for {len(found)} layers")
    for mixture, to in zip(found, config.layer_expert_maps):
        for name, count, mapped in ((mixture.router, len(to), True), (mixture.experts, max(to) + 1, False)):
            own, old = copy.copy(config), model.get_submodule(name)
            set_experts(own, count)
            kind = type(old)
            made = kind(own)
            if mapped:
                made.__class__ = _mapped(kind)
                made.targets = list(to)
            else:
                made.stacked_experts = True  # for `models.anatomy`, which would not take a single one for a stack
            if getattr(made, "config", None) is own:
                made.config = config  # what is switched for the whole model, such as how experts are computed
            surgery.replace_module(model, name, made)


def _mapped(kind: type[nn.Module]) -> type[nn.Module]:
    """The family's router, whose choices are those of `targets`."""

    class Mapped(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, gates, choices = super().forward(hidden_states)
            return logits, gates, torch.tensor(self.targets, device=choices.device)[choices]

    Mapped.__name__ = Mapped.__qualname__ = f"Mapped{kind.__name__}"
    return Mapped


def _check_lists(config: Any) -> None:
    for to in config.layer_expert_maps or ():
        if not to or sorted(set(to)) != list(range(max(to) + 1)):
            raise ValueError("layer_expert_maps must list, for each layer of experts, what each choice stands for")


_CONFIGS: dict[str, Any] = {}
_MODELS: dict[str, Any] = {}
for _family in FAMILIES:
    _CONFIGS[_family], _MODELS[_family] = derive(
        _family, __name__, "Regrouped", REGROUPED, {"layer_expert_maps": (list[list[int]] | None, None)},
        build=_build, check=_check_lists,
    )  # fmt: skip
    globals()[_CONFIGS[_family].__name__], globals()[_MODELS[_family].__name__] = _CONFIGS[_family], _MODELS[_family]

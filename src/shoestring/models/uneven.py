"""Models whose layers differ in size: other heads and neurons in each, some without attention or without MLP.

`shrink` cuts such a model out of a larger one. Where all layers come out alike it is a plain model of its family;
otherwise its class derives from the family's own and is known to transformers' Auto classes once this module has been
imported. Readers who do not know it stop: at its `model_type`, and the family's own class at a seal.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoestring.core.errors import UsageError
from shoestring.models import surgery
from shoestring.models.anatomy import Absent, Block, block_lists, features, halves, inspect, renumber
from shoestring.models.derived import derive, plain
from shoestring.models.load import UNEVEN, quiet

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


@dataclass(frozen=True)
class Size:
    """How large a block is: groups of heads that share keys and values, and neurons. With 0 the part is gone."""

    groups: int
    neurons: int


@dataclass(frozen=True)
class Sizes:
    """How large a model is that can be cut.

    Attributes:
        blocks: of each block in order.
        hidden: width of the residual stream.
        head_dim: dimensions of a head; `group_heads` heads of queries share one of keys and values.
    """

    blocks: tuple[Size, ...]
    hidden: int
    head_dim: int
    group_heads: int

    @property
    def group_cost(self) -> int:
        """Weights of a block's attention matrices that belong to one group."""
        return 2 * (self.group_heads + 1) * self.head_dim * self.hidden

    @property
    def neuron_cost(self) -> int:
        """Weights of a block's MLP matrices that belong to one neuron."""
        return 3 * self.hidden

    @property
    def weights(self) -> int:
        """Weights of all matrices of all blocks."""
        return sum(b.groups * self.group_cost + b.neurons * self.neuron_cost for b in self.blocks)


@dataclass(frozen=True)
class Keep:
    """What stays of one block. A part of which nothing stays goes with its norm; with both parts the block goes.

    Attributes:
        groups, neurons: indices in the block as it is.
        attention_bias, mlp_bias: constants (hidden,) to add to what the part adds to the residual stream, or None.
    """

    groups: Sequence[int]
    neurons: Sequence[int]
    attention_bias: Tensor | None = field(default=None, compare=False)
    mlp_bias: Tensor | None = field(default=None, compare=False)

    @property
    def biased(self) -> bool:
        return self.attention_bias is not None or self.mlp_bias is not None

    @property
    def nothing(self) -> bool:
        return not (len(self.groups) or len(self.neurons) or self.biased)


def sizes(model: nn.Module) -> Sizes:
    """The sizes of a causal model of `FAMILIES`, plain or uneven.

    Raises:
        UsageError: another family, or matrices that are packed or adapted.
    """
    family = family_of(model)
    config: Any = model.config
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    found, ratio = [], 0
    for block in inspect(model).blocks:
        parts = {role: model.get_submodule(name) for role, name in block.projections.items()}
        if set(parts) - {*ATTENTION, *MLP} or any(type(part) is not nn.Linear for part in parts.values()):
            raise UsageError(
                f"{type(model).__name__} cannot be cut into a smaller model as it is",
                f"{block.name} has other matrices than a plain {family} model",
                "Prune the float model, and compress or adapt the result",
            )
        groups = features(parts["k"])[1] // dim if "k" in parts else 0
        ratio = ratio or (features(parts["q"])[1] // (groups * dim) if groups else 0)
        found.append(Size(groups, features(parts["down"])[0] if "down" in parts else 0))
    return Sizes(tuple(found), int(config.hidden_size), dim, ratio)


def family_of(model: nn.Module) -> str:
    """The family of a model that can be cut.

    Raises:
        UsageError: any other; its class is named.
    """
    for family in FAMILIES:
        if type(model) in (plain(family), _MODELS[family]):
            return family
    raise UsageError(
        f"{type(model).__name__} cannot be cut into a smaller model",
        "its heads and neurons are not known to be those of a Llama-like model",
        "Use " + ", ".join(plain(family).__name__ for family in FAMILIES),
    )


def is_uneven(model: nn.Module) -> bool:
    """Whether a model needs this module to be loaded."""
    return type(model) in _MODELS.values()


def shrink(model: PreTrainedModel, keep: Sequence[Keep], *, hidden: Sequence[int] | None = None) -> PreTrainedModel:
    """A new model with copies of what `keep` names, one entry for each block. `model` stays as it is.

    It computes what `model` does when the outputs of all other heads and neurons are zero and no part writes into the
    dimensions that are not in `hidden`.

    Args:
        hidden: dimensions of the residual stream that stay, None for all. Norms went over the full width; what is left
            of them is scaled so that their result is the same.

    Raises:
        UsageError: a model that cannot be cut, indices that it does not have, or nothing left that attends.
    """
    before = sizes(model)
    _check(model, before, keep, hidden)
    blocks = [(block, kept) for block, kept in zip(inspect(model).blocks, keep) if not kept.nothing]
    config = _config(model, before, blocks, hidden)
    state = {name: value.detach().clone() for name, value in _weights(model, before, blocks, hidden, config)}
    kind = _MODELS[family_of(model)] if type(config) in _CONFIGS.values() else plain(family_of(model))
    with quiet():
        made, report = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype, output_loading_info=True
        )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()  # type: ignore[no-any-return]


def _weights(
    model: PreTrainedModel,
    before: Sizes,
    blocks: Sequence[tuple[Block, Keep]],
    hidden: Sequence[int] | None,
    config: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Name in the smaller model and weight, tensor by tensor."""
    anatomy, own = inspect(model), dict(model.named_parameters())
    stream = None if hidden is None else torch.as_tensor(list(hidden), dtype=torch.long)
    # Norms divide by the root of the mean over what they see: fewer dimensions, the same sum.
    grown = 1.0 if hidden is None else (before.hidden / len(hidden)) ** 0.5
    yield f"{anatomy.embeddings}.weight", _cut(own[f"{anatomy.embeddings}.weight"], None, stream)
    if not anatomy.embeddings_tied:
        yield f"{anatomy.head}.weight", _cut(own[f"{anatomy.head}.weight"], None, stream)
    yield f"{anatomy.final_norm}.weight", _cut(own[f"{anatomy.final_norm}.weight"], stream) * grown
    for place, (block, keep) in enumerate(blocks):
        stack = block.name.rpartition(".")[0]

        def here(name: str, block: Block = block, stack: str = stack, place: int = place) -> str:
            return f"{stack}.{place}{name.removeprefix(block.name)}"

        groups, neurons = (torch.as_tensor(list(kept), dtype=torch.long) for kept in (keep.groups, keep.neurons))
        narrow = (groups[:, None] * before.head_dim + torch.arange(before.head_dim)).flatten()
        wide = before.head_dim * before.group_heads
        queries = (groups[:, None] * wide + torch.arange(wide)).flatten()
        rows = {"q": queries, "k": narrow, "v": narrow, "gate": neurons, "up": neurons, "o": stream, "down": stream}
        columns = {"o": queries, "down": neurons}
        for part, kept, roles, given in (
            ("attention", groups, ATTENTION, keep.attention_bias),
            ("mlp", neurons, MLP, keep.mlp_bias),
        ):
            half = halves(block)[part]
            target = f"{half.module}.bias"
            if len(kept):
                yield here(half.norm) + ".weight", _cut(own[f"{half.norm}.weight"], stream) * grown
                for role in roles:
                    name = block.projections[role]
                    yield here(name) + ".weight", _cut(own[f"{name}.weight"], rows[role], columns.get(role, stream))
                    if role not in columns and f"{name}.bias" in own:
                        yield here(name) + ".bias", _cut(own[f"{name}.bias"], rows[role])
                target = f"{block.projections[roles[-1]]}.bias"
                inside = [name for name in block.norms if name.startswith(half.module + ".")]
                yield from ((here(name) + ".weight", own[f"{name}.weight"]) for name in inside)
            constant = own.get(target)
            if (len(kept) and constant is not None) or getattr(config, "output_biases", False):
                zero = torch.zeros(before.hidden, dtype=model.dtype)
                terms = [term.to(zero) for term in (constant, given) if term is not None]
                yield here(target), _cut(sum(terms, zero), stream)


def _cut(value: Tensor, rows: Tensor | None, columns: Tensor | None = None) -> Tensor:
    value = value if rows is None else value.index_select(0, rows.to(value.device))
    return value if columns is None else value.index_select(1, columns.to(value.device))


def _check(model: PreTrainedModel, before: Sizes, keep: Sequence[Keep], hidden: Sequence[int] | None) -> None:
    if len(keep) != len(before.blocks):
        raise UsageError(f"{len(keep)} blocks were described, {type(model).__name__} has {len(before.blocks)}")
    wanted = [("dimensions", hidden, before.hidden, "the stream")] if hidden is not None else []
    for number, (size, kept) in enumerate(zip(before.blocks, keep)):
        wanted += [("groups", kept.groups, size.groups, f"block {number}")]
        wanted += [("neurons", kept.neurons, size.neurons, f"block {number}")]
    for what, indices, count, where in wanted:
        given = [int(index) for index in indices]
        if given and not 0 <= min(given) <= max(given) < count or len(set(given)) < len(given):
            raise UsageError(f"The {what} to keep of {where} are not different ones of {count}")
    if not any(len(kept.groups) for kept in keep) or (hidden is not None and not len(hidden)):
        raise UsageError(
            "Nothing would be left of the model's attention", remedy="Keep one group of heads in one layer at least"
        )
    config: Any = model.config
    lost = any(not len(kept.groups) and not kept.nothing for kept in keep)
    if lost and len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise UsageError(
            f"{type(model).__name__} cannot lose the attention of single layers",
            "its layers see unequally far, and its cache could not tell which of them is left",
            "Keep a group of heads in each layer, or remove whole layers",
        )
    if hidden is not None and any(n.count(".") > b.name.count(".") + 1 for b in inspect(model).blocks for n in b.norms):
        raise UsageError(
            f"{type(model).__name__} cannot be made narrower",
            "its heads are normalised with the same epsilon as the stream, which would have to change",
            "Keep all dimensions of the stream",
        )


def _config(
    model: PreTrainedModel, before: Sizes, blocks: Sequence[tuple[Block, Keep]], hidden: Sequence[int] | None
) -> Any:
    """The configuration of what is left: plain where it can say it."""
    family, was = family_of(model), model.config
    values = {
        k: v for k, v in was.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")
    }
    left = [Size(len(kept.groups), len(kept.neurons)) for _, kept in blocks]
    most = Size(max(size.groups for size in left), max(1, *(size.neurons for size in left)))
    biases = bool(values.pop("output_biases", False)) or any(kept.biased for _, kept in blocks)
    for name in ("layer_key_value_heads", "layer_intermediate_sizes"):
        values.pop(name, None)
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][block.index] for block, _ in blocks]
    values |= {
        "num_hidden_layers": len(left),
        "num_attention_heads": most.groups * before.group_heads,
        "num_key_value_heads": most.groups,
        "head_dim": before.head_dim,
        "intermediate_size": most.neurons,
    }
    if hidden is not None:
        values |= {"hidden_size": len(hidden), "rms_norm_eps": values["rms_norm_eps"] * before.hidden / len(hidden)}
    if not biases and set(left) == {most}:
        try:
            return CONFIG_MAPPING[family](**values)
        except StrictDataclassError:
            pass  # some families' own configurations allow only heads that divide the width
    return _CONFIGS[family](
        **values,
        layer_key_value_heads=[size.groups for size in left],
        layer_intermediate_sizes=[size.neurons for size in left],
        output_biases=biases,
    )


# ---- the classes -------------------------------------------------------------------------------------------------


def _check_lists(config: Any) -> None:
    groups, neurons = config.layer_key_value_heads, config.layer_intermediate_sizes
    layers = config.num_hidden_layers
    if len(groups) != layers or len(neurons) != layers or min(*groups, *neurons, 0) < 0 or not any(groups):
        raise ValueError(
            "layer_key_value_heads and layer_intermediate_sizes must list one number of 0 or more for each of the "
            f"{layers} layers, one of the former above 0"
        )
    if max(groups) > config.num_key_value_heads or max(neurons) > config.intermediate_size:
        raise ValueError("a layer has more heads or neurons than num_key_value_heads and intermediate_size allow")


def _build(model: Any, config: Any) -> None:
    """Put blocks of the sizes that `config` lists in the place of equal ones."""
    ratio = config.num_attention_heads // config.num_key_value_heads
    ((stack, blocks),) = block_lists(model).items()
    for index, old in enumerate(list(blocks)):
        own = copy.copy(config)
        groups, own.intermediate_size = config.layer_key_value_heads[index], config.layer_intermediate_sizes[index] or 1
        own.num_key_value_heads, own.num_attention_heads = max(groups, 1), max(groups, 1) * ratio
        made = type(old)(own, index)
        for module in made.modules():
            if getattr(module, "config", None) is own:
                module.config = config  # what is switched for the whole model, such as its attention, stands there
        surgery.replace_module(model, f"{stack}.{index}", made)
    for block, groups, neurons in zip(
        inspect(model).blocks, config.layer_key_value_heads, config.layer_intermediate_sizes
    ):
        for part, role, count in (("attention", "o", groups), ("mlp", "down", neurons)):
            half = halves(block)[part]
            if not count:
                surgery.replace_module(model, half.module, Absent(part, config.hidden_size, config.output_biases))
                surgery.replace_module(model, half.norm, nn.Identity())
            elif config.output_biases:
                last: Any = model.get_submodule(block.projections[role])
                if last.bias is None:
                    last.bias = nn.Parameter(torch.zeros(config.hidden_size))
    renumber(blocks)


def _complete(config: Any) -> None:
    """Layers of which nothing is said are as large as the family's."""
    if config.layer_key_value_heads is None:
        config.layer_key_value_heads = [config.num_key_value_heads] * config.num_hidden_layers
    if config.layer_intermediate_sizes is None:
        config.layer_intermediate_sizes = [config.intermediate_size] * config.num_hidden_layers


_FIELDS = {
    "layer_key_value_heads": (list[int] | None, None),
    "layer_intermediate_sizes": (list[int] | None, None),
    "output_biases": (bool, False),
}
_CONFIGS: dict[str, Any] = {}
_MODELS: dict[str, Any] = {}
for _family in FAMILIES:
    _CONFIGS[_family], _MODELS[_family] = derive(
        _family, __name__, "Uneven", UNEVEN, _FIELDS, build=_build, check=_check_lists, complete=_complete
    )
    globals()[_CONFIGS[_family].__name__], globals()[_MODELS[_family].__name__] = _CONFIGS[_family], _MODELS[_family]

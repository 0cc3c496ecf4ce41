"""What the tuners of this room share: the way into peft, and a linear layer whose adapters change its weight.

A method subclasses `AdapterConfig`, `LinearLayer` and `LinearTuner`, says what an adapter does to a weight in
`LinearLayer.changed` (or `get_delta_weight`, where it adds), and calls `join` once. Saving, loading, several adapters,
disabling, merging and unmerging bit for bit are then peft's and this file's. A method of another form joins with
classes of its own and may still use `Guard`, which refuses files that do not belong to the adapter.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper, PeftType, register_peft_method
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoestring.models.folder import ADAPTER_WEIGHTS


def join(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Make `name` a type of peft's, once; `config` and `tuner` then work with everything that peft offers.

    Raises:
        ValueError: the name is taken by another class.
    """
    member = name.upper()
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)  # type: ignore[call-overload]
    if known is config:
        return
    if known is not None:
        raise ValueError(f"peft already has a type {member} ({known.__module__}); give the method another name")
    if member not in PeftType.__members__:
        # The enumeration is closed to subclasses, and peft looks a type up as one of its members.
        value: Any = str.__new__(PeftType, member)
        value._name_, value._value_, value._sort_order_ = member, member, len(PeftType)
        value.__objclass__ = PeftType
        type.__setattr__(PeftType, member, value)
        PeftType._member_names_.append(member)
        PeftType._member_map_[member] = value
        PeftType._value2member_map_[member] = value
    register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=tuner.prefix)


@dataclass
class AdapterConfig(PeftConfig):
    """Fields that peft's own machinery reads by name; a method adds its own, each with a default.

    Args:
        target_modules: names or endings of the modules to adapt, a regular expression, or "all-linear".
        exclude_modules: names, endings or a regular expression of modules to leave alone.
        layers_to_transform: numbers of the only layers to adapt.
        layers_pattern: name of the list that holds the layers, where it is none of the usual ones.
        modules_to_save: names of modules, such as a new head, that are trained in full and saved with the adapter.

    Raises:
        ValueError: a value that cannot be, or a field that a file holds and this version does not know.
    """

    TYPE: ClassVar[str] = ""

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "The only layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.TYPE.upper())
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if self.target_modules is not None and not self.target_modules:
            raise ValueError('target_modules is empty; name the modules to adapt, or "all-linear"')
        one_expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if self.layers_to_transform is not None and one_expression:
            raise ValueError("layers_to_transform needs target_modules as a list, not as one expression")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse what peft would drop with a warning: a setting that is not known changes what an adapter means."""
        made = PEFT_TYPE_TO_CONFIG_MAPPING.get(kwargs.get("peft_type"), cls)  # type: ignore[arg-type]
        stray = sorted(set(kwargs) - set(made.__dataclass_fields__))
        if stray:
            raise ValueError(
                f"{made.__name__} has no field {', '.join(stray)}; the adapter was saved by another version"
            )
        return kwargs


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless the setting `name` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not possible; it must be a whole number of at least {least}")


def number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raises ValueError unless the setting `name` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        bound = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
        raise ValueError(f"{name}={value!r} is not possible; it must be a number {bound}")


def reaches(config: Any, key: str) -> Any:
    """Whether the adapter is for the module of this full name, by peft's rules."""
    named = config.layers_to_transform is not None and not isinstance(config.target_modules, str)
    if not named or key not in config.target_modules:
        return check_target_module_exists(config, key)
    # peft asks for the layer only where a target is an ending, and "all-linear" makes whole names of few.
    asked = copy(config)
    asked.target_modules = {key.rpartition(".")[2]}
    return check_target_module_exists(asked, key)


# --- linear layers, however they hold their weight -------------------------------------------------------------------


def is_packed(base: Any) -> bool:
    """Whether the layer holds integers in place of its float weight; it can be read, not written."""
    return hasattr(base, "unpacked")


def read_weight(base: Any) -> Tensor:
    """The weight (out, in) that `base` computes with: a view where it is a float, float32 where it is packed."""
    if is_packed(base):
        return base.unpacked()
    return base.weight.T if isinstance(base, Conv1D) else base.weight


def read_bias(base: Any) -> Tensor | None:
    """The bias of `base`, None where it has none or its kind knows none."""
    return getattr(base, "bias", None)


def sizes(base: Any) -> tuple[int, int]:
    """(in, out) features of a layer: a linear layer, a convolution, an embedding (rows, width), or a norm."""
    if isinstance(base, Conv1D | nn.Embedding):
        return base.weight.shape[0], base.weight.shape[1]
    if not hasattr(base, "in_features"):
        return base.weight.shape[1 % base.weight.dim()], base.weight.shape[0]
    return base.in_features, base.out_features


def compute_dtype(base: Any) -> torch.dtype:
    """The type adapters of `base` are made in."""
    dtype = base.weight.dtype
    return dtype if dtype.is_floating_point else torch.float32


def answer_dtype(x: Tensor) -> torch.dtype:
    """The type in which a linear layer answers x: that of x, or autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class LinearLayer(nn.Module, BaseTunerLayer):
    """A linear layer under adapters that change its weight (out, in) and perhaps its bias (out).

    A subclass names its containers, keyed by adapter, in `adapter_layer_names` (parameters) and `other_param_names`
    (the rest), makes them in `containers`, fills them in `fill`, and says what an adapter does in `get_delta_weight`
    (an addition) or `changed` (anything else). `adapted` is the forward pass under active adapters; a method with a
    cheaper way than making the changed weight overrides it. Its class is called ...Linear...
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, key: str, **shared: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = sizes(base_layer)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self._kept: list[Tensor] | None = None  # the base's weight and bias, while something is merged
        self.containers()
        self.update_layer(adapter_name, config, key, **shared)

    def containers(self) -> None:
        """Make the empty containers that the class attributes name."""
        raise NotImplementedError

    def fill(self, adapter_name: str, config: Any, key: str, **shared: Any) -> None:
        """Make the adapter's parameters. `key` is the layer's full name; `shared` comes from the tuner.

        Raises:
            ValueError: the settings do not fit this layer; the message names `key`.
        """
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: Any, key: str, **shared: Any) -> None:
        """Add an adapter to the layer, or make it anew."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        self.fill(adapter_name, config, key, **shared)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def has(self, adapter_name: str) -> bool:
        """Whether the adapter reaches this layer."""
        return any(adapter_name in getattr(self, name) for name in self.adapter_layer_names + self.other_param_names)

    @property
    def acting(self) -> list[str]:
        """The active adapters that reach this layer, in order."""
        return [name for name in self.active_adapters if self.has(name)]

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the weight, (out, in)."""
        raise NotImplementedError

    def changed(self, adapter_name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias under the adapter, from those without it; gradients flow."""
        return weight + self.get_delta_weight(adapter_name).to(weight.dtype), bias

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        """Output (..., out) for x (..., in) under the adapters `names`, by the changed weight."""
        base: Any = self.get_base_layer()
        weight, bias = read_weight(base), read_bias(base)
        for name in names:
            weight, bias = self.changed(name, weight, bias)
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif not self.merged and self.acting:
            return self.adapted(x, self.acting).to(answer_dtype(x))
        return self.base_layer(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base's weight; what it was is kept until `unmerge`.

        Raises:
            ValueError: the base is packed, or (`safe_merge`) a weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        if not names:
            return
        base: Any = self.get_base_layer()
        if is_packed(base):
            raise ValueError(
                "a base of packed integers has no room for an adapter's small changes; merge into the model it was "
                "packed from"
            )
        with torch.no_grad():
            weight, bias = read_weight(base).clone(), read_bias(base)
            for name in names:
                weight, bias = self.changed(name, weight, bias)
            if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
                raise ValueError(f"the weight would not be finite; the adapter {', '.join(names)} seems to be broken")
            if self._kept is None:
                self._kept = [p.detach().clone() for p in (base.weight, read_bias(base)) if p is not None]
            self._write(weight, bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base its weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        assert self._kept is not None
        for parameter, kept in zip((base.weight, read_bias(base)), self._kept):
            parameter.data.copy_(kept)
        if len(self._kept) == 1 and read_bias(base) is not None:
            base.bias = None
        self._kept = None
        self.merged_adapters.clear()

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        base: Any = self.get_base_layer()
        base.weight.data.copy_(weight.T if isinstance(base, Conv1D) else weight)
        if read_bias(base) is not None:
            base.bias.data.copy_(bias)
        elif bias is not None:
            base.bias = nn.Parameter(bias.detach().to(base.weight.dtype), requires_grad=False)


class Guard(BaseTuner):
    """A tuner that does as asked or refuses: files that are not the adapter's, rows that it cannot tell apart."""

    @property
    def _method(self) -> str:
        config: Any = next(iter(self.peft_config.values()))
        return str(config.TYPE)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return reaches(peft_config, key)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names is not possible: {self._method} has one adapter act on all rows of a batch; call the "
                "model once for each adapter, after set_adapter"
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        for other in unwanted_adapter_names:
            for place, module in model.named_modules():
                if isinstance(module, BaseTunerLayer) and other in place.split("."):
                    raise ValueError(
                        f"an adapter is called {other!r}, as a part of the model is ({place}), and peft would leave "
                        "the tensors there out of the file of another; give it another name"
                    )
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # peft leaves out the other adapters when it saves; when a file is read, all the model's tensors come here.
        return {
            key: value
            for key, value in found.items()
            if all(cls._remove_adapter_name_from_key(key, other) == key for other in unwanted_adapter_names)
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        others = [name for name in model.peft_config if name != adapter_name]  # type: ignore[union-attr]
        own = set(cls._get_adapter_state_dict(model, config, adapter_name, model.state_dict(), others))  # type: ignore[arg-type]
        foreign = sorted(key for key in found if key not in own and not saved_beside(key, model))
        if foreign:
            raise ValueError(
                f"the adapter's file holds {_few(foreign)}, which {type(config).__name__} does not have on this model; "
                "use the base it was trained on, and an intact file"
            )
        lacking = sorted(own - set(found))
        if lacking:
            raise ValueError(f"the adapter's file lacks {_few(lacking)}; save the adapter again")
        return found

    def _check_target(self, target: nn.Module, key: str, kinds: tuple[type, ...], words: str) -> None:
        """Raises TypeError, naming the module, unless it is one of `kinds`, which `words` say."""
        if not isinstance(target, kinds):
            raise TypeError(f"{key} is a {type(target).__name__}; {self._method} adapts {words}")


class LinearTuner(Guard):
    """A tuner whose layers are `LinearLayer`s; every linear layer of the blocks when no target is named."""

    tuner_layer_cls: type[LinearLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # peft finds the layers that an earlier adapter has wrapped by this word, when it expands "all-linear".
        assert "Linear" in cls.tuner_layer_cls.__name__, (
            f"the layer class of {cls.__name__} must be called ...Linear..."
        )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def shared(self, adapter_name: str, config: Any, key: str) -> dict[str, Any]:
        """What the tuner hands to a layer's `fill` beside its config."""
        return {}

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
        shared = self.shared(adapter_name, peft_config, current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, current_key, **shared)
            return
        self._check_target(target, current_key, (nn.Linear, Conv1D), "linear layers")
        made = self.tuner_layer_cls(target, adapter_name, peft_config, current_key, **shared)
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)


def write_lora(
    out: Path,
    config: Mapping[str, Any],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    alphas: Mapping[str, float],
    beside: Mapping[str, Tensor],
) -> None:
    """Write a plain LoRA folder that any reader of peft's adapters takes.

    Args:
        config: the fields of the adapter that it replaces; what both have in common is kept.
        pairs: layer's full name -> (A (r, in), B (out, r)); the rank may differ from layer to layer.
        alphas: layer's full name -> what B A is scaled by, times its r.
        beside: tensors of modules trained in full, by their names in the file.
    """
    ranks = {layer: len(a) for layer, (a, _) in pairs.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=config.get("dropout") or 0.0,
        target_modules=sorted(pairs),
        rank_pattern={layer: own for layer, own in ranks.items() if own != rank},
        alpha_pattern={layer: own for layer, own in alphas.items() if own != alpha},  # type: ignore[misc]
        modules_to_save=config.get("modules_to_save"),
        task_type=config.get("task_type"),
        base_model_name_or_path=config.get("base_model_name_or_path"),
        inference_mode=True,
    )
    tensors = {name: tensor.contiguous() for name, tensor in beside.items()}
    for layer, halves in pairs.items():
        for side, half in zip("AB", halves):
            tensors[f"base_model.model.{layer}.lora_{side}.weight"] = half.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    lora.save_pretrained(str(out))
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def saved_beside(key: str, model: nn.Module) -> bool:
    """Whether peft itself saves this tensor beside an adapter's: of a module trained in full, or a resized table."""
    if any(part in key.split(".") for part in EMBEDDING_LAYER_NAMES):
        return True
    trained = (name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    return any(key.startswith(f"{name}.") for name in trained)


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:120] for name in names[:most]) + more

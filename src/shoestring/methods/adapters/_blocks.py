"""What tuners that adapt whole blocks share: small modules beside a module that stays what and where it is.

A linear layer is replaced by one that holds it. A block is not: transformers asks for its class and its attributes,
records its outputs and checkpoints it, and the engine runs some blocks and passes over others. So a `Beside` becomes a
child of the module it adapts and takes over that module's `forward`; all else about the module stays.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shoestring.methods.adapters._shared import Guard
from shoestring.models.anatomy import Block, features, inspect

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}
SPREAD = 0.02  # standard deviation of what starts random


class Bottleneck(nn.Module):
    """U s(D x + b) + c without the residual: width -> inner -> width.

    Args:
        identity: start U at zero, so that it adds nothing; else U is normal as D is.
    """

    def __init__(self, width: int, inner: int, activation: str, identity: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Parameter(torch.randn(inner, width) * SPREAD)
        self.down_bias = nn.Parameter(torch.zeros(inner))
        self.up = nn.Parameter(torch.zeros(width, inner) if identity else torch.randn(width, inner) * SPREAD)
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), in the type of x."""
        inner = ACTIVATIONS[self.activation](nn.functional.linear(x.to(self.down.dtype), self.down, self.down_bias))
        return nn.functional.linear(inner, self.up, self.up_bias).to(x.dtype)


class Beside(nn.Module, BaseTunerLayer):
    """Adapters of one module, kept as its child `self.child`; they act through `takes_over`."""

    child: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters: list[str] = []
        self._undo: list[tuple[nn.Module, Any]] = []  # in a list they are no children, which would be saved
        module.add_module(self.child, self)

    def takes_over(self, module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
        """Make `run` the module's forward and return the forward it had."""
        plain = module.forward
        self._undo.append((module, vars(module).get("forward")))
        module.forward = run
        return plain

    def let_go(self) -> None:
        """Give every module its own forward back."""
        while self._undo:
            module, own = self._undo.pop()
            if own is None:
                del module.forward
            else:
                module.forward = own

    def put(self, container: str, adapter_name: str, made: nn.Module, like: nn.Module) -> None:
        """Keep `made` as the adapter's, in the float type of `like` and where it computes."""
        weights = next((p for p in like.parameters() if p.is_floating_point()), torch.zeros(()))
        if not any(p.is_meta for p in made.parameters()):
            made = made.to(weights.device, weights.dtype)
        getattr(self, container)[adapter_name] = made

    @property
    def acting(self) -> list[str]:
        """The active adapters that reach this module, in order; none while adapters are disabled."""
        if self.disable_adapters:
            return []
        known = self._get_available_adapters()
        return [name for name in self.active_adapters if name in known]

    @property
    def weight(self) -> Tensor:
        raise AttributeError(f"{type(self).__name__} has no weight of its own")

    @property
    def bias(self) -> Tensor:
        raise AttributeError(f"{type(self).__name__} has no bias of its own")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("an adapter with a nonlinear function in it is no change of a weight; keep it beside")


class BlockTuner(Guard):
    """A tuner of whole blocks: of all, unless `target_modules`, `exclude_modules` or `layers_to_transform` say less."""

    tuner_layer_cls: type[Beside]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]
    blocks: dict[str, Block]

    def attach(self, name: str, config: Any, block: Block) -> None:
        """Give the block the adapter `name`."""
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # no target named means every block, whatever the family calls them

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        self.blocks = {block.name: block for block in inspect(model).blocks}

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        block = self.blocks.get(key)
        if block is None and peft_config.target_modules is None:
            return False
        asked = copy(peft_config)
        asked.layers_to_transform = None
        asked.target_modules = set(self.blocks) if asked.target_modules is None else asked.target_modules
        found = super()._check_target_module_exists(asked, key)
        numbers = peft_config.layers_to_transform
        if found and block is not None and numbers is not None:
            return block.index in ([numbers] if isinstance(numbers, int) else numbers)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # peft looks for the name at the end of a key; a part that has parts of its own has more behind it.
        for container in cls.tuner_layer_cls.adapter_layer_names:
            start, found, own = key.rpartition(f".{container}.{adapter_name}.")
            if found:
                return f"{start}.{container}.{own}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

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
        block = self.blocks.get(current_key)
        if block is None:
            some = next(iter(self.blocks))
            raise TypeError(f"{current_key} is a {type(target).__name__}; name whole blocks, such as {some}")
        self.attach(adapter_name, peft_config, block)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, Beside)]
        if merge and layers:
            layers[0][1].merge()
        for name, layer in reversed(layers):
            layer.let_go()
            parent, _, child = name.rpartition(".")
            delattr(self.model.get_submodule(parent), child)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


def width_of(model: nn.Module, block: Block) -> int:
    """The width of the hidden states that pass through the block."""
    return features(model.get_submodule(block.projections["o"]))[1]


def stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states (batch, length, width) that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def changed(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with its hidden states changed: a tensor, or a tuple that begins with them."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

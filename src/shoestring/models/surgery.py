"""Replacing and removing modules of a model: the only place where that is done.

Once an optimizer holds a model's parameters, a replaced module would be trained by nobody and a removed one still be
updated; the trainer marks the model then, and surgery refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from shoestring.core.errors import ShoestringError, UsageError, nearest
from shoestring.models.anatomy import block_lists, renumber, set_depth

_MARK = "_shoestring_frozen_by"


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`.

    Raises:
        UsageError: there is none; the nearest names are suggested.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in model.named_modules() if known]
        raise UsageError(f"{type(model).__name__} has no module {name!r}", remedy=nearest(name, known)) from None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` in the place of the one called `name`; returns the old one.

    Raises:
        UsageError: there is no module of that name.
        ShoestringError: an optimizer holds the model's parameters.
    """
    old = get_module(model, name)
    replace_modules(model, [(name, module)])
    return old


def replace_modules(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """As `replace_module`, one after the other; what holds the model is looked for once. Raises as it does."""
    _refuse_if_frozen(model, "replace modules")
    for name, module in modules:
        old = get_module(model, name)
        parent, _, leaf = name.rpartition(".")
        module.train(old.training)
        holder = model.get_submodule(parent)
        if isinstance(holder, nn.ModuleList | nn.Sequential):
            holder[int(leaf)] = module
        else:
            setattr(holder, leaf, module)


def drop_blocks(model: nn.Module, indices: Collection[int], stack: str = "") -> None:
    """Remove blocks for good, number the rest anew (caches count on it) and write the depth into the configuration.

    Args:
        indices: places within the stack, from 0.
        stack: part of the block list's name ("encoder", "decoder"), needed when the model has two.

    Raises:
        UsageError: an index that does not exist, nothing would be left, or two stacks and none named.
        ShoestringError: an optimizer holds the model's parameters.
    """
    _refuse_if_frozen(model, "drop blocks")
    lists = {name: blocks for name, blocks in block_lists(model).items() if stack in name}
    if len(lists) != 1:
        raise UsageError(
            f"{type(model).__name__} has {len(lists)} stacks of blocks called {stack!r}",
            remedy="Name one: encoder or decoder",
        )
    ((name, blocks),) = lists.items()
    unknown = sorted(set(indices) - set(range(len(blocks))))
    if unknown:
        raise UsageError(f"{name} has no block {unknown[0]}", f"it has {len(blocks)}", "Count from 0")
    kept = [index for index in range(len(blocks)) if index not in set(indices)]
    if not kept:
        raise UsageError(f"All {len(blocks)} blocks of {name} would be removed", remedy="Keep at least one")
    for index in sorted(set(indices), reverse=True):
        del blocks[index]
    renumber(blocks)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        set_depth(config, len(kept), kept, stack or "decoder")


def freeze_structure(model: nn.Module, holder: str = "an optimizer") -> None:
    """Refuse surgery on `model` from now on; `holder` is named in the refusal."""
    setattr(model, _MARK, holder)


def unfreeze_structure(model: nn.Module) -> None:
    """Allow surgery again, when the optimizer is gone."""
    if hasattr(model, _MARK):
        delattr(model, _MARK)


def _refuse_if_frozen(model: nn.Module, action: str) -> None:
    holder = next((vars(m)[_MARK] for m in model.modules() if _MARK in vars(m)), None)
    if holder:
        raise ShoestringError(
            f"Cannot {action} in {type(model).__name__}: {holder} holds its parameters",
            "a new module would not be trained and a removed one still would",
            "Change the model before training starts, or after it has ended",
        )

"""A model in a folder of which only the parts that are asked for stand in memory."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from shoestring.core.errors import UsageError
from shoestring.models.anatomy import Anatomy, inspect
from shoestring.models.folder import check_folder
from shoestring.models.load import auto_class, choose_dtype, kind_of, know_architecture, quiet

SHARDS = 10  # weight files that are open at one time


class Streamed:
    """The model of a folder without its weights, into which `load` reads them part by part.

    Attributes:
        model: its parameters are on the meta device until they are loaded; its buffers are real.
        anatomy: its parts.

    A module that `surgery` has replaced is not read; what stands in its place is left alone.

    Args:
        dtype: as for `models.load`.

    Raises:
        UsageError: as `check_folder`, and a folder whose weights are packed.
    """

    def __init__(self, folder: Path, *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False) -> None:
        found = check_folder(folder, trust_remote_code=trust_remote_code)
        if found.config.get("quantization_config"):
            raise UsageError(
                f"{folder} is packed",
                "what reads a model part by part needs plain weights",
                "Give the model that it was made from, or unpack it with `shoestring export`",
            )
        know_architecture(found)
        self.dtype = choose_dtype(dtype, found, "cpu")
        config = AutoConfig.from_pretrained(found.path, local_files_only=True, trust_remote_code=trust_remote_code)
        with quiet(), init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = auto_class(kind_of(found.config)).from_config(
                config, dtype=self.dtype, trust_remote_code=trust_remote_code
            )
        self.model.eval()
        self.anatomy: Anatomy = inspect(self.model)
        self._files = {name: tensor.file for name, tensor in found.tensors.items()}
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._mapping = get_model_conversion_mapping(self.model)
        self._stored = self._by_parameter()

    def load(self, *parts: str) -> None:
        """Read the weights of these modules (full names) from the folder.

        Raises:
            UsageError: the folder lacks some of them.
        """
        self._load([name for name, _ in self.model.named_parameters() if _inside(name, parts)])

    def load_rest(self) -> None:
        """Read what stands outside the blocks: embeddings, last norm, head."""
        blocks = tuple(block.name for block in self.anatomy.blocks)
        self._load([name for name, _ in self.model.named_parameters() if not _inside(name, blocks)])
        self.model.tie_weights()

    def block_calls(self, rows: list[list[int]]) -> list[list[tuple[tuple, dict[str, Any]]]]:
        """With what each block is called for each row of tokens, [row][block], as if those before it did nothing.

        The first positional argument is the hidden state, (1, tokens, width). `load_rest` must have come before.
        """
        calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        blocks = [block.module for block in self.anatomy.blocks]
        for index, block in enumerate(blocks):
            block.forward = _Pass(calls, last=index == len(blocks) - 1)  # type: ignore[method-assign, assignment]
        try:
            for row in rows:
                calls.append([])
                with contextlib.suppress(_Enough), torch.no_grad():
                    self.model(input_ids=torch.tensor([row]), use_cache=False)
        finally:
            for block in blocks:
                del block.forward
        return calls

    def _load(self, names: list[str]) -> None:
        wanted = {name for name in names if self.model.get_parameter(name).is_meta}
        tied = {name for name in wanted if name not in self._stored and name in self.model.all_tied_weights_keys}
        absent = sorted(wanted - tied - set(self._stored))
        if absent:
            raise UsageError(
                f"The folder has no weights for {', '.join(absent[:3])}", remedy="Get an intact copy of it"
            )
        tensors = {key: self._slice(key) for name in wanted - tied for key in self._stored[name]}
        settings = LoadStateDictConfig(dtype=self.dtype, weight_mapping=self._mapping)  # type: ignore[arg-type]
        with quiet():
            convert_and_load_state_dict_in_model(self.model, tensors, settings)
        left = sorted(name for name in wanted - tied if self.model.get_parameter(name).is_meta)
        if left:
            raise UsageError(f"The weights of {', '.join(left[:3])} do not fit the configuration")

    def _by_parameter(self) -> dict[str, list[str]]:
        """Parameter -> names of the stored tensors that it is made of."""
        known = self.model.state_dict()
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        found: dict[str, list[str]] = {}
        for key in self._files:
            made = [rename_source_key(key, renamings, converters, self.model.base_model_prefix, known)[0], key]
            found.setdefault(next((name for name in made if name in known), key), []).append(key)
        return found

    def _slice(self, key: str) -> Any:
        file = self._files[key]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
            if len(self._open) > SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file].get_slice(key)


def unload(module: nn.Module) -> None:
    """Give the memory of a module's parameters back."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class _Enough(Exception):
    pass


class _Pass:
    """A block's forward that notes what it is called with and hands the hidden state on."""

    def __init__(self, calls: list, *, last: bool) -> None:
        self.calls, self.last = calls, last

    def __call__(self, hidden: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        self.calls[-1].append(((hidden, *args), named))
        if self.last:
            raise _Enough
        return hidden


def _inside(name: str, parts: tuple[str, ...]) -> bool:
    return any(name.startswith(part + ".") for part in parts)

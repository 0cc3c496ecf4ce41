"""Low-rank adapters beside a torch model: each token of a batch adds the product of its own adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shoestring.core.errors import UsageError
from shoestring.engine.adapter_forms import NotBeside, plain
from shoestring.engine.low_rank import chosen, refuse_more
from shoestring.engine.runner import Batch
from shoestring.models.anatomy import features
from shoestring.models.folder import ADAPTER_WEIGHTS, check_adapter

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Pair:
    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank], with the scale in it


class Adapters:
    """The adapters of one model. `projections`: full name -> module that may carry a pair, as seen by the adapter."""

    def __init__(self, projections: Mapping[str, nn.Module], dtype: torch.dtype, device: torch.device) -> None:
        self._projections, self._dtype, self._device = projections, dtype, device
        self._pairs: dict[str, dict[int, _Pair]] = {}
        self._hooks: dict[str, Any] = {}
        self._next = 0
        self._tokens: list[tuple[int, torch.Tensor | None]] = []  # adapter and its tokens, None for all of them
        self.numbers: set[int] = set()

    def add(self, folder: Path) -> int:
        """The number of the adapter in `folder`; see `Runner.add_adapter`."""
        with plain(folder) as written:
            found = self._read(written)
        number, self._next = self._next, self._next + 1
        self.numbers.add(number)
        for name, pair in found.items():
            self._pairs.setdefault(name, {})[number] = pair
            if name not in self._hooks:
                hook = partial(self._add_products, self._pairs[name])
                self._hooks[name] = self._projections[name].register_forward_hook(hook)
        return number

    def drop(self, number: int) -> None:
        if number not in self.numbers:
            raise UsageError(f"There is no adapter with the number {number}", remedy="Add it first")
        self.numbers.discard(number)
        for name in [name for name, pairs in self._pairs.items() if number in pairs]:
            del self._pairs[name][number]
            if not self._pairs[name]:
                del self._pairs[name]
                self._hooks.pop(name).remove()

    def use(self, batch: Batch | None) -> None:
        """Which tokens of the coming pass use which adapter."""
        self._tokens = []
        if batch is None or batch.adapters is None:
            return
        for number in np.unique(batch.adapters):
            if number >= 0:
                mine = np.flatnonzero(batch.adapters == number)
                rows = None if len(mine) == batch.tokens else torch.from_numpy(mine).to(self._device)
                self._tokens.append((int(number), rows))

    def close(self) -> None:
        for number in list(self.numbers):
            self.drop(number)

    def _add_products(
        self, pairs: dict[int, _Pair], _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        for number, rows in self._tokens:
            pair = pairs.get(number)
            if pair is None:
                continue
            x = inputs[0].flatten(0, -2)
            x = (x if rows is None else x[rows]).to(pair.a.dtype)
            added = ((x @ pair.a.T) @ pair.b.T).to(output.dtype)
            flat = output.flatten(0, -2)
            flat = flat + added if rows is None else flat.index_add(0, rows, added)
            output = flat.view(output.shape)
        return output

    def _read(self, folder: Path) -> dict[str, _Pair]:
        from safetensors.torch import load_file

        config = check_adapter(folder)
        refuse_more(folder, config)
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, half = key.removesuffix(".weight").rpartition(".")
            if half not in ("lora_A", "lora_B") or not key.startswith(_PREFIX):
                raise NotBeside(f"{folder / ADAPTER_WEIGHTS} holds {key[:120]}", "which is no low-rank matrix")
            halves.setdefault(name.removeprefix(_PREFIX), {})[half] = tensor
        return {name: self._pair(folder, name, pair, config) for name, pair in halves.items()}

    def _pair(self, folder: Path, name: str, halves: dict[str, torch.Tensor], config: dict[str, Any]) -> _Pair:
        module = self._projections.get(name)
        if module is None:
            raise NotBeside(
                f"{folder} adapts {name}, which is no projection of this model's blocks",
                "it may belong to another model",
            )
        columns, rows = features(module)
        if len(halves) != 2:
            raise UsageError(f"{folder} has only {next(iter(halves))} of {name}", remedy="Save the adapter again")
        a, b = halves["lora_A"], halves["lora_B"]
        rank = a.shape[0]
        if a.shape != (rank, columns) or b.shape != (rows, rank):
            raise UsageError(
                f"{folder} has matrices of {tuple(b.shape)} and {tuple(a.shape)} for {name}",
                f"its weight is {rows} x {columns}",
                "Use the adapter with the base it was trained on",
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise UsageError(f"{folder} has numbers that are not finite in {name}", remedy="Train the adapter again")
        alpha = chosen(folder, config, "alpha_pattern", "lora_alpha", name)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return _Pair(
            a.to(self._device, self._dtype).contiguous(), (b.float() * scale).to(self._device, self._dtype).contiguous()
        )

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
from shoestring.engine.runner import Batch
from shoestring.models.anatomy import features
from shoestring.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
from shoestring.models.load import quiet

_PREFIX = "base_model.model."
# Fields of a LoRA configuration that ask for more than y += scale * B A x.
_MORE = (
    "use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias",
    "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora",
)  # fmt: skip


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
        found = self._read(folder)
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
        from peft import LoraConfig
        from safetensors.torch import load_file

        raw = check_adapter(folder)
        where = folder / ADAPTER_CONFIG
        if raw.get("peft_type") != "LORA":
            raise UsageError(
                f"{where} is of the type {raw.get('peft_type')!r}",
                "only LoRA adapters run beside the weights",
                "Merge it into its base: `shoestring merge`",
            )
        more = [name for name in _MORE if raw.get(name)] + (["bias"] if raw.get("bias", "none") != "none" else [])
        if more:
            raise UsageError(
                f"{where} asks for more than low-rank products ({', '.join(more)})",
                "this cannot be mixed with other adapters in one batch",
                "Merge it into its base: `shoestring merge`",
            )
        try:
            with quiet():
                config = LoraConfig.from_pretrained(str(folder))
        except (TypeError, ValueError, KeyError) as error:
            raise UsageError(f"{where} cannot be read", str(error)[:300], "Save the adapter again") from error
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, half = key.removesuffix(".weight").rpartition(".")
            if half not in ("lora_A", "lora_B") or not key.startswith(_PREFIX):
                raise UsageError(
                    f"{folder / ADAPTER_WEIGHTS} holds {key}, which is no low-rank matrix", remedy="Merge it instead"
                )
            halves.setdefault(name.removeprefix(_PREFIX), {})[half] = tensor
        return {name: self._pair(folder, name, pair, config) for name, pair in halves.items()}

    def _pair(self, folder: Path, name: str, halves: dict[str, torch.Tensor], config: Any) -> _Pair:
        module = self._projections.get(name)
        if module is None:
            raise UsageError(
                f"{folder} adapts {name}, which is no projection of this model's blocks",
                "it may belong to another model",
                "Use the adapter with the base it was trained on, or merge it",
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
        alpha = _of(config.alpha_pattern, name, config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        return _Pair(
            a.to(self._device, self._dtype).contiguous(), (b.float() * scale).to(self._device, self._dtype).contiguous()
        )


def _of(pattern: Mapping[str, float], name: str, default: float) -> float:
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), name), default) if pattern else default

"""Exit heads beside a model: read from the folder of an adapter that trained them, computed on either runner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.engine.gates import unnamed
from shoestring.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
from shoestring.models.tensors import floats, open_safetensors

if TYPE_CHECKING:
    from shoestring.engine.hooks import Draft, Verified
    from shoestring.engine.runner import Runner
    from shoestring.engine.sequence import Sequence as Answer

_TENSOR = re.compile(r".*\.(\d+)\.exit\.gate\.(?:\w+\.)?(down|up|norm\.weight|norm\.bias|log_temperature)")


@dataclass(frozen=True)
class ExitHead:
    """norm(x + U V x) and a temperature; arrays are float32."""

    down: np.ndarray  # V [rank, hidden]
    up: np.ndarray  # U [hidden, rank]
    weight: np.ndarray
    bias: np.ndarray | None
    epsilon: float
    temperature: float

    def normed(self, x: np.ndarray) -> np.ndarray:
        """What the model's head is applied to, [rows, hidden] from the same."""
        x = x + (x @ self.down.T) @ self.up.T
        if self.bias is not None:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + self.epsilon) * self.weight
        return x if self.bias is None else x + self.bias


@dataclass(frozen=True)
class ExitHeads:
    """The heads of one model by the layer that they stand behind, 1 the first."""

    heads: dict[int, ExitHead]
    runner: Runner

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.heads)

    def logits(self, layer: int, hidden: Any) -> np.ndarray:
        """float32 [rows, vocab], before the temperature, from the runner's hidden states [rows, hidden]."""
        return self.runner.head(self.heads[layer].normed(self.runner.to_host(hidden)))

    def confidence(self, layer: int, logits: np.ndarray) -> np.ndarray:
        """The largest calibrated probability of each row."""
        scaled = logits / self.heads[layer].temperature
        return 1 / np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1)


class ConfidentExit:
    """Leaves at the first gate whose confidence reaches `threshold`; 1 is never."""

    def __init__(self, heads: ExitHeads, threshold: float) -> None:
        self.heads, self.threshold = heads, threshold

    @property
    def layers(self) -> Sequence[int]:
        return self.heads.layers

    def leave(self, layer: int, hidden: Any, answers: Sequence[Answer]) -> list[np.ndarray | bool]:
        if self.threshold >= 1:  # a confidence may round to 1
            return [False] * len(answers)
        logits = self.heads.logits(layer, hidden)
        sure = self.heads.confidence(layer, logits) >= self.threshold
        return [row if leaves else False for row, leaves in zip(logits, sure)]


class HeadDraft(ConfidentExit):
    """Guesses by the first head at most `length` tokens, while it is as sure as `threshold`; whole passes verify."""

    def __init__(self, heads: ExitHeads, length: int, threshold: float) -> None:
        first = heads.layers[0]
        super().__init__(ExitHeads({first: heads.heads[first]}, heads.runner), threshold)
        self.length = length

    def propose(self, answer: Answer, limit: int) -> Draft:
        return unnamed(min(self.length, limit))

    def observe(self, verified: Sequence[Verified], tokens: int, seconds: float) -> None:
        pass

    def guess(self, hidden: Any, answers: Sequence[Answer]) -> tuple[list[int], list[bool]]:
        (layer,) = self.layers
        logits = self.heads.logits(layer, hidden)
        sure = self.heads.confidence(layer, logits) >= self.threshold
        return [int(token) for token in logits.argmax(-1)], [bool(one) for one in sure]


def gates_in(folder: Path) -> tuple[int, ...]:
    """The layers that the exit heads in an adapter's folder stand behind.

    Raises:
        UsageError: it holds no exit heads.
    """
    gates = check_adapter(folder).get("gates")
    if not isinstance(gates, list) or not gates or not all(isinstance(g, int) and g > 0 for g in gates):
        raise UsageError(f"{folder} holds no exit heads", f"{ADAPTER_CONFIG} names no gates")
    return tuple(gates)


def read_exits(folder: Path, runner: Runner) -> ExitHeads:
    """The exit heads that an adapter's folder holds for the model of `runner`.

    Raises:
        UsageError: no such heads in the folder, heads that were never trained, or heads of another model.
    """
    config = check_adapter(folder)
    where = folder / ADAPTER_WEIGHTS
    tensors = open_safetensors(where)
    found: dict[int, dict[str, np.ndarray]] = {}
    for name in tensors:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UsageError(
                f"{where} holds {name[:120]}", "that is no part of an exit head", "Give a folder of exit heads"
            )
        found.setdefault(int(match[1]) + 1, {})[match[2]] = floats(tensors[name]).copy()
    gates, epsilon = list(gates_in(folder)), config.get("epsilon")
    if not found or sorted(found) != gates or not isinstance(epsilon, float):
        raise UsageError(f"{folder} holds no exit heads", f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} do not say the same")
    hidden, layers = runner.facts.hidden, runner.facts.layers
    heads = {}
    for gate, parts in sorted(found.items()):
        rank = len(parts.get("down", ()))
        wanted = {"down": (rank, hidden), "up": (hidden, rank), "norm.weight": (hidden,), "log_temperature": (1,)}
        for part, shape in wanted.items():
            if part not in parts or parts[part].shape != shape or not np.isfinite(parts[part]).all():
                raise UsageError(
                    f"The exit head behind layer {gate} in {folder} does not fit",
                    f"its {part} is not {' x '.join(map(str, shape))} finite numbers, as the model asks",
                    "Use it with the model it was trained on",
                )
        if gate > layers:
            raise UsageError(f"{folder} has an exit head behind layer {gate}", f"the model has {layers} layers")
        if not parts["up"].any():
            raise UsageError(
                f"The exit head behind layer {gate} in {folder} was never trained", remedy="Train it first"
            )
        heads[gate] = ExitHead(
            parts["down"], parts["up"], parts["norm.weight"], parts.get("norm.bias"), epsilon,
            float(np.exp(parts["log_temperature"][0])),
        )  # fmt: skip
    return ExitHeads(heads, runner)

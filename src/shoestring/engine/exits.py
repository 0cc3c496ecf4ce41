"""Gates that say early what a model will say: how answers leave at them or are drafted by them; and exit heads, read
from the folder of an adapter that trained them and computed on either runner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.engine.gates import SelfDraftDecoder, unnamed
from shoestring.engine.hooks import Hooks
from shoestring.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
from shoestring.models.tensors import floats, open_safetensors

if TYPE_CHECKING:
    from shoestring.engine.hooks import Draft, Verified
    from shoestring.engine.runner import Runner
    from shoestring.engine.sequence import Sequence as Answer

_TENSOR = re.compile(r".*\.(\d+)\.exit\.gate\.(?:\w+\.)?(down|up|norm\.weight|norm\.bias|warmth)")

# A gate keeps its temperature t as w, t = exp(WARMTH w): at the rate at which gates learn log t would hardly move.
WARMTH = 10.0


class Gates(Protocol):
    """What stands behind some of a model's layers and says what the model would say at its end."""

    @property
    def layers(self) -> Sequence[int]: ...

    def logits(self, layer: int, hidden: Any) -> np.ndarray:
        """float32 [rows, vocab], before the temperature, from what an exit policy sees of the newest tokens."""

    def confidence(self, layer: int, logits: np.ndarray) -> np.ndarray:
        """The largest calibrated probability of each row."""


def largest(logits: np.ndarray, temperature: float) -> np.ndarray:
    """The largest probability of each row, [rows], at a temperature."""
    scaled = logits / temperature
    return 1 / np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1)


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
        return largest(logits, self.heads[layer].temperature)


class ConfidentExit:
    """Leaves at the first gate that is as sure as `threshold`; 1 is never.

    Args:
        streams: of hidden states that pass to the gates side by side.
    """

    def __init__(self, gates: Gates, threshold: float, streams: int = 1) -> None:
        self.gates, self.threshold, self.streams = gates, threshold, streams
        self.layers = tuple(gates.layers)

    def leave(self, layer: int, hidden: Any, answers: Sequence[Answer]) -> list[np.ndarray | bool]:
        if self.threshold >= 1:  # a confidence may round to 1
            return [False] * len(answers)
        logits = self.gates.logits(layer, hidden)
        sure = self.sure(layer, hidden, logits, answers)
        return [row if one >= self.threshold else False for row, one in zip(logits, sure)]

    def sure(self, layer: int, hidden: Any, logits: np.ndarray, answers: Sequence[Answer]) -> Sequence[float]:
        """How sure the gate is of each row."""
        return self.gates.confidence(layer, logits).tolist()  # type: ignore[no-any-return]


class GateDraft(ConfidentExit):
    """Guesses by the first gate at most `length` tokens, while it is as sure as `threshold`; whole passes verify."""

    def __init__(self, gates: Gates, length: int, threshold: float, streams: int = 1) -> None:
        super().__init__(gates, threshold, streams)
        self.layers, self.length = self.layers[:1], length

    def propose(self, answer: Answer, limit: int) -> Draft:
        return unnamed(min(self.length, limit))

    def observe(self, verified: Sequence[Verified], tokens: int, seconds: float) -> None:
        pass

    def guess(self, hidden: Any, answers: Sequence[Answer]) -> tuple[list[int], list[bool]]:
        (layer,) = self.layers
        logits = self.gates.logits(layer, hidden)
        sure = self.sure(layer, hidden, logits, answers)
        return [int(token) for token in logits.argmax(-1)], [one >= self.threshold for one in sure]


def drafts(gates: Gates, length: int, threshold: float, streams: int = 1) -> Hooks:
    """Drafts by the first gate and whole passes that verify them: the answer is that of plain decoding."""
    both = GateDraft(gates, length, threshold, streams)
    return Hooks(exit=both, drafter=both, decoder=SelfDraftDecoder)


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
    gates, epsilon, offset = list(gates_in(folder)), config.get("epsilon"), config.get("offset") or 0.0
    if not found or sorted(found) != gates or not isinstance(epsilon, float):
        raise UsageError(f"{folder} holds no exit heads", f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} do not say the same")
    hidden, layers = runner.facts.hidden, runner.facts.layers
    heads = {}
    for gate, parts in sorted(found.items()):
        rank = len(parts.get("down", ()))
        wanted = {"down": (rank, hidden), "up": (hidden, rank), "norm.weight": (hidden,), "warmth": (1,)}
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
            parts["down"], parts["up"], parts["norm.weight"] + offset, parts.get("norm.bias"), epsilon,
            float(np.exp(WARMTH * parts["warmth"][0])),
        )  # fmt: skip
    return ExitHeads(heads, runner)

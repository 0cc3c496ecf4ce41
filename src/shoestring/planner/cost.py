"""What a pipeline's result will cost, from the model's shape alone: no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoestring.core.shape import Shape

# The load that `memory` and `flops_per_token` are predicted for, and measured under.
PROMPT_TOKENS, NEW_TOKENS = 64, 64
# Arithmetic scratch of the libraries, measured on models of 135M and 1B parameters: packed weights of their matrix
# products and buffers of their allocators.
WORKSPACE = 40_000_000


@dataclass(frozen=True)
class Prediction:
    """Base units. `memory` is the peak of a process that loads the model and generates."""

    storage: int
    memory: int
    flops_per_token: float

    def figures(self) -> dict[str, float | None]:
        """By budget resource."""
        return {"storage": self.storage, "memory": self.memory}

    def to_json(self) -> dict[str, float]:
        return {"storage": self.storage, "memory": self.memory, "flops_per_token": self.flops_per_token}


def predict(shape: Shape, floor: int) -> Prediction:
    """The price of having the model at work.

    Args:
        shape: the model after the pipeline.
        floor: resident bytes of the interpreter before the model is read.
    """
    tokens = PROMPT_TOKENS + NEW_TOKENS
    # A prompt's activations: a few tensors of the widest layer in fp32, and the logits of the last position.
    widest = max(
        (max(w.dims) for w in shape.weights if len(w.dims) == 2 and w.role not in ("embed", "head")),
        default=shape.hidden,
    )
    activations = 4 * PROMPT_TOKENS * (4 * widest + 8 * shape.hidden) + 3 * 4 * shape.vocab
    memory = floor + shape.resident + shape.kv_bytes(tokens) + activations + WORKSPACE
    return Prediction(shape.storage, memory, shape.flops_per_token(tokens))


def read_per_token(shape: Shape) -> float:
    """Bytes of weights that one token needs: every matrix that it is multiplied with, and one row of a table.

    A matrix that shares its numbers with others is read once for each of them; an array that only they read is not
    read by itself.
    """
    by_name = {weight.name: weight for weight in shape.weights}
    shared = {weight.tied for weight in shape.weights if weight.tied}
    total = 0.0
    for weight in shape.weights:
        owner = by_name.get(weight.tied, weight)
        size = owner.resident * weight.count / max(1, owner.count)
        if weight.role == "embed":
            total += size / max(1, weight.dims[0])
        elif not (weight.name in shared and len(weight.dims) == 1):
            total += size * weight.used
    return total


def errors(predicted: Prediction, measured: Mapping[str, float | None]) -> dict[str, float]:
    """Relative errors (predicted / measured - 1) of what was measured."""
    found = {}
    for name, value in predicted.to_json().items():
        actual = measured.get(name)
        if actual:
            found[name] = value / actual - 1
    return found

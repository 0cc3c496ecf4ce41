"""Guesses of the experts that later layers will ask for, from what the present one sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoestring.core.errors import UsageError
from shoestring.methods.serving._expert_replay import Together
from shoestring.models.anatomy import route
from shoestring.models.routing import Recorder
from shoestring.models.streams import rows_of

# (layer, what its router read [tokens, width], the experts it chose [tokens, k]) -> (later layer, expert, how sure),
# the surest first. Layers are counted among those with experts; the one after the last is the first of the next token.
# Anything that is called so can be plugged in.
Predictor = Callable[[int, Tensor, Tensor], Iterable[tuple[int, int, float]]]


class ByHistory:
    """What was met `ahead` layers after the same experts before; it learns while it is used.

    Args:
        guesses: experts a token; `confidence`: the least probability.
    """

    def __init__(self, counts: Sequence[int], guesses: int, confidence: float = 0.0, ahead: int = 1) -> None:
        self.together = Together(counts, ahead)
        self.guesses, self.confidence = guesses, confidence
        self._choices: dict[int, Tensor] = {}

    def __call__(self, layer: int, hidden: Tensor, choices: Tensor) -> list[tuple[int, int, float]]:
        layers, choices = len(self.together.counts), rows_of(choices, 0)
        earlier = self._choices.get((layer - self.together.ahead) % layers)
        if earlier is not None and len(earlier) == len(choices) and (layer >= self.together.ahead or len(choices) == 1):
            for before, now in zip(earlier.tolist(), choices.tolist()):
                self.together.see((layer - self.together.ahead) % layers, before, now)
        self._choices[layer] = choices
        guess = self.together.guesser(self.guesses * len(choices), self.confidence)
        return list(guess(layer, choices.unique().tolist()))


class ByRouter:
    """What the routers of the next layers say of the present hidden state.

    The stream changes little from one layer to the next; of several side by side the one furthest ahead is asked. How
    sure it is of an expert is how likely as many draws as there are guesses meet it: few of many have a large share.
    Behind the last layer comes the next token, of which a router knows nothing: there `after` guesses.
    """

    def __init__(
        self, routers: Sequence[nn.Module], guesses: int, confidence: float, ahead: int, after: Predictor
    ) -> None:
        self.routers, self.guesses, self.confidence, self.ahead, self.after = routers, guesses, confidence, ahead, after

    @torch.no_grad()
    def __call__(self, layer: int, hidden: Tensor, choices: Tensor) -> list[tuple[int, int, float]]:
        # At the last layer its guesses count, and at the first it learns what came of them.
        behind = list(self.after(layer, hidden, choices)) if layer in (0, len(self.routers) - 1) else []
        hidden, found = rows_of(hidden, -1), list[tuple[int, int, float]]()
        for later in range(layer + 1, min(layer + 1 + self.ahead, len(self.routers))):
            p = route(self.routers[later], hidden)[0].float().softmax(-1).amax(0)
            sure = 1 - (1 - p) ** self.guesses
            found += _best(later, sure, self.guesses * len(hidden), self.confidence)
        return found + [entry for entry in behind if entry[0] <= layer]


class ByLinear:
    """A linear map from a layer's hidden state to the next layer's experts, fitted to a recording.

    Args:
        weights: of each layer, (width + 1, experts of the next one); the last row is added.
    """

    def __init__(self, weights: Sequence[Tensor], guesses: int, confidence: float = 0.0) -> None:
        self.weights, self.guesses, self.confidence = list(weights), guesses, confidence

    @torch.no_grad()
    def __call__(self, layer: int, hidden: Tensor, choices: Tensor) -> list[tuple[int, int, float]]:
        weight = self.weights[layer]
        sure = (hidden.float() @ weight[:-1] + weight[-1]).amax(0)
        return _best((layer + 1) % len(self.weights), sure, self.guesses * len(hidden), self.confidence)

    def save(self, file: Path) -> None:
        save_file({str(layer): weight.contiguous() for layer, weight in enumerate(self.weights)}, file)

    @classmethod
    def load(cls, file: Path, width: int, counts: Sequence[int], guesses: int, confidence: float = 0.0) -> ByLinear:
        """Read what `save` wrote. Raises UsageError when it is for another model."""
        try:
            found = load_file(file)
        except Exception as error:  # what safetensors raises has no common base
            raise UsageError(f"{file} is no trained predictor", str(error)) from None
        wanted = [(width + 1, counts[(layer + 1) % len(counts)]) for layer in range(len(counts))]
        shapes = [tuple(found.get(str(layer), torch.empty(0)).shape) for layer in range(len(counts))]
        if len(found) != len(counts) or shapes != wanted:
            raise UsageError(f"{file} was trained for another model", remedy="Train one on a recording of this model")
        return cls([found[str(layer)] for layer in range(len(counts))], guesses, confidence)


def fit_linear(recorder: Recorder, guesses: int, confidence: float = 0.0, decay: float = 1e-2) -> ByLinear:
    """The linear predictor that a recording with hidden states teaches, by least squares.

    The target is 1 for experts that the next layer chose and 0 for the others; `decay` times the mean square of the
    inputs is added to the diagonal.
    """
    trace = recorder.trace()
    weights = []
    for layer in range(trace.layers):
        shift, later = divmod(layer + 1, trace.layers)
        x = recorder.states(layer)[: len(trace.steps) - shift]
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        chosen = torch.from_numpy(trace.experts[shift:, later]).long()
        y = torch.zeros(len(x), trace.counts[later] + 1).scatter_(
            1, chosen.clamp(min=-1) % (trace.counts[later] + 1), 1.0
        )
        gram = x.T @ x
        gram += decay * gram.diagonal().mean() * torch.eye(len(gram))
        weights.append(torch.linalg.solve(gram, x.T @ y[:, :-1]))
    return ByLinear(weights, guesses, confidence)


def recalls(predictor: Predictor, recorder: Recorder) -> list[float | None]:
    """Of each layer, the share of the experts met by a recording's tokens that had been guessed one layer before.

    None where nothing was guessed. Tokens are taken one by one.
    """
    trace = recorder.trace()
    states: list[Any] = [recorder.states(layer) for layer in range(trace.layers)]
    right, met, asked = [0] * trace.layers, [0] * trace.layers, [False] * trace.layers
    guessed: dict[int, set[int]] = {}
    for token in range(len(trace.steps)):
        for layer in range(trace.layers):
            experts = [int(e) for e in trace.experts[token, layer] if e >= 0]
            right[layer] += len(guessed.get(layer, set()) & set(experts))
            met[layer] += len(experts) if layer in guessed else 0
            asked[layer] = asked[layer] or layer in guessed
            guessed.pop(layer, None)
            for later, expert, _ in predictor(layer, states[layer][token : token + 1], torch.tensor([experts])):
                if (later - layer) % trace.layers == 1 % trace.layers:
                    guessed.setdefault(later, set()).add(expert)
    return [right[n] / met[n] if asked[n] and met[n] else None for n in range(trace.layers)]


def _best(layer: int, sure: Tensor, most: int, confidence: float) -> list[tuple[int, int, float]]:
    values, experts = sure.topk(min(most, len(sure)))
    return [(layer, e, v) for e, v in zip(experts.tolist(), values.tolist()) if v >= confidence]

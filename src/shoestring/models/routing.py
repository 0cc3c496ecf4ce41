"""Which experts each token meets: recorded from a mixture at work, kept in a file, read without the model."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from shoestring.core.errors import UsageError
from shoestring.models.anatomy import mixtures
from shoestring.models.streams import rows_of

_KIND = "shoestring-routing"


@dataclass(frozen=True)
class Trace:
    """The routes of some tokens, in the order in which they were computed.

    Attributes:
        experts: int32 [tokens, layers, k], the experts that a token met; -1 where it met fewer.
        gates: float32 [tokens, layers, k], how much each counted.
        steps: int32 [tokens], number of the pass that computed the token; a pass of one token is a step of decoding.
        counts: how many experts each layer has.
    """

    experts: np.ndarray
    gates: np.ndarray
    steps: np.ndarray
    counts: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.counts)

    def visits(self) -> Iterator[tuple[int, list[int]]]:
        """(layer, experts in ascending order without repetition), in running order: what a cache is asked for."""
        bounds = np.flatnonzero(np.diff(self.steps, prepend=-1)).tolist() + [len(self.steps)]
        for first, last in zip(bounds, bounds[1:]):
            for layer in range(self.layers):
                yield layer, [int(e) for e in np.unique(self.experts[first:last, layer]) if e >= 0]

    def as_decoding(self) -> Trace:
        """The same tokens as if each had been computed in a pass of its own."""
        return Trace(self.experts, self.gates, np.arange(len(self.steps), dtype=np.int32), self.counts)

    def loads(self) -> list[np.ndarray]:
        """Of each layer, how many tokens met each expert, int64 [experts]."""
        found = []
        for layer, count in enumerate(self.counts):
            met = self.experts[:, layer].ravel()
            found.append(np.bincount(met[met >= 0], minlength=count))
        return found

    def masses(self) -> list[np.ndarray]:
        """Of each layer, the sum of the gates of each expert, float64 [experts]."""
        found = []
        for layer, count in enumerate(self.counts):
            met, gates = self.experts[:, layer].ravel(), self.gates[:, layer].ravel()
            found.append(np.bincount(met[met >= 0], gates[met >= 0], minlength=count))
        return found

    def entropy(self) -> list[float]:
        """Of each layer, the entropy of the experts' loads over the largest possible one: 1 is even, 0 is one expert.

        Caches and pruning live on uneven or persistent routes, so their figures mean little without this one.
        """
        found = []
        for load in self.loads():
            share = load[load > 0] / max(1, load.sum())
            found.append(float(-(share * np.log(share)).sum() / np.log(len(load))) if len(load) > 1 else 0.0)
        return found

    def repeats(self) -> list[float]:
        """Of each layer, the share of a token's experts that the token before it met too."""
        found = []
        for layer in range(self.layers):
            now, before = self.experts[1:, layer], self.experts[:-1, layer]
            again = (now[:, :, None] == before[:, None, :]).any(-1) & (now >= 0)
            found.append(float(again.sum() / max(1, (now >= 0).sum())))
        return found

    def save(self, file: Path) -> None:
        """Write everything into one safetensors file."""
        tensors = {"experts": self.experts, "gates": self.gates, "steps": self.steps}
        save_file(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
            file,
            {"kind": _KIND, "counts": json.dumps(list(self.counts))},
        )

    @classmethod
    def load(cls, file: Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            UsageError: it is no such file.
        """
        try:
            with safe_open(file, framework="np") as opened:
                said = opened.metadata() or {}
                if said.get("kind") == _KIND:
                    experts, gates, steps = (opened.get_tensor(name) for name in ("experts", "gates", "steps"))
                    return cls(experts, gates, steps, tuple(json.loads(said["counts"])))
            why = "it holds something else"
        except Exception as error:  # what safetensors raises has no common base
            why = str(error)
        raise UsageError(f"{file} is no recorded routing", why, "`shoestring measure` writes one")


@dataclass
class Recorder:
    """What `watch` collects. `hidden` has what the routers read, float32 [tokens, width], by layer, where asked for."""

    counts: tuple[int, ...]
    keep_hidden: bool = False
    passes: deque[list[tuple[Tensor, Tensor]]] = field(default_factory=deque)
    hidden: deque[list[Tensor]] = field(default_factory=deque)

    def trace(self) -> Trace:
        """What was recorded so far; passes that were cut short are left out."""
        whole = [entries for entries in self.passes if len(entries) == len(self.counts)]
        most = max((choices.shape[-1] for entries in whole for choices, _ in entries), default=1)
        tokens = sum(len(entries[0][0]) for entries in whole)
        experts = np.full((tokens, len(self.counts), most), -1, np.int32)
        gates = np.zeros((tokens, len(self.counts), most), np.float32)
        steps, at = np.zeros(tokens, np.int32), 0
        for number, entries in enumerate(whole):
            for layer, (choices, weights) in enumerate(entries):
                end, k = at + len(choices), choices.shape[-1]
                experts[at:end, layer, :k], gates[at:end, layer, :k] = choices.numpy(), weights.numpy()
            steps[at:end] = number
            at = end
        experts[experts >= np.asarray(self.counts)[:, None]] = -1
        return Trace(experts, gates, steps, self.counts)

    def states(self, layer: int) -> Tensor:
        """What the router of a layer read, float32 [tokens, width]."""
        return torch.cat([entries[layer] for entries in self.hidden if len(entries) == len(self.counts)])

    def see(self, layer: int, hidden: Tensor, choices: Tensor, gates: Tensor) -> None:
        if layer == 0:
            self.passes.append([])
            self.hidden.append([])
        if self.passes and len(self.passes[-1]) == layer:
            self.passes[-1].append((choices.detach().cpu(), gates.detach().float().cpu()))
            if self.keep_hidden:
                self.hidden[-1].append(hidden.detach().float().cpu())


def attach(model: nn.Module, *, hidden: bool = False, most: int | None = None) -> tuple[Recorder, list[Any]]:
    """A recorder that sees every pass of `model`, and the handles whose `remove` ends that.

    Args:
        hidden: keep what the routers read, too.
        most: remember only the last so many passes.

    Raises:
        UsageError: a model without experts, or with routers of another kind.
    """
    found = mixtures(model)
    recorder = Recorder(tuple(m.count for m in found), hidden, deque(maxlen=most), deque(maxlen=most))
    handles = []
    for layer, mixture in enumerate(found):

        def look(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], layer: int = layer) -> None:
            x, choices, gates = (*args, *named.values())[:3]
            recorder.see(layer, *(rows_of(part, 0) for part in (x, choices, gates)))

        handles.append(model.get_submodule(mixture.experts).register_forward_pre_hook(look, with_kwargs=True))
    return recorder, handles


@contextmanager
def watch(model: nn.Module, *, hidden: bool = False) -> Iterator[Recorder]:
    """Record which experts the tokens of every pass meet while the context is open.

    Args:
        hidden: keep what the routers read, too.

    Raises:
        UsageError: as `attach`.
    """
    recorder, handles = attach(model, hidden=hidden)
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()

"""Which layers a model can do without: a search over how many, and a model that passes over some of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.models.anatomy import inspect, renumber
from shoestring.training.loss import chunked_cross_entropy, last_hidden_and_head

Keep = tuple[bool, ...]
Row = dict[str, Any]


def search(layers: int, most: int, loss: Callable[[Keep], float], last: int = 1) -> tuple[Keep, ...]:
    """The best layers to keep for every number of removed ones, by dynamic programming.

    Args:
        layers: of the whole model.
        most: removed layers, at most layers - last.
        loss: of the model that has only the layers marked True; smaller is better. It is asked `evaluations` times.
        last: layers at the end that always stay.

    Returns:
        for m = 0 .. most the vector with m layers off.
    """
    prunable = layers - last
    best: list[Keep] = [(True,) * layers] + [()] * most
    value = [float("nan")] + [float("inf")] * most
    for n in range(1, prunable + 1):
        # Downwards, so that best[m - 1] is still that of n - 1.
        for m in range(min(most, n), 0, -1):
            tried = tuple(kept and place != prunable - n for place, kept in enumerate(best[m - 1]))
            found = loss(tried)
            if found < value[m]:  # (eq. 1); of equals the older stays
                best[m], value[m] = tried, found
    return tuple(best)


def evaluations(layers: int, most: int, last: int = 1) -> int:
    """How often `search` asks for a loss: N M - M (M - 1) / 2 for N layers that may go."""
    return (layers - last) * most - most * (most - 1) // 2


@contextmanager
def skipping(blocks: Sequence[nn.Module], keep: Sequence[bool], start: Tensor | None = None) -> Iterator[None]:
    """Within the block the layers marked False are passed over, and the others take their places in a key-value cache.

    Args:
        blocks: all layers of a model.
        start: what enters the layer behind the first False, (batch, length, width); the layers before that one are
            passed over as well. It saves computing them again for one and the same batch.
    """
    if all(keep):
        yield
        return
    gone = keep.index(False) if start is not None else -1
    kept = [place for place, stays in enumerate(keep) if stays and place > gone]
    try:
        for place, block in enumerate(blocks):
            if place not in kept:
                block.forward = _hand_on(start if place == gone else None)  # type: ignore[method-assign]
        renumber(nn.ModuleList([blocks[place] for place in kept]))
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        renumber(nn.ModuleList(blocks))


def _hand_on(start: Tensor | None) -> Callable[..., Tensor]:
    return lambda hidden_states, *_, **__: hidden_states if start is None else start


class LossWithout:
    """Mean next-token loss over some rows of a model that lacks some of its layers, nats a token.

    Args:
        rows: `input_ids` and `labels`; each is passed alone, so that nothing is padded.

    What enters each layer of the whole model is kept, so that a loss only costs the layers behind the first absent one.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row]) -> None:
        self.model = model
        self.blocks = [block.module for block in inspect(model).blocks]
        device = next(model.parameters()).device
        self.batches = [
            {name: torch.as_tensor(row[name], device=device)[None] for name in ("input_ids", "labels")} for row in rows
        ]
        self.tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in self.batches)
        self.entering: list[list[Tensor]] = []
        self.whole = self._total(None) / self.tokens

    def __call__(self, keep: Keep) -> float:
        return self.whole if all(keep) else self._total(keep) / self.tokens

    @torch.no_grad()
    def _total(self, keep: Keep | None) -> float:
        total = 0.0
        for number, batch in enumerate(self.batches):
            if keep is None:
                hidden, head = self._watched(batch)
            else:
                with skipping(self.blocks, keep, self.entering[number][keep.index(False)]):
                    hidden, head, _ = last_hidden_and_head(self.model, batch)
            total += float(chunked_cross_entropy(hidden, head, batch["labels"], 1.0))
        return total

    def _watched(self, batch: Row) -> tuple[Tensor, nn.Module]:
        entering: list[Tensor] = []
        hooks = [b.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for b in self.blocks]
        try:
            hidden, head, _ = last_hidden_and_head(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        self.entering.append(entering)
        return hidden, head

"""Masked language modelling: which tokens of a line are hidden, and what is to be found in their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoestring.core.errors import UsageError

IGNORED = -100


def mask_tokens(
    ids: Sequence[int],
    special: Sequence[int],
    mask_id: int,
    vocab: int,
    generator: torch.Generator,
    share: float = 0.15,
) -> tuple[list[int], list[int]]:
    """Input and labels of one line: `share` of its tokens, and never none, are to be found again.

    Of those, eight in ten are masked, one is exchanged for a random token, one stays.

    Args:
        special: 1 where a token is no text and is left alone.

    Raises:
        UsageError: the line has no token that may be hidden.
    """
    free = torch.tensor([i for i, taken in enumerate(special) if not taken])
    if not len(free):
        raise UsageError("a line has no token to hide", "all of its tokens are special", "Leave empty lines out")
    count = max(1, round(share * len(free)))
    chosen = free[torch.randperm(len(free), generator=generator)[:count]]
    fate = torch.rand(count, generator=generator)
    exchanged = torch.randint(vocab, (count,), generator=generator)
    hidden, labels = list(ids), [IGNORED] * len(ids)
    for place, draw, other in zip(chosen.tolist(), fate.tolist(), exchanged.tolist()):
        labels[place] = ids[place]
        hidden[place] = mask_id if draw < 0.8 else other if draw < 0.9 else ids[place]
    return hidden, labels

"""Streams of hidden states that pass a model side by side, one after another along the tokens.

The first is the model's own. The others read the keys and values of the first and leave none behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_tokens: ContextVar[int | None] = ContextVar("tokens", default=None)


def tokens_of_first() -> int | None:
    """How many tokens, along the last but one axis, are the first stream's; None while there is but one."""
    return _tokens.get()


def rows_of(rows: Tensor, stream: int) -> Tensor:
    """One stream's of a pass's rows, [streams * tokens, ...], 0 being the first; all of them while there is but one."""
    tokens = _tokens.get()
    return rows if tokens is None else rows.unflatten(0, (-1, tokens))[stream]


@contextmanager
def side_by_side(tokens: int) -> Iterator[None]:
    """What is computed inside has several streams of `tokens` tokens each."""
    before = _tokens.set(tokens)
    try:
        yield
    finally:
        _tokens.reset(before)

"""What followed the same three tokens the last time: a longer memory than a pair's row, with one successor each."""

from __future__ import annotations

from collections.abc import Sequence

_BITS = 21  # of a token id inside a key


def _key(owner: int, a: int, b: int, c: int) -> int:
    return ((owner << _BITS | a) << _BITS | b) << _BITS | c


class Latest:
    """(a, b, c) -> the token that last followed them, for each owner apart.

    Args:
        entries: triples that are kept; what was learnt longest ago goes first.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._known: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._known)

    def after(self, owner: int, a: int, b: int, c: int) -> int | None:
        return None if a < 0 else self._known.get(_key(owner, a, b, c))

    def learn(self, owner: int, tokens: Sequence[int], start: int, run: int) -> int:
        """Learn tokens[start:], each with the three before it.

        Args:
            run: how many tokens in a row, just before `start`, came as the last time.

        Returns:
            the same of the last tokens.
        """
        known = self._known
        for at in range(max(start, 3), len(tokens)):
            key = _key(owner, *tokens[at - 3 : at])
            run = run + 1 if known.pop(key, None) == tokens[at] else 0
            known[key] = tokens[at]
        while len(known) > self.entries:
            del known[next(iter(known))]
        return run

"""What followed the same tokens the last time: a longer memory than a pair's row, with one successor each."""

from __future__ import annotations

from collections.abc import Sequence

_BITS = 21  # of a token id inside a key
_LONG, _SHORT = 6, 3  # tokens that a key has
_IDS, _LONG_IDS, _SHORT_IDS = ((1 << _BITS * tokens) - 1 for tokens in (1, _LONG, _SHORT))


def end(text: Sequence[int]) -> int:
    """The last six tokens of a text as one number; of a shorter text zeros stand before it."""
    recent = 0
    for token in text[-_LONG:]:
        recent = recent << _BITS | token
    return recent


def then(recent: int, token: int) -> int:
    """The `end` of a text that goes on with a token."""
    return (recent << _BITS | token) & _LONG_IDS


def pair(recent: int) -> tuple[int, int]:
    """The last two tokens."""
    return recent >> _BITS & _IDS, recent & _IDS


class Latest:
    """Six tokens -> the token that last followed them, and three tokens likewise, for each owner apart.

    Where six are known, they say more: a passage that is repeated goes on as it did there, whatever has followed its
    words elsewhere since.

    Args:
        entries: of either kind that are kept; what was learnt longest ago goes first.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._long: dict[int, int] = {}
        self._short: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._short)

    def after(self, owner: int, recent: int) -> int | None:
        """What followed the `end` of a text the last time; None where nothing is known of that."""
        said = self._long.get(owner << _BITS * _LONG | recent)
        return self._short.get(owner << _BITS * _SHORT | recent & _SHORT_IDS) if said is None else said

    def learn(self, owner: int, tokens: Sequence[int], start: int, run: int) -> int:
        """Learn tokens[start:], each with those before it.

        Args:
            run: how many tokens in a row, just before `start`, came as the last time.

        Returns:
            the same of the last tokens.
        """
        long, short, start = self._long, self._short, max(start, _SHORT)
        recent = end(tokens[max(start - _LONG, 0) : start])
        for at in range(start, len(tokens)):
            token = tokens[at]
            key = owner << _BITS * _SHORT | recent & _SHORT_IDS
            said = short.pop(key, None)
            short[key] = token
            if at >= _LONG:
                key = owner << _BITS * _LONG | recent
                far = long.pop(key, None)
                said = said if far is None else far
                long[key] = token
            run = run + 1 if said == token else 0
            recent = then(recent, token)
        for known in (long, short):
            while len(known) > self.entries:
                del known[next(iter(known))]
        return run

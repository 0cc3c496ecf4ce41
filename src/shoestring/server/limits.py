"""Who may come in: a bounded queue for all, and for each key how many at once and how many a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from shoestring.server.errors import ApiError
from shoestring.server.keys import Client

_FORGET = 600.0  # seconds after which a client that stays away is forgotten


class _Account:
    """One client's open requests, and a bucket that fills with its rate."""

    def __init__(self, tokens: float, now: float) -> None:
        self.open = 0
        self.tokens, self.filled = tokens, now


class Ticket:
    """Leave to be computed; give it back with `leave`, once or more often."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave: Callable[[], None] | None = leave

    def leave(self) -> None:
        leave, self._leave = self._leave, None
        if leave:
            leave()


class Gate:
    """Counts answers that are computed or wait.

    Args:
        room: answers that fit, those that wait included.
        concurrency: requests that one client may have open; 0 for no limit.
        per_minute: requests that one client may begin in a minute; 0 for no limit.
    """

    def __init__(self, room: int, concurrency: int, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.room, self.concurrency, self.per_minute = room, concurrency, per_minute
        self.taken = 0
        self.requests = 0
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, client: Client, answers: int) -> Ticket:
        """Take a place for each of `answers`; more than there are at all takes all.

        Raises:
            ApiError: 429 for what this client has too much of, 503 when the queue is full; both say when to come back.
        """
        account = self._account(client)
        if self.concurrency and account.open >= self.concurrency:
            raise _later(429, f"This key has {account.open} open requests, the most it may have", 1)
        answers = min(answers, self.room)
        if self.taken + answers > self.room:
            raise _later(503, f"{self.taken} answers are computed or wait; there is no room for {answers} more", 1)
        if self.per_minute:
            if account.tokens < 1:
                wait = (1 - account.tokens) * 60 / self.per_minute
                raise _later(429, f"This key may begin {self.per_minute} requests a minute", wait)
            account.tokens -= 1
        account.open += 1
        self.taken += answers
        self.requests += 1

        def leave() -> None:
            account.open -= 1
            self.taken -= answers
            self.requests -= 1

        return Ticket(leave)

    def _account(self, client: Client) -> _Account:
        now, burst = self._clock(), float(max(1, self.per_minute))
        if len(self._accounts) > 10_000:
            self._accounts = {k: a for k, a in self._accounts.items() if a.open or now - a.filled < _FORGET}
        account = self._accounts.setdefault(client.digest, _Account(burst, now))
        account.tokens = min(burst, account.tokens + (now - account.filled) * self.per_minute / 60)
        account.filled = now
        return account


def _later(status: int, why: str, seconds: float) -> ApiError:
    code = "rate_limit_exceeded" if status == 429 else "queue_full"
    return ApiError(status, why, code=code, headers={"retry-after": str(max(1, math.ceil(seconds)))})

"""One admitted HTTP request and what the engine computes for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shoestring.core.errors import ShoestringError
from shoestring.engine.request import Delta, Request, RequestError, TokenLogprob, Usage
from shoestring.server.errors import ApiError, bad, failed, refusal
from shoestring.server.limits import Ticket
from shoestring.server.service import Service, log

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]


class ClientGone(Exception):
    """Nobody is left to answer."""


@dataclass
class Answer:
    """One answer as far as it has come."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        if delta.finish_reason:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Work:
    """The prompts of one HTTP request. Answer `i * n + j` is answer j to prompt i.

    Close it when the HTTP request ends, however it ends: places in the queue and counters depend on it.
    """

    def __init__(self, service: Service, requests: Sequence[Request], ticket: Ticket) -> None:
        self.service, self.requests = service, list(requests)
        self.engine = service.engine
        self.n = self.requests[0].sampling.n
        self.usages: dict[int, Usage] = {}
        self._open = set(range(len(self.requests) * self.n))
        self._ticket = ticket
        self._metered = service.meter.read()
        self._computed = self._total()

    @asynccontextmanager
    async def batches(self) -> AsyncIterator[AsyncGenerator[list[tuple[int, Delta]], None]]:
        """What the engine gives, each time all since the last look, with the number of the prompt. To be `noted`.

        Raises:
            ApiError: the engine refused, failed, or could not finish an answer.
        """
        try:
            async with aclosing(self.engine.streams(self.requests)) as batches:
                yield batches
        except RequestError as error:
            raise refusal(error) from None
        except ShoestringError as error:
            raise failed(error) from None

    async def answers(self) -> list[Answer]:
        """All answers, whole."""
        found = [Answer() for _ in range(len(self.requests) * self.n)]
        async with self.batches() as batches:
            async for batch in batches:
                for i, delta in batch:
                    found[self.noted(i, delta)].add(delta)
        return found

    def usage(self) -> dict[str, Any]:
        """Tokens, times and energy, as the `usage` of an answer."""
        usages = self.usages.values()
        prompt = sum(len(request.prompt) for request in self.requests)
        completion = sum(usage.completion_tokens for usage in usages)
        cached = self._cached()
        accepted = sum(usage.accepted_draft_tokens for usage in usages)
        drafted = sum(usage.draft_tokens for usage in usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
            "shoestring": self.bill(prompt - cached + completion),
        }

    def bill(self, computed: int) -> dict[str, Any]:
        """Times of this request, and its share of the energy: that of the tokens it had computed."""
        usages = [usage for usage in self.usages.values() if usage.started]
        started = min((u.started for u in usages), default=0.0)
        first = min((u.first_token for u in usages if u.first_token), default=started)
        last = max((u.last_token for u in usages if u.last_token), default=first)
        arrival = min(request.arrival for request in self.requests)
        everyone = max(1, computed, self._total() - self._computed)
        return {
            "queue_seconds": round(max(0.0, started - arrival) if usages else 0.0, 6),
            "prefill_seconds": round(max(0.0, first - started), 6),
            "decode_seconds": round(max(0.0, last - first), 6),
            **self.service.meter.bill(self._metered, computed / everyone),
        }

    def close(self) -> None:
        """Give the places back; answers that have not ended count as aborted."""
        for at in list(self._open):
            self._end(at, "abort")
        self._ticket.leave()

    def noted(self, i: int, delta: Delta) -> int:
        """Count what prompt i's answer was given; returns the number of that answer.

        Raises:
            ApiError: it could not be finished.
        """
        at = i * self.n + delta.index
        before, now = self.usages.get(at), delta.usage
        if delta.tokens and before is not None and before.last_token:
            count = len(delta.tokens)
            self.service.metrics.between_tokens.add((now.last_token - before.last_token) / count, count)
        self.usages[at] = now
        if delta.finish_reason:
            self._end(at, delta.finish_reason)
            if delta.finish_reason == "error":
                raise self._unfinished(delta)
        return at

    def _end(self, at: int, reason: str) -> None:
        self._open.discard(at)
        request = self.requests[at // self.n]
        usage = self.usages.get(at) or Usage(len(request.prompt), arrival=request.arrival)
        self.service.metrics.finish(usage, reason)

    def _cached(self) -> int:
        first = [self.usages[i * self.n] for i in range(len(self.requests)) if i * self.n in self.usages]
        return sum(usage.cached_tokens for usage in first)

    def _total(self) -> int:
        """Tokens that the engine has computed since it was opened."""
        counts = self.engine.counts()
        return counts.prompt_tokens - counts.prefix_hits + counts.generation_tokens

    def _unfinished(self, delta: Delta) -> ApiError:
        log.warning("an answer could not be finished: %r", delta.error)
        given = self.requests[0].sampling
        if given.constraint is not None:
            return bad("response_format", f"The answer cannot follow its format: {delta.error}", "constraint_failed")
        if given.logit_bias or given.stop_token_ids or given.min_tokens:
            return bad("logit_bias", f"The answer cannot go on: {delta.error}", "no_token_possible")
        return ApiError(500, "The answer could not be finished", code="answer_failed")


async def attended(service: Service, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, as long as somebody waits for it.

    Raises:
        ClientGone: the client has left. ApiError: 504 when it takes too long, 503 when the server must end.
    """
    task = asyncio.create_task(work)
    listener = asyncio.create_task(_gone(receive))
    service.tasks.add(task)
    try:
        await asyncio.wait(
            {task, listener}, timeout=service.settings.request_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if task.cancelled():
            raise ApiError(503, "The server is ending", code="draining", headers={"connection": "close"})
        if task.done():
            return task.result()
        if listener.done():
            raise ClientGone
        raise ApiError(504, "The answer was not finished in time", headers={"x-should-retry": "false"})
    finally:
        service.tasks.discard(task)
        for helper in (task, listener):
            helper.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""The engine beside an event loop: streams, cancellation, and what those who wait hear when it fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoestring.core.errors import ShoestringError
from shoestring.engine import aio
from shoestring.engine.aio import AsyncEngine
from shoestring.engine.engine import Engine
from shoestring.engine.request import Request, RequestError, Sampling

SAMPLING = Sampling(max_tokens=20, ignore_eos=True)
SOON = 10.0


@pytest.fixture
def beside(model: Path) -> Iterator[AsyncEngine]:
    running = AsyncEngine(Engine(model, runner="native", threads=1))
    yield running
    running.close()


async def tokens_of(beside: AsyncEngine, request: Request) -> list[int]:
    return [token async for delta in beside.stream(request) for token in delta.tokens]


def test_streams_side_by_side_give_what_the_engine_gives(beside: AsyncEngine, model: Path) -> None:
    prompts = [list(range(3, 8 + i)) for i in range(6)]

    async def work() -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(beside, Request(prompt, SAMPLING)) for prompt in prompts))

    found = asyncio.run(work())
    with Engine(model, runner="native", threads=1) as engine:
        assert found == [list(answer.tokens) for (answer,) in engine.generate(prompts, SAMPLING)]


def test_what_a_pass_gave_is_handed_over_when_the_next_one_begins(
    beside: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the interpreter is free; and after the last pass at once."""
    order: list[str] = []
    engine = beside.engine

    def told(word: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            order.append(word)
            return function(*given)

        return call

    monkeypatch.setattr(engine.scheduler, "schedule", told("plan", engine.scheduler.schedule))
    monkeypatch.setattr(engine.runner, "run", told("pass", engine.runner.run))
    monkeypatch.setattr(aio, "_soon", told("hand over", aio._soon))
    found = asyncio.run(tokens_of(beside, Request([3, 4], Sampling(max_tokens=3, ignore_eos=True))))
    assert len(found) == 3
    assert order == ["plan", "pass", *2 * ["plan", "hand over", "pass"], "hand over"]


def test_several_requests_come_in_one_stream(beside: AsyncEngine) -> None:
    requests = [Request([3, 4], Sampling(max_tokens=2 + i, n=2, ignore_eos=True)) for i in range(3)]

    async def work() -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        async for batch in beside.streams(requests):
            for i, delta in batch:
                found[i, delta.index] = found.get((i, delta.index), 0) + len(delta.tokens)
        return found

    assert asyncio.run(work()) == {(i, j): 2 + i for i in range(3) for j in range(2)}
    with pytest.raises(RequestError, match="empty"):  # and one that is refused takes the others with it
        asyncio.run(anext(beside.streams([requests[0], Request([])])))
    counts = asyncio.run(beside.run(beside.engine.counts))
    assert counts.running == counts.waiting == counts.blocks_used == 0


def test_leaving_a_stream_frees_its_pages(beside: AsyncEngine) -> None:
    async def work() -> None:
        stream = beside.stream(Request([3, 4, 5], Sampling(max_tokens=120, ignore_eos=True)))
        await anext(stream)
        await stream.aclose()
        await beside.run(lambda: None)  # after the order to cancel
        counts = await beside.run(beside.engine.counts)
        assert counts.running == counts.blocks_used == 0 and counts.finished == {"abort": 1}

    asyncio.run(work())


def test_a_refused_request_raises_where_it_was_made(beside: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="empty"):
        asyncio.run(tokens_of(beside, Request([])))
    assert beside.state == "ready"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_fails_everyone_who_waits_is_told(beside: AsyncEngine) -> None:
    inside, go = threading.Event(), threading.Event()

    def broken() -> list:
        inside.set()
        go.wait(SOON)
        raise ShoestringError("the arithmetic broke")

    async def work() -> None:
        beside.engine.advance = broken  # type: ignore[method-assign]
        stream = asyncio.create_task(tokens_of(beside, Request([3, 4], SAMPLING)))
        await asyncio.to_thread(inside.wait, SOON)
        order = asyncio.create_task(beside.run(lambda: 1))  # waits for a turn that never comes
        await asyncio.sleep(0)
        go.set()
        for waiting in (stream, order):
            with pytest.raises(ShoestringError, match="the arithmetic broke"):
                await asyncio.wait_for(waiting, SOON)
        assert beside.state == "failing"
        with pytest.raises(ShoestringError, match="the arithmetic broke"):
            await beside.run(lambda: 1)

    asyncio.run(work())


def test_closing_tells_whoever_listens(beside: AsyncEngine) -> None:
    async def work() -> None:
        stream = beside.stream(Request([3, 4], Sampling(max_tokens=120, ignore_eos=True)))
        await anext(stream)
        await asyncio.to_thread(beside.close)
        with pytest.raises(ShoestringError, match="closed"):
            async for _ in stream:
                pass
        assert beside.state == "closed"

    asyncio.run(work())
    beside.close()  # once more does no harm

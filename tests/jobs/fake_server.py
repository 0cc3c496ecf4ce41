"""A server of event streams with delays that are known, so that what a client measures can be checked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FakeServer:
    """Answers chat and text completions: `first` seconds of silence, then a token each `gap` seconds.

    `trouble` maps the number of a request (the first is 0) to how it goes wrong. Requests are kept in `seen`.
    """

    def __init__(self, first: float, gap: float, usage: bool, trouble: dict[int, str], reuse: int) -> None:
        self.first, self.gap, self.usage, self.trouble, self.reuse = first, gap, usage, trouble, reuse
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.busy = self.most = 0
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
        self.keys.add(fields.get("authorization", ""))
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        if "/models" in head.splitlines()[0]:
            await self.plain(writer, 200, {"data": [{"id": "fake"}]})
        else:
            await self.stream(writer, json.loads(body))
        writer.close()

    async def plain(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()

    async def stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        trouble = self.trouble.get(len(self.seen), "")
        self.seen.append(body)
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            if trouble == "refuse":
                return await self.plain(writer, 429, {"error": {"message": "no", "code": "rate_limit_exceeded"}})
            if trouble == "hang":
                return await asyncio.sleep(30)
            if trouble == "garbage":
                return writer.write(b"hello there\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            chat = "messages" in body
            if chat:
                self.event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            await asyncio.sleep(self.first)
            for number in range(body["max_tokens"]):
                if number:
                    await asyncio.sleep(self.gap)
                if trouble == "cut" and number == 2:
                    return None
                if trouble == "error" and number == 2:
                    return self.event(writer, {"error": {"message": "it broke", "code": "engine_failed"}})
                self.event(writer, {"choices": [{"index": 0, "delta": {"content": "x"}} if chat else {"text": "x"}]})
            if self.usage:
                told = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
                told |= {"prompt_tokens_details": {"cached_tokens": self.reuse}}
                self.event(writer, {"choices": [], "usage": told})
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        finally:
            self.busy -= 1

    def event(self, writer: asyncio.StreamWriter, data: Any) -> None:
        line = b"data: " + json.dumps(data).encode() + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(line), line))


@contextmanager
def fake_server(
    first: float = 0.05, gap: float = 0.01, usage: bool = True, trouble: dict[int, str] | None = None, reuse: int = 0
) -> Iterator[FakeServer]:
    """Serves on a free port of this machine until the block ends; `.port` says which."""
    fake = FakeServer(first, gap, usage, trouble or {}, reuse)
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def begin() -> None:
        server = await asyncio.start_server(fake.answer, "127.0.0.1", 0)
        fake.port = server.sockets[0].getsockname()[1]
        ready.set()

    def work() -> None:
        loop.create_task(begin())
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait()
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join()

"""Text from a model as it is written: one answer, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from shoestring.core.errors import UsageError
from shoestring.jobs._writers import Answering, Message, Writer, open_writer

if TYPE_CHECKING:
    from shoestring.engine.engine import Engine
    from shoestring.models import Loaded


def generate(
    ref: str | Path | Loaded | Engine,
    prompt: str,
    *,
    system: str = "",
    raw: bool = False,
    offline: bool | None = None,
    **how: Any,
) -> Iterator[str]:
    """The model's answer to `prompt`, piece by piece; leaving the iterator stops the model.

    Args:
        system: a message that goes before the prompt.
        raw: continue `prompt` as it is, without the chat template.
        how: fields of `Answering`: max_new_tokens, temperature, top_p, top_k, min_p, seed, stop, json_schema ...

    Raises:
        UsageError: a model that writes no text, impossible options, or a prompt longer than the context. All are
            raised by the call, before the first piece.
    """
    answering = Answering(**how)
    writer = open_writer(ref, answering, offline)
    ids = writer.ids(prompt if raw else [*_opening(system), {"role": "user", "content": prompt}])
    pieces = writer.write(ids, answering, answering.seed)

    def closing() -> Iterator[str]:
        try:
            yield from pieces
        finally:
            if isinstance(ref, str | Path):
                writer.close()

    return closing()


def chat(
    ref: str | Path | Loaded | Engine,
    *,
    lines: Iterable[str] | None = None,
    out: TextIO | None = None,
    notes: TextIO | None = None,
    system: str = "",
    offline: bool | None = None,
    **how: Any,
) -> list[Message]:
    """Talk until the lines end; returns the conversation. Each line is one message, empty ones are passed over.

    `/clear` forgets the conversation, `/exit` ends it. When it outgrows the model's context, its oldest turns are
    forgotten, with a note. A turn computes only what is new: the rest of the conversation is in the engine's cache.

    Args:
        lines: what the user says; None reads standard input, with a prompt when that is a terminal.
        out, notes: where answers and remarks go; None means standard output and standard error.
        how: fields of `Answering`; here answers are drawn, at temperature 0.7 and top_p 0.95, and are up to 512 tokens
            long, unless it says otherwise.

    Raises:
        UsageError: as `generate`.
    """
    out, notes = out or sys.stdout, notes or sys.stderr
    answering = Answering(**{"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.95, **how})
    writer = open_writer(ref, answering, offline)
    if not writer.chats:
        raise UsageError(f"{writer.name} is a seq2seq model and cannot chat", remedy="Give a causal language model")
    interactive = lines is None and sys.stdin.isatty()
    if not writer.has_template:
        print("This model has no chat template, so it was probably not made for conversation.", file=notes)
    messages = _opening(system)
    for line in _typed() if interactive else lines if lines is not None else sys.stdin:
        said = line.strip()
        if said == "/exit":
            break
        if said == "/clear":
            messages = _opening(system)
        if not said or said == "/clear":
            continue
        messages.append({"role": "user", "content": said})
        ids = _within_context(writer, messages, min(answering.max_new_tokens, 64), notes)
        answer = ""
        try:
            for piece in writer.write(ids, answering, answering.seed + len(messages)):
                answer += piece
                print(piece, end="", file=out, flush=True)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(" (stopped)", end="", file=notes, flush=True)
        print(file=out, flush=True)
        messages.append({"role": "assistant", "content": answer})
    if isinstance(ref, str | Path):
        writer.close()
    return messages


def _opening(system: str) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _within_context(writer: Writer, messages: list[Message], answer: int, notes: TextIO) -> list[int]:
    """Ids of the conversation, whose oldest turns are removed from `messages` until an answer has room."""
    first = 1 if messages[0]["role"] == "system" else 0
    while len(ids := writer.ids(messages)) + answer > (writer.context or sys.maxsize) and len(messages) > first + 1:
        del messages[first : first + 2]
        print("(The oldest turn no longer fits the model's context and is forgotten.)", file=notes)
    return ids

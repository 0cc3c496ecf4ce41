"""Text from a model as it is written: one answer, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TextIO

from shoestring.core.errors import UsageError
from shoestring.jobs._doors import open_model

if TYPE_CHECKING:
    from shoestring.models import Loaded

Message = dict[str, str]


def generate(
    ref: str | Path | Loaded,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str = "",
    raw: bool = False,
    dtype: str = "auto",
    offline: bool | None = None,
) -> Iterator[str]:
    """The model's answer to `prompt`, piece by piece; leaving the iterator stops the model.

    Args:
        max_new_tokens: the longest answer; shortened to what the model's context leaves.
        temperature: 0 always takes the likeliest token; above it tokens are drawn, the same ones for the same `seed`.
        top_p: draw only from the likeliest tokens that together have this probability.
        raw: continue `prompt` as it is, without the chat template.

    Raises:
        UsageError: a model that writes no text, impossible options, or a prompt longer than the context. All are
            raised by the call, before the first piece.
    """
    loaded = _loaded(ref, dtype, offline)
    if raw or loaded.kind == "seq2seq":
        ids = loaded.tokenizer(prompt).input_ids
    else:
        ids = _ids(loaded, _opening(system) + [{"role": "user", "content": prompt}])
    return _answer(loaded, ids, max_new_tokens, temperature, top_p, seed)


def chat(
    ref: str | Path | Loaded,
    *,
    lines: Iterable[str] | None = None,
    out: TextIO | None = None,
    notes: TextIO | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    system: str = "",
    dtype: str = "auto",
    offline: bool | None = None,
) -> list[Message]:
    """Talk until the lines end; returns the conversation. Each line is one message, empty ones are passed over.

    `/clear` forgets the conversation, `/exit` ends it. When it outgrows the model's context, its oldest turns are
    forgotten, with a note.

    Args:
        lines: what the user says; None reads standard input, with a prompt when that is a terminal.
        out, notes: where answers and remarks go; None means standard output and standard error.
        others: as for `generate`.

    Raises:
        UsageError: as `generate`.
    """
    out, notes = out or sys.stdout, notes or sys.stderr
    loaded = _loaded(ref, dtype, offline)
    if loaded.kind != "causal":
        raise UsageError(
            f"{loaded.ref} is a {loaded.kind} model and cannot chat", remedy="Give a causal language model"
        )
    interactive = lines is None and sys.stdin.isatty()
    if not loaded.tokenizer.chat_template:
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
        ids = _within_context(loaded, messages, min(max_new_tokens, 64), notes)
        answer = ""
        try:
            for piece in _answer(loaded, ids, max_new_tokens, temperature, top_p, seed + len(messages)):
                answer += piece
                print(piece, end="", file=out, flush=True)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(" (stopped)", end="", file=notes, flush=True)
        print(file=out, flush=True)
        messages.append({"role": "assistant", "content": answer})
    return messages


def _loaded(ref: str | Path | Loaded, dtype: str, offline: bool | None) -> Loaded:
    loaded = open_model(ref, dtype=dtype, offline=offline) if isinstance(ref, str | Path) else ref
    if loaded.kind == "masked":
        raise UsageError(
            f"{loaded.ref} is a masked language model",
            "it fills gaps and writes no text",
            "Give a causal or encoder-decoder model",
        )
    if loaded.tokenizer is None:
        raise UsageError(
            f"{loaded.path} holds no tokenizer", remedy="Copy the tokenizer of its base model into the folder"
        )
    return loaded


def _opening(system: str) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _ids(loaded: Loaded, messages: list[Message]) -> list[int]:
    from shoestring.data import chat_template

    try:
        text = loaded.tokenizer.apply_chat_template(
            messages, chat_template=chat_template(loaded.tokenizer), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise whatever they like
        raise UsageError(f"The chat template of {loaded.ref} refuses the conversation", str(error)) from None
    return list(loaded.tokenizer(text, add_special_tokens=False).input_ids)


def _context(loaded: Loaded) -> int | None:
    return getattr(loaded.model.config, "max_position_embeddings", None) if loaded.kind == "causal" else None


def _within_context(loaded: Loaded, messages: list[Message], answer: int, notes: TextIO) -> list[int]:
    """Ids of the conversation, whose oldest turns are removed from `messages` until an answer has room."""
    context = _context(loaded)
    first = 1 if messages[0]["role"] == "system" else 0
    while len(ids := _ids(loaded, messages)) + answer > (context or sys.maxsize) and len(messages) > first + 1:
        del messages[first : first + 2]
        print("(The oldest turn no longer fits the model's context and is forgotten.)", file=notes)
    return ids


def _answer(
    loaded: Loaded, ids: list[int], max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UsageError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p} is not possible",
            remedy="max_new_tokens is at least 1, temperature at least 0, top_p above 0 and at most 1",
        )
    context = _context(loaded)
    if not ids:
        raise UsageError("The prompt is empty", remedy="Write something")
    if context and len(ids) >= context:
        raise UsageError(
            f"The prompt has {len(ids)} tokens, the model's context is {context}", remedy="Shorten the prompt"
        )
    room = min(max_new_tokens, context - len(ids)) if context else max_new_tokens
    options: dict[str, Any] = {"max_new_tokens": room, "do_sample": temperature > 0}
    # Set even when not drawn: a folder's own generation settings must not have a say.
    options |= (
        {"temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature
        else dict.fromkeys(("temperature", "top_p", "top_k"))
    )
    return _stream(loaded, ids, options, seed)


def _stream(loaded: Loaded, ids: list[int], options: dict[str, Any], seed: int) -> Iterator[str]:
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    left = Event()

    class Left(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(input_ids),), left.is_set(), dtype=torch.bool)

    tokenizer, model = loaded.tokenizer, loaded.model
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    prompt = torch.tensor([ids], device=model.device)
    named = model.generation_config.eos_token_id
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                torch.manual_seed(seed)
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Left()]),
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                    **options,
                )
        except BaseException as error:
            failed.append(error)
            streamer.text_queue.put(streamer.stop_signal)

    worker = Thread(target=work, name="shoestring-generate", daemon=True)
    worker.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        left.set()
        worker.join()
    if failed:
        raise failed[0]

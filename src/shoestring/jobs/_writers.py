"""Two ways to write an answer: the engine, and transformers for what the engine does not run.

A writer turns messages or plain text into token ids, knows the longest context, and continues ids piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.shape import context_of
from shoestring.models.load import Loaded

if TYPE_CHECKING:
    from shoestring.engine.engine import Engine

Message = dict[str, str]
_ADAPTER = "adapter"


@dataclass(frozen=True)
class Answering:
    """How answers are made.

    Attributes:
        max_new_tokens: the longest answer; shortened to what the model's context leaves.
        temperature: 0 always takes the likeliest token; above it tokens are drawn, the same ones for the same `seed`.
        top_p: draw only from the likeliest tokens that together have this probability.
        top_k: draw only from so many of the likeliest tokens; 0 means all.
        min_p: draw only tokens with at least this share of the likeliest one's probability.
        repetition_penalty: above 1, tokens that have occurred become less likely.
        stop: strings that end the answer and are not part of it.
        json_schema: the answer must be JSON that follows this schema, given as text.
        adapter: a PEFT adapter folder to use with the model.
        dtype: what to compute in; "auto" computes on the weights as they are stored.
        threads: for arithmetic; None takes one for each core that the process may use.
        trust_remote_code: run Python code that the model's folder brings.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    json_schema: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False


class Writer(Protocol):
    name: str
    context: int | None
    has_template: bool
    chats: bool

    def ids(self, prompt: str | list[Message]) -> list[int]:
        """Of plain text, or of a conversation through the chat template.

        Raises:
            UsageError: the template refuses the conversation.
        """

    def write(self, ids: list[int], how: Answering, seed: int) -> Iterator[str]:
        """The answer piece by piece; leaving the iterator stops the model.

        Raises:
            UsageError: by the call: impossible options, or a prompt longer than the context.
        """

    def close(self) -> None: ...


def open_writer(ref: str | Path | Loaded | Engine, how: Answering, offline: bool | None) -> Writer:
    """The engine's writer where it runs the model, else that of transformers.

    Raises:
        UsageError: a model that writes no text, or cannot be opened.
    """
    if isinstance(ref, Loaded):
        return TransformersWriter(ref)
    from shoestring.engine.engine import Engine

    if isinstance(ref, Engine):
        return EngineWriter(ref)
    adapters = {_ADAPTER: how.adapter} if how.adapter else {}
    try:
        # One answer at a time: the cache holds one context, and no other prompt waits for a long one.
        engine = Engine(
            ref,
            dtype=how.dtype,
            threads=how.threads,
            adapters=adapters,
            max_sequences=1,
            max_step_tokens=512,
            offline=offline,
            trust_remote_code=how.trust_remote_code,
        )
        return EngineWriter(engine)
    except DoesNotFit:
        raise
    except UsageError:
        if adapters:
            raise
        from shoestring.jobs._doors import open_model  # it looks for methods of other packages, which takes a while

        given = {"dtype": how.dtype, "offline": offline, "trust_remote_code": how.trust_remote_code}
        return TransformersWriter(open_model(ref, **given))


class EngineWriter:
    chats = True

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name = engine, engine.name
        self.context: int | None = engine.context
        self.has_template = engine.tokenizer.has_template

    def ids(self, prompt: str | list[Message]) -> list[int]:
        return self.engine.prompt_ids(prompt)  # type: ignore[arg-type]

    def write(self, ids: list[int], how: Answering, seed: int) -> Iterator[str]:
        from shoestring.engine.request import Constraint, Sampling

        sampling = Sampling(
            max_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            min_p=how.min_p,
            repetition_penalty=how.repetition_penalty,
            seed=seed,
            stop=how.stop,
            constraint=Constraint("json_schema", how.json_schema) if how.json_schema else None,
        )
        deltas = self.engine.stream(ids, sampling, adapter=_ADAPTER if _ADAPTER in self.engine.adapters else "")

        def pieces() -> Iterator[str]:
            with closing(deltas):  # type: ignore[type-var]
                yield from (delta.text for delta in deltas if delta.text)

        return pieces()

    def close(self) -> None:
        self.engine.close()


class TransformersWriter:
    """For encoder-decoders, families the engine does not know, and models that are already in memory."""

    def __init__(self, loaded: Loaded) -> None:
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
        self.loaded, self.name, self.chats = loaded, loaded.ref, loaded.kind == "causal"
        self.has_template = bool(loaded.tokenizer.chat_template)
        self.context: int | None = context_of(loaded.model.config) if self.chats else None

    def ids(self, prompt: str | list[Message]) -> list[int]:
        from shoestring.data import chat_template

        tokenizer = self.loaded.tokenizer
        if not self.chats and not isinstance(prompt, str):
            prompt = prompt[-1]["content"]
        if isinstance(prompt, str):
            return list(tokenizer(prompt).input_ids)
        try:
            text = tokenizer.apply_chat_template(
                prompt, chat_template=chat_template(tokenizer), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise whatever they like
            raise UsageError(f"The chat template of {self.loaded.ref} refuses the conversation", str(error)) from None
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def write(self, ids: list[int], how: Answering, seed: int) -> Iterator[str]:
        if how.max_new_tokens < 1 or how.temperature < 0 or not 0 < how.top_p <= 1:
            raise UsageError(
                f"max_new_tokens={how.max_new_tokens}, temperature={how.temperature}, top_p={how.top_p} is impossible",
                remedy="max_new_tokens is at least 1, temperature at least 0, top_p above 0 and at most 1",
            )
        if how.json_schema or how.adapter:
            raise UsageError(f"{self.loaded.ref} runs in transformers, where neither JSON schema nor adapter is served")
        if not ids:
            raise UsageError("The prompt is empty", remedy="Write something")
        if self.context and len(ids) >= self.context:
            raise UsageError(
                f"The prompt has {len(ids)} tokens; the model's context is {self.context}", remedy="Shorten the prompt"
            )
        room = min(how.max_new_tokens, self.context - len(ids)) if self.context else how.max_new_tokens
        drawn = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k, "min_p": how.min_p or None}
        # Set even when nothing is drawn: a folder's own generation settings must not have a say.
        options = drawn if how.temperature else dict.fromkeys(drawn)
        options |= {"max_new_tokens": room, "do_sample": how.temperature > 0}
        options |= {"repetition_penalty": how.repetition_penalty}
        return _until(_stream(self.loaded, ids, options, seed), how.stop)

    def close(self) -> None:
        pass


def _until(pieces: Iterator[str], stops: tuple[str, ...]) -> Iterator[str]:
    """Text before the first of `stops`; what may be the beginning of one is held back."""
    held = ""
    with closing(pieces):  # type: ignore[type-var]
        for piece in pieces:
            held += piece
            found = [at for stop in stops if (at := held.find(stop)) >= 0]
            keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
            settled = held[: min(found)] if found else held[: len(held) - keep]
            if settled:
                yield settled
            if found:
                return
            held = held[len(settled) :]
    if held:
        yield held


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

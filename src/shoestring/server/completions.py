"""/v1/completions: text or token ids continued as they are."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoestring.engine.aio import AsyncEngine
from shoestring.engine.request import Delta, Request, Sampling, TokenLogprob
from shoestring.engine.tokenizer import Tokenizer
from shoestring.server.errors import bad
from shoestring.server.logprobs import Offsets, of_completion, of_prompt
from shoestring.server.sampling import compiled, of_format, of_logprobs, of_structured, sampling
from shoestring.server.schema import CompletionRequest
from shoestring.server.service import Service
from shoestring.server.stream import Tail, event, quoted
from shoestring.server.work import Answer, Work

_LONG = 4096  # characters from which tokenising is not done between two answers of others


@dataclass(frozen=True)
class Continuation:
    """Prompts, ready to be continued.

    Attributes:
        echo: what stands before each answer; empty without `echo`.
        offsets: where the tokens of each prompt begin in what stands before its answer; empty where nobody asks.
        prompt_logprobs: alternatives to report with each token of the prompts, apart from those of `echo`.
        silent: only the prompt is wanted, nothing of what follows.
    """

    id: str
    model: str
    prompts: list[list[int]]
    sampling: Sampling
    created: int
    fingerprint: str
    echo: list[str]
    offsets: list[list[int]]
    prompt_logprobs: int | None = None
    silent: bool = False
    usage_in_stream: bool = False
    usage_so_far: bool = False

    @property
    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


async def ids_of(
    tokenizer: Tokenizer, prompts: Sequence[str | list[int]], special: bool | None = None
) -> list[list[int]]:
    """Token ids of texts; ids are left as they are. Text that looks like a special token is text.

    Args:
        special: false leaves out the tokens that this tokenizer begins every text with.
    """

    def encode() -> list[list[int]]:
        whole = special is not False
        return [tokenizer.encode(prompt, whole=whole) if isinstance(prompt, str) else prompt for prompt in prompts]

    size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await asyncio.to_thread(encode) if size > _LONG else encode()


async def prepare(service: Service, engine: AsyncEngine, given: CompletionRequest, request_id: str) -> Continuation:
    """Everything but the computing.

    Raises:
        ApiError: what cannot be served, with the field at fault.
    """
    limits, inner = service.settings, engine.engine
    if len(given.prompt) > limits.max_prompts:
        raise bad("prompt", f"There are {len(given.prompt)} prompts; at most {limits.max_prompts} are read")
    if given.best_of not in (None, given.n or 1):
        raise bad("best_of", "best_of is only supported where it equals n", "unsupported_parameter")
    if given.max_tokens == 0 and not given.echo and given.prompt_logprobs is None:
        raise bad("max_tokens", "max_tokens can be 0 only with echo or prompt_logprobs")
    constraint, param = of_structured(given.structured_outputs, limits), "structured_outputs"
    if form := of_format(given.response_format, limits):
        if constraint is not None:
            raise bad("structured_outputs", "It cannot be combined with response_format")
        constraint, param = form, "response_format"
    await compiled(engine, constraint, param)
    logprobs = of_logprobs("logprobs", given.logprobs, limits)
    prompt_logprobs = of_logprobs("prompt_logprobs", given.prompt_logprobs, limits)
    judged = [wanted for wanted in (prompt_logprobs, logprobs if given.echo else None) if wanted is not None]
    silent = given.max_tokens == 0
    settings = sampling(
        given,
        limits,
        inner.facts.vocab,
        max_tokens=1 if silent else 16 if given.max_tokens is None else given.max_tokens,
        logprobs=logprobs,
        prompt_logprobs=max(judged, default=None),
        constraint=constraint,
    )
    prompts = await ids_of(inner.tokenizer, given.prompt, given.add_special_tokens)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise bad("prompt" if len(prompts) == 1 else f"prompt[{i}]", "The prompt is empty")
        if max(prompt) >= inner.facts.vocab:
            raise bad("prompt", f"Token ids end at {inner.facts.vocab - 1}")
    texts = [""] * len(prompts)
    offsets: list[list[int]] = [[] for _ in prompts]
    if given.echo:
        texts = [
            text if isinstance(text, str) else inner.tokenizer.decode(ids, skip_special=False)
            for text, ids in zip(given.prompt, prompts)
        ]
        if logprobs is not None:
            streams = [inner.tokenizer.stream(skip_special=isinstance(text, str)) for text in given.prompt]
            offsets = [Offsets(stream).of(ids) for stream, ids in zip(streams, prompts)]
    return Continuation(
        id=f"cmpl-{request_id}",
        model=given.model,
        prompts=prompts,
        sampling=settings,
        created=int(time.time()),
        fingerprint=service.fingerprint,
        echo=texts,
        offsets=offsets,
        prompt_logprobs=prompt_logprobs,
        silent=silent,
        usage_in_stream=bool(given.stream_options and given.stream_options.include_usage),
        usage_so_far=bool(given.stream_options and given.stream_options.continuous_usage_stats),
    )


def requests(made: Continuation, adapter: str, client: str, isolation: str) -> list[Request]:
    more: dict[str, Any] = {"adapter": adapter, "client": client, "isolation": isolation, "continues": True}
    return [Request(prompt, made.sampling, **more) for prompt in made.prompts]


def answer(made: Continuation, tokenizer: Tokenizer, found: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
    """A whole `text_completion`. All answers to a prompt share the log-probabilities of the prompt."""
    choices = []
    n = made.sampling.n
    for at, one in enumerate(found):
        i = at // n
        echo, scored = made.echo[i], found[i * n].prompt_logprobs
        wanted, logprobs = made.sampling.logprobs, None
        if wanted is not None:
            tokens = [] if made.silent else one.tokens
            offsets = _offsets(made, tokenizer, i).of(tokens)
            judged: list[TokenLogprob | None] = [*one.logprobs]
            if echo:
                tokens, judged = [*made.prompts[i], *tokens], [*scored, *judged]
                offsets = made.offsets[i] + offsets
            logprobs = of_completion(tokenizer, tokens, judged, wanted, offsets)
        extra = made.prompt_logprobs
        choices.append(
            {
                "index": at,
                "text": echo if made.silent else echo + one.text,
                "logprobs": logprobs,
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
                "prompt_logprobs": None if extra is None else of_prompt(tokenizer, scored, extra),
            }
        )
    return {**made.head, "choices": choices, "usage": _counted(made, usage)}


def _counted(made: Continuation, usage: dict[str, Any]) -> dict[str, Any]:
    """The engine draws one token at least; where none is wanted it is no part of the answer."""
    return {**usage, "completion_tokens": 0, "total_tokens": usage["prompt_tokens"]} if made.silent else usage


def _offsets(made: Continuation, tokenizer: Tokenizer, i: int) -> Offsets:
    """Of an answer to prompt i."""
    return Offsets(tokenizer.stream(after=made.prompts[i]), len(made.echo[i]))


class Events:
    """The same as server-sent events. With `echo` an answer's first event carries its prompt."""

    def __init__(self, made: Continuation, tokenizer: Tokenizer) -> None:
        self._made, self._tokenizer = made, tokenizer
        self._n, self._wanted = made.sampling.n, made.sampling.logprobs
        answers = range(self._n * len(made.prompts))
        head = json.dumps(made.head, separators=(",", ":"))[:-1]
        self._tail = Tail(made.usage_in_stream, made.usage_so_far)
        self._opening = [f'data: {head},"choices":[{{"index":{at},"text":' for at in answers]
        self._plain = ',"logprobs":null,"finish_reason":null}]'
        self._waiting = set(answers) if any(made.echo) else set()
        self._of_prompt: list[list[TokenLogprob | None]] = [[] for _ in made.prompts]
        self._offsets = [_offsets(made, tokenizer, at // self._n) for at in answers]
        self._held: list[tuple[int, Delta]] = []

    def begin(self) -> bytes:
        return b""

    def add(self, at: int, delta: Delta) -> bytes:
        if self._wanted is None and delta.finish_reason is None and at not in self._waiting:
            said = quoted(delta.text) + self._plain + self._end_of(at, delta)
            return (self._opening[at] + said).encode() if delta.text else b""
        self._of_prompt[at // self._n] += delta.prompt_logprobs
        if delta.tokens or delta.text or delta.finish_reason:
            self._held.append((at, delta))  # the first of a further answer comes before the prompt's last part
        lines, still = [], []
        for pair in self._held:
            if self._ready(pair[0]):
                lines.append(self._line(*pair))
            else:
                still.append(pair)
        self._held = still
        return "".join(lines).encode()

    def end(self, work: Work) -> bytes:
        if not self._made.usage_in_stream:
            return b""
        return event({**self._made.head, "choices": [], "usage": _counted(self._made, work.usage())})

    def _ready(self, at: int) -> bool:
        i = at // self._n
        known = len(self._of_prompt[i]) == len(self._made.prompts[i])
        return at not in self._waiting or self._wanted is None or known

    def _line(self, at: int, delta: Delta) -> str:
        made, i = self._made, at // self._n
        text, tokens = delta.text, list(delta.tokens)
        judged: list[TokenLogprob | None] = list(delta.logprobs)
        if made.silent:
            text, tokens, judged = "", [], []
        offsets = self._offsets[at].of(tokens) if self._wanted is not None else []
        if at in self._waiting:
            self._waiting.discard(at)
            text, tokens, offsets = made.echo[i] + text, made.prompts[i] + tokens, made.offsets[i] + offsets
            judged = self._of_prompt[i] + judged
        logprobs = "null"
        if self._wanted is not None and tokens:
            logprobs = json.dumps(of_completion(self._tokenizer, tokens, judged, self._wanted, offsets))
        reason, more = "null", ""
        if delta.finish_reason:
            reason, more = f'"{delta.finish_reason}"', f',"stop_reason":{json.dumps(delta.stop_reason)}'
        end = self._end_of(at, delta)
        return f'{self._opening[at]}{quoted(text)},"logprobs":{logprobs},"finish_reason":{reason}{more}}}]{end}'

    def _end_of(self, at: int, delta: Delta) -> str:
        done = 0 if self._made.silent else delta.usage.completion_tokens
        return self._tail(len(self._made.prompts[at // self._n]), done)

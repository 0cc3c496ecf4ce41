"""What a client asks for and what it gets back: plain data, no torch."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from shoestring.core.errors import UsageError

FinishReason = Literal["stop", "length", "abort", "error"]

_numbers = itertools.count()


@dataclass(frozen=True)
class Constraint:
    """The answer must match: a JSON schema, a regular expression, a grammar (Lark or GBNF), or be any JSON object."""

    kind: Literal["json_schema", "json_object", "regex", "grammar"]
    text: str = ""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop. Ranges are checked where requests come in (`check`).

    Attributes:
        max_tokens: longest answer; None means what the context leaves.
        temperature: 0 always takes the likeliest token.
        top_k: draw only from the k likeliest; 0 means all.
        top_p, min_p, typical_p: nucleus, share of the likeliest token's probability, locally typical mass.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or answer.
        presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens of the answer.
        logit_bias: added to the logits of these token ids.
        seed: None draws one; with a seed the tokens do not depend on what else is in the batch.
        stop: strings that end the answer and are not part of it.
        logprobs: how many alternatives to report with each token; None reports nothing, 0 the token's own.
        prompt_logprobs: the same for the prompt's tokens.
        n: answers wanted; they share the prompt's cache.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    constraint: Constraint | None = None


@dataclass
class Request:
    """One piece of work for the engine.

    Attributes:
        prompt: token ids.
        adapter: name of a loaded adapter; empty for the base model.
        client: whom fairness counts it for.
        isolation: only requests with the same word share cached prefixes.
        priority: smaller goes first.
        embed: no answer is wanted but the mean of the prompt's normed hidden states.
        continues: the answer goes on with the prompt's text, so a space at its beginning is part of it; otherwise it
            is a text of its own.
    """

    prompt: list[int]
    sampling: Sampling = Sampling()
    adapter: str = ""
    client: str = ""
    isolation: str = ""
    priority: int = 0
    embed: bool = False
    continues: bool = False
    id: str = field(default_factory=lambda: f"req-{next(_numbers)}")
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability before temperature and filters, with the likeliest alternatives.

    Attributes:
        rank: 1 for the likeliest token, 2 for the next one.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 1


@dataclass(frozen=True)
class Usage:
    """Counts and times of one request. Times in seconds of the monotonic clock; first_token 0 until there is one."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    arrival: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(frozen=True)
class Delta:
    """What one step added to answer `index` of a request. `text` is settled: no later token can take it back."""

    request_id: str
    index: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage = Usage()
    error: str = ""
    embedding: np.ndarray | None = None  # float32 [hidden], of length 1


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    usage: Usage = Usage()


class RequestError(UsageError):
    """A request that cannot be served. `param` names its field, `code` is a short word as OpenAI's errors have."""

    def __init__(self, what: str, why: str = "", remedy: str = "", *, param: str = "", code: str = "") -> None:
        super().__init__(what, why, remedy)
        self.param, self.code = param, code

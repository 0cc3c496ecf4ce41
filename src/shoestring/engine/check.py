"""Which sampling settings can be served: the ranges of OpenAI's interface, and bounds on what costs time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from shoestring.engine.request import RequestError, Sampling

# What one request may ask for at most, whoever asks; a server's own limits lie below.
MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_ANSWERS, MAX_LOGPROBS = 64, 1024, 4096, 128, 1000
_INT64 = 1 << 63

# (field, lowest, highest, whether the lowest itself is allowed)
_NUMBERS = (
    ("temperature", 0.0, 2.0, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("typical_p", 0.0, 1.0, False),
    ("repetition_penalty", 0.0, 100.0, False),
    ("presence_penalty", -2.0, 2.0, True),
    ("frequency_penalty", -2.0, 2.0, True),
)
_INTEGERS = (
    ("top_k", -1, _INT64 - 1),
    ("min_tokens", 0, _INT64 - 1),
    ("n", 1, MAX_ANSWERS),
)
_OPTIONAL_INTEGERS = (
    ("max_tokens", 1, _INT64 - 1),
    ("seed", -_INT64, _INT64 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """Whether these settings can be served by a model with `vocab` tokens. Constraints are checked when compiled.

    Raises:
        RequestError: a value of the wrong type or outside its range; `param` names the field as OpenAI's API does.
    """
    for name, low, high, inclusive in _NUMBERS:
        value = getattr(sampling, name)
        if not _number(value) or not (low <= value <= high) or (value == low and not inclusive):
            raise _outside(name, value, f"a number from {'' if inclusive else 'above '}{low:g} to {high:g}")
    if sampling.min_p == 1:
        raise _outside("min_p", sampling.min_p, "a number from 0 to below 1")
    for name, least, most in _INTEGERS:
        _check_integer(name, getattr(sampling, name), least, most)
    for name, least, most in _OPTIONAL_INTEGERS:
        if getattr(sampling, name) is not None:
            _check_integer(name, getattr(sampling, name), least, most)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise RequestError(
            f"min_tokens is {sampling.min_tokens}, more than max_tokens, {sampling.max_tokens}", param="min_tokens"
        )
    _check_bias(sampling.logit_bias, vocab)
    _check_stops(sampling.stop)
    for token in sampling.stop_token_ids:
        _check_token("stop_token_ids", token, vocab)
    if sampling.constraint and sampling.ignore_eos:
        raise RequestError(
            "ignore_eos cannot be combined with a constraint",
            "The end of a constrained answer is part of the constraint",
            param="ignore_eos",
        )


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if not _integer(value) or not least <= value <= most:
        raise _outside(name, value, f"a whole number from {least} to {most}")


def _check_bias(biases: Iterable[tuple[int, float]], vocab: int) -> None:
    biases = tuple(biases)
    if len(biases) > MAX_BIASES:
        raise RequestError(
            f"logit_bias has {len(biases)} entries; at most {MAX_BIASES} are allowed", param="logit_bias"
        )
    for token, value in biases:
        _check_token("logit_bias", token, vocab)
        if not _number(value) or not -100 <= value <= 100:
            raise _outside("logit_bias", value, "numbers from -100 to 100")


def _check_stops(stops: Iterable[str]) -> None:
    stops = tuple(stops)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed", param="stop")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise RequestError(f"A stop must be a string of 1 to {MAX_STOP_LENGTH} characters", param="stop")


def _check_token(name: str, token: Any, vocab: int) -> None:
    if not _integer(token) or not 0 <= token < vocab:
        raise _outside(name, token, f"token ids from 0 to {vocab - 1}")


def _number(value: Any) -> bool:
    return _integer(value) or (isinstance(value, float) and math.isfinite(value))


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _outside(name: str, value: Any, allowed: str) -> RequestError:
    # Python refuses to write out very long integers.
    shown = "beyond 64 bits" if _integer(value) and value.bit_length() > 64 else str(value)[:40]
    return RequestError(f"{name} must be {allowed}; it is {shown}", param=name, code="invalid_value")

"""Each setting at, inside and outside its bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoestring.engine.check import check_sampling
from shoestring.engine.request import Constraint, RequestError, Sampling

VOCAB = 100
NAN, INF, HUGE = math.nan, math.inf, 10**5000

ALLOWED: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1, 2.0],
    "top_p": [1e-9, 0.5, 1],
    "min_p": [0, 0.999],
    "typical_p": [0.01, 1.0],
    "repetition_penalty": [0.01, 1, 5.0],
    "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2.0, 0, 2],
    "top_k": [-1, 0, 1, 10**9],
    "n": [1, 128],
    "min_tokens": [0, 5],
    "max_tokens": [None, 1, 10**6],
    "seed": [None, 0, -(2**63), 2**63 - 1],
    "logprobs": [None, 0, 1000],
    "prompt_logprobs": [None, 0, 1000],
    "logit_bias": [(), ((0, -100), (99, 100.0)), ((0, 1.0),) * 4096],
    "stop": [(), ("a", "b", "c", "x" * 1024), ("a",) * 64],
    "stop_token_ids": [(), (0, 99)],
    "constraint": [Constraint("json_object")],
}
REFUSED: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1, NAN, INF, -INF, HUGE, True, "1", None],
    "top_p": [0, -1, 1.1, NAN, None],
    "min_p": [1, 1.0, -0.1, NAN, False],
    "typical_p": [0.0, 1.5, NAN],
    "repetition_penalty": [0, -1.0, INF, NAN],
    "presence_penalty": [-2.1, 2.1, NAN],
    "frequency_penalty": [3, -INF],
    "top_k": [-2, 1.5, HUGE, None, True],
    "n": [0, 129, -1, 1.0, HUGE, True],
    "min_tokens": [-1, 0.5],
    "max_tokens": [0, -5, "ten", 1.0, HUGE],
    "seed": [2**63, -(2**63) - 1, 1.5, HUGE, "x", True],
    "logprobs": [-1, 1001, True, 1.0],
    "prompt_logprobs": [-1, 1001],
    "logit_bias": [((100, 0.0),), ((-1, 0.0),), ((HUGE, 1.0),), ((1, 100.5),), ((1, NAN),), ((0, 1.0),) * 4097],
    "stop": [("",), ("x" * 1025,), ("a",) * 65, (1,)],
    "stop_token_ids": [(100,), (-1,), (1.0,), (2**31,), (2**63,)],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ALLOWED.items() for value in values])
def test_allowed(name: str, value: Any) -> None:
    check_sampling(Sampling(**{name: value}), VOCAB)


@pytest.mark.parametrize("name, place", [(name, i) for name, values in REFUSED.items() for i in range(len(values))])
def test_refused(name: str, place: int) -> None:
    with pytest.raises(RequestError) as caught:
        check_sampling(Sampling(**{name: REFUSED[name][place]}), VOCAB)
    assert caught.value.param == name
    assert len(str(caught.value)) < 200


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(RequestError) as caught:
        check_sampling(Sampling(min_tokens=5, max_tokens=4), VOCAB)
    assert caught.value.param == "min_tokens"
    with pytest.raises(RequestError) as caught:
        check_sampling(Sampling(ignore_eos=True, constraint=Constraint("regex", "a+")), VOCAB)
    assert caught.value.param == "ignore_eos"

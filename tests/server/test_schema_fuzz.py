"""Requests made from /openapi.json: answers have the shape it promises, and none is a failure of the server."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from serving import Server, toy

CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]


@pytest.fixture(scope="module")
def operations() -> Any:
    with toy(request_seconds=10, context=128) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        yield running, [made.ok() for made in schema.get_all_operations()]


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_no_request_fails_the_server(operations: tuple[Server, list[Any]], kind: str) -> None:
    running, found = operations
    assert len(found) > 15
    answers: list[int] = []
    mode = schemathesis.GenerationMode(kind)
    for operation in found:
        if not operation.body and kind == "negative":
            continue
        strategy = operation.as_strategy(generation_mode=mode)
        examples = 60 if operation.path.endswith("completions") else 12

        @seed(1)
        @settings(
            max_examples=examples, deadline=10_000, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=strategy)
        def attempt(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "toy"  # else all that is tested is that there is no such model
            if isinstance(case.body, dict) and case.body.get("stream"):
                case.body["stream"] = False
            answers.append(case.call_and_validate(checks=CHECKS, timeout=15).status_code)

        attempt()
    assert kind == "negative" or answers.count(200) > 20, answers
    running.settled()

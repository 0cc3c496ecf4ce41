from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring import models
from shoestring.core import catalog
from shoestring.core.budget import RESOURCES, Budget, Miss
from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.shape import Shape
from shoestring.core.step import Step
from shoestring.lab import tiny
from shoestring.planner.plan import HOPELESS, MERGE, Candidate, by_verb, plan, refuse_hopeless, relax

FLOOR = 500_000_000
ROOMY = Budget({"storage": 1e12})


@pytest.fixture(scope="module")
def shape() -> Shape:
    return models.shape_of(tiny.model(dtype=torch.bfloat16))


def names(candidates: list[Candidate]) -> list[str]:
    return [c.name for c in candidates]


def test_what_fits_comes_first_and_the_least_compressed_of_it(shape: Shape) -> None:
    found = plan(shape, ROOMY, FLOOR)
    assert found[0].name == "as it is" and all(c.fits for c in found)
    sizes = [c.predicted.storage for c in found]
    assert sizes == sorted(sizes, reverse=True) and len(set(names(found))) == len(found)
    limit = sizes[len(sizes) // 2]
    found = plan(shape, Budget({"storage": limit}), FLOOR)
    fits = [c for c in found if c.fits]
    assert found[: len(fits)] == fits and fits[0].predicted.storage == limit
    misses = found[len(fits) :]
    assert misses and [c.excess for c in misses] == sorted(c.excess for c in misses)
    assert all(c.predicted.storage > limit and c.misses[0].limit == limit for c in misses)
    assert found[-1].name == "as it is"


def test_a_limit_that_no_fixed_setting_keeps_is_told_to_a_method(shape: Shape) -> None:
    smallest = min(c.predicted.storage for c in plan(shape, ROOMY, FLOOR))
    limit = smallest - 2000
    found = plan(shape, Budget({"storage": limit}), FLOOR)
    assert found[0].fits and "within" in catalog.get(found[0].steps[-1].method).words
    assert 0.8 * limit < found[0].predicted.storage <= limit
    assert not plan(shape, Budget({"storage": 1000}), FLOOR)[0].fits, "and none where nothing is as small"


def test_a_miss_is_what_the_prediction_says(shape: Shape) -> None:
    budget = Budget({"storage": 1000, "memory": FLOOR, "time": 1})
    closest = plan(shape, budget, FLOOR)[0]
    assert {m.resource: m.value for m in closest.misses} == closest.predicted.figures()
    assert closest.excess == max(closest.predicted.storage / 1000, closest.predicted.memory / FLOOR)
    assert len(closest.to_json()["misses"]) == 2 and closest.to_json()["predicted"] == closest.predicted.to_json()


def test_training_comes_first_and_is_merged(shape: Shape) -> None:
    found = plan(shape, ROOMY, FLOOR, adapt="auto")
    assert all(c.steps[0].verb == "train" and c.steps[1] == MERGE for c in found)
    default = next(m.name for m in by_verb("train") if m.default)
    assert names(found)[0] == default, "merging is no method and has no settings worth saying"
    plain = {c.predicted for c in plan(shape, ROOMY, FLOOR)}
    assert {c.predicted for c in found} == plain, "a merged adapter costs nothing at work"


def test_compression_by_request(shape: Shape) -> None:
    assert names(plan(shape, ROOMY, FLOOR, compress="none")) == ["as it is"]
    found = plan(shape, ROOMY, FLOOR, compress="int4")
    assert all([s.method for s in c.steps] == ["int4"] for c in found)
    assert len(found) == len(catalog.module("int4").settings())
    found = plan(shape, ROOMY, FLOOR, compress="int8", options={"group_size": 128})
    assert [c.steps for c in found] == [(Step("compress", "int8", {"group_size": 128}),)]


def test_what_a_method_would_leave_as_it_is_makes_no_candidate() -> None:
    sizes = dict(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    strange, usual = (
        models.shape_of(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)))
        for family in ("gpt_oss", "mixtral")
    )
    assert names(plan(strange, ROOMY, FLOOR)) == ["as it is"]
    assert len(plan(usual, ROOMY, FLOOR)) > 1
    with pytest.raises(UsageError, match="gpt_oss model does not fit"):
        plan(strange, ROOMY, FLOOR, compress="int4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"adapt": "int4"}, "int4 does not train. it stands in the room quantizers, whose verb is compress.*lora"),
        ({"compress": "lora"}, "lora does not compress.*Methods that compress: .*int8"),
        ({"adapt": "lorra"}, "unknown method lorra. Did you mean lora"),
        ({"compress": "int4", "options": {"group_size": 7}}, "group_size 7"),
    ],
)
def test_methods_that_cannot(words: dict, message: str, shape: Shape) -> None:
    with pytest.raises(UsageError, match=message):
        plan(shape, ROOMY, FLOOR, **words)


def test_by_verb_asks_the_rooms() -> None:
    for verb in ("train", "compress"):
        found = list(by_verb(verb))
        assert found and all(catalog.contract(m.room).VERB == verb for m in found)
    assert list(by_verb("sing")) == []
    assert sum(m.default for m in by_verb("train")) == 1


def test_only_the_hopeless_is_refused(shape: Shape) -> None:
    least = min(c.predicted.storage for c in plan(shape, ROOMY, FLOOR, compress="int4"))
    near, far = (Budget({"storage": least / (HOPELESS + d)}) for d in (-0.01, 0.01))
    refuse_hopeless(plan(shape, near, FLOOR, compress="int4"), near)
    with pytest.raises(DoesNotFit, match="nothing fits storage=.*where the limit is.*Relax storage"):
        refuse_hopeless(plan(shape, far, FLOOR, compress="int4"), far)


@given(st.lists(st.tuples(st.sampled_from(["storage", "memory", "train.memory"]), st.floats(10, 1e13)), min_size=1,
                unique_by=lambda pair: pair[0]))  # fmt: skip
def test_relax_is_a_budget_that_is_met(values: list[tuple[str, float]]) -> None:
    misses = [Miss(resource, value, value / 2) for resource, value in values]
    relaxed = Budget.parse(relax(misses))
    assert set(relaxed.limits) == {resource for resource, _ in values}
    assert not list(relaxed.misses(dict(values)))
    assert all(relaxed.limits[resource] <= 1.2 * value + 1 for resource, value in values), "no more than is needed"


@pytest.mark.parametrize("value", [0.0123, 0.5, 1.5, 7.9, 9.99, 10.0, 99.5])
@pytest.mark.parametrize("resource", [r for r, (unit, *_) in RESOURCES.items() if unit != "B"])
def test_relax_is_met_by_small_figures_too(resource: str, value: float) -> None:
    relaxed = Budget.parse(relax([Miss(resource, value, value / 2)]))
    assert not list(relaxed.misses({resource: value})), relaxed
    assert relaxed.limits[resource] <= 1.2 * value

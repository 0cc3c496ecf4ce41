"""What is recommended: every way to run a model, priced, sorted, and bounded by the memory's bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring import models
from shoestring.core import catalog, survey
from shoestring.core.errors import UsageError
from shoestring.jobs import recommend as job
from shoestring.jobs.compress import CompressRequest, compress
from shoestring.jobs.recommend import RecommendRequest, recommend
from shoestring.lab import tiny_mixture
from shoestring.planner.plan import by_verb

GIGABYTE = 1e9


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "engine_floor", lambda: 50_000_000)


@pytest.fixture
def ways(tiny: Path, floor: None) -> list[dict[str, Any]]:
    found = recommend(RecommendRequest(str(tiny), memory="1GB", bandwidth="1GB/s"))
    assert (found["memory"], found["bandwidth"]) == (GIGABYTE, GIGABYTE)
    return list(found["ways"])


def way(ways: list[dict[str, Any]], method: str, **options: Any) -> dict[str, Any]:
    return next(w for w in ways if w["method"] == method and options.items() <= w["options"].items())


def test_every_method_that_fits_the_model_is_there_with_each_of_its_settings(
    tiny: Path, ways: list[dict[str, Any]]
) -> None:
    shape = models.shape_of(tiny)
    expected = {("", ())}
    for method in by_verb("compress"):
        module = catalog.module(method.name)
        for settings in module.settings():
            try:
                module.price(shape, settings)
            except UsageError:
                continue
            expected.add((method.name, tuple(settings.items())))
    assert {(w["method"], tuple(w["options"].items())) for w in ways} == expected
    assert len(ways) == len(expected) > 10


def test_bytes_are_the_methods_prices_and_speed_is_bandwidth_over_what_a_token_reads(
    tiny: Path, ways: list[dict[str, Any]]
) -> None:
    shape = models.shape_of(tiny)
    plain = way(ways, "")
    assert plain["storage"] == shape.storage and plain["bits"] == pytest.approx(32), "it is stored in float32"
    for one in ways:
        assert one["tokens_per_s"] == pytest.approx(GIGABYTE / one["read"])
        if one["method"]:
            priced = catalog.module(one["method"]).price(shape, one["options"]).shape
            assert one["storage"] == priced.storage
            assert one["bits"] == pytest.approx(8 * (priced.storage - priced.other_files) / shape.parameters)
            assert one["needs"] == survey.needs(catalog.get(one["method"]))
    packer = next(m.name for m in by_verb("compress") if m.default)
    assert way(ways, packer)["read"] < plain["read"] and way(ways, packer)["memory"] < plain["memory"]


def test_what_is_packed_for_files_alone_runs_as_bfloat16(ways: list[dict[str, Any]]) -> None:
    plain, coded, fixed = way(ways, ""), way(ways, "dfloat11", coding="huffman"), way(ways, "dfloat11", coding="fixed")
    assert coded["storage"] < plain["storage"]
    assert coded["read"] == pytest.approx(plain["read"] / 2, rel=0.01), "the tiny model is stored in float32"
    assert fixed["read"] < coded["read"]


def test_an_array_that_all_layers_read_is_read_for_each_of_them(ways: list[dict[str, Any]]) -> None:
    plain, shared = way(ways, ""), way(ways, "stable_rps", kept=0.1)
    assert shared["storage"] < plain["storage"] / 2 and shared["memory"] < plain["memory"]
    assert shared["read"] == pytest.approx(plain["read"], rel=0.1)


def test_what_fits_comes_first_and_keeps_most(tiny: Path, floor: None, ways: list[dict[str, Any]]) -> None:
    assert all(one["fits"] for one in ways)
    assert [one["bits"] for one in ways] == sorted((one["bits"] for one in ways), reverse=True)
    plain = way(ways, "")
    found = recommend(RecommendRequest(str(tiny), memory=f"{plain['memory'] - 1}B", bandwidth="1GB"))["ways"]
    fits = [one["fits"] for one in found]
    assert fits == sorted(fits, reverse=True) and True in fits and not way(found, "")["fits"]
    misses = [one["memory"] for one in found if not one["fits"]]
    assert misses == sorted(misses) and all(one["memory"] < plain["memory"] for one in found if one["fits"])


def test_bandwidth_is_measured_when_it_is_not_given(tiny: Path, floor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def bandwidth(threads: int) -> float:
        asked.append(threads)
        return 7e9

    monkeypatch.setattr(job, "bandwidth", bandwidth)
    assert recommend(RecommendRequest(str(tiny), memory="1GB", threads=3))["bandwidth"] == 7e9
    assert asked == [3]


def test_a_mixture_has_ways_of_its_own_and_those_that_cannot_be_are_passed_over(tmp_path: Path, floor: None) -> None:
    tiny_mixture.model(hidden_size=32, intermediate_size=32).save_pretrained(tmp_path)
    ways = recommend(RecommendRequest(str(tmp_path), memory="1GB", bandwidth="1GB"))["ways"]
    plain, fewer = way(ways, ""), way(ways, "expert_pruning")
    assert fewer["storage"] < plain["storage"] and plain["fits"]
    # Two of four experts work on a token.
    assert 0.5 < plain["read"] / plain["storage"] < 0.8
    # Latent experts save nothing where experts are as wide as the model: who would be offered a larger one?
    smaller = [w for w in ways if w["method"] and catalog.get(w["method"]).room == "architectures"]
    assert all(w["storage"] < plain["storage"] for w in smaller)


def test_nobody_is_offered_what_a_family_cannot_get(tmp_path: Path, floor: None) -> None:
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    offered = {w["method"] for w in recommend(RecommendRequest(str(tmp_path), memory="1GB", bandwidth="1GB"))["ways"]}
    rebuild = {m.name for m in by_verb("compress") if m.room in ("architectures", "pruners")}
    assert not offered & rebuild and {"int4", "mixed", "ptqtp"} < offered
    for method in sorted(rebuild):
        with pytest.raises(UsageError, match="gemma3_text"):
            compress(CompressRequest(str(tmp_path), method), out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [({"memory": "much"}, "memory"), ({"bandwidth": "20GB/h"}, "bandwidth"), ({"bandwidth": "20"}, "no unit"),
     ({"threads": 0}, "threads"), ({"threads": 100_000}, "threads"), ({"memory": ""}, "memory"),
     ({"bandwidth": "/s"}, "bandwidth")],
)  # fmt: skip
def test_quantities_that_are_none(tiny: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        recommend(RecommendRequest(str(tiny), **{"memory": "1GB", "bandwidth": "1GB", **given}))

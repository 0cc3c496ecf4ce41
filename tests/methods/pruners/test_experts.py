"""Experts that are taken out, joined, and thinned: what stays the same, and what is best on the calibration text."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from passes import logits_of
from shoestring import models
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.kernels import formats, ops
from shoestring.kernels.formats import _rows, sparse
from shoestring.lab import tiny
from shoestring.methods.pruners import _experts, expert_merging, expert_pruning
from shoestring.models import packed, surgery
from shoestring.models.anatomy import mixtures

ROWS = [
    {"input_ids": row} for row in torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()
]


def mixture(**changes: Any) -> Any:
    model: Any = _experts.base(**{"num_local_experts": 6, "initializer_range": 0.2, **changes})
    return model


def loaded(model: Any, folder: Path) -> models.Loaded:
    return models.Loaded(model, None, folder, "tiny", "causal")


def work(folder: Path) -> Work:
    return Work(Ledger(), folder)


# ---------------------------------------------------------------- taking out


def test_the_search_finds_the_best_of_all_subsets_and_beats_frequency() -> None:
    model = mixture()
    seen, _ = _experts.watched(model, ROWS, 128)
    for s in seen:
        best = expert_pruning.search(model, s, 4, 1000)
        errors = {c: expert_pruning.error(model, s, list(c)) for c in combinations(range(6), 4)}
        assert errors[tuple(best)] == min(errors.values())
        frequent = sorted(s.load.argsort(descending=True)[:4].tolist())
        greedy = expert_pruning.search(model, s, 4, 1)
        assert errors[tuple(best)] <= errors[tuple(frequent)] and errors[tuple(greedy)] < max(errors.values())
        assert expert_pruning.error(model, s, list(range(6))) == 0.0


def test_the_pruned_layer_is_what_was_weighed(tmp_path: Path) -> None:
    model = mixture()
    result = expert_pruning.prune(
        loaded(model, tmp_path),
        expert_pruning.ExpertPruningOptions(sparsity=1 / 3, tokens=128),
        ROWS,
        [],
        work(tmp_path),
    )
    seen, _ = _experts.watched(model, ROWS, 128)
    for s, own, kept in zip(seen, mixtures(result.model), result.facts["kept"]):
        found = _experts.layer_output(result.model, own, s.inputs)
        assert torch.allclose(found, _experts.layer_output(model, s.mixture, s.inputs, kept), atol=1e-6)
    assert result.model.config.num_local_experts == 4 and type(result.model) is type(model)
    assert len(result.facts["routing_entropy"]) == 2


def test_layers_lose_experts_where_it_shows_least(tmp_path: Path) -> None:
    model = mixture()
    with torch.no_grad():  # in the second layer four experts are one
        for name in mixtures(model)[1].tensors:
            weight = model.get_submodule(mixtures(model)[1].experts).get_parameter(name)
            weight[1:4] = weight[0]
    options = expert_pruning.ExpertPruningOptions(sparsity=1 / 3, uneven=True, tokens=128)
    result = expert_pruning.prune(loaded(model, tmp_path), options, ROWS, [], work(tmp_path))
    first, second = result.facts["kept"]
    assert len(first) + len(second) == 8 and len(second) < len(first)
    result.model.save_pretrained(tmp_path / "small")
    again = models.load(tmp_path / "small").model
    assert torch.equal(tiny.logits(again), tiny.logits(result.model))


def test_weights_go_by_size_times_gated_input() -> None:
    model = mixture()
    seen, _ = _experts.watched(model, ROWS, 128)
    before = model.get_submodule(seen[0].mixture.experts).gate_up_proj[0].clone()
    share = expert_pruning.zero_weights(model, seen, 0.25)
    after = model.get_submodule(seen[0].mixture.experts).gate_up_proj[0]
    assert share == 0.25 and ((after == 0).sum(1) == 16).all()
    with torch.no_grad():
        _, gates, choices = model.get_submodule(seen[0].mixture.router)(seen[0].inputs)
    token, place = torch.where(choices == 0)
    hint = (seen[0].inputs[token] * gates[token, place, None]).norm(dim=0)
    score = before.abs() * hint
    assert (score.masked_fill(after != 0, -1).amax(1) <= score.masked_fill(after == 0, 1e9).amin(1)).all()


def test_two_of_four() -> None:
    mask = expert_pruning.lowest(torch.tensor([[1.0, 4, 3, 2, 8, 5, 6, 7]]), 0.5, "2:4")
    assert mask.tolist() == [[True, False, False, True, False, True, True, False]]


def test_experts_thinned_to_two_of_four_take_nine_bits_a_weight() -> None:
    model = mixture().bfloat16()
    seen, _ = _experts.watched(model, ROWS, 128)
    assert expert_pruning.zero_weights(model, seen, 0.0, "2:4") == 0.5
    for s in seen:
        for name in s.mixture.tensors:
            for matrix in model.get_submodule(s.mixture.experts).get_parameter(name).detach():
                rows, columns = matrix.shape
                data = sparse.encode(matrix)
                # Two numbers of four and a bit for each place, which is as much as two places of two bits.
                beside = 8 * (_rows.HEAD + 4 * (rows + 1) + 64)
                assert 8 * len(data) - beside == rows * (8 * columns + 64 * -(-columns // 64))
                assert torch.equal(sparse.decode(data, columns), matrix)


def test_the_engine_runs_two_of_four_as_it_is_stored(tmp_path: Path) -> None:
    if not ops.backend()["native"]:
        pytest.skip("no native library in this installation")
    from shoestring.engine.native_runner import NativeRunner

    model = tiny.model(hidden_size=64, intermediate_size=128).bfloat16()
    layers = {n: m for n, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    for layer in layers.values():
        layer.weight.data.masked_fill_(expert_pruning.lowest(layer.weight.float().abs(), 0.0, "2:4"), 0)
    model.save_pretrained(tmp_path / "plain")
    for name, layer in layers.items():
        data = sparse.encode(layer.weight.detach())
        made = packed.linear(formats.parse(f"sparse/{len(data)}"), {"weight": data}, layer.in_features)
        made.rows = made.out_features = layer.out_features
        surgery.replace_module(model, name, made)
    packed.mark(model)
    model.save_pretrained(tmp_path / "sparse")
    runners = [NativeRunner(tmp_path / name, threads=1) for name in ("plain", "sparse")]
    assert np.array_equal(*(logits_of(runner, ROWS[0]["input_ids"]) for runner in runners))
    saved = sum(layer.weight.numel() * 2 - sparse.size(*layer.weight.shape, layer.weight.numel() // 2)
        for layer in layers.values())  # fmt: skip
    assert runners[0].facts.weight_bytes - runners[1].facts.weight_bytes == saved > 0


# ---------------------------------------------------------------- joining


def test_an_expert_and_its_shuffled_copy_join_without_loss_when_aligned() -> None:
    torch.manual_seed(0)
    wide, narrow, order = torch.randn(2 * 24, 16), torch.randn(16, 24), torch.randperm(24)
    both = {
        "gate_up_proj": torch.stack([wide, wide[torch.cat([order, order + 24])]]),
        "down_proj": torch.stack([narrow, narrow[:, order]]),
    }
    x = torch.randn(50, 16)

    def output(tensors: Any, expert: int) -> torch.Tensor:
        gate, up = (x @ tensors["gate_up_proj"][expert].T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ tensors["down_proj"][expert].T

    assert torch.allclose(output(both, 0), output(both, 1), atol=1e-4)
    off = {}
    for align in (True, False):
        options = expert_merging.ExpertMergingOptions(align=align)
        made = expert_merging.joint(both, [3.0, 2.0], [[0, 1]], options)
        off[align] = float((output(made, 0) - output(both, 0)).norm() / output(both, 0).norm())
    assert off[True] < 1e-5 and off[False] > 0.5


def test_a_model_of_shuffled_copies_is_joined_without_loss(tmp_path: Path) -> None:
    for alike in expert_merging.LIKENESS:
        model = mixture(num_local_experts=4)
        with torch.no_grad():
            for m in mixtures(model):
                experts, router = model.get_submodule(m.experts), model.get_submodule(m.router)
                order = torch.randperm(96)
                experts.gate_up_proj[2:] = experts.gate_up_proj[:2][:, torch.cat([order, order + 96])]
                experts.down_proj[2:] = experts.down_proj[:2][:, :, order]
                router.weight[2:] = router.weight[:2] * 0.9 + 0.01 * torch.randn(2, 64)
        options = expert_merging.ExpertMergingOptions(alike=alike, tokens=128)
        result = expert_merging.prune(loaded(model, tmp_path), options, ROWS, [], work(tmp_path))
        assert result.facts["groups"] == [[[0, 2], [1, 3]]] * 2, alike
        assert torch.allclose(tiny.logits(result.model), tiny.logits(model), atol=1e-4)


def test_weights_of_the_average_are_how_many_tokens_met_each() -> None:
    tensors = {"gate_up_proj": torch.stack([torch.zeros(4, 2), torch.ones(4, 2)]), "down_proj": torch.zeros(2, 2, 2)}
    for weighting, wanted in ((True, 0.25), (False, 0.5)):
        options = expert_merging.ExpertMergingOptions(weighting=weighting, align=False)
        made = expert_merging.joint(tensors, [30.0, 10.0], [[0, 1]], options)
        assert torch.allclose(made["gate_up_proj"], torch.tensor(wanted))


def test_distillation_brings_a_dense_layer_nearer(tmp_path: Path) -> None:
    losses = {}
    for steps in (0, 12):
        model = mixture(num_local_experts=4)
        options = expert_merging.ExpertMergingOptions(sparsity=0.75, tokens=128, distil=steps, distil_rate=3e-3)
        result = expert_merging.prune(loaded(model, tmp_path), options, ROWS, [], work(tmp_path))
        assert {m.count for m in mixtures(result.model)} == {1}
        ids = torch.tensor([row["input_ids"] for row in ROWS])
        log, target = (tiny.logits(m, ids).log_softmax(-1) for m in (result.model, model))
        losses[steps] = torch.nn.functional.kl_div(log, target, log_target=True, reduction="sum").item()
    assert losses[12] < 0.9 * losses[0], losses


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a token meets 2"):
        expert_pruning.prune(
            loaded(mixture(), tmp_path), expert_pruning.ExpertPruningOptions(sparsity=0.9), ROWS, [], work(tmp_path)
        )
    joined = expert_merging.prune(
        loaded(mixture(), tmp_path), expert_merging.ExpertMergingOptions(tokens=64), ROWS, [], work(tmp_path)
    ).model
    with pytest.raises(UsageError, match="joined already"):
        expert_pruning.prune(
            loaded(joined, tmp_path), expert_pruning.ExpertPruningOptions(tokens=64), ROWS, [], work(tmp_path)
        )
    for wrong in ({"way": "x"}, {"uneven": True, "way": "mass"}, {"pattern": "4:2", "way": "weights"}, {"tokens": 0}):
        with pytest.raises(UsageError):
            expert_pruning.ExpertPruningOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="groups of 5"):
        expert_pruning.lowest(torch.ones(2, 8), 0.5, "2:5")
    shape = models.shape_of(mixture())
    for module in (expert_pruning, expert_merging):  # what is refused when it is done has a price all the same
        assert module.price(shape, {"sparsity": 0.99}).shape.parameters < shape.parameters

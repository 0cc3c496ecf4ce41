from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from shoestring import models
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.lab import tiny, tiny_mixture

MOLE = catalog.module("mole")


def rows(count: int = 8, length: int = 12) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny.batch(count, length).tolist()]


def converted(base: Any = None, **options: Any) -> Any:
    return MOLE.convert(base or MOLE.base().eval(), MOLE.MoLEOptions(**options), rows())


def with_common_space(latent: int) -> Any:
    """A mixture whose experts are A^i B with one B, for gate and up each."""
    base = MOLE.base().eval()
    for _, experts in MOLE.experts_of(base):
        count, wide, hidden = experts.gate_up_proj.shape
        for part in experts.gate_up_proj.data.chunk(2, 1):
            part.copy_(torch.randn(count, wide // 2, latent) @ torch.randn(latent, hidden) * 0.02)
    return base


# ---------------------------------------------------------------- the algebra


def test_experts_with_a_common_row_space_come_back() -> None:
    torch.manual_seed(0)
    base = with_common_space(20)
    made = converted(base, latent_dim=20)
    torch.testing.assert_close(tiny.logits(made.model), tiny.logits(base), atol=1e-5, rtol=1e-5)
    assert all(layer[part]["kept"] > 1 - 1e-10 for layer in made.facts["layers"] for part in ("gate", "up"))


@pytest.mark.parametrize("latent", [1, 10, 24, 40])
def test_the_error_is_the_sum_of_what_is_left_out(latent: int) -> None:
    weights = torch.randn(4, 24, 64, dtype=torch.float64)
    made = MOLE.factor(weights, latent)
    sigma = torch.linalg.svdvals(weights.flatten(0, 1))
    error = (made.own @ made.shared - weights).square().sum()
    torch.testing.assert_close(error, sigma[latent:].square().sum())
    torch.testing.assert_close(torch.tensor(made.kept).double(), 1 - error / weights.square().sum())
    torch.testing.assert_close(made.shared @ made.shared.T, torch.eye(latent, dtype=torch.float64))
    assert made.values.sum() == pytest.approx(1)


def test_own_matrices_come_from_the_whole_ones() -> None:
    """Taking them from what the first phase cut would be worse."""
    torch.manual_seed(0)
    weights = torch.randn(4, 24, 20).double() @ torch.randn(20, 64).double()
    made = MOLE.factor(weights, 20, rank=8)
    u, sigma, v = torch.linalg.svd(weights, full_matrices=False)
    cut = (u[..., :8] * sigma[..., None, :8]) @ v[..., :8, :]

    def error(own: torch.Tensor) -> float:
        return float((own @ made.shared - weights).square().sum() / weights.square().sum())

    assert error(made.own) < 0.2 * error(cut @ made.shared.T)


def test_weighting_serves_the_inputs_that_occur() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 24, 64, generator=draw).double()
    x = (torch.randn(500, 12, generator=draw) @ torch.randn(12, 64, generator=draw)).double()
    x += 0.1 * torch.randn(500, 64, generator=draw).double()

    def error(made: Any) -> float:
        wrong = (made.own @ made.shared - weights) @ x.T
        return float(wrong.square().sum() / (weights @ x.T).square().sum())

    assert error(MOLE.factor(weights, 24, moment=x.T @ x)) < 0.1 * error(MOLE.factor(weights, 24))


def test_a_new_model_varies_as_the_family_does() -> None:
    config = MOLE.MODELS[0][0](
        hidden_size=256, intermediate_size=64, num_local_experts=8, num_hidden_layers=1, vocab_size=64, latent_dim=48,
        num_attention_heads=4, num_key_value_heads=4, factor_down=True,
    )  # fmt: skip
    torch.manual_seed(0)
    experts = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    for product in (
        experts.own_gate @ experts.shared_gate,
        experts.own_up @ experts.shared_up,
        experts.shared_down @ experts.own_down,
    ):
        assert product.std().item() == pytest.approx(config.initializer_range, rel=0.05)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_parameters_are_as_the_formula_says(group: int, down: bool) -> None:
    made = converted(experts_per_group=group, latent_dim=20, factor_down=down, allow_growth=True)
    n, m, r, count = 64, 24, 20, 4
    want = count * 2 * m * r + count // group * 2 * r * n
    want += count * r * m + count // group * n * r if down else count * m * n
    for _, module in made.model.named_modules():
        if isinstance(module, MOLE.LatentExperts):
            assert sum(p.numel() for p in module.parameters()) == want == module.sizes.parameters
    assert made.facts["after"] == 2 * want and made.facts["before"] == 2 * 3 * count * m * n


class Counting(torch.overrides.TorchFunctionMode):
    """Counts products by the shape of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.shapes.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def test_the_shared_product_is_computed_once_a_group() -> None:
    experts = converted(experts_per_group=4).model.model.layers[0].mlp.experts
    routes = torch.tensor([[0, 1], [1, 2], [3, 0]])
    with Counting() as count, torch.no_grad():
        got = experts(x := torch.randn(3, 64), routes, torch.full((3, 2), 0.5))
    assert count.shapes.count((64, 24)) == 2, "gate and up, for all three tokens and all four experts"
    assert count.shapes.count((24, 24)) == 8 and count.shapes.count((24, 64)) == 4
    want = torch.zeros(3, 64)
    for token in range(3):
        for expert in routes[token].tolist():
            gate = experts.own_gate[expert] @ experts.shared_gate[0] @ x[token]
            up = experts.own_up[expert] @ experts.shared_up[0] @ x[token]
            want[token] += 0.5 * experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
    torch.testing.assert_close(got, want.detach(), atol=1e-6, rtol=1e-4)


def test_groups_without_tokens_do_not_run() -> None:
    experts = converted(experts_per_group=2, allow_growth=True).model.model.layers[0].mlp.experts
    with Counting() as count, torch.no_grad():
        experts(torch.randn(3, 64), torch.tensor([[2, 3]] * 3), torch.full((3, 2), 0.5))
    assert count.shapes.count((64, 24)) == 2


def test_a_factored_down_sums_before_its_shared_product() -> None:
    torch.manual_seed(0)
    base = MOLE.base().eval()
    for _, experts in MOLE.experts_of(base):
        for part in experts.gate_up_proj.data.chunk(2, 1):
            part.copy_(torch.randn(4, 24, 24) @ torch.randn(24, 64) * 0.02)
        experts.down_proj.data = torch.randn(64, 24) @ torch.randn(4, 24, 24) * 0.02
    made = converted(base, factor_down=True).model
    torch.testing.assert_close(tiny.logits(made), tiny.logits(base), atol=1e-5, rtol=1e-4)
    experts = made.model.layers[0].mlp.experts
    with Counting() as count, torch.no_grad():
        experts(torch.randn(3, 64), torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.full((3, 2), 0.5))
    assert count.shapes.count((24, 64)) == 1


def test_routing_is_what_it_was() -> None:
    base, x = MOLE.base().eval(), torch.randn(7, 64)
    gate = converted(base).model.model.layers[1].mlp.gate
    assert all(map(torch.equal, gate(x), base.model.layers[1].mlp.gate(x)))


def test_another_family(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=tiny.VOCAB, hidden_size=64, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=6, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    base = OlmoeForCausalLM(config).eval()
    same = converted(base, **MOLE.NEUTRAL).model
    torch.testing.assert_close(tiny.logits(same), tiny.logits(base), atol=1e-5, rtol=1e-4)
    made = converted(base, experts_per_group=3).model
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.experts_per_group == 3 and torch.equal(tiny.logits(again), tiny.logits(made))


# ---------------------------------------------------------------- converting


def test_the_spectrum_says_what_other_sizes_would_lose(tmp_path: Path) -> None:
    facts = converted().facts
    layer = facts["layers"][0]
    told = layer["up"]["spectrum"]
    assert list(told) == ["8", "16", "24", "32", "40", "48", "56", "64"] and told["64"] == 0
    assert told["24"] == pytest.approx(1 - layer["up"]["kept"], abs=1e-5)
    assert sorted(told.values(), reverse=True) == list(told.values())
    json.dumps(facts)


def test_independent_experts_keep_little() -> None:
    """m / n of the energy and a little more: a warning, not a success."""
    weights = torch.randn(64, 24, 64, generator=torch.Generator().manual_seed(0))
    assert 24 / 64 < MOLE.factor(weights, 24).kept < 24 / 64 + 0.1


def test_more_experts_a_group_keep_less() -> None:
    kept = [converted(experts_per_group=k, allow_growth=True).facts["layers"][0]["gate"]["kept"] for k in (1, 2, 4)]
    assert kept[0] == pytest.approx(1) and kept[0] > kept[1] > kept[2]


def test_healing_trains_the_experts_alone(tmp_path: Path) -> None:
    base = MOLE.base().eval()
    made = converted(base)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    work = Work(Ledger(), tmp_path, training={"learning_rate": 1e-2, "max_steps": 3, "save_steps": 0})
    facts = MOLE.heal(made, base, MOLE.MoLEOptions(), rows(), [], work)
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert facts["steps"] == 3 and moved and all(".experts." in name for name in moved)
    assert {n for n in before if ".experts." in n} == moved
    assert all(p.requires_grad for p in made.model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts_per_group": 3}, "4 experts do not make groups of 3"),
        ({"experts_per_group": 1, "latent_dim": 30, "allow_growth": True}, "latent_dim 30 is more than the 24"),
        ({"latent_dim": 65, "allow_growth": True}, "latent_dim 65 is more than the 64"),
        ({"experts_per_group": 1}, "would not save parameters"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        converted(**options)


@pytest.mark.parametrize("options", [{"experts_per_group": 0}, {"latent_dim": -1}, {"rank": 2.5}])
def test_values_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        MOLE.MoLEOptions(**options)


def test_the_weighted_conversion_needs_text() -> None:
    with pytest.raises(UsageError, match="--data"):
        MOLE.convert(MOLE.base(), MOLE.MoLEOptions(weighted=True), [])


def test_the_weighted_conversion_is_closer_on_its_text() -> None:
    """The embeddings of a tiny model span few directions, so it has much to gain."""
    base = MOLE.base().eval()
    error = {
        weighted: (tiny.logits(converted(base, weighted=weighted).model) - tiny.logits(base)).norm()
        for weighted in (False, True)
    }
    assert error[True] < error[False]


def test_settings_that_save_nothing_have_no_price() -> None:
    """So that nobody is offered them; who wants them all the same says so."""
    shape = models.shape_of(tiny_mixture.model(hidden_size=32, intermediate_size=96, tie_word_embeddings=True))
    with pytest.raises(UsageError, match="would not save parameters"):
        MOLE.price(shape, {"experts_per_group": 2})
    grown = MOLE.price(shape, {"experts_per_group": 2, "latent_dim": 32, "allow_growth": True}).shape
    assert grown.parameters > shape.parameters


def test_flops_are_those_of_active_parts() -> None:
    base = MOLE.base()
    before = models.shape_of(base)
    after = MOLE.price(before, {"experts_per_group": None}).shape
    spent = {w.name.rpartition(".")[2]: w.used for w in after.of("expert")}
    assert spent == {"own_gate": 0.5, "own_up": 0.5, "shared_gate": 1.0, "shared_up": 1.0, "down_proj": 0.5}

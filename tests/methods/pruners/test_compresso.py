"""Compresso: gates, their price, the exact cut, and a run that goes on where it was killed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring import models, training
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.data.corpus import Corpus, Example
from shoestring.lab import tiny
from shoestring.methods.pruners import _gates, _shared, compresso
from shoestring.methods.pruners._gates import Decision, Gates, gated
from shoestring.models import uneven
from shoestring.models.anatomy import inspect

ROWS = [{"input_ids": row, "labels": row} for row in tiny.batch(16, 16).tolist()]


def stirred(gates: Gates, seed: int = 0) -> Gates:
    """Gates as training may leave them: some sure, some in doubt, some closed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for gate in gates.gates():
            gate.copy_(torch.randn(len(gate)) * 4).clamp_(-_gates.SURE, _gates.SURE)
    return gates


def pruned(
    model: Any, folder: Path, *, resume: bool = False, steps: int = 8, save_steps: int = 0, **options: Any
) -> _shared.Pruned:
    torch.manual_seed(0)
    settings = {"max_steps": steps, "per_device_train_batch_size": 2, "save_steps": save_steps, "learning_rate": 1e-3}
    work = Work(Ledger(), folder, training=settings, resume=resume)
    loaded = models.Loaded(model, None, folder, "tiny", "causal")
    return compresso.prune(loaded, compresso.CompressoOptions(**options), ROWS, [], work)


# ---------------------------------------------------------------- gates


def test_how_often_a_gate_is_open_is_what_the_formula_says() -> None:
    torch.manual_seed(0)
    for a in (-3.0, -1.0, 0.0, 2.0):
        drawn = _gates.draw(torch.full((40_000,), a))
        assert (drawn > 0).float().mean().item() == pytest.approx(float(_gates.likely(torch.tensor(a))), abs=0.01)
        assert drawn.min() >= 0 and drawn.max() <= 1
    assert float(_gates.likely(torch.tensor(0.5))) == pytest.approx(
        1 / (1 + math.exp(-(0.5 - 2 / 3 * math.log(0.1 / 1.1))))
    )


def test_gates_start_open_and_within_reach_of_a_gradient() -> None:
    gates = Gates(uneven.sizes(tiny.model()), 0.2, hidden=True)
    for gate in gates.gates():
        assert gate.max() <= math.log(100) + 1e-6 and gate.min() > 4.4
    loss = gates.expected_sparsity()
    loss.backward()
    assert all(gate.grad is not None and gate.grad.abs().min() > 0 for gate in gates.gates())


def test_a_gradient_of_the_language_model_reaches_the_gates() -> None:
    model = tiny.model().train()
    gates = Gates(uneven.sizes(model), 0.2, hidden=True)
    with torch.no_grad():
        for gate in gates.gates():
            gate.fill_(0.0)
    with gated(model, inspect(model), gates):
        model(**tiny.inputs(model)).loss.backward()
    for gate in gates.gates():
        assert gate.grad is not None and gate.grad.abs().sum() > 0


def test_draws_differ_from_step_to_step_and_settled_gates_do_not() -> None:
    model = tiny.model()
    gates = stirred(Gates(uneven.sizes(model), 0.2))
    with gated(model, inspect(model), gates):
        model.train()
        first, second = (model(tiny.batch()).logits for _ in range(2))
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(tiny.logits(model), tiny.logits(model))
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.model())), "the hooks are left behind"


def test_as_many_close_as_are_expected_to_and_the_smallest_do() -> None:
    gates = torch.tensor([3.0, -2.0, 0.5, -4.0, -3.0])
    expected = round(5 - float(_gates.likely(gates).sum()))
    z = _gates.settled(gates)
    assert expected == 2 and (z == 0).tolist() == [False, False, False, True, True]
    assert torch.allclose(z[:3], torch.sigmoid(0.8 * gates[:3] / (2 / 3))), "the soft values stay as multipliers"
    assert 0 < z[1] < 0.5


# ---------------------------------------------------------------- size and price


@pytest.mark.parametrize("hidden", [False, True])
def test_the_expected_size_with_sure_gates_is_the_size_of_the_sliced_model(hidden: bool) -> None:
    model = tiny.model(num_hidden_layers=3)
    gates = stirred(Gates(uneven.sizes(model), 0.2, hidden=hidden))
    with torch.no_grad():
        for gate in gates.gates():
            gate.copy_(torch.where(gate > 0, 60.0, -60.0))
        gates.groups[0].fill_(60.0)
    before = gates.sizes.weights
    expected = gates.expected_sparsity().item()
    decision = Decision(
        tuple((g > 0).float() for g in gates.groups),
        tuple((g > 0).float() for g in gates.neurons),
        (gates.dimensions > 0).float() if gates.dimensions is not None else None,
    )
    small = compresso.cut(model, decision)
    assert 1 - uneven.sizes(small).weights / before == pytest.approx(expected, abs=1e-5)
    assert _gates.weights_left(decision, gates.sizes) == pytest.approx(uneven.sizes(small).weights)


def test_the_price_rises_while_the_target_is_not_met_and_only_then_is_paid() -> None:
    gates = Gates(uneven.sizes(tiny.model()), 0.4)
    gates.configure_schedule(10)
    gates.learning = True
    optimizer = _gates.Adam([{"params": [*gates.gates(), gates.prices]}], gates, 0.1)
    assert gates.auxiliary_loss() == 0.0, "the target starts at what is"
    last = 0.0
    for step in range(1, 6):
        gates.update_and_allocate(step)
        optimizer.zero_grad()
        loss = gates.auxiliary_loss()
        assert loss is not None
        loss.backward()
        optimizer.step()
        assert gates.expected_sparsity() < gates.target()
        assert gates.prices.abs().min() > last, "a multiplier did not grow"
        last = gates.prices.abs().min().item()
    assert gates.prices[0] < 0 < gates.prices[1], "what is too large must cost, what is too small must not"
    gates.learning = False
    assert gates.auxiliary_loss() is None


def test_the_target_rises_in_a_line_and_stays() -> None:
    gates = Gates(uneven.sizes(tiny.model()), 0.3)
    gates.configure_schedule(100)
    seen = []
    for step in (0, 10, 25, 50, 99):
        gates.update_and_allocate(step)
        seen.append(gates.target())
    assert seen == pytest.approx([0.0, 0.06, 0.15, 0.3, 0.3])
    gates.warmup = 0.0
    gates.update_and_allocate(0)
    assert gates.target() == 0.3


def test_expected_sparsity_ends_at_the_target(tmp_path: Path) -> None:
    found = pruned(tiny.model(num_hidden_layers=1), tmp_path, steps=200, sparsity=0.3, healing=0.0)
    assert found.facts["expected_sparsity"] == pytest.approx(0.3, abs=0.005)


def test_gates_keep_their_learning_rate_and_multipliers_climb() -> None:
    gates = Gates(uneven.sizes(tiny.model()), 0.2)
    other = torch.nn.Parameter(torch.zeros(3))
    optimizer = _gates.Adam([{"params": [other, *gates.parameters()], "lr": 0.5}], gates, 0.1)
    assert [group.get("maximize", False) for group in optimizer.param_groups] == [False, False, True]
    for group in optimizer.param_groups:
        group["lr"] = 1e-9  # as a schedule would
    sum(p.sum() for p in (other, gates.prices, gates.neurons[0])).backward()  # type: ignore[union-attr]
    before = gates.neurons[0].detach().clone()
    optimizer.step()
    assert torch.allclose(gates.prices, torch.full((2,), 0.1)) and other.abs().max() < 1e-8
    assert torch.allclose(before - gates.neurons[0], torch.full_like(before, 0.1))


def test_what_does_nothing_is_what_goes(tmp_path: Path) -> None:
    """A third of the neurons of a model that has learned something write nothing: training must find just those."""
    torch.manual_seed(0)
    model = tiny.model(num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([row["input_ids"] for row in ROWS])
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    idle = torch.arange(0, 96, 3)
    with torch.no_grad():
        down: Any = model.get_submodule(inspect(model).blocks[0].projections["down"])
        down.weight[:, idle] = 0
    sparsity = 32 * uneven.sizes(model).neuron_cost / uneven.sizes(model).weights
    gates = Gates(uneven.sizes(model), sparsity)
    wrapped = _shared.with_lora(model, 4)
    wrapped.add_module("gates", gates)
    options = training.TrainOptions(
        max_steps=120, per_device_train_batch_size=8, save_steps=0, max_grad_norm=1e9, learning_rate=1e-4,
        optimizer=lambda groups: _gates.Adam(groups, gates, 0.15),
    )  # fmt: skip
    with gated(model, inspect(model), gates):
        training.train(wrapped, ROWS, [], options, tmp_path)
    decision = gates.on_budget()
    gone = decision.neurons[0] == 0
    assert decision.groups[0].count_nonzero() == 2 and gone.sum() == 32
    assert gone[idle].sum() >= 29, f"of 32 idle neurons {int(gone[idle].sum())} were found"


# ---------------------------------------------------------------- the cut


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_cut_is_exact_with_unequal_layers_and_missing_parts(hidden: bool, tied: bool) -> None:
    model = tiny.model(num_hidden_layers=3, tie_word_embeddings=tied)
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight.uniform_(0.5, 1.5)
        model.model.norm.weight.uniform_(0.5, 1.5)
    gates = stirred(Gates(uneven.sizes(model), 0.4, hidden=hidden))
    with torch.no_grad():
        gates.groups[0].copy_(torch.tensor([3.0, -4.6]))
        gates.groups[1].fill_(-4.6)  # a layer without attention
        gates.groups[2].fill_(2.0)
        gates.neurons[2].fill_(-60.0)  # and one without neurons
    with gated(model, inspect(model), gates):
        masked = tiny.logits(model)
    decision = gates.settle()
    small = compresso.cut(copy.deepcopy(model), decision)
    assert torch.allclose(tiny.logits(small), masked, atol=2e-5), (tiny.logits(small) - masked).abs().max()
    sizes = uneven.sizes(small)
    assert sizes.blocks[1].groups == 0 and sizes.blocks[2].neurons == 0
    assert sizes.blocks[0].groups == 1 and len({size.neurons for size in sizes.blocks}) > 1
    assert (sizes.hidden < 64) == hidden
    assert {z.item() for z in decision.neurons[0] if z > 0} != {1.0}, "multipliers were made 1"


def test_a_model_keeps_one_group_at_least() -> None:
    gates = Gates(uneven.sizes(tiny.model()), 0.9)
    with torch.no_grad():
        for gate in gates.groups:
            gate.fill_(-4.6)
        gates.groups[1][1] = -4.0
    decision = gates.on_budget()
    assert [z.count_nonzero().item() for z in decision.groups] == [0, 1]


def test_the_budget_is_met_to_the_neuron_however_short_the_training() -> None:
    sizes = uneven.sizes(tiny.model(num_hidden_layers=4))
    for sparsity in (0.05, 0.2, 0.5):
        for gates in (Gates(sizes, sparsity), stirred(Gates(sizes, sparsity), 3)):
            left = _gates.weights_left(gates.on_budget(), sizes)
            assert abs(left - (1 - sparsity) * sizes.weights) <= sizes.neuron_cost


# ---------------------------------------------------------------- the whole


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sparsity": 0.3, "gate_learning_rate": 0.3, "save_steps": 1}
    whole = pruned(tiny.model(), tmp_path / "whole", **options)

    class Killed(BaseException): ...

    def at(step: int) -> Any:
        class Kill(Gates):
            def update_and_allocate(self, global_step: int) -> None:
                super().update_and_allocate(global_step)
                if global_step == step:
                    raise Killed

        return Kill

    before, heal = compresso.Gates, _shared.heal
    compresso.Gates = at(4)  # type: ignore[misc]
    try:
        with pytest.raises(Killed):
            pruned(tiny.model(), tmp_path / "cut", **options)
        compresso.Gates = before  # type: ignore[misc]
        _shared.heal = lambda *a: (_ for _ in ()).throw(Killed())  # type: ignore[assignment]
        with pytest.raises(Killed):
            pruned(tiny.model(), tmp_path / "cut", resume=True, **options)
    finally:
        compresso.Gates, _shared.heal = before, heal  # type: ignore[misc]
    again = pruned(tiny.model(), tmp_path / "cut", resume=True, **options)
    assert again.facts["neurons"] == whole.facts["neurons"]
    assert torch.equal(tiny.logits(again.model), tiny.logits(whole.model))


def test_healing_lowers_the_loss_and_can_be_left_out(tmp_path: Path) -> None:
    bare = pruned(tiny.model(), tmp_path / "bare", steps=6, sparsity=0.3, healing=0.0)
    healed = pruned(
        tiny.model(), tmp_path / "healed", steps=36, sparsity=0.3, healing=5 / 6, healing_learning_rate=1e-2
    )
    assert "healing" not in bare.facts and healed.facts["healing"]
    losses = [found.model(**tiny.inputs(found.model)).loss.item() for found in (bare, healed)]
    assert losses[1] < losses[0] - 0.05


def test_steps_are_shared_between_choosing_and_healing() -> None:
    assert _shared.divide({"max_steps": 110}, 3 / 11) == ({"max_steps": 80}, {"max_steps": 30})
    first, second = _shared.divide({"num_train_epochs": 11, "max_seconds": 22}, 3 / 11)
    assert first["num_train_epochs"] == pytest.approx(8) and second["max_seconds"] == pytest.approx(6)
    assert _shared.divide({"max_steps": 1}, 0.2) == ({"max_steps": 1}, {})


def test_the_prompt_tells_of_the_pruning_and_is_not_learned() -> None:
    corpus = Corpus(
        [
            Example([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
            Example([{"role": "system", "content": "S"}, {"role": "assistant", "content": "a"}], weights=[0, 1]),
            Example(text="plain"),
        ],
        "chat",
    )
    seen = [compresso._told(example) for example in corpus.examples]
    assert seen[0].messages[0]["role"] == "system" and "pruned" in seen[0].messages[0]["content"]
    assert seen[1].messages[0]["content"].endswith("S") and len(seen[1].messages) == 2
    assert seen[2] is corpus.examples[2]
    assert seen[0].learned() == [2] and seen[1].learned() == [1]


@pytest.mark.parametrize("hidden", [False, True])
def test_the_price_counts_what_trains(hidden: bool) -> None:
    model = tiny.model()
    promised = compresso.price(models.shape_of(model), {"rank": 4, "hidden": hidden}).trainable
    wrapped = _shared.with_lora(model, 4)
    wrapped.add_module("gates", Gates(uneven.sizes(tiny.model()), 0.2, hidden))
    assert promised == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{"warmup": 1.0}, {"healing": -0.1}, {"gate_learning_rate": 0}, {"rank": 0}])
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        compresso.CompressoOptions(**options)


@pytest.mark.real
def test_the_default_model_loses_heads_and_neurons(tmp_path: Path) -> None:
    loaded = models.load("smollm2")
    decision = stirred(Gates(uneven.sizes(loaded.model), 0.2)).on_budget()
    before = uneven.sizes(loaded.model).weights
    small = compresso.cut(loaded.model, decision)
    assert uneven.sizes(small).weights == pytest.approx(0.8 * before, rel=1e-4)
    small.save_pretrained(tmp_path)
    again = models.load(tmp_path, dtype=small.dtype).model
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)


def test_training_finds_what_the_gates_offer_it() -> None:
    """The loop must call what `Gates` defines; a renamed word would leave the target at 0 in silence."""
    source = Path(training.__file__).parent
    said = "".join(file.read_text(encoding="utf-8") for file in source.glob("*.py"))
    for word in (
        "auxiliary_loss",
        "configure_schedule",
        "update_and_allocate",
        "allocation_state",
        "load_allocation_state",
    ):
        assert word in said and hasattr(Gates, word)

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from training_cases import lora, options
from transformers import TrainerCallback

from shoestring.core.errors import ShoestringError
from shoestring.lab import tiny
from shoestring.training import checkpoints, train
from shoestring.training.between_steps import BetweenSteps


class Growing(nn.Module):
    """A low-rank update of the token embeddings' width that gains a rank every third step, in one of three ways."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.way, self.heard, self.acted = way, [], []
        self.a, self.b = nn.Parameter(torch.full((2, width), 0.1)), nn.Parameter(torch.zeros(width, 2))
        self.more = nn.ParameterList()

    def forward(self, x):
        for a in (self.a, *self.more):
            x = x + (x @ a.T) @ self.b[:, : len(a)].T
        return x

    def configure_schedule(self, total_steps):
        self.heard.append(total_steps)

    def update_and_allocate(self, global_step):
        assert self.a.grad is not None
        self.acted.append(global_step)
        if global_step % 3 == 2:
            self.grow()

    def grow(self):
        wider = torch.cat([self.a.detach(), torch.full((1, self.a.shape[1]), 0.05)])
        longer = torch.cat([self.b.detach(), torch.zeros(self.b.shape[0], 1)], 1)
        if self.way == "in place":
            self.a.data, self.b.data = wider, longer
        elif self.way == "replaced":
            self.a, self.b = nn.Parameter(wider), nn.Parameter(longer)
        else:
            self.more.append(nn.Parameter(torch.full_like(self.a, 0.05)))

    def allocation_state(self):
        return {"rank": self.a.shape[0], "more": len(self.more)}

    def load_allocation_state(self, state):
        while self.a.shape[0] < state["rank"] or len(self.more) < state["more"]:
            self.grow()


def growing(way="in place"):
    model = tiny.model()
    model.requires_grad_(False)
    layer = model.model.layers[0].mlp
    layer.growing = Growing(model.config.hidden_size, way)
    layer.register_forward_hook(lambda module, args, out: module.growing(out))
    return model


def tuner(model):
    return model.model.layers[0].mlp.growing


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


WAYS = ("in place", "replaced", "appended")


@pytest.mark.parametrize("way", WAYS)
def test_grown_parameters_are_trained_on(rows, tmp_path, way):
    model = growing(way)
    train(model, rows, [], options(max_steps=8, weight_decay=0.1), tmp_path)
    grown = tuner(model)
    assert grown.acted == list(range(8)) and grown.heard == [8]
    if way == "appended":
        assert len(grown.more) == 2
        assert not torch.all(grown.more[0] == 0.05) and not torch.all(grown.more[1] == 0.05)
    else:
        assert grown.a.shape[0] == 4 and grown.b.shape[1] == 4
        assert not torch.any(grown.a[2] == 0.05) and torch.all(grown.b[:, 3].abs() > 0)


@pytest.mark.parametrize("way", WAYS)
def test_the_optimizer_keeps_what_it_knew(way):
    model = growing(way)
    layer = tuner(model)
    optimizer = torch.optim.AdamW(
        [{"params": [layer.a], "weight_decay": 0.5}, {"params": [layer.b], "weight_decay": 0.0}], lr=1e-2
    )
    between = BetweenSteps(model)
    between.begin(9)
    (layer.a.sum() + (layer.b * 3).sum()).backward()
    optimizer.step()
    known = {name: optimizer.state[p]["exp_avg"].clone() for name, p in (("a", layer.a), ("b", layer.b))}
    between.act(2, optimizer, lambda: ["model.layers.0.mlp.growing.a", "model.layers.0.mlp.growing.more.0"])
    assert torch.equal(optimizer.state[layer.a]["exp_avg"][:2], known["a"])
    assert torch.equal(optimizer.state[layer.b]["exp_avg"][:, :2], known["b"])
    assert float(optimizer.state[layer.a]["step"]) == 1
    assert optimizer.state[layer.a]["exp_avg"][2:].abs().sum() == 0
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
    first, second = ([id(p) for p in g["params"]] for g in optimizer.param_groups)
    assert first == [id(layer.a), *(id(p) for p in layer.more)] and second == [id(layer.b)]
    held = {id(p) for p in optimizer.state}
    assert held <= {id(p) for p in layer.parameters()}, "state of parameters that are gone"


def test_a_parameter_that_vanishes_leaves_the_optimizer():
    model = growing("appended")
    layer = tuner(model)
    layer.grow()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    between = BetweenSteps(model)
    between.begin(5)
    layer.a.grad = torch.zeros_like(layer.a)
    layer.more = nn.ParameterList()
    between.act(0, optimizer, list)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(layer.a), id(layer.b)]


class Stopped(Exception):
    pass


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Stopped


@pytest.mark.parametrize("way", WAYS)
def test_a_grown_run_resumes_bit_for_bit(rows, tmp_path, way):
    whole, chosen = growing(way), options(max_steps=12, save_steps=5, weight_decay=0.1)
    train(whole, rows, [], chosen, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(growing(way), rows, [], chosen, tmp_path / "torn", callbacks=[StopAfter(8)])
    assert checkpoints.newest_complete(tmp_path / "torn").step == 5
    again = growing(way)
    train(again, rows, [], chosen, tmp_path / "torn", resume=True)
    assert tuner(again).acted == list(range(5, 12)) and tuner(again).heard == [12]
    ours, theirs = weights(again), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    finished = growing(way)
    train(finished, rows, [], chosen, tmp_path / "torn", resume=True)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(finished).items())


def test_growth_that_cannot_be_repeated_is_an_error(rows, tmp_path, monkeypatch):
    monkeypatch.delattr(Growing, "allocation_state")
    train(growing(), rows, [], options(max_steps=4, save_steps=4), tmp_path)
    with pytest.raises(ShoestringError, match=r"growing.a has the shape \(3, 64\), the model's \(2, 64\).*allocation_"):
        train(growing(), rows, [], options(max_steps=4, save_steps=4), tmp_path, resume=True)


def test_a_time_limit_tells_the_new_total(rows, tmp_path):
    model = growing()
    result = train(model, rows, [], options(max_steps=100_000, max_seconds=1.5, save_steps=0), tmp_path)
    assert tuner(model).heard[0] == 100_000 and tuner(model).heard[-1] == result.steps


def test_adalora_of_peft_is_told_and_prunes(rows, tmp_path):
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=999, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(tiny.model(), config)
    result = train(model, rows, [], options(max_steps=12, learning_rate=2e-2), tmp_path)
    assert model.peft_config["default"].total_step == 12
    ranks = [sum(kept) for kept in model.peft_config["default"].rank_pattern.values()]
    assert sum(ranks) == 2 * len(ranks) < 4 * len(ranks)
    assert result.loss < result.log[0]["loss"]


def test_other_adapters_are_left_alone(rows, tmp_path):
    assert BetweenSteps(lora(tiny.model())).tuners == {}


class Slow(nn.Module):
    """Two numbers that scale what passes, one of them with a learning rate of its own and no weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.plain = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.slow * self.plain

    def parameter_groups(self, learning_rate):
        return [{"params": [self.slow], "lr": 0.1 * learning_rate, "weight_decay": 0.0}]


@pytest.mark.parametrize("made", [None, partial(torch.optim.SGD, lr=5e-3)])
def test_a_module_may_want_learning_rates_of_its_own(rows, tmp_path, made):
    model = tiny.model()
    model.requires_grad_(False)
    layer = model.model.layers[0].mlp
    layer.slow = Slow()
    layer.register_forward_hook(lambda module, args, out: module.slow(out))
    found = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **_):
            found.append([(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups])

    settings = options(max_steps=2, weight_decay=0.5, lr_scheduler_type="constant", optimizer=made)
    train(model, rows, [], settings, tmp_path, callbacks=[Look()])
    assert found[-1] == [(1, 5e-4, 0.0), (1, 5e-3, 0.5)], "one parameter stands in one group, and each kind has one"
    moved = [abs(float(p.detach()) - 1) for p in (layer.slow.slow, layer.slow.plain)]
    assert 0 < 5 * moved[0] < moved[1]

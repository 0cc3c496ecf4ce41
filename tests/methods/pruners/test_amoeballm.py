from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shoestring import models
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.lab import tiny
from shoestring.methods.pruners import _depth, _fluctuation, _mixture
from shoestring.methods.pruners._sandwich import MOST_WEIGHT, Sandwich, balanced, distillation
from shoestring.methods.pruners._supernet import Plan, Subnet, Supernet, open_supernet
from shoestring.models import surgery, uneven

amoeballm = catalog.module("amoeballm")
Options = catalog.load("amoeballm")
LAYERS, LEAST = 6, 3
RATIOS = (1.0, 0.875, 0.75, 0.625)


def base(**changes: Any) -> Any:
    return tiny.model(num_hidden_layers=LAYERS, **changes)


def loud() -> Any:
    """A model that is sure of what it says, and wrong, so that there is much to learn."""
    model = base()
    with torch.no_grad():
        model.model.embed_tokens.weight *= 10
    return model


def rows(count: int = 4, length: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, tiny.VOCAB, (count, length), generator=draw).tolist()
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def counting() -> list[dict[str, Any]]:
    """Rows in which every token says what the next one is."""
    return [{"input_ids": ids, "labels": ids} for ids in tiny.batch(8, 24).tolist()]


def options(**changes: Any) -> Any:
    return Options(**{"depth": 0.5, "width": 0.75, "least_depth": 0.5, "rank": 4, **changes})


def plan(model: Any = None, **changes: Any) -> Plan:
    return amoeballm.plan_supernet(base() if model is None else model, options(**changes), rows())


@cache
def usual_plan() -> Plan:
    return plan()


def stirred(net: Supernet) -> Supernet:
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in net.layers.values():
            layer.B.normal_(0, 0.1)
    return net


def supernet() -> Supernet:
    """One with updates that are not zero."""
    return stirred(Supernet(base(), usual_plan(), 5, 2, 4, 8.0)).eval()


def work(folder: Path, **settings: Any) -> Work:
    training = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 0, "learning_rate": 1e-2, **settings}
    return Work(Ledger(), folder, training=training)


def loaded(model: Any = None) -> models.Loaded:
    return models.Loaded(base() if model is None else model, None, Path(), "tiny", "causal")


# ---------------------------------------------------------------- depth


def table(layers: int, last: int = 1) -> dict[_depth.Keep, float]:
    """A random loss for every choice of layers."""
    draw = torch.Generator().manual_seed(3)
    return {keep: float(torch.rand((), generator=draw)) for keep in itertools.product((True, False), repeat=layers)}


@pytest.mark.parametrize(("layers", "most", "last"), [(6, 3, 1), (8, 4, 2), (5, 1, 1), (7, 6, 1)])
def test_the_search_asks_as_often_as_stated(layers: int, most: int, last: int) -> None:
    losses, asked = table(layers), []

    def loss(keep: _depth.Keep) -> float:
        asked.append(keep)
        return losses[keep]

    found = _depth.search(layers, most, loss, last)
    prunable = layers - last
    assert len(asked) == prunable * most - most * (most - 1) // 2 == len(set(asked))
    assert found == _depth.search(layers, most, losses.__getitem__, last), "not reproducible"
    for removed, keep in enumerate(found):
        assert keep.count(False) == removed and all(keep[-last:])


def test_one_layer_less_is_the_best_of_all_single_layers() -> None:
    losses = table(9)
    found = _depth.search(9, 3, losses.__getitem__)
    singles = [tuple(place != gone for place in range(9)) for gone in range(8)]
    assert found[1] == min(singles, key=losses.__getitem__)


def test_the_search_is_the_recursion_of_the_paper() -> None:
    """Against the table d[n][m] written down in full."""
    losses, layers, most = table(7), 7, 4
    prunable = layers - 1
    best: dict[tuple[int, int], Any] = {(n, 0): (True,) * layers for n in range(prunable + 1)}
    for n, m in itertools.product(range(1, prunable + 1), range(1, most + 1)):
        if m <= n:
            tried = tuple(kept and place != prunable - n for place, kept in enumerate(best[n - 1, m - 1]))
            older = best.get((n - 1, m))
            best[n, m] = tried if older is None or losses[tried] < losses[older] else older
    assert list(_depth.search(layers, most, losses.__getitem__)) == [best[prunable, m] for m in range(most + 1)]


def test_of_equal_losses_the_older_choice_stays() -> None:
    assert _depth.search(5, 1, lambda keep: 1.0)[1] == (True, True, True, False, True)


@pytest.mark.parametrize("keep", [(0, 1, 1, 1, 1, 1), (1, 1, 0, 1, 0, 1), (0, 0, 1, 0, 1, 1), (1, 1, 1, 1, 1, 1)])
def test_the_loss_without_layers_is_that_of_the_model_that_has_none(keep: tuple[int, ...]) -> None:
    found = _depth.LossWithout(base(), rows())(tuple(map(bool, keep)))
    cut = base()
    surgery.drop_blocks(cut, [place for place, stays in enumerate(keep) if not stays])
    wanted = torch.stack([cut(**{n: torch.tensor([v]) for n, v in row.items()}).loss for row in rows()]).mean()
    assert found == pytest.approx(wanted.item(), abs=1e-5)


def test_a_skipped_layer_is_not_computed_and_comes_back() -> None:
    model = base()
    before, ran = tiny.logits(model), []
    for place, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, place=place: ran.append(place))
    with _depth.skipping(model.model.layers, (True, False, True, False, True, True)):
        tiny.logits(model)
        assert ran == [0, 2, 4, 5]
        assert [model.model.layers[place].self_attn.layer_idx for place in (0, 2, 4, 5)] == [0, 1, 2, 3]
    assert torch.equal(tiny.logits(model), before)
    assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(LAYERS))


# ---------------------------------------------------------------- width


def test_moments_are_those_of_two_passes() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(257, 12, generator=draw) * torch.arange(1, 13) + 100
    running = _fluctuation.RunningMoments()
    for part in values.split([1, 100, 7, 149]):
        running.add(part[None])
    found = running.moments()
    assert torch.allclose(found.mean, values.mean(0), atol=1e-4)
    assert torch.allclose(found.variance, values.double().var(0, correction=0).float(), rtol=1e-5)


def test_moments_are_of_the_inputs_of_the_model() -> None:
    model, name, seen = base(), "model.layers.2.mlp.down_proj", []
    found = _fluctuation.watch(model, [name], ({"input_ids": torch.tensor([row["input_ids"]])} for row in rows()))
    model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(args[0][0]))
    for row in rows():
        model(torch.tensor([row["input_ids"]]))
    assert torch.allclose(found[name].variance, torch.cat(seen).var(0, correction=0), rtol=1e-3, atol=1e-9)


def test_scores_are_the_fluctuation_of_what_a_layer_writes() -> None:
    torch.manual_seed(0)
    weight, variance = torch.randn(8, 12), torch.rand(12)
    score = variance * weight.square().sum(0)
    standard = (score - score.mean()) / score.std()
    assert torch.allclose(_fluctuation.scores(weight, variance).float(), standard, atol=1e-5)
    squared = score.square()
    standard = (squared - squared.mean()) / squared.std()
    grouped = _fluctuation.scores(weight, variance, groups=3).float()
    assert torch.allclose(
        grouped, torch.stack([standard[:4].mean(), standard[4:8].mean(), standard[8:].mean()]), atol=1e-5
    )


def test_inputs_that_are_all_alike_do_not_divide_by_zero() -> None:
    assert torch.equal(_fluctuation.scores(torch.ones(4, 6), torch.ones(6)), torch.zeros(6).double())


def test_widths_are_nested_and_reach_their_share() -> None:
    torch.manual_seed(0)
    attention, neurons = [torch.randn(3) for _ in range(4)], [torch.randn(200) for _ in range(4)]
    widths = _fluctuation.choose(attention, neurons, 20.0, RATIOS)
    whole = 4 * (3 * 20.0 + 200)
    for width, ratio in zip(widths, RATIOS):
        kept = sum(20.0 * int(g.sum()) + int(n.sum()) for g, n in zip(width.groups, width.neurons))
        assert abs(kept / whole - ratio) <= 10 / whole, "further off than half of the largest unit"
        gone = [s[~k] for s, k in zip([*attention, *neurons], [*width.groups, *width.neurons])]
        stays = [s[k] for s, k in zip([*attention, *neurons], [*width.groups, *width.neurons])]
        assert ratio == 1 or torch.cat(gone).max() < torch.cat(stays).min(), "not the best of all layers together"
    for large, small in itertools.pairwise(widths):
        for more, fewer in zip([*large.groups, *large.neurons], [*small.groups, *small.neurons]):
            assert not (fewer & ~more).any()


def test_a_group_of_heads_weighs_what_it_has_in_parameters() -> None:
    llama = uneven.Sizes((), hidden=4096, head_dim=128, group_heads=1)
    assert llama.group_cost / llama.neuron_cost == pytest.approx(512 / 3)
    grouped = uneven.sizes(base())
    block = base().model.layers[0]
    of_attention = sum(p.numel() for p in block.self_attn.parameters())
    assert grouped.group_cost == of_attention / grouped.blocks[0].groups


def test_the_bias_lowers_the_error_of_what_is_removed() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(500, 20) + torch.linspace(-2, 2, 20), torch.randn(8, 20)
    removed = torch.rand(20) < 0.4
    bias = _fluctuation.compensation(weight, x.mean(0), removed)
    whole, left = x @ weight.T, (x * ~removed) @ weight.T
    assert (left + bias - whole).norm() < 0.7 * (left - whole).norm()
    best = (whole - left).mean(0)
    assert torch.allclose(bias, best, atol=1e-4), "not the constant of least squared error"


def test_the_bias_helps_in_a_model() -> None:
    model = base()
    with torch.no_grad():  # what attention reads has a mean that is not zero
        model.model.embed_tokens.weight += 0.02 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    whole = tiny.logits(model)
    net = Supernet(model, plan(model), 5, 2, 4, 8.0).eval()
    subnet = net.plan.subnet(LAYERS, 0.625)
    with_bias = tiny.logits(net.extract(subnet))
    net.shifts[subnet.width] = {name: torch.zeros_like(shift) for name, shift in net.shifts[subnet.width].items()}
    assert (with_bias - whole).norm() < 0.9 * (tiny.logits(net.extract(subnet)) - whole).norm()


# ---------------------------------------------------------------- the mixture


def test_the_router_sees_the_shape_and_nothing_else() -> None:
    torch.manual_seed(0)
    router = _mixture.ShapeRouter(LAYERS, 4, experts=5, top=2)
    keep = (True, False, True, True, True, True)
    router.eval()
    gates = router(keep, 1)
    assert torch.equal(gates, router(keep, 1)), "the same shape, other gates"
    assert int((gates > 0).sum()) == 2 and float(gates.sum()) == pytest.approx(1)
    assert not torch.equal(gates, router(keep, 2)) and not torch.equal(gates, router((True,) * LAYERS, 1))
    router.train()
    assert not torch.equal(router(keep, 1), router(keep, 1)), "no noise in training"


def test_gates_are_the_softmax_over_the_best_two() -> None:
    torch.manual_seed(0)
    router = _mixture.ShapeRouter(3, 2, experts=4, top=2).eval()
    x = torch.tensor([1.0, 0, 1, 0, 1])
    first, second = router.score
    logits = second.weight @ (first.weight @ x + first.bias) + second.bias
    places = logits.topk(2).indices
    wanted = torch.zeros(4)
    wanted[places] = logits[places].softmax(0)
    assert torch.allclose(router((True, False, True), 1), wanted, atol=1e-6)
    torch.manual_seed(5)
    noise = torch.randn(4)
    noisy = logits + noise * F.softplus(router.noise(x))
    torch.manual_seed(5)
    gates = router.train()((True, False, True), 1)
    assert set(gates.nonzero().flatten().tolist()) == set(noisy.topk(2).indices.tolist())
    assert torch.allclose(gates[gates > 0].log().diff().abs(), noisy.topk(2).values.diff().abs(), atol=1e-5)


def test_the_update_is_the_product_of_the_sums() -> None:
    torch.manual_seed(0)
    layer = _mixture.MixedLinear(nn.Linear(6, 4), experts=3, rank=2, alpha=6.0)
    nn.init.normal_(layer.B)
    gates = torch.tensor([0.3, 0.0, 0.7])
    a, b = 0.3 * layer.A[0] + 0.7 * layer.A[2], 0.3 * layer.B[0] + 0.7 * layer.B[2]
    assert torch.allclose(layer.update(gates), 3.0 * b @ a, atol=1e-6)
    sum_of_products = 3.0 * (0.3 * layer.B[0] @ layer.A[0] + 0.7 * layer.B[2] @ layer.A[2])
    assert not torch.allclose(layer.update(gates), sum_of_products, atol=1e-2), "cross terms are missing"
    layer.gates, x = gates, torch.randn(5, 6)
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ layer.update(gates).T, atol=1e-5)


def test_every_linear_layer_of_the_blocks_has_the_same_gates() -> None:
    net = supernet().train()
    with net.active(Subnet(net.plan.keeps[2], 1)):
        gates = {id(layer.gates) for layer in net.layers.values()}
    assert len(gates) == 1 and len(net.layers) == 7 * LAYERS
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name in trained if not name.startswith("router.")} == {
        f"model.{name}.{side}" for name in net.layers for side in "AB"
    }


# ---------------------------------------------------------------- extraction


SHAPES = [(6, 1.0), (6, 0.75), (5, 0.875), (4, 1.0), (4, 0.625), (3, 0.875), (3, 0.625)]


@pytest.fixture(scope="module")
def net() -> Supernet:
    return supernet()


@pytest.mark.parametrize(("depth", "ratio"), SHAPES)
def test_what_is_cut_out_is_what_the_supernet_shows(net: Supernet, depth: int, ratio: float) -> None:
    subnet = net.plan.subnet(depth, ratio)
    small, ids = net.extract(subnet), tiny.batch(2, 10)
    with net.active(subnet), torch.no_grad():
        whole = net(input_ids=ids).logits
        first = net(input_ids=ids[:, :6], use_cache=True)
        rest = net(input_ids=ids[:, 6:], past_key_values=first.past_key_values).logits
        assert first.past_key_values.get_seq_length() == 10
    assert torch.allclose(whole[:, 6:], rest, atol=1e-5), "with a cache the view answers differently"
    assert torch.allclose(tiny.logits(small, ids), whole, atol=1e-5)
    with torch.no_grad():
        first = small(ids[:, :6], use_cache=True)
        rest = small(ids[:, 6:], past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, whole[:, 6:], atol=1e-5), "with a cache the extracted model answers differently"
    assert small.config.num_hidden_layers == depth
    matrices = sum(p.numel() for n, p in small.named_parameters() if p.dim() == 2 and ".layers." in n)
    assert matrices == net.weights_of(subnet)


def test_shapes_differ_and_extraction_leaves_the_supernet_alone(net: Supernet) -> None:
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    logits = [tiny.logits(net.extract(net.plan.subnet(*shape))) for shape in SHAPES]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(logits, 2))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    with torch.no_grad():
        outside = net(input_ids=tiny.batch()).logits
    assert torch.equal(outside, tiny.logits(base())), "outside of its views it is the model as it came"


def test_an_extracted_model_loads_and_generates(net: Supernet, tmp_path: Path) -> None:
    small: Any = net.extract(net.plan.subnet(4, 0.625))
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(small))
    given = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(again.generate(tiny.batch(), **given), small.generate(tiny.batch(), use_cache=False, **given))


def test_whole_groups_of_heads_go(net: Supernet) -> None:
    groups = {int(kept.sum()) for kept in net.plan.widths[-1].groups}
    assert len(groups) > 1, "layers lose equally much, so nothing is tested"
    after = uneven.sizes(net.extract(net.plan.subnet(LAYERS, 0.625)))
    assert [b.groups for b in after.blocks] == [int(kept.sum()) for kept in net.plan.widths[-1].groups]
    assert after.group_heads == 2


def test_recalibrated_means_are_those_in_the_subnet(net: Supernet) -> None:
    subnet = net.plan.subnet(3, 0.75)
    means = net.means(subnet, rows(seed=4))
    small, unhidden = net.extract(subnet, means), net.extract(subnet)
    assert not torch.equal(tiny.logits(small), tiny.logits(unhidden))
    place = subnet.keep.index(True)
    name = f"model.layers.{place}.mlp.down_proj"
    assert name in means and not any(
        f".layers.{gone}." in n for gone, k in enumerate(subnet.keep) if not k for n in means
    )
    seen: list[Tensor] = []
    hook = net.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with net.active(subnet), torch.no_grad():
        for row in rows(seed=4):
            net(input_ids=torch.tensor([row["input_ids"]]))
    hook.remove()
    assert torch.allclose(means[name], torch.cat(seen).mean(0), atol=1e-6)
    stays = net.plan.widths[subnet.width].neurons[place]
    weight = net.model.get_submodule(name)
    merged = weight.base_layer.weight + weight.update(net.router(subnet.keep, subnet.width))
    wanted = merged[:, ~stays] @ means[name][~stays]
    assert torch.allclose(small.model.layers[0].mlp.down_proj.bias, wanted, atol=1e-5)


# ---------------------------------------------------------------- training


def test_a_step_is_the_whole_two_between_and_the_smallest() -> None:
    sandwich = Sandwich(supernet())
    torch.manual_seed(0)
    depths, widths = set(), set()
    for _ in range(60):
        *between, smallest = sandwich.draw()
        assert smallest == Subnet(sandwich.supernet.plan.keeps[-1], 3) and len(between) == 2
        assert between[0].width != between[1].width, "widths are drawn without putting back"
        assert all(s.keep in sandwich.supernet.plan.keeps[1:] for s in between)
        depths |= {s.depth for s in between}
        widths |= {s.width for s in between}
    assert depths == {3, 4, 5} and widths == {0, 1, 2, 3}
    ran = []
    sandwich.supernet.register_forward_pre_hook(lambda *_: ran.append("bypassed"))
    active = Supernet.active

    def watched(self: Supernet, subnet: Subnet) -> Any:
        ran.append((subnet.depth, subnet.width))
        return active(self, subnet)

    with pytest.MonkeyPatch.context() as patch, sandwich.train():
        patch.setattr(Supernet, "active", watched)
        sandwich.loss(sandwich(input_ids=tiny.batch()), tiny.batch())
    assert len(ran) == 4 and ran[0] == (LAYERS, 0) and ran[-1] == (LEAST, 3)


def test_balancing_scales_the_gradient_by_the_quotient_of_the_losses() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    loss, reference = x.square().sum(), torch.tensor(5.0, requires_grad=True)
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    scaled = balanced(loss, reference)
    assert scaled.item() == pytest.approx(5.0)
    (gradient,) = torch.autograd.grad(scaled, x)
    assert torch.allclose(gradient, plain * 5.0 / 13.0)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(balanced(x.square().sum(), reference), reference)
    tiny_loss = (x * 1e-9).sum()
    (gradient,) = torch.autograd.grad(balanced(tiny_loss, reference), x)
    assert torch.allclose(gradient, torch.full((2,), 1e-9 * MOST_WEIGHT)), "a vanishing loss drowns the others"


def test_the_gradient_of_a_step_is_that_of_its_four_losses() -> None:
    """Against losses over whole logits, one graph, balanced by hand."""
    net, ids = supernet(), tiny.batch(2, 12)
    labels = ids.clone()
    labels[:, :5] = -100
    sandwich = Sandwich(net)
    sandwich.train()
    net.router.eval()  # the same gates in both computations
    torch.manual_seed(3)
    subnets = [*sandwich.draw()]
    torch.manual_seed(3)
    with sandwich:
        first = sandwich.loss(sandwich(input_ids=ids, attention_mask=torch.ones_like(ids)), labels)
        first.backward()
    got = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    learned = labels[:, 1:] != -100

    def log_probabilities(subnet: Subnet) -> Tensor:
        with net.active(subnet):
            return net(input_ids=ids).logits[:, :-1][learned].log_softmax(-1)

    whole = log_probabilities(Subnet((True,) * LAYERS, 0))
    reference = F.nll_loss(whole, labels[:, 1:][learned])
    assert first.item() == pytest.approx(reference.item(), abs=1e-5)
    total = reference
    for subnet in subnets:
        loss = -(whole.detach().exp() * log_probabilities(subnet)).sum(-1).mean()
        total = total + loss * (reference / loss).detach()
    total.backward()
    wanted = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        assert torch.allclose(got[name], gradient, atol=1e-6, rtol=1e-3), name


def test_distillation_is_against_the_teacher_where_labels_are() -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 30, bias=False).requires_grad_(False)
    hidden, teacher = torch.randn(2, 7, 8, requires_grad=True), torch.randn(2, 7, 8, requires_grad=True)
    labels = torch.randint(0, 30, (2, 7))
    labels[0, :4] = -100
    loss = distillation(hidden, teacher, head, labels, 3.0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    learned = labels[:, 1:] != -100
    p, q = head(teacher.detach())[:, :-1][learned].softmax(-1), head(hidden)[:, :-1][learned].log_softmax(-1)
    wanted = -(p * q).sum() / 3.0
    assert torch.allclose(loss, wanted, atol=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(wanted, hidden)[0], atol=1e-6)
    assert distillation(hidden, teacher, head, torch.full((2, 7), -100)).item() == 0.0


def test_labels_may_share_the_loss_with_the_teacher() -> None:
    grads = []
    for weight in (1.0, 0.5, 0.0):
        net = supernet()
        net.router.train(False)
        sandwich = Sandwich(net, between=0, weight=weight)
        sandwich.training = True
        with sandwich:
            sandwich.loss(sandwich(input_ids=tiny.batch()), tiny.batch())  # no backward: only the smallest's gradient
        grads.append(torch.cat([p.grad.flatten() for n, p in net.named_parameters() if p.grad is not None]))
    assert not torch.allclose(grads[0], grads[2]) and not torch.allclose(grads[0], grads[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Supernet]:
    folder = tmp_path_factory.mktemp("amoeballm")
    torch.manual_seed(0)
    given = work(folder, max_steps=16, per_device_train_batch_size=4, learning_rate=2e-2)
    made, facts = amoeballm.train_supernet(loaded(loud()), options(), counting(), given)
    assert facts["steps"] == 16
    made.save(folder / "supernet")
    return folder, made


def test_one_training_makes_every_shape_better(trained: tuple[Path, Supernet]) -> None:
    made = trained[1]
    raw = Supernet(loud(), made.plan, 5, 2, 4, 8.0).eval()

    ids = tiny.batch(8, 24)

    @torch.no_grad()
    def loss(net: Supernet, subnet: Subnet) -> float:
        return float(net.extract(subnet)(ids, labels=ids).loss)

    shapes = [made.plan.subnet(*shape) for shape in SHAPES]
    gains = {(s.depth, made.plan.ratios[s.width]): loss(raw, s) - loss(made, s) for s in shapes}
    assert len(gains) >= 6 and min(gains.values()) > 5, gains


def test_every_shape_has_a_held_out_loss(trained: tuple[Path, Supernet]) -> None:
    made, ids = trained[1], tiny.batch(2, 24)
    table = amoeballm.compare_shapes(made, [{"input_ids": row, "labels": row} for row in ids.tolist()])
    assert [(row["depth"], row["width"]) for row in table] == list(itertools.product((6, 5, 4, 3), RATIOS))
    row = next(row for row in table if (row["depth"], row["width"]) == (4, 0.75))
    small = made.extract(made.plan.subnet(4, 0.75))
    assert row["loss"] == pytest.approx(small(ids, labels=ids).loss.item(), abs=1e-4)
    assert row["weights_kept"] == pytest.approx(0.5, abs=0.1)


def test_another_shape_is_cut_out_of_what_was_kept(trained: tuple[Path, Supernet]) -> None:
    folder, made = trained
    for shape in SHAPES[:3]:
        got = amoeballm.extract(loud(), folder / "supernet", *shape)
        assert torch.equal(tiny.logits(got), tiny.logits(made.extract(made.plan.subnet(*shape))))
    again = open_supernet(loud(), folder / "supernet")
    assert again.plan.keeps == made.plan.keeps and again.options == made.options


def test_a_kept_supernet_is_not_trained_again(trained: tuple[Path, Supernet], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = trained
    monkeypatch.setattr(amoeballm, "train_supernet", None)
    asked = options(supernet=str(folder / "supernet"), depth=4 / 6, width=0.625)
    done = amoeballm.prune(loaded(loud()), asked, [], [], work(folder / "other"))
    assert torch.equal(tiny.logits(done.model), tiny.logits(made.extract(made.plan.subnet(4, 0.625))))
    assert done.facts["depth"] == 4 and len(done.facts["removed_layers"]) == 2 and "training" not in done.facts
    json.dumps(done.facts)


def test_a_supernet_of_another_model_or_shape_is_refused(trained: tuple[Path, Supernet], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another model"):
        amoeballm.extract(base(seed=5), trained[0] / "supernet", 4, 0.75)
    with pytest.raises(UsageError, match="no whole supernet"):
        amoeballm.extract(base(), tmp_path, 4, 0.75)
    with pytest.raises(UsageError, match="3 to 6"):
        amoeballm.extract(loud(), trained[0] / "supernet", 2, 0.75)
    with pytest.raises(UsageError, match="0.875"):
        amoeballm.extract(loud(), trained[0] / "supernet", 4, 0.7)


def test_a_run_is_resumed_where_it_was(tmp_path: Path) -> None:
    def run() -> Tensor:
        given = replace(work(tmp_path, save_steps=2, max_steps=4), resume=True)
        torch.manual_seed(0)
        made, _ = amoeballm.train_supernet(loaded(), options(), rows(), given)
        return tiny.logits(made.extract(made.plan.subnet(4, 0.75)))

    whole = run()
    (last,) = [found for found in tmp_path.iterdir() if found.name.endswith("-4")]
    shutil.rmtree(last)
    assert torch.equal(run(), whole), "other subnets or other noise were drawn after the pause"


# ---------------------------------------------------------------- options and price


@pytest.mark.parametrize(
    "bad",
    [{"depth": 0}, {"depth": 1.5}, {"width": 0.8}, {"widths": (0.9, 0.5)}, {"widths": (1.0, 0.5, 0.75)}, {"top": 9},
     {"search_tokens": 0}, {"distillation": 2.0}, {"rank": True}],
)  # fmt: skip
def test_impossible_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        Options(**bad)


def test_layers_that_always_stay_must_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="always stay"):
        plan(last=4)


def test_first_tokens_are_all_labels() -> None:
    given = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    found = amoeballm.first_tokens(given, 6)
    assert [row["input_ids"] for row in found] == [[1, 2, 3, 4], [5, 6]]
    assert all(row["labels"] == row["input_ids"] for row in found)


@pytest.mark.parametrize("shape", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.75)])
def test_the_price_counts_layers_biases_and_what_trains(net: Supernet, shape: tuple[float, float]) -> None:
    made = amoeballm.price(models.shape_of(base()), {"depth": shape[0], "width": shape[1], "rank": 4})
    small = net.extract(net.plan.subnet(round(shape[0] * LAYERS), shape[1]))
    counted = sum(p.numel() for p in small.parameters())
    assert abs(made.shape.parameters / counted - 1) < 0.01
    assert made.shape.layers == round(shape[0] * LAYERS)
    assert made.trainable == sum(layer.A.numel() + layer.B.numel() for layer in net.layers.values())


# ---------------------------------------------------------------- the real model


@pytest.mark.real
def test_the_default_model() -> None:
    model = models.load("smollm2")
    text = model.tokenizer(json.__doc__)["input_ids"]
    found = [{"input_ids": text[start : start + 48], "labels": text[start : start + 48]} for start in (0, 48, 96, 144)]
    given = Options(depth=28 / 30, least_depth=29 / 30, width=0.875, search_tokens=24, watched_tokens=96)
    net = stirred(Supernet(model.model, amoeballm.plan_supernet(model.model, given, found), 5, 2, 4, 0.1)).eval()
    subnet = net.plan.subnet(28, 0.875)
    small: Any = net.extract(subnet)
    ids = torch.tensor([found[0]["input_ids"]])
    with net.active(subnet), torch.no_grad():
        view = net(input_ids=ids).logits.float()
    out = small(ids).logits.float()
    assert (out - view).norm() / view.norm() < 0.05, "more than the rounding of bfloat16"
    assert small.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3

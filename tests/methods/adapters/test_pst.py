from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.lab import tiny
from shoestring.methods.adapters import pst
from shoestring.methods.adapters.pst import MaskedProduct, PstCallback, PstConfig, PstLinear, Rule
from shoestring.training import TrainOptions, train


def wrapped(base: Any = None, sparsity_now: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"sparsity": 0.6, "r": 4, "score_rank": 3, "target_modules": "all-linear"} | options
    model: Any = get_peft_model(base or tiny.model(), PstConfig(**settings, task_type="CAUSAL_LM")).eval()
    model.base_model.raise_sparsity(sparsity_now)
    return model


def layers(model: nn.Module) -> dict[str, PstLinear]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, PstLinear)}


def stirred(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def parts(rows: int = 6, columns: int = 10, r: int = 3, q: int = 2) -> tuple[Rule, list[Tensor]]:
    """A rule with numbers of its own, and (base, U, V, A, B, R, C), none of them zero."""
    torch.manual_seed(4)
    given = [torch.randn(s) for s in ((rows, columns), (rows, r), (r, columns), (rows, q), (q, columns), rows, columns)]
    return Rule(0.7, 0.4, 0.3), given


def mask_by_sorting(scores: Tensor, count: int) -> Tensor:
    """The oracle: sort all of them, and of equal ones take the first."""
    mask = torch.ones(scores.numel())
    mask[scores.flatten().argsort(stable=True)[:count]] = 0
    return mask.view(scores.shape)


def by_autograd(x: Tensor, rule: Rule, count: int, base: Tensor, *own: Tensor) -> Tensor:
    """The product by torch's own autograd, the mask's gradient going to the scores as it is: the oracle."""
    u, v, a, b, rows, columns = own
    weight = base + rule.beta * (u @ v)
    scores = weight.abs() + rule.score_scale * (a @ b) + rule.line_scale * (rows[:, None] + columns)
    mask = mask_by_sorting(scores.detach(), count) + scores - scores.detach()
    return F.linear(x, mask * weight)


# ---------------------------------------------------------------- the mask


@pytest.mark.parametrize("count", [1, 29, 30, 59])
def test_the_mask_is_that_of_a_full_sort(count: int) -> None:
    rule, (base, *own) = parts()
    weight = rule.weight(base, *own[:2])
    wanted = mask_by_sorting(rule.scores(weight, *own[2:]), count)
    assert torch.equal(rule.masked(count, base, *own)[0], weight * wanted)
    assert int((wanted == 0).sum()) == count


@pytest.mark.parametrize("count", range(1, 12))
def test_of_equal_scores_the_first_are_pruned(count: int) -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0, 3.0], [1.0, 0.0, 2.0, 1.0], [1.0, 3.0, 2.0, 1.0]])
    gone = pst.pruned(scores, pst.cut_at(scores, count))
    assert torch.equal(gone, mask_by_sorting(scores, count) == 0)


def test_both_selections_agree() -> None:
    """What other devices use in place of the CPU's partial sort."""
    scores = torch.randn(40, 30)
    for count in (1, 500, 1199):
        cut = pst.cut_at(scores, count)
        assert cut.score == float(torch.nextafter(scores.flatten().kthvalue(count).values, torch.tensor(math.inf)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9])
def test_exactly_as_many_zeros_as_promised(sparsity: float, dtype: torch.dtype) -> None:
    """In bfloat16 many weights are equal; of the untouched base only the size counts."""
    for model in (wrapped(tiny.model(dtype=dtype), sparsity), stirred(wrapped(tiny.model(dtype=dtype), sparsity))):
        for name, layer in layers(model).items():
            weight = layer.changed("default", pst._shared.read_weight(layer.get_base_layer()), None)[0]
            assert zeros(weight) == math.floor(sparsity * weight.numel()), name


def test_exactly_as_many_zeros_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    plain = Rule.masked

    def watched(self: Rule, count: int, base: Tensor, *own: Tensor) -> Any:
        made = plain(self, count, base, *own)
        seen.append((count, zeros(made[0]), base.numel()))
        return made

    monkeypatch.setattr(Rule, "masked", watched)
    model = wrapped()
    train(model, rows(), [], options(), tmp_path)
    assert all(count == found for count, found, _ in seen)
    config, each = model.peft_config["default"], len(layers(model))
    for step in range(10):
        wanted = config.sparsity_at(step, 10)
        # The loop looks once more at the first batch.
        passes = seen[(step + 1) * each : (step + 2) * each]
        assert [count for count, _, _ in passes] == [math.floor(wanted * size) for _, _, size in passes], step


def test_the_mask_is_of_the_weight_as_it_now_is() -> None:
    model = wrapped(sparsity_now=0.5)
    layer = next(iter(layers(model).values()))
    base = layer.get_base_layer().weight
    smallest = int(base.abs().argmin())
    row, column = divmod(smallest, base.shape[1])
    assert layer.changed("default", base, None)[0][row, column] == 0
    with torch.no_grad():  # the update makes the smallest weight the largest
        layer.pst_U["default"].zero_()[row] = 1.0
        layer.pst_V["default"].zero_()[:, column] = 5.0
    changed = layer.changed("default", base, None)[0]
    assert changed[row, column] == changed.abs().max() > 10


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("count", [0, 25, 59])
def test_gradients_are_those_of_autograd(count: int) -> None:
    rule, given = parts()
    x, pull = torch.randn(5, 10), torch.randn(5, 6)
    ours, oracle = ([p.clone().requires_grad_() for p in (x, *given[1:])] for _ in range(2))
    y = MaskedProduct.apply(ours[0], None, rule, count, given[0], *ours[1:])
    z = by_autograd(oracle[0], rule, count, given[0], *oracle[1:])
    assert torch.allclose(y, z, atol=1e-6)
    (y * pull).sum().backward()
    (z * pull).sum().backward()
    for mine, other in zip(ours, oracle):
        assert mine.grad.abs().sum() > 0 and torch.allclose(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_gradients_are_the_closed_forms() -> None:
    """Step 5 of the paper written out, with ties among the scores."""
    rule, (base, *own) = parts()
    base = (4 * base).round() / 4
    u, v, a, b, rows_, columns = own = [p.requires_grad_() for p in (own[0], 0 * own[1], own[2], 0 * own[3], *own[4:])]
    own[4].data.zero_(), own[5].data.zero_()
    x = torch.randn(7, 10)
    MaskedProduct.apply(x, None, rule, 30, base, *own).square().sum().backward()
    mask = mask_by_sorting(base.abs(), 30)
    g = (2 * x @ (mask * base).T).T @ x
    s = g * base
    w = g * mask + base.sign() * s
    wanted = [
        rule.beta * w @ v.T, rule.beta * u.T @ w, rule.score_scale * s @ b.T, rule.score_scale * a.T @ s,
        rule.line_scale * s.sum(1), rule.line_scale * s.sum(0),
    ]  # fmt: skip
    for parameter, grad in zip(own, wanted):
        assert torch.allclose(parameter.grad, grad, atol=1e-4, rtol=1e-4)
    assert u.grad.abs().sum() == 0 and v.grad.abs().sum() > 0 and b.grad.abs().sum() > 0


def test_a_pruned_weight_comes_back() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 4, bias=False))
    base[0].weight.data.copy_(0.5 + torch.rand(4, 8))
    base[0].weight.data[2, 3] = 0.3  # the smallest, and the target wants it much larger
    target = base[0].weight.detach().clone()
    target[2, 3], target[1, 1] = 3.0, 0.0
    model: Any = get_peft_model(base, PstConfig(sparsity=0.05, r=2, score_rank=2, target_modules=["0"]))  # type: ignore[arg-type]
    model.base_model.raise_sparsity(0.05)  # one weight of 32
    layer = layers(model)["0"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-2)
    history = []
    for _ in range(60):
        weight = layer.changed("default", base[0].base_layer.weight, None)[0]
        assert zeros(weight) == 1
        history.append(divmod(int((weight == 0).flatten().nonzero()), 8))
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        (model(x) - x @ target.T).square().mean().backward()
        optimizer.step()
    assert history[0] == (2, 3) and history[-1] != (2, 3), history


def test_scores_alone_can_bring_it_back() -> None:
    """At sparsity one half, gradients reach A, B, R and C through weights that are pruned."""
    rule, (base, *own) = parts()
    own[3].zero_(), own[4].zero_(), own[5].zero_(), own[1].zero_()
    for p in own:
        p.requires_grad_()
    weight, cut = rule.masked(30, base, *own)
    row, column = divmod(int((weight == 0).flatten().nonzero()[0]), 10)
    x, pull = torch.zeros(1, 10), torch.zeros(1, 6)
    x[0, column], pull[0, row] = 1.0, 1.0
    (MaskedProduct.apply(x, None, rule, 30, base, *own) * pull).sum().backward()
    assert own[4].grad[row] == pytest.approx(float(rule.line_scale * base[row, column]))
    assert own[5].grad[column] == pytest.approx(float(rule.line_scale * base[row, column]))
    assert own[3].grad[:, column].abs().min() > 0


def test_checkpointing_sees_the_same_sparsity() -> None:
    grads = []
    for saving in (False, True):
        model = stirred(wrapped(sparsity_now=0.5)).train()
        if saving:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**tiny.inputs(model)).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---------------------------------------------------------------- start, schedule


def test_it_starts_as_the_base() -> None:
    assert torch.equal(tiny.logits(wrapped()), tiny.logits(tiny.model()))
    assert not torch.allclose(tiny.logits(wrapped(sparsity_now=0.5)), tiny.logits(tiny.model()), atol=1e-3)


def test_schedule() -> None:
    config, total = PstConfig(sparsity=0.8, initial_sparsity=0.2), 100
    for step, wanted in ((0, 0.2), (10, 0.2), (40, 0.8 - 0.6 * 0.5**3), (70, 0.8), (85, 0.8), (100, 0.8)):
        assert config.sparsity_at(step, total) == pytest.approx(wanted)
    assert PstConfig(sparsity=0.9).sparsity_at(25, 100) == pytest.approx(0.9 * (1 - 0.75**3))
    course = [config.sparsity_at(step, total) for step in range(101)]
    assert course == sorted(course) and 0.2 < course[11] < course[69] < 0.8


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in tiny.batch(8, 10)]


def options(**changes: Any) -> TrainOptions:
    settings = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 0}
    return TrainOptions(**{**settings, **changes})


def test_a_run_ends_at_the_final_sparsity_and_learns(tmp_path: Path) -> None:
    model = wrapped()
    result = train(model, rows(), [], options(max_steps=25, learning_rate=1e-2), tmp_path)
    losses = [record["loss"] for record in result.log if "loss" in record]
    assert losses[-1] < losses[0]
    assert {int(m.pst_zeros["default"]) / m.weight.numel() > 0.599 for m in layers(model).values()} == {True}


def test_a_shortened_run_ends_at_the_final_sparsity() -> None:
    tuner = wrapped().base_model
    tuner.configure_schedule(100)
    for step in range(8):
        tuner.update_and_allocate(step)
    assert not any(int(m.pst_zeros["default"]) for m in layers(tuner).values())
    tuner.configure_schedule(8)  # the time is over
    assert all(int(m.pst_zeros["default"]) == math.floor(0.6 * m.weight.numel()) for m in layers(tuner).values())


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    whole = wrapped()
    train(whole, rows(), [], options(save_steps=3, save_total_limit=None), tmp_path / "whole")
    for step in (3, 6):
        again = wrapped()
        (tmp_path / f"part{step}").mkdir()
        (tmp_path / "whole" / f"checkpoint-{step}").rename(tmp_path / f"part{step}" / f"checkpoint-{step}")
        train(again, rows(), [], options(save_steps=3, save_total_limit=None), tmp_path / f"part{step}", resume=True)
        assert torch.equal(tiny.logits(again), tiny.logits(whole)), step


def test_sparsity_never_falls() -> None:
    model = wrapped(sparsity_now=0.6)
    model.base_model.configure_schedule(10)
    model.base_model.update_and_allocate(0)
    assert all(int(m.pst_zeros["default"]) == math.floor(0.6 * m.weight.numel()) for m in layers(model).values())


def test_in_transformers_trainer_by_the_callback(tmp_path: Path) -> None:
    model = wrapped()
    settings = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=1e-3, use_cpu=True, report_to=[], save_strategy="no",
        per_device_train_batch_size=2, logging_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows(), callbacks=[PstCallback()]).train()  # type: ignore[arg-type]
    assert all(int(m.pst_zeros["default"]) == math.floor(0.6 * m.weight.numel()) for m in layers(model).values())


def test_without_a_schedule_nothing_is_pruned_and_merging_says_so() -> None:
    with pytest.warns(UserWarning, match="only 0% of the weights are pruned, of 60% wanted"):
        wrapped().merge_and_unload()
    with pytest.raises(ValueError, match="configure_schedule"):
        wrapped().base_model.update_and_allocate(0)


# ---------------------------------------------------------------- what training costs


def test_nothing_of_the_weights_size_is_trained_or_kept() -> None:
    """Full movement pruning trains W and S and keeps two moments of each: eight tensors of the weight's size."""
    size = 256
    torch.manual_seed(0)
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(size, size)),  # type: ignore[arg-type]
        PstConfig(sparsity=0.5, r=4, score_rank=4, target_modules=["0"]),
    )
    model.base_model.raise_sparsity(0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(torch.randn(4, size)).square().sum()
    loss.backward()
    optimizer.step()
    ours = sum(p.numel() for p in trained)
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    assert ours == 9 * 2 * size and max(p.numel() for p in trained) < size * size
    assert max(kept, default=0) < size * size
    assert ours + ours + state < 8 * size * size / 3, "numbers, gradients and moments against movement pruning's"


# ---------------------------------------------------------------- merging, saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_a_plain_linear_with_the_same_answers(dtype: torch.dtype) -> None:
    model = stirred(wrapped(tiny.model(dtype=dtype), 0.6))
    out, names = tiny.logits(model), list(layers(model))
    merged = model.merge_and_unload()
    assert torch.equal(tiny.logits(merged), out)
    for name in names:
        layer = merged.get_submodule(name)
        assert type(layer) is nn.Linear
        assert zeros(layer.weight) == math.floor(0.6 * layer.weight.numel()), name
    assert not any("pst_" in name for name in merged.state_dict())


def test_the_sparsity_is_saved_with_the_adapter(tmp_path: Path) -> None:
    model = stirred(wrapped(sparsity_now=0.35))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    counts = [int(m.pst_zeros["default"]) for m in layers(again).values()]
    assert counts == [math.floor(0.35 * m.weight.numel()) for m in layers(again).values()]


def test_unmerging_and_disabling_give_the_base_back() -> None:
    model = stirred(wrapped(sparsity_now=0.6))
    out = tiny.logits(model)
    model.merge_adapter()
    assert torch.equal(tiny.logits(model), out)
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), out)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.model()))


def test_another_adapter_fills_the_zeros_unless_they_are_kept() -> None:
    found = {}
    for keeps in (False, True):
        merged = stirred(wrapped(sparsity_now=0.6)).merge_and_unload()
        torch.manual_seed(1)
        lora: Any = stirred(get_peft_model(merged, LoraConfig(r=2, target_modules=["up_proj"])))
        before = {n: p.clone() for n, p in lora.state_dict().items() if n.endswith("up_proj.base_layer.weight")}
        model = pst.merge_within_zeros(lora) if keeps else lora.merge_and_unload()
        found[keeps] = [m.weight for n, m in model.named_modules() if n.endswith("up_proj")]
    size = found[True][0].numel()
    assert all(zeros(weight) < 10 for weight in found[False])
    for kept, filled, base in zip(found[True], found[False], before.values()):
        assert zeros(kept) == math.floor(0.6 * size) and torch.equal(kept == 0, base == 0)
        assert torch.equal(kept[base != 0], filled[base != 0]), "elsewhere it is the plain merge"


def test_zeros_cannot_be_kept_once_they_are_filled() -> None:
    lora: Any = get_peft_model(
        wrapped(sparsity_now=0.6).merge_and_unload(), LoraConfig(r=2, target_modules=["up_proj"])
    )
    lora.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it first"):
        pst.merge_within_zeros(lora)


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"sparsity": 1.0}, "sparsity=1.0"), ({"sparsity": 1.5}, "sparsity"), ({"sparsity": -0.1}, "sparsity"),
     ({"initial_sparsity": 0.7}, "initial_sparsity=0.7 is more"), ({"begin": 0.8}, "together more"),
     ({"score_rank": 0}, "score_rank"), ({"sparsity": "half"}, "sparsity")],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((UsageError, ValueError), match=said):
        wrapped(**settings)


def test_a_matrix_too_small_to_prune_is_refused() -> None:
    base: Any = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="of the 2 x 4 weights of 0 are 0 zeros"):
        get_peft_model(base, PstConfig(sparsity=0.1, target_modules=["0"]))


def test_a_head_tied_to_the_embeddings_is_refused() -> None:
    assert not any("lm_head" in name for name in layers(wrapped()))
    with pytest.raises(ValueError, match="lm_head shares its weight with the input embeddings"):
        wrapped(target_modules=["lm_head"])


def test_several_adapters_do_not_act_together() -> None:
    model = wrapped(sparsity_now=0.6)
    model.add_adapter("two", PstConfig(sparsity=0.5, target_modules="all-linear"))
    with pytest.raises(ValueError, match="cannot act together"):
        model.base_model.set_adapter(["default", "two"])
    with pytest.raises(ValueError, match="cannot act together"):
        model.merge_adapter(["default", "two"])


def test_zeros_survive_a_cast() -> None:
    model = wrapped(sparsity_now=0.37)
    counts = [int(m.pst_zeros["default"]) for m in layers(model).values()]
    model.to(torch.bfloat16)
    assert [int(m.pst_zeros["default"]) for m in layers(model).values()] == counts


def test_scores_have_a_rate_of_their_own() -> None:
    (group,) = wrapped(score_rate=5.0).base_model.parameter_groups(1e-3)
    assert group["lr"] == 5e-3 and group["weight_decay"] == 0.0 and len(group["params"]) == 4 * 14


@pytest.mark.real
def test_on_the_default_model() -> None:
    from shoestring import models

    loaded = models.load("smollm2")
    torch.manual_seed(0)
    ends = {"layers_to_transform": [0, 29], "target_modules": ["down_proj", "q_proj"], "sparsity": 0.5}
    model: Any = catalog.contract("adapters").wrap(catalog.module("pst"), loaded.model, ends)
    ids = loaded.tokenizer("def add(a, b):\n    return a + b\n", return_tensors="pt").input_ids
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    model.base_model.configure_schedule(4)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        losses.append(loss.item())
    assert losses[1] < losses[0], "before anything is pruned it learns"
    names = list(layers(model))
    with torch.no_grad():
        out = model.eval()(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert torch.equal(merged(input_ids=ids).logits, out)
    for name in names:
        weight = merged.get_submodule(name).weight
        assert zeros(weight) - weight.numel() // 2 in range(3), name  # the base has a zero or two of its own

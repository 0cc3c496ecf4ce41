from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from shoestring.core import catalog
from shoestring.lab import tiny
from shoestring.training import TrainOptions, train

grown = catalog.module("triadapt_lora")
catalog.contract("adapters").adopt(grown)
NAME = "model.layers.1.mlp.up_proj"


def wrapped(seed: int = 0, base: Any = None, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(base or tiny.model(), grown.TriAdaptLoraConfig(**options)).eval()


def stirred(model: PeftModel, seed: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    found = ((n.removeprefix("base_model.model."), m) for n, m in model.named_modules())
    return {n: m for n, m in found if isinstance(m, grown.TriAdaptLoraLinear)}


def grow_some(model: PeftModel, *, keep_scale: bool = True, name: str = "default") -> PeftModel:
    """Ranks of 1 to 7 in two or three blocks, from layer to layer."""
    for number, layer in enumerate(layers(model).values()):
        for times in range(number % 3):
            layer.grow(name, 2 + times, keep_scale)
            stirred(model, number)
    return model


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------- blocks


def test_the_inner_matrix_is_a_lower_and_an_upper_triangle_of_blocks() -> None:
    layer = layers(wrapped(init_rank=2))[NAME]
    layer.grow("default", 1, True)
    layer.grow("default", 3, True)
    stirred_values = torch.Generator().manual_seed(3)
    for block in layer.parameters():
        block.data = torch.randn(block.shape, generator=stirred_values)
    a, b, rows, cols = layer.blocks("default")
    assert [tuple(t.shape) for t in rows] == [(2, 2), (1, 3), (3, 6)]
    assert [tuple(t.shape) for t in cols] == [(2, 2), (3, 1), (6, 3)]
    wanted = torch.zeros(6, 6)
    for i, (first, last) in enumerate(((0, 2), (2, 3), (3, 6))):
        wanted[first:last, :last] += rows[i]
        wanted[:last, first:last] += cols[i]
    big_a, big_b, c = layer.matrices("default")
    assert torch.equal(c, wanted)
    assert torch.equal(big_a, torch.cat(list(a))) and torch.equal(big_b, torch.cat(list(b), 1))
    torch.testing.assert_close(layer.get_delta_weight("default"), 16 / (6 + 1e-5) * big_b @ c @ big_a)
    # a layer counts in + out for each rank, and 2 a_i R_i for the inner matrix: not 2 R^2
    assert sum(p.numel() for n, p in layer.named_parameters() if "triadapt" in n) == 6 * (64 + 96) + 2 * (4 + 3 + 18)


def test_the_forward_pass_is_that_of_the_changed_weight() -> None:
    model = grow_some(stirred(wrapped()))
    plain = tiny.model()
    for name, layer in layers(model).items():
        plain.get_submodule(name).weight.data += layer.get_delta_weight("default")
    torch.testing.assert_close(tiny.logits(model), tiny.logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep_scale", [True, False])
def test_growing_keeps_the_update_or_divides_it_as_published(keep_scale: bool) -> None:
    layer = layers(stirred(wrapped(init_rank=8, reference_rank=8)))[NAME]
    layer.grow("default", 1, True)
    stirred(layer)
    before = layer.get_delta_weight("default").detach().clone()
    layer.grow("default", 4, keep_scale)
    torch.testing.assert_close(
        layer.get_delta_weight("default"), before if keep_scale else before * 9 / 13, rtol=1e-4, atol=1e-7
    )


# ---------------------------------------------------------------- the start


def one_step(model: PeftModel) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    model(**tiny.inputs(model)).loss.backward()
    optimizer.step()
    model.eval()


def test_after_one_step_b_has_moved_in_every_layer() -> None:
    model = wrapped()
    one_step(model)
    for name, layer in layers(model).items():
        assert layer.triadapt_B["default"][0].abs().min() > 0, name


def test_after_growth_every_parameter_of_the_new_block_gets_a_gradient_soon() -> None:
    model = wrapped()
    one_step(model)
    for layer in layers(model).values():
        layer.grow("default", 2, True)
    for _ in range(2):
        one_step(model)
    model.zero_grad()
    model(**tiny.inputs(model)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_the_published_start_never_moves_and_says_so() -> None:
    with pytest.warns(UserWarning, match="nothing is learned"):
        model = wrapped(init="paper-file", orth_reg_weight=0.0)
    before = tiny.logits(model)
    one_step(model)
    assert torch.equal(tiny.logits(model), before)
    for layer in layers(model).values():
        layer.grow("default", 2, True)
        assert not any(block.abs().sum() for blocks in layer.blocks("default") for block in list(blocks)[1:])
    one_step(model)
    assert torch.equal(tiny.logits(model), before)


# ---------------------------------------------------------------- events


@pytest.mark.parametrize(
    ("law", "step", "missing", "many"),
    [
        ("linear", 20, 100, 11), ("linear", 55, 100, 50), ("linear", 55, 7, 3), ("linear", 11, 10, 1),
        ("linear", 99, 1000, 210), ("non-linear", 55, 100, 10), ("non-linear", 10, 500, 1),
        ("non-linear", 99, 0, 1), ("non-linear", 99, 1, 1), ("non-linear", 91, 1000, 210),
    ],
)  # fmt: skip
def test_how_many_grow(law: str, step: int, missing: int, many: int) -> None:
    config = grown.TriAdaptLoraConfig(total_step=100, init_warmup=10, rank_growth_model=law)
    share = (step - 10) / 90
    exact = missing * share if law == "linear" else math.exp(share * math.log(max(missing, 1)))
    assert config.how_many(step, missing, 210) == many == min(max(int(exact), 1), 210)


def scored(model: PeftModel, scores: list[float]) -> None:
    """Give the layers these scores, by what they remember."""
    for layer, score in zip(layers(model).values(), scores, strict=True):
        layer.triadapt_norm["default"] = torch.tensor(layer.importance("default") - score)


def test_the_best_layers_grow_and_ties_all_do() -> None:
    model = wrapped(total_step=100, init_warmup=0, incre_interval=10, reference_rank=4)  # 42 ranks are missing
    scored(model, [1.0, 0.5, *[0.0] * 12])
    model.base_model.update_and_allocate(8)  # after 9 steps there is no event
    assert set(map(sum, model.base_model.grown().values())) == {1}
    scored(model, [1.0, 0.5, 0.25, 3.0, 0.125, 0.125, 0.125, *[0.0] * 7])
    model.base_model.update_and_allocate(9)  # k = int(42 * 0.1) = 4
    assert list(model.base_model.grown().values()) == [[1, 2]] * 4 + [[1]] * 10
    model = wrapped(total_step=100, init_warmup=0, incre_interval=10, reference_rank=4, target_total_rank=35)
    for layer in layers(model).values():
        layer.triadapt_norm["default"] = torch.tensor(layer.importance("default"))  # all score exactly 0
    model.base_model.update_and_allocate(9)  # k = 2, and all tie
    assert list(model.base_model.grown().values()) == [[1, 2]] * 14


def test_growth_waits_for_the_warm_up_and_ends_at_the_target() -> None:
    model = wrapped(total_step=40, init_warmup=4, incre_interval=2, reference_rank=4, target_total_rank=31)
    totals = []
    for step in range(40):
        for number, layer in enumerate(layers(model).values()):
            layer.triadapt_row["default"][0].data += 0.01 * (number + 1)
        model.base_model.update_and_allocate(step)
        totals.append(sum(map(sum, model.base_model.grown().values())))
    assert set(totals[:5]) == {14} and totals[5] > 14
    changes = {step + 1 for step in range(1, 40) if totals[step] > totals[step - 1]}
    assert changes and all(step % 2 == 0 for step in changes)
    # k of at most 17 layers grow by 2 at once
    assert 31 <= totals[-1] <= 31 + 17 * 2 - 1
    stopped = next(i for i, total in enumerate(totals) if total >= 31)
    assert set(totals[stopped:]) == {totals[-1]}


def test_no_rank_is_added_after_the_last_step() -> None:
    model = wrapped(total_step=10, init_warmup=0, incre_interval=5)
    model.base_model.update_and_allocate(9)
    assert set(map(sum, model.base_model.grown().values())) == {1}


def test_the_first_score_is_the_growth_since_the_start() -> None:
    model = wrapped()
    layer = layers(model)[NAME]
    assert layer.score("default") == pytest.approx(0, abs=1e-8) and layer.importance("default") > 0
    layer.triadapt_row["default"][0].data += 1.0
    norm = float(layer.inner("default").norm())
    assert layer.score("default") == pytest.approx(norm - float(layer.triadapt_norm["default"]), rel=1e-5)


@pytest.mark.parametrize("reset", [True, False])
def test_a_layer_that_grew_is_scored_anew_or_as_published(reset: bool) -> None:
    model = wrapped(total_step=100, init_warmup=0, incre_interval=10, reset_score=reset, target_modules=["up_proj"])
    winner = layers(model)[NAME]
    winner.triadapt_row["default"][0].data += 1.0
    model.base_model.update_and_allocate(9)
    assert winner.sizes("default") == [1, 4]
    norm = float(winner.inner("default").norm())
    remembered = norm / 2 if reset else abs(float(winner.inner("default")[0, 0]))
    assert float(winner.triadapt_norm["default"]) == pytest.approx(remembered, rel=1e-4)
    assert winner.score("default") == pytest.approx(0, abs=1e-6) if reset else winner.score("default") < -0.3


def test_odd_reference_ranks_grow_by_half_rounded_down() -> None:
    assert [grown.TriAdaptLoraConfig(reference_rank=r).grows_by for r in (1, 3, 8)] == [1, 1, 4]


def test_left_out_the_schedule_follows_the_length_of_the_run() -> None:
    assert grown.TriAdaptLoraConfig(total_step=400).schedule() == (40, 20, 400)
    assert grown.TriAdaptLoraConfig(total_step=5).schedule() == (0, 1, 5)
    with pytest.raises(ValueError, match="total_step=None"):
        wrapped().base_model.update_and_allocate(0)
    with pytest.raises(ValueError, match="init_warmup=9"):
        wrapped(init_warmup=9).base_model.configure_schedule(9)
    with pytest.raises(ValueError, match="set max_steps"):
        wrapped().base_model.configure_schedule(2**63 - 1)


# ---------------------------------------------------------------- orthogonality


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_gets_the_orthogonality_term_in_training(weight: float) -> None:
    model = grow_some(stirred(wrapped(orth_reg_weight=weight)))
    plain = model(**tiny.inputs(model)).loss
    model.train()
    terms = []
    for layer in layers(model).values():
        a, b, _ = layer.matrices("default")
        identity = torch.eye(len(a))
        terms += [(a @ a.T - identity).square().sum().sqrt(), (b.T @ b - identity).square().sum().sqrt()]
    wanted = weight * sum(terms) / len(terms)
    torch.testing.assert_close(model(**tiny.inputs(model)).loss - plain, torch.as_tensor(wanted), rtol=1e-4, atol=1e-5)
    if weight:
        torch.testing.assert_close(model.base_model.auxiliary_loss(), wanted)
    else:
        assert model.base_model.auxiliary_loss() is None
    assert not model.unload()._forward_hooks


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"reference_rank": 0}, "reference_rank=0"), ({"init_rank": 9}, "init_rank=9"),
        ({"rank_growth_model": "cubic"}, "linear or non-linear"), ({"init": "zeros"}, "paper-file"),
        ({"incre_interval": 0}, "incre_interval=0"), ({"dropout": 2}, "dropout=2"), ({"alpha": "x"}, "alpha"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_named(options: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        grown.TriAdaptLoraConfig(**options)


def test_only_one_adapter_grows() -> None:
    model = wrapped(total_step=4)
    model.add_adapter("two", grown.TriAdaptLoraConfig(total_step=4, init_warmup=0))
    model.set_adapter("two")
    model.base_model.update_and_allocate(0)
    assert set(map(sum, model.base_model.grown("default").values())) == {1}
    assert max(map(sum, model.base_model.grown("two").values())) > 1
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(ValueError, match="default and two"):
        model.base_model.update_and_allocate(1)


def test_training_that_never_grows_is_warned_of_once() -> None:
    model = wrapped().train()
    with pytest.warns(UserWarning, match="TriAdaptLoraCallback"):
        model(**tiny.inputs(model))
    at_work, known = wrapped(), wrapped(total_step=10).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quiet in (model, at_work, known):
            quiet(**tiny.inputs(quiet))


def test_several_processes_and_compiled_models_are_refused(tmp_path: Path) -> None:
    class Several(TrainingArguments):
        world_size = 2

    for settings in (Several(str(tmp_path), use_cpu=True), TrainingArguments(str(tmp_path), use_cpu=True)):
        if not isinstance(settings, Several):
            settings.torch_compile = True
        with pytest.raises(ValueError, match="one process, without torch_compile"):
            grown.TriAdaptLoraCallback().on_train_begin(settings, None, None, model=wrapped())


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_grown_adapter_is_saved_loaded_merged_and_exported(family: str, tmp_path: Path) -> None:
    options = dict(dropout=0.1, task_type="CAUSAL_LM")
    model = grow_some(stirred(wrapped(base=tiny.model(family), **options)))
    ranks = {sum(sizes) for sizes in model.base_model.grown().values()}
    assert len(ranks) == 3
    out = tiny.logits(model)
    model.save_pretrained(tmp_path / "grown")
    for few in (False, True):
        again = PeftModel.from_pretrained(tiny.model(family), tmp_path / "grown", low_cpu_mem_usage=few).eval()
        assert torch.equal(tiny.logits(again), out)
        assert again.base_model.grown() == model.base_model.grown()
        norms = [float(layer.triadapt_norm["default"]) for layer in layers(again).values()]
        assert norms == [float(layer.triadapt_norm["default"]) for layer in layers(model).values()]
    grown.as_lora(tmp_path / "grown", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["rank_pattern"] and set(config["alpha_pattern"]) == set()
    lora = PeftModel.from_pretrained(tiny.model(family), tmp_path / "lora").eval()
    torch.testing.assert_close(tiny.logits(lora), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tiny.logits(model.merge_and_unload()), out, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, tiny.logits(tiny.model(family)), atol=1e-2)


def test_a_grown_adapter_becomes_what_a_smaller_file_holds(tmp_path: Path) -> None:
    model = stirred(wrapped())
    out = tiny.logits(model)
    model.save_pretrained(tmp_path)
    grow_some(model)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(tiny.logits(model), out) and set(map(sum, model.base_model.grown().values())) == {1}
    assert trained(model) == trained(wrapped())


@pytest.mark.parametrize("change", ["gap", "empty", "width"])
def test_a_file_with_broken_blocks_is_refused(change: str, tmp_path: Path) -> None:
    grow_some(wrapped()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.k_proj.triadapt_"
    if change == "gap":
        tensors[key + "A.7"] = tensors.pop(key + "A.1")
    else:
        tensors[key + "A.1"] = torch.zeros(0, 64) if change == "empty" else torch.zeros(2, 65)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="k_proj"):
        PeftModel.from_pretrained(tiny.model(), tmp_path)


# ---------------------------------------------------------------- training


def rows(count: int = 40) -> list[dict[str, Any]]:
    made = []
    for i in range(count):
        ids = [3 + (i * 7 + j) % (tiny.VOCAB - 3) for j in range(8)]
        made.append({"input_ids": ids, "labels": ids})
    return made


def trainer(folder: Path, model: PeftModel, **changes: Any) -> Trainer:
    settings = TrainingArguments(
        str(folder), max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="linear",
        use_cpu=True, report_to=[], disable_tqdm=True, save_steps=6, logging_strategy="no",
        **changes,
    )  # fmt: skip
    data = [{name: torch.tensor(value) for name, value in row.items()} for row in rows()]
    return Trainer(model, settings, train_dataset=data, callbacks=[grown.TriAdaptLoraCallback()])  # type: ignore[arg-type]


def test_with_transformers_trainer_it_grows_and_new_ranks_learn(tmp_path: Path) -> None:
    model = wrapped(orth_reg_weight=0.0)
    run = trainer(tmp_path, model)
    seen: dict[int, tuple[int, list[int]]] = {}
    rates: list[set[float]] = []
    moments: list[bool] = []
    update = model.base_model.update_and_allocate

    def watched(step: int) -> None:
        update(step)
        seen[step + 1] = (trained(model), [sum(sizes) for sizes in model.base_model.grown().values()])

    model.base_model.update_and_allocate = watched

    class Watch(grown.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in model.parameters() if p.requires_grad}
            rates.append({group["lr"] for group in optimizer.param_groups if group["params"]})
            block = layers(model)[NAME].triadapt_A["default"][0]
            moments.append(bool(optimizer.state[block]) and int(optimizer.state[block]["step"]) == state.global_step)

    run.add_callback(Watch())
    run.train()
    totals = [sum(ranks) for _, ranks in seen.values()]
    assert totals[0] == 14 < totals[-1] >= 8 * 14 and totals == sorted(totals) and len(set(totals)) > 2
    assert all(len(rate) == 1 for rate in rates) and max(rates[0]) > max(rates[-1])
    assert all(moments[1:]), "what the optimizer knows of old blocks outlives the growth"
    late = [layer.triadapt_B["default"][-1] for layer in layers(model).values() if len(layer.sizes("default")) > 1]
    assert all(block.abs().sum() > 0 for block in late)
    assert model.peft_config["default"].total_step == 12


def test_a_trainer_of_transformers_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = wrapped(incre_rank_num=1)
    trainer(tmp_path / "whole", whole).train()
    half = wrapped(incre_rank_num=1)
    first = trainer(tmp_path / "half", half)

    class Stop(grown.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= 6

    first.add_callback(Stop())
    first.train()
    again = wrapped(seed=5, incre_rank_num=1)
    trainer(tmp_path / "half", again).train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-6"))
    ranks = [sum(map(sum, model.base_model.grown().values())) for model in (half, whole)]
    assert 14 < ranks[0] < ranks[1], ranks
    assert again.base_model.grown() == whole.base_model.grown()
    assert torch.equal(tiny.logits(again.eval()), tiny.logits(whole.eval()))


def test_own_training_grows_it_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    options = TrainOptions(max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=6)

    def run(folder: Path, model: PeftModel, resume: bool = False, stop: bool = False) -> PeftModel:
        class Stop(grown.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if stop and state.global_step == 8:
                    raise KeyboardInterrupt

        try:
            train(model, rows(), [], options, folder, resume=resume, callbacks=[Stop()])
        except KeyboardInterrupt:
            assert stop
        return model.eval()

    whole = run(tmp_path / "whole", wrapped(incre_rank_num=1))
    half = run(tmp_path / "half", wrapped(incre_rank_num=1), stop=True)
    again = run(tmp_path / "half", wrapped(incre_rank_num=1), resume=True)
    ranks = [sum(map(sum, model.base_model.grown().values())) for model in (half, whole)]
    assert 14 < ranks[0] < ranks[1], ranks
    assert again.base_model.grown() == whole.base_model.grown()
    assert torch.equal(tiny.logits(again), tiny.logits(whole))
    assert all(
        float(a.triadapt_norm["default"]) == float(b.triadapt_norm["default"])
        for a, b in zip(layers(again).values(), layers(whole).values())
    )

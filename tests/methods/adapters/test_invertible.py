from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from shoestring.core import catalog
from shoestring.engine.runner import Batch
from shoestring.engine.torch_runner import TorchRunner
from shoestring.lab import tiny
from shoestring.methods.adapters import invertible
from shoestring.methods.adapters.invertible import Coupling, InvertibleBlock, InvertibleConfig
from shoestring.models import load, shape_of
from shoestring.models.load import Loaded
from shoestring.training.loss import NextTokenLoss

FAMILIES = ("llama", "gpt2", "bert", "t5")

invertible.register()
torch.set_num_threads(1)


def stir(model: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p))
    return model


def wrapped(family: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    return stir(get_peft_model(tiny.model(family), InvertibleConfig(**options)).eval())


def layers(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def fit(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**tiny.inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- the bottleneck in both kinds of block


def test_a_block_that_ends_by_adding() -> None:
    model = wrapped("llama", form="seq_bn")
    block = model.base_model.model.model.layers[0]
    seen: dict[str, torch.Tensor] = {}
    block.register_forward_hook(lambda _, args, out: seen.update(out=out))
    block.mlp.register_forward_hook(lambda _, args, out: seen.update(u=out))
    block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(v=args[0]))
    tiny.logits(model)
    x = seen["u"] + seen["v"]
    part = block.invertible.adapter["default"]
    a = seen["u"] + torch.relu(x @ part.down.T + part.down_bias) @ part.up.T + part.up_bias
    assert torch.allclose(seen["out"], a + seen["v"], atol=1e-5)


def test_a_block_that_ends_with_its_norm() -> None:
    model = wrapped("bert", form="seq_bn")
    block = model.base_model.model.bert.encoder.layer[0]
    seen: dict[str, torch.Tensor] = {}
    block.register_forward_hook(lambda _, args, out: seen.update(out=out))
    block.output.dense.register_forward_hook(lambda _, args, out: seen.update(u=out))
    block.attention.register_forward_hook(lambda _, args, out: seen.update(v=out[0]))
    tiny.logits(model)
    own = block.output.LayerNorm
    norm = lambda s: torch.nn.functional.layer_norm(s, (64,), own.weight, own.bias, own.eps)
    x = norm(seen["u"] + seen["v"])
    part = block.invertible.adapter["default"]
    a = seen["u"] + torch.relu(x @ part.down.T + part.down_bias) @ part.up.T + part.up_bias
    assert torch.allclose(seen["out"], norm(a + seen["v"]), atol=1e-5)
    assert not torch.allclose(seen["out"], x, atol=1e-2), "the adapter must do something for this to mean anything"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["seq_bn", "seq_bn_inv"])
def test_zero_starts_at_the_base_model_and_normal_near_it(family: str, form: str) -> None:
    base = tiny.logits(tiny.model(family))
    torch.manual_seed(0)
    zero = get_peft_model(tiny.model(family), InvertibleConfig(form=form, init="zero")).eval()
    assert torch.allclose(tiny.logits(zero), base, atol=1e-6)
    near = get_peft_model(tiny.model(family), InvertibleConfig(form=form)).eval()
    apart = (tiny.logits(near) - base).abs().max()
    assert 0 < apart < 0.1 * base.abs().max()
    for name, p in near.named_parameters():
        if p.requires_grad:
            assert not p.any() if name.endswith("_bias") else 0.01 < p.std() < 0.03, name


@pytest.mark.parametrize(("width", "layers_"), [(64, 2), (96, 3)])
def test_parameters_follow_the_formula(width: int, layers_: int) -> None:
    base = tiny.model("llama", hidden_size=width, num_hidden_layers=layers_)
    for form, more in (("seq_bn", 0), ("seq_bn_inv", 2 * (2 * width // 2 * width // 4 + 3 * width // 4))):
        model = get_peft_model(copy.deepcopy(base), InvertibleConfig(form=form))
        expected = layers_ * (2 * width**2 // 16 + width // 16 + width) + more
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        assert invertible.price(shape_of(base), {"form": form}).trainable == expected


# ---------------------------------------------------------------- the invertible part


def test_the_inverse_is_exact() -> None:
    coupling = layers(stir(wrapped("llama"), 3), Coupling)[0]
    x = 3 * torch.randn(4, 7, 64)
    y = coupling.couple(x)
    assert not torch.allclose(x, y, atol=0.1)
    assert torch.allclose(coupling.uncouple(y), x, atol=1e-5)
    assert torch.allclose(coupling.couple(coupling.uncouple(x)), x, atol=1e-5)
    low = x.bfloat16()
    back = coupling.uncouple(coupling.couple(low))
    assert back.dtype == torch.bfloat16 and torch.allclose(back.float(), low.float(), rtol=0.02, atol=0.06)


def test_the_coupling_is_the_one_of_the_equations() -> None:
    coupling = layers(wrapped("llama"), Coupling)[0]
    f, g = coupling.f["default"], coupling.g["default"]
    x = torch.randn(5, 64)
    y1 = x[:, :32] + f(x[:, 32:])
    assert torch.allclose(coupling.couple(x), torch.cat([y1, x[:, 32:] + g(y1)], 1), atol=1e-6)
    assert f.down.shape == (16, 32) and f.up.shape == (32, 16) and f.activation == "relu"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_it_enters_with_the_embeddings_and_leaves_before_the_head(family: str, tied: bool) -> None:
    base = tiny.model(family, tie_word_embeddings=tied)
    model = stir(get_peft_model(tiny.model(family, tie_word_embeddings=tied), InvertibleConfig()), 2).eval()
    for block in layers(model, InvertibleBlock):  # leave the invertible part alone
        for p in block.parameters():
            p.data.zero_()
    core, coupling = model.base_model.model, layers(model, Coupling)[0]
    blocks = [block.module for block in invertible.inspect(core).blocks if block.index == 0]
    plain_blocks = [block.module for block in invertible.inspect(base).blocks if block.index == 0]
    entered, entering, before, head_input = [], [], [], []
    for block, plain in zip(blocks, plain_blocks):
        plain.register_forward_pre_hook(lambda _, args: (coupling.couple(args[0]), *args[1:]))
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        plain.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    base.get_output_embeddings().register_forward_pre_hook(lambda _, args: (coupling.uncouple(args[0]),))
    core.get_output_embeddings().register_forward_pre_hook(lambda _, args: before.append(args[0]))
    base.get_output_embeddings().register_forward_pre_hook(lambda _, args: head_input.append(args[0]))
    ours, theirs = tiny.logits(model), tiny.logits(base)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(entered[0], entering[0], atol=1e-3), "the first block gets coupled states"
    assert not torch.allclose(before[0], head_input[0], atol=1e-3), "the head gets uncoupled states"
    embed, head = core.get_input_embeddings().weight, core.get_output_embeddings().weight
    assert (embed is head) == (base.get_input_embeddings().weight is base.get_output_embeddings().weight)
    assert torch.equal(embed, tiny.model(family, tie_word_embeddings=tied).get_input_embeddings().weight)


def test_both_directions_train_it() -> None:
    for cut in ("couple", "uncouple"):
        model = wrapped("llama")
        coupling = layers(model, Coupling)[0]
        own = getattr(coupling, cut)
        setattr(coupling, cut, lambda x, own=own: own(x).detach() if x.requires_grad is False else x)
        model(**tiny.inputs(model)).loss.backward()
        assert coupling.f["default"].up.grad.abs().sum() > 0, f"without the gradient of {cut} none is left"


def test_training_leaves_the_tied_matrix_as_it_is() -> None:
    model = wrapped("llama")
    before = model.get_input_embeddings().weight.clone()
    losses = fit(model, 20)
    assert losses[-1] < losses[0]
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_chunked_loss_sees_the_inverse() -> None:
    model = wrapped("llama")
    rows, loss = tiny.inputs(model), NextTokenLoss()
    assert torch.allclose(loss(model, rows), model(**rows).loss, atol=1e-5)
    assert loss.reason is None


def test_a_classifier_has_the_forward_direction_alone() -> None:
    config = tiny.model("bert").config
    model = get_peft_model(BertForSequenceClassification(config), InvertibleConfig(modules_to_save=["classifier"]))
    coupling = layers(model, Coupling)[0]
    calls: list[str] = []
    couple, uncouple = coupling.couple, coupling.uncouple
    coupling.couple = lambda x: (calls.append("in"), couple(x))[1]
    coupling.uncouple = lambda x: (calls.append("out"), uncouple(x))[1]
    model(tiny.batch())
    assert calls == ["in"]


# ---------------------------------------------------------------- stacks


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    """Folders of two language adapters and of a task adapter that was trained above the first."""
    for seed, name in ((1, "italian"), (2, "german")):
        torch.manual_seed(seed)
        model = get_peft_model(tiny.model(), InvertibleConfig())
        stir(model, seed).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny.model(), tmp_path / "italian", adapter_name="italian")
    model.add_adapter("task", InvertibleConfig(form="seq_bn"))
    model.base_model.set_adapter(["italian", "task"])
    fit(model)
    model.save_pretrained(tmp_path, selected_adapters=["task"])
    return tmp_path


def test_only_the_top_of_a_stack_trains(languages: Path) -> None:
    model: Any = PeftModel.from_pretrained(tiny.model(), languages / "italian", adapter_name="italian")
    model.add_adapter("task", InvertibleConfig(form="seq_bn"))
    model.base_model.set_adapter(["italian", "task"])
    assert trained(model) and all(".task." in name for name in trained(model))
    below = {n: p.clone() for n, p in model.named_parameters() if ".italian." in n}
    fit(model)
    assert all(torch.equal(p, below[n]) for n, p in model.named_parameters() if n in below)
    with model.disable_adapter():
        assert torch.allclose(tiny.logits(model), tiny.logits(tiny.model()), atol=1e-6)
    assert all(".task." in name for name in trained(model)), "disabling for a while thaws the language adapter"


def test_each_reads_what_the_one_below_made() -> None:
    model = wrapped("llama", form="seq_bn")
    model.add_adapter("task", InvertibleConfig(form="seq_bn"))
    model.base_model.set_adapter(["default", "task"])
    stir(model, 5)
    layer = layers(model, InvertibleBlock)[0]
    lower, upper = layer.adapter["default"], layer.adapter["task"]
    s = torch.randn(3, 64)
    one = s + lower(s)
    assert torch.allclose(layer.stacked(s, lambda x: x), one + upper(one), atol=1e-6)
    halved = layer.stacked(s, lambda x: x / 2)
    one = s + lower(s / 2)
    assert torch.allclose(halved, one + upper(one / 2), atol=1e-6)


def test_a_stack_is_saved_in_parts_and_languages_are_exchanged(languages: Path) -> None:
    def stacked(*order: str) -> torch.Tensor:
        model: Any = PeftModel.from_pretrained(tiny.model(), languages / order[0], adapter_name=order[0])
        for name in order[1:]:
            model.load_adapter(str(languages / name), name)
        model.base_model.set_adapter([order[0], "task"])
        first = tiny.logits(model.eval())
        if "german" in order[1:]:
            model.base_model.set_adapter(["german", "task"])
            swapped = tiny.logits(model)
            model.base_model.set_adapter([order[0], "task"])
            assert torch.equal(tiny.logits(model), first), "the exchange leaves something behind"
            return swapped
        return first

    italian, german = stacked("italian", "task"), stacked("german", "task")
    assert not torch.allclose(italian, german, atol=1e-3)
    assert torch.equal(stacked("italian", "german", "task"), german)


def test_two_invertible_parts_at_once_are_refused(languages: Path) -> None:
    model: Any = PeftModel.from_pretrained(tiny.model(), languages / "italian", adapter_name="italian")
    model.load_adapter(str(languages / "german"), "german")
    with pytest.raises(ValueError, match="italian and german each have an invertible part"):
        model.base_model.set_adapter(["italian", "german"])
    assert model.base_model.active_adapters == ["italian"]


# ---------------------------------------------------------------- fusion


def fused(seed: int = 7) -> Any:
    model = wrapped("llama", form="seq_bn")
    model.add_adapter("graph", InvertibleConfig(form="seq_bn"))
    model.add_adapter("both", InvertibleConfig(form="fusion", fuse=["default", "graph"]))
    model.set_adapter("graph")
    stir(model, seed)
    model.set_adapter("both")
    return model


def test_a_fusion_starts_as_a_mean_and_weighs_by_attention() -> None:
    model = fused()
    layer = layers(model, InvertibleBlock)[0]
    fusion, s = layer.fusion["both"], torch.randn(5, 64)
    added = [layer.adapter[name](s) for name in ("default", "graph")]
    assert torch.equal(fusion.value, torch.eye(64))
    with torch.no_grad():
        fusion.query.zero_()
        assert torch.allclose(layer.stacked(s, lambda x: x), s + (added[0] + added[1]) / 2, atol=1e-6)
        stir(model, 8)
        scores = torch.stack([((s @ fusion.query.T) * (o @ fusion.key.T)).sum(-1) for o in added], -1).softmax(-1)
        expected = s + sum(scores[:, i, None] * (o @ fusion.value.T) for i, o in enumerate(added))
        assert torch.allclose(layer.stacked(s, lambda x: x), expected, atol=1e-5)


def test_a_fusion_trains_alone_and_is_saved_alone(tmp_path: Path) -> None:
    model = fused()
    assert trained(model) and all(".both." in name for name in trained(model))
    losses = fit(model, 15)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(tiny.model(), tmp_path)
    with pytest.raises(ValueError, match="needs graph, which is not loaded"):
        again.load_adapter(str(tmp_path / "both"), "both")
    again: Any = PeftModel.from_pretrained(tiny.model(), tmp_path)
    again.load_adapter(str(tmp_path / "graph"), "graph")
    again.load_adapter(str(tmp_path / "both"), "both")
    again.set_adapter("both")
    assert torch.equal(tiny.logits(again.eval()), tiny.logits(model.eval()))
    with pytest.raises(ValueError, match="graph is fused by both"):
        again.delete_adapter("graph")
    again.delete_adapter("both")
    again.delete_adapter("graph")


def test_fusing_what_has_an_invertible_part_is_refused() -> None:
    model = wrapped("llama")
    with pytest.raises(ValueError, match="has form='seq_bn_inv'"):
        model.add_adapter("both", InvertibleConfig(form="fusion", fuse=["default"]))


# ---------------------------------------------------------------- with everything else


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_copy_unload(family: str, tmp_path: Path) -> None:
    model = wrapped(family)
    out = tiny.logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.model(family), tmp_path, adapter_name="other").eval()
    assert torch.equal(tiny.logits(again), out)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.mul_(1.5)
    assert torch.equal(tiny.logits(model), out), "a copy shares modules with its original"
    base = model.unload()
    assert torch.equal(tiny.logits(base), tiny.logits(tiny.model(family)))
    assert [n for n, _ in base.named_modules()] == [n for n, _ in tiny.model(family).named_modules()]
    assert not any("forward" in vars(module) for module in base.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    plain, saving = wrapped(family), wrapped(family)
    saving.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    for model in (plain, saving):
        torch.manual_seed(3)
        model.train()(**tiny.inputs(model)).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters()):
        if a.requires_grad:
            assert a.grad.abs().sum() > 0 and torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_it_learns_on_frozen_integers(name: str, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "float")
    packed = lambda: AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=catalog.load(name)(group_size=32)
    )
    torch.manual_seed(0)
    model: Any = get_peft_model(packed(), InvertibleConfig())
    frozen = {n: v.clone() for n, v in model.state_dict().items()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(15):
        loss = model(**tiny.inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2, losses
    assert all(torch.equal(v, frozen[n]) for n, v in model.state_dict().items() if n not in trained), "the base moved"
    model.eval().save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        tiny.logits(PeftModel.from_pretrained(packed(), tmp_path / "adapter").eval()), tiny.logits(model)
    )


def test_the_engine_runs_it() -> None:
    model = wrapped("llama")
    ids = tiny.batch(1, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].numpy()
    runner = TorchRunner(Loaded(model, None, Path(), "tiny", "causal"), cache_dtype="fp32")
    try:
        runner.reserve(4)
        numbers, ends = np.arange(9, dtype=np.int32), np.array([0, 9], np.int32)
        tables = np.arange(4, dtype=np.int32)[None]
        batch = Batch(ids[0].numpy().astype(np.int32), numbers, ends, np.zeros(1, np.int32), tables)
        out = runner.run(batch, 1, 2, runner.run(batch, 0, 1))
        assert np.allclose(runner.logits(out, np.arange(9)), expected, atol=1e-4)
    finally:
        runner.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": 0}, "reduction=0"), ({"form": "par_bn"}, "form='par_bn'"), ({"init": "ones"}, "init='ones'"),
        ({"coupling_reduction": -1}, "coupling_reduction=-1"), ({"activation": "tanh"}, "activation='tanh'"),
        ({"form": "fusion"}, "fuse=None"), ({"fuse": ["a"]}, "seq_bn_inv"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InvertibleConfig(**options)


def test_an_odd_width_has_no_halves() -> None:
    base = tiny.model("llama", hidden_size=63, num_attention_heads=3, num_key_value_heads=3, head_dim=20)
    with pytest.raises(ValueError, match="width 63 has no halves"):
        get_peft_model(base, InvertibleConfig())


def test_merging_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="nonlinear"):
        wrapped().merge_and_unload()


@pytest.mark.real
def test_on_the_default_model_in_bfloat16() -> None:
    loaded = load("smollm2", dtype="bfloat16")
    model = get_peft_model(loaded.model, InvertibleConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == pytest.approx(1.43e6, rel=0.01)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    ids = loaded.tokenizer("La capitale d'Italia si chiama Roma.", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2, losses

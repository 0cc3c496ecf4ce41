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
from shoestring.methods.adapters import connected
from shoestring.methods.adapters.connected import ConnectedBlock, ConnectedConfig
from shoestring.models import load, shape_of
from shoestring.models.anatomy import inspect
from shoestring.models.load import Loaded

FAMILIES = ("llama", "gpt2", "bert", "t5")
FORMS: tuple[dict[str, Any], ...] = (
    {"links": "none"}, {"links": "scale"}, {"links": "bottleneck"}, {"links": "linear"},
    {"links": "linear", "links_over": "parts"}, {"links": "linear", "norm": True},
)  # fmt: skip

connected.register()
torch.set_num_threads(1)


def wrapped(family: str = "llama", stirred: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(family), ConnectedConfig(r=4, **options)).eval()
    for p in model.parameters():
        if p.requires_grad and stirred:
            p.data.add_(0.05 * torch.randn_like(p))
    return model


def layers(model: nn.Module) -> list[ConnectedBlock]:
    return [module for module in model.modules() if isinstance(module, ConnectedBlock)]


# ---------------------------------------------------------------- the path


class Cut(nn.Module):
    """A block whose output no gradient passes through."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.plain(*args, **kwargs)
        return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("links", ["none", "scale", "bottleneck", "linear"])
def test_links_are_a_path_of_trained_modules_alone(family: str, links: str) -> None:
    model = wrapped(family, links=links)
    found = layers(model)
    for layer in found:
        object.__setattr__(layer, "plain", Cut(layer.plain).forward)
    model(**tiny.inputs(model)).loss.backward()
    # In an encoder-decoder the stacks are joined by cross-attention, which is cut: each has its own last adapter.
    first, last = (found[2], found[3]) if family == "t5" else (found[0], found[-1])
    assert last.adapter["default"].up.grad.abs().sum() > 0
    gradient = first.adapter["default"].up.grad
    if links == "none":
        assert gradient is None or not gradient.abs().sum()
    else:
        assert gradient.abs().sum() > 0


def test_the_link_skips_attention_and_mlp() -> None:
    model = wrapped("llama", stirred=False, links="linear", link_rate=1.0)
    block = model.base_model.model.model.layers[0]
    with torch.no_grad():
        for p in block.connected.link.parameters():
            p.copy_(torch.eye(64))
        for p in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            p.zero_()
    seen: list[torch.Tensor] = []
    block.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    tiny.logits(model)
    assert torch.allclose(seen[1], 2 * seen[0])  # the residual stream, and the link beside the whole block


@pytest.mark.parametrize("family", FAMILIES)
def test_links_over_parts_read_what_the_part_reads(family: str) -> None:
    model = wrapped(family, stirred=False, links="linear", links_over="parts", link_rate=0.5)
    layer = layers(model)[0]
    for p in [*layer.attention_link.parameters(), *layer.mlp_link.parameters()]:
        p.data.copy_(torch.eye(64))
    anatomy = inspect(model)
    for first, last, key in (("q", "o", "attention_link"), ("up", "down", "mlp_link")):
        names = anatomy.blocks[0].projections
        begin = model.get_submodule(names.get(first, names.get("qkv")))
        end = model.get_submodule(names[last])
        read: list[torch.Tensor] = []
        gave: list[torch.Tensor] = []
        begin.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        end.register_forward_hook(lambda m, args, out, gave=gave: gave.extend((type(m).forward(m, args[0]), out)))
        tiny.logits(model)
        assert torch.allclose(gave[1], gave[0] + 0.5 * read[0], atol=1e-5)
        assert layer.parts[key].read is None, "a pass leaves its activations behind"


# ---------------------------------------------------------------- start, formula, rate


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS[:-1], ids=str)
def test_training_starts_at_the_base_model(family: str, form: dict[str, Any]) -> None:
    model = wrapped(family, stirred=False, **form)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.model(family)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parameters_follow_the_formula(form: dict[str, Any]) -> None:
    model = wrapped(**form)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter = 2 * 64 * 4 + 4 + 64
    link = {"none": 0, "scale": 64, "bottleneck": adapter, "linear": 64 * 64}[form["links"]]
    expected = 2 * (adapter + link * (2 if "links_over" in form else 1) + (128 if "norm" in form else 0))
    assert trained == expected == connected.price(shape_of(tiny.model()), {"r": 4, **form}).trainable


def test_scattered_and_linked_can_have_equal_size() -> None:
    # 6 layers of width 384: r = 208 alone has what r = 16 with linear links has, as in the comparison at equal size.
    sizes = [6 * (2 * 384 * 208 + 208 + 384), 6 * (2 * 384 * 16 + 16 + 384 + 384 * 384)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01


def test_the_rate_of_the_links_is_a_learning_rate_under_adam() -> None:
    moved = []
    for rate, learning_rate in ((0.1, 1e-2), (1.0, 1e-3)):
        model = wrapped(stirred=False, links="linear", link_rate=rate)
        link = layers(model)[0].link["default"].matrix
        optimizer = torch.optim.AdamW([link], learning_rate, weight_decay=0.0, eps=1e-16)
        model(**tiny.inputs(model)).loss.backward()
        optimizer.step()
        moved.append(rate * link.detach())
    assert torch.allclose(*moved, rtol=1e-3, atol=1e-6) and moved[0].abs().max() > 5e-4


# ---------------------------------------------------------------- around a block, as transformers uses it


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS[3:], ids=str)
def test_save_load_copy_unload(family: str, form: dict[str, Any], tmp_path: Path) -> None:
    model = wrapped(family, **form)
    out = tiny.logits(model)
    assert not torch.allclose(out, tiny.logits(tiny.model(family)))
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
@pytest.mark.parametrize("over", ["block", "parts"])
def test_gradient_checkpointing(family: str, reentrant: bool, over: str) -> None:
    plain, saving = wrapped(family, links_over=over), wrapped(family, links_over=over)
    saving.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    for model in (plain, saving):
        torch.manual_seed(3)
        model.train()(**tiny.inputs(model)).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters()):
        if a.requires_grad:
            assert a.grad.abs().sum() > 0 and torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.mark.parametrize("over", ["block", "parts"])
def test_padding_and_cache_change_nothing(over: str) -> None:
    model = wrapped("llama", links_over=over)
    ids = tiny.batch(1, 7)
    mask = torch.tensor([[0, 0, 0] + [1] * 7])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        beside = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        begun = model(input_ids=ids[:, :4], use_cache=True)
        rest = model(input_ids=ids[:, 4:], past_key_values=begun.past_key_values).logits
    assert torch.allclose(alone, beside[:, 3:], atol=1e-5)
    assert torch.allclose(alone[:, 4:], rest, atol=1e-5)


def test_the_block_stays_what_it_is() -> None:
    base, model = tiny.model("qwen3"), wrapped("qwen3").base_model.model
    for theirs, ours in zip(base.model.layers, model.model.layers):
        assert type(theirs) is type(ours)
        assert ours.self_attn.layer_idx == theirs.self_attn.layer_idx
    assert {n for n, _ in base.named_modules()} <= {n for n, _ in model.named_modules()}
    with torch.no_grad():
        states = model(tiny.batch(), output_hidden_states=True).hidden_states
        entering: list[torch.Tensor] = []
        model.model.layers[1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        model(tiny.batch())
    assert torch.equal(states[1], entering[0]), "recorded states are those of the adapted blocks"


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_it_learns_on_frozen_integers(name: str, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "float")
    packed = lambda: AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=catalog.load(name)(group_size=32)
    )
    torch.manual_seed(0)
    model: Any = get_peft_model(packed(), ConnectedConfig(r=4))
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


def test_the_engine_runs_adapted_blocks() -> None:
    model = wrapped("llama")
    ids = tiny.batch(1, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].numpy()
    runner = TorchRunner(Loaded(model, None, Path(), "tiny", "causal"), cache_dtype="fp32")
    try:
        runner.reserve(4)
        numbers = np.arange(9, dtype=np.int32)
        ends, tables = np.array([0, 9], np.int32), np.arange(4, dtype=np.int32)[None]
        batch = Batch(ids[0].numpy().astype(np.int32), numbers, ends, np.zeros(1, np.int32), tables)
        half = runner.run(batch, 0, 1)
        out = runner.run(batch, 1, 2, half)
        assert np.allclose(runner.logits(out, np.arange(9)), expected, atol=1e-4)
    finally:
        runner.close()
    with torch.no_grad():
        assert np.allclose(model(input_ids=ids).logits[0].numpy(), expected, atol=1e-6)


def test_half_of_the_layers_and_named_blocks() -> None:
    for options in ({"layers_to_transform": [1]}, {"layers_to_transform": 1}, {"target_modules": ["layers.1"]},
                    {"exclude_modules": ["layers.0"]}):  # fmt: skip
        model = wrapped("llama", **options)
        assert [name for name, m in model.named_modules() if isinstance(m, ConnectedBlock)] == [
            "base_model.model.model.layers.1.connected"
        ]


def test_a_reranking_head_is_saved_and_a_forgotten_one_is_not(tmp_path: Path) -> None:
    def made(seed: int) -> BertForSequenceClassification:
        torch.manual_seed(seed)
        config = tiny.model("bert").config
        config.num_labels = 1
        return BertForSequenceClassification(config)

    body = {k: v for k, v in made(0).state_dict().items() if "classifier" not in k}
    for save, same in ((["classifier"], True), (None, False)):
        first, second = made(0), made(1)  # the head of a model loaded anew is random
        second.load_state_dict(body, strict=False)
        model: Any = get_peft_model(first, ConnectedConfig(r=4, modules_to_save=save)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1) if p.requires_grad else None
            out = model(tiny.batch()).logits
            folder = tmp_path / str(same)
            model.save_pretrained(folder)
            again = PeftModel.from_pretrained(second, folder).eval()
            assert torch.equal(again(tiny.batch()).logits, out) == same


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r=0"), ({"links": "both"}, "links='both'"), ({"links_over": "layer"}, "links_over='layer'"),
        ({"activation": "tanh"}, "activation='tanh'"), ({"link_rate": 0}, "link_rate=0"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConnectedConfig(**options)


def test_a_target_that_is_no_block() -> None:
    with pytest.raises(TypeError, match="whole blocks, such as model.layers.0"):
        wrapped(target_modules=["q_proj"])


def test_merging_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="nonlinear"):
        wrapped().merge_and_unload()


def test_large_links_are_mentioned() -> None:
    with pytest.warns(UserWarning, match=r"8192 numbers, 12% of the model"):
        get_peft_model(tiny.model(), ConnectedConfig())


@pytest.mark.real
def test_on_the_default_model_in_bfloat16() -> None:
    loaded = load("smollm2", dtype="bfloat16")
    model = get_peft_model(loaded.model, ConnectedConfig(r=8, layers_to_transform=[0, 29]))
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    ids = loaded.tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2, losses
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

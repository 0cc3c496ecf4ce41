from __future__ import annotations

import copy
import json
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from shoestring.core import catalog
from shoestring.lab import tiny
from shoestring.methods.adapters import paca
from shoestring.methods.adapters.paca import PacaConfig

PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make small products slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wrapped(seed: int = 0, base: Any = None, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(base or tiny.model(), PacaConfig(**{"target_modules": "all-linear", **options})).eval()


def stirred(model: PeftModel, seed: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, paca.PacaLinear)}


def one(
    inputs: int = 24, outputs: int = 16, r: int = 5, *, dtype: torch.dtype = torch.float64, alpha: float = 10.0,
    biased: bool = True, **options: Any
) -> Any:  # fmt: skip
    """One adapted layer in training, its change not zero."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=biased, dtype=dtype))
    config = PacaConfig(r=r, alpha=alpha, target_modules=["0"], **options)
    return stirred(get_peft_model(model, config, autocast_adapter_dtype=dtype.itemsize < 4)).train()


def layer_of(model: Any) -> Any:
    return next(iter(layers(model).values()))


class Calls(TorchDispatchMode):
    """Counts operators and keeps the sizes of products."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def kept_for_backward(model: nn.Module, run: Any) -> int:
    """Bytes that a forward pass keeps beside the model's own tensors; storage shared by several counts once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    assert kept is not None  # alive until here, so no address was used twice
    return sum(seen.values())


# ---------------------------------------------------------------- the product and its gradients


def test_a_training_forward_is_one_product() -> None:
    model, x = one(), torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    with Calls() as calls:
        y = model(x)
    assert sum(calls.counts[name] for name in PRODUCTS) == 1, calls.counts
    with Calls() as calls:
        y.sum().backward()
    assert sum(calls.counts[name] for name in PRODUCTS) == 2, "grad x, and the columns' gradient"


def test_only_the_chosen_inputs_are_kept() -> None:
    r, tokens = 4, 512
    model, x = one(256, 64, r, dtype=torch.float32), torch.randn(tokens, 256)
    assert kept_for_backward(model, lambda: model(x)) == tokens * r * 4
    lora = get_peft_model(nn.Sequential(nn.Linear(256, 64)), LoraConfig(r=r, target_modules=["0"]))
    assert kept_for_backward(lora, lambda: lora(x)) >= tokens * 256 * 4


@pytest.mark.parametrize("shape", [(24,), (9, 24), (2, 7, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_are_those_of_full_fine_tuning_in_these_columns(shape: tuple[int, ...], biased: bool) -> None:
    model, x = one(biased=biased), torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    layer = layer_of(model)
    model(x).square().sum().backward()
    own = x.grad.clone()
    columns, scale = layer.paca_columns["default"], 2.0
    assert layer.scaling["default"] == scale
    full = nn.Linear(24, 16, bias=biased, dtype=torch.float64)
    full.load_state_dict(layer.base_layer.state_dict())
    with torch.no_grad():
        full.weight[:, columns] += scale * layer.paca_change["default"]
    x.grad = None
    full(x).square().sum().backward()
    torch.testing.assert_close(own, x.grad, rtol=1e-12, atol=1e-12)
    grad = layer.paca_change["default"].grad
    torch.testing.assert_close(grad, scale * full.weight.grad[:, columns], rtol=1e-12, atol=1e-12)
    assert layer.base_layer.weight.grad is None


def test_gradients_hold_against_finite_differences() -> None:
    layer = layer_of(one(7, 6, 3, bias="paca_only"))
    change, bias = layer.paca_change["default"], layer.base_layer.bias
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    columns, weight = layer.paca_columns["default"], layer.base_layer.weight

    def product(x: torch.Tensor, change: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return paca._Columns.apply(x, weight, bias, change, columns, 1.5)

    assert torch.autograd.gradcheck(product, (x, change, bias))


def test_training_the_change_is_training_the_columns() -> None:
    """The paper's P = W[:, c] / s + D takes the same steps under Adam."""
    model, x = one(), torch.randn(9, 24, dtype=torch.float64)
    layer, target = layer_of(model), torch.randn(9, 16, dtype=torch.float64)
    columns, s = layer.paca_columns["default"], layer.scaling["default"]
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    p = (weight[:, columns] / s + layer.paca_change["default"].detach()).requires_grad_()
    ours, theirs = (torch.optim.Adam([q], 0.05) for q in (layer.paca_change["default"], p))
    for _ in range(5):
        for optimizer, y in (
            (ours, lambda: model(x)),
            (theirs, lambda: nn.functional.linear(x, weight.index_copy(1, columns, s * p), bias)),
        ):
            optimizer.zero_grad()
            (y() - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(weight[:, columns] + s * layer.paca_change["default"], s * p, rtol=1e-9, atol=1e-9)


def test_biases_train_on_their_own_condition() -> None:
    model, x = one(bias="paca_only"), torch.randn(9, 24, dtype=torch.float64)
    layer = layer_of(model)
    model(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, (2 * model(x)).sum(0).detach())
    layer.paca_change["default"].requires_grad_(False)
    layer.bias.grad = None
    model(x).square().sum().backward()
    assert layer.bias.grad is not None
    assert one(bias="none").base_model.model[0].bias.grad is None


def test_biases_are_saved_and_loaded(tmp_path: Path) -> None:
    model = stirred(wrapped(base=tiny.model("gpt2"), bias="paca_only"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.model("gpt2"), tmp_path).eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    from shoestring import models

    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == paca.price(models.shape_of(tiny.model("gpt2")), {"r": 8, "bias": "paca_only"}).trainable
    with pytest.raises(ValueError, match="biases"):
        paca.as_lora(tmp_path, tmp_path / "lora")


# ---------------------------------------------------------------- the base stays whole


def test_the_base_is_whole_between_passes_and_its_version_stands() -> None:
    model, x = one(), torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    weight = layer_of(model).base_layer.weight
    before, version = weight.clone(), weight._version
    y = model(x)
    assert torch.equal(weight, before)
    y.sum().backward()
    assert torch.equal(weight, before) and weight._version == version


@pytest.mark.parametrize("what", ["weight", "change"])
def test_a_write_between_forward_and_backward_is_detected(what: str) -> None:
    model, x = one(), torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    layer = layer_of(model)
    y = model(x)
    with torch.no_grad():
        (layer.base_layer.weight if what == "weight" else layer.paca_change["default"]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_error_in_the_product_leaves_the_base_whole() -> None:
    model = one()
    weight = layer_of(model).base_layer.weight
    before = weight.clone()
    with pytest.raises(RuntimeError):
        paca._Columns.apply(torch.randn(9, 24), weight, torch.randn(3), *_parts(model))
    assert torch.equal(weight, before)


def _parts(model: Any) -> tuple[Any, ...]:
    layer = layer_of(model)
    return layer.paca_change["default"], layer.paca_columns["default"], 1.0


def test_a_module_used_twice() -> None:
    model, x = one(16, 16), torch.randn(9, 16, dtype=torch.float64)
    layer = layer_of(model)
    model(model(x)).square().sum().backward()
    grad = layer.paca_change["default"].grad.clone()
    change = layer.paca_change["default"].detach().clone().requires_grad_()
    base = layer.base_layer
    weight = base.weight.index_add(1, layer.paca_columns["default"], 2.0 * change)
    y = nn.functional.linear(nn.functional.linear(x, weight, base.bias), weight, base.bias)
    y.square().sum().backward()
    torch.testing.assert_close(grad, change.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_and_accumulated(reentrant: bool) -> None:
    model = one(16, 16)
    layer, parts = layer_of(model), torch.randn(3, 5, 16, dtype=torch.float64).requires_grad_()
    for part in parts:
        model(part).square().sum().backward()
    plain, layer.paca_change["default"].grad = layer.paca_change["default"].grad, None
    for part in parts:
        checkpoint(model, part, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(layer.paca_change["default"].grad, plain)


def test_two_threads_train_on_one_weight() -> None:
    model = one(64, 64, r=32, dtype=torch.float32)
    weight = layer_of(model).base_layer.weight
    before, x = weight.clone(), torch.randn(64, 64)
    expected = model(x).detach()
    wrong: list[int] = []

    def work() -> None:
        for turn in range(200):
            if not torch.equal(model(x).detach(), expected):
                wrong.append(turn)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(weight, before)


def test_second_derivatives_are_refused() -> None:
    model, x = one(), torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------- the same function by both ways


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_training_and_inference_compute_the_same(family: str) -> None:
    changes = {"t5": {"dropout_rate": 0.0}, "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
               "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}  # fmt: skip
    model = stirred(wrapped(base=tiny.model(family, **changes.get(family, {}))))
    quiet = tiny.logits(model)
    assert not torch.allclose(quiet, tiny.logits(model.get_base_model().eval() and tiny.model(family)), atol=1e-2)
    out = model.train()(**tiny.inputs(model))
    torch.testing.assert_close(out.logits.float(), quiet, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.eval()(**tiny.inputs(model)).loss.backward()  # through autograd's own rules
    assert grads
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_columns_of_a_conv1d_are_its_rows() -> None:
    model = wrapped(base=tiny.model("gpt2"), r=3).train()
    layer = layers(model)["transformer.h.0.mlp.c_fc"]
    assert isinstance(layer.base_layer, Conv1D) and (layer.in_features, layer.out_features) == (64, 96)
    with torch.no_grad():
        layer.paca_change["default"].fill_(1.0)
    x = torch.randn(2, 64)
    weight, columns = layer.base_layer.weight.detach().clone(), layer.paca_columns["default"]
    weight[columns] += layer.scaling["default"]
    torch.testing.assert_close(layer(x), x @ weight + layer.base_layer.bias)


def test_a_weight_that_trains_too_gets_its_gradient() -> None:
    model, x = one(), torch.randn(9, 24, dtype=torch.float64)
    layer = layer_of(model)
    layer.base_layer.weight.requires_grad_(True)
    model(x).sum().backward()
    assert layer.base_layer.weight.grad is not None and layer.paca_change["default"].grad.abs().sum() > 0


def test_hooks_on_the_base_are_called() -> None:
    model, x, calls = one(), torch.randn(9, 24, dtype=torch.float64), []
    plain = model(x)
    handle = layer_of(model).base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), plain)
    assert calls
    handle.remove()


def test_compiled_it_computes_the_same() -> None:
    model, x = one(dtype=torch.float32), torch.randn(9, 24)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert layer_of(model).paca_change["default"].grad.abs().sum() > 0


# ---------------------------------------------------------------- number formats


def test_on_a_bfloat16_base_the_change_is_float32_and_small_steps_count() -> None:
    model = one(dtype=torch.bfloat16, alpha=5.0)
    layer, x = layer_of(model), torch.randn(9, 24, dtype=torch.bfloat16)
    change = layer.paca_change["default"]
    assert change.dtype == torch.float32 and layer.base_layer.weight.dtype == torch.bfloat16
    model(x).float().square().sum().backward()
    assert change.grad.dtype == torch.float32
    before = change.detach().clone()
    with torch.no_grad():
        change.add_(1e-6)
    assert not torch.equal(change, before), "it would vanish in bfloat16"
    layer.paca_columns["default"].requires_grad_(False)
    assert model.to(torch.bfloat16) and layer.paca_columns["default"].dtype == torch.int64


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_under_autocast(base: torch.dtype, given: torch.dtype) -> None:
    model, x = one(dtype=base), torch.randn(2, 9, 24, dtype=given, requires_grad=True)
    layer = layer_of(model)
    weight = layer.base_layer.weight
    before = weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        plain = layer.base_layer(x)
    assert y.dtype == plain.dtype == torch.bfloat16
    y.float().square().sum().backward()
    change = layer.paca_change["default"]
    assert change.dtype == change.grad.dtype == torch.float32 and x.grad.dtype == given
    assert torch.equal(weight, before)
    exact = nn.functional.linear(
        x.float(), weight.float().index_add(1, layer.paca_columns["default"], 2.0 * change), layer.bias.float()
    )
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_a_base_of_another_type_than_its_input() -> None:
    model, x = one(dtype=torch.bfloat16), torch.randn(9, 24)
    assert model(x).dtype == torch.float32


# ---------------------------------------------------------------- choosing columns


def test_layers_draw_their_own_columns_and_a_seed_fixes_them() -> None:
    first, same, other = (layers(wrapped(seed)) for seed in (0, 0, 1))
    drawn = {n: tuple(m.paca_columns["default"].tolist()) for n, m in first.items()}
    assert len(set(drawn.values())) == len(drawn) == 14
    assert all(len(set(c)) == 8 and list(c) == sorted(c) for c in drawn.values())
    assert drawn == {n: tuple(m.paca_columns["default"].tolist()) for n, m in same.items()}
    assert drawn != {n: tuple(m.paca_columns["default"].tolist()) for n, m in other.items()}


def test_columns_by_their_norm() -> None:
    norms = tiny.model().model.layers[0].mlp.up_proj.weight.norm(dim=0)
    order = norms.argsort()
    for select, wanted in (("smallest", order[:8]), ("largest", order[-8:])):
        layer = layers(wrapped(select=select))["model.layers.0.mlp.up_proj"]
        assert set(layer.paca_columns["default"].tolist()) == set(wanted.tolist())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"r": 0}, "r=0"), ({"r": 65}, "65 is more than the 64"), ({"alpha": -1.0}, "alpha"),
     ({"select": "best"}, "select"), ({"bias": "some"}, "bias")],
)  # fmt: skip
def test_impossible_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrapped(**options)


def test_a_head_that_is_the_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        wrapped(target_modules=["lm_head"])
    wrapped(base=tiny.model(tie_word_embeddings=False), target_modules=["lm_head"])


# ---------------------------------------------------------------- adapters


def test_merging_writes_the_very_weight_that_was_trained() -> None:
    model = stirred(wrapped(base=tiny.model(dtype=torch.bfloat16))).train()
    out = model(**tiny.inputs(model)).logits
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(merged(**tiny.inputs(merged)).logits, out)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_adapters_with_columns_in_common(family: str) -> None:
    model = wrapped(base=tiny.model(family), r=48)
    model.add_adapter("two", PacaConfig(r=48, target_modules="all-linear"))
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "paca_" not in n}
    alone: dict[str, torch.Tensor] = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        stirred(model, seed=len(alone))
        model.train()(**tiny.inputs(model)).loss.backward()
        alone[name] = tiny.logits(model.eval())
    layer = next(iter(layers(model).values()))
    both = set(layer.paca_columns["default"].tolist()) & set(layer.paca_columns["two"].tolist())
    assert both, "48 of 64 twice must overlap"
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.model(family)))
    for name in ("default", "two"):
        model.set_adapter(name)
        assert torch.equal(tiny.logits(model), alone[name])
    model.base_model.set_adapter(["default", "two"])
    together = tiny.logits(model)
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), together, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    model.delete_adapter("two")
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert torch.equal(tiny.logits(model), alone["default"])


def test_only_change_and_columns_are_saved_and_no_seed_is_needed(tmp_path: Path) -> None:
    model = stirred(wrapped(seed=5))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} == {"paca_change", "paca_columns", "paca_width"}
    assert all(t.dtype == torch.int64 for key, t in tensors.items() if key.endswith("columns"))
    torch.manual_seed(99)
    for low in (False, True):
        again = PeftModel.from_pretrained(tiny.model(), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("change", ["twice", "beyond", "floats", "width"])
def test_a_file_with_impossible_columns_is_refused(change: str, tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.paca_"
    columns = tensors[name + "columns"]
    if change == "floats":
        tensors[name + "columns"] = columns.float()
    elif change == "width":
        tensors[name + "width"] = torch.tensor(96)
    else:
        columns[-1] = {"twice": columns[0], "beyond": 64}[change]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj"):
        PeftModel.from_pretrained(tiny.model(), tmp_path)


def test_on_another_base_it_is_a_change_and_not_a_mix(tmp_path: Path) -> None:
    model = stirred(wrapped())
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(tiny.model(seed=7), tmp_path)
    name = "model.layers.0.mlp.up_proj"
    layer, own = layers(other)[name], tiny.model(seed=7).get_submodule(name).weight
    merged = other.merge_and_unload().get_submodule(name).weight
    wanted = own.index_add(1, layer.paca_columns["default"], layers(model)[name].paca_change["default"])
    torch.testing.assert_close(merged, wanted)
    with pytest.raises((ValueError, RuntimeError), match="mlp.*proj"):
        PeftModel.from_pretrained(tiny.model(intermediate_size=80), tmp_path)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_it_is_a_plain_lora(family: str, tmp_path: Path) -> None:
    model = stirred(wrapped(base=tiny.model(family), r=6, alpha=9.0))
    model.save_pretrained(tmp_path / "paca")
    paca.as_lora(tmp_path / "paca", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    lora = PeftModel.from_pretrained(tiny.model(family), tmp_path / "lora").eval()
    assert type(lora.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(tiny.logits(lora), tiny.logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tiny.logits(lora), tiny.logits(tiny.model(family)), atol=1e-3)


def test_a_copy_of_the_model_is_whole() -> None:
    model = stirred(wrapped())
    assert torch.equal(tiny.logits(copy.deepcopy(model)), tiny.logits(model))


# ---------------------------------------------------------------- packed bases


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_on_packed_integers(name: str, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "float")
    config = catalog.load(name)(group_size=32)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)

    model = stirred(wrapped(base=load()))
    layer = layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(2, 7, 96, requires_grad=True)
    y = layer.train()(x)
    columns, change = layer.paca_columns["default"], layer.paca_change["default"]
    trained = layer.base_layer.unpacked().index_add(1, columns, change)  # the paper's dense copy with its columns
    with torch.no_grad():
        by_hand = layer.base_layer(x) + x[..., columns] @ change.T
    torch.testing.assert_close(y, by_hand)
    torch.testing.assert_close(y, x @ trained.T, rtol=0.1, atol=0.1)  # the base rounds activations
    y.square().sum().backward()
    torch.testing.assert_close(change.grad, (2 * y.detach()).flatten(0, 1).T @ x.detach()[..., columns].flatten(0, 1))
    tokens = 512
    long = torch.randn(tokens, 96)
    assert kept_for_backward(layer, lambda: layer(long)) == tokens * 8 * 4
    with pytest.raises(ValueError, match="packed"):
        model.merge_adapter()
    codes = {n: p.clone() for n, p in model.named_parameters() if "paca_" not in n}
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        loss = model(**tiny.inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(torch.equal(p, codes[n]) for n, p in model.named_parameters() if n in codes)
    model.eval().save_pretrained(tmp_path / "adapter")
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()), tiny.logits(model))


# ---------------------------------------------------------------- a real model


@pytest.mark.real
def test_on_the_default_model_less_is_kept_than_by_lora() -> None:
    from shoestring import models

    kept = {}
    ids = torch.arange(1000, 1128)[None]
    for name, config in (
        ("paca", PacaConfig(r=8, target_modules="all-linear")),
        ("lora", LoraConfig(r=8, target_modules="all-linear")),
    ):
        model = peft.get_peft_model(models.load("smollm2").model, config).train()
        kept[name] = kept_for_backward(model, partial(model, ids, logits_to_keep=1))
    assert kept["paca"] < 0.85 * kept["lora"], kept

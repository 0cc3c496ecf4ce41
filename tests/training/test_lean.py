from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_cases import lora, options

from shoestring.core import catalog
from shoestring.lab import tiny
from shoestring.training import lean as lean_module
from shoestring.training import train
from shoestring.training.lean import lean_backward


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch):
    monkeypatch.setattr(lean_module, "_LEAST_BYTES", 0)


def grown(model):
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p))
    return model.train()


def grown_once(model):
    """Its trained parameters are away from where a gradient would be zero, the same at every call."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.05 * torch.randn_like(p))
    return model.train()


def gradients(model, lean, autocast=False):
    model.zero_grad()
    saving = lean_backward() if lean else contextlib.nullcontext()
    with saving, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**tiny.inputs(model)).loss
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_are_the_same_bit_for_bit(family, half, adapted):
    model = tiny.model(family, dtype=torch.bfloat16 if half else torch.float32)
    kind = {"bert": None, "t5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    model = grown(lora(model, task_type=kind) if adapted else model)
    runs = []
    for lean in (False, True):
        torch.manual_seed(3)  # of dropout
        runs.append(gradients(model, lean, half))
    assert len(runs[0]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", catalog.in_room("adapters"))
def test_gradients_of_every_adapter_are_the_same(name):
    torch.manual_seed(0)
    model = catalog.contract("adapters").wrap(catalog.module(name), tiny.model(dtype=torch.bfloat16), {})
    runs = []
    for lean in (False, True):
        torch.manual_seed(3)
        runs.append(gradients(grown_once(model), lean, autocast=True))
    assert len(runs[0]) > 1
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def kept(run):
    """What the hooks put in the place of each saved tensor while `run` runs, and what `run` returns."""
    found = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def spied(pack, unpack):
        def note(tensor):
            found.append(pack(tensor))
            return found[-1]

        return hooks(note, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", spied)
        with lean_backward():
            return found, run()


def test_a_gated_block_keeps_two_of_four():
    gate, up, down = (nn.Linear(64, 64, bias=False) for _ in range(3))
    x = torch.randn(32, 64)
    found, out = kept(lambda: down((F.silu(gate(x)) * up(x)).view(8, 4, 64)).sum())
    again = sorted(k.node.name() for k in found if isinstance(k, lean_module._Again))
    assert again == ["MulBackward0", "SiluBackward0"]
    tensors = [k for k in found if isinstance(k, torch.Tensor) and k.grad_fn is not None]
    assert len({k.data_ptr() for k in tensors if k.grad_fn.name() != "TBackward0"}) == 2  # gate and up
    out.backward()
    assert down.weight.grad.abs().sum() > 0


def test_a_copy_is_kept_narrow_and_once():
    weight = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    hidden = (torch.randn(32, 64, dtype=torch.bfloat16) @ weight).float()
    found, out = kept(lambda: hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True)))
    narrow = [k for k in found if isinstance(k, lean_module._Narrowed)]
    assert len(narrow) == 2 and narrow[0] is narrow[1] and narrow[0].narrow.dtype == torch.bfloat16
    assert torch.equal(out.grad_fn._saved_self, hidden)


def test_a_product_with_a_constant_is_kept():
    x, constant = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)

    def run():
        product = (x * 2) * constant
        return product.exp().mul(product).sum()

    found, out = kept(run)
    assert not any(isinstance(k, lean_module._Again) and k.node.name() == "MulBackward0" for k in found)
    assert torch.equal(torch.autograd.grad(out, x)[0], torch.autograd.grad(run(), x)[0])


@pytest.mark.skipif(lean_module._MALLOC_TRIM is None, reason="needs glibc")
def test_holes_are_given_back_every_so_many_bytes(monkeypatch):
    calls = []
    monkeypatch.setattr(lean_module, "give_back_holes", lambda: calls.append(1))
    monkeypatch.setattr(lean_module, "_TRIM_BYTES", 3 * 64 * 64 * 4)
    x = torch.randn(64, 64, requires_grad=True)
    with lean_backward():
        for _ in range(8):
            (x * 2).exp().pow(2)  # two kept each
    assert len(calls) in (3, 4, 5)
    monkeypatch.undo()
    lean_module.give_back_holes()


def test_second_derivatives_are_the_same():
    weight = torch.randn(64, 64, requires_grad=True)
    ends = []
    for lean in (lean_backward, contextlib.nullcontext):
        with lean():
            out = (F.silu(weight) * weight.tanh()).pow(2).sum()
            (grad,) = torch.autograd.grad(out, weight, create_graph=True)
        ends.append(torch.autograd.grad(grad.pow(2).sum(), weight)[0])
    assert torch.equal(*ends)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_with_and_without(rows, tmp_path, monkeypatch, checkpointing):
    ends = []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr("shoestring.training.trainer.lean_backward", contextlib.nullcontext)
        model = lora(tiny.model(dtype=torch.bfloat16), lora_dropout=0.1)
        chosen = options(max_steps=4, dtype="bfloat16", gradient_checkpointing=checkpointing)
        result = train(model, rows, [], chosen, tmp_path / str(lean))
        ends.append([r["loss"] for r in result.log] + [p.detach() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*ends, strict=True))

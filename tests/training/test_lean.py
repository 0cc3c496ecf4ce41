from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from training_cases import lora, options

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


def test_a_gated_block_keeps_two_of_four(monkeypatch):
    gate, up, down = (nn.Linear(64, 64, bias=False) for _ in range(3))
    x = torch.randn(32, 64)
    made = []
    monkeypatch.setattr(lean_module._Again, "__init__", lambda self, node, t, init=lean_module._Again.__init__: (
        made.append((node.name(), tuple(t.shape))), init(self, node, t))[1])  # fmt: skip
    with lean_backward():
        out = down((torch.nn.functional.silu(gate(x)) * up(x)).view(8, 4, 64)).sum()
    assert sorted(made) == [("MulBackward0", (32, 64)), ("SiluBackward0", (32, 64))]
    out.backward()
    assert down.weight.grad.abs().sum() > 0


def test_a_copy_is_kept_narrow_and_once():
    weight = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    hidden = (x @ weight).float()
    with lean_backward():
        out = (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True))).sum()
    saved = out.grad_fn.next_functions[0][0]
    assert torch.equal(saved._saved_self, hidden)
    before = weight.grad
    out.backward()
    plain = torch.autograd.grad(
        ((h := (x @ weight).float()) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))).sum(), weight
    )[0]
    assert before is None and torch.equal(weight.grad, plain)


def test_a_product_with_a_constant_is_kept():
    x, constant = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
    with lean_backward():
        product = (x * 2) * constant
        out = product.exp().mul(product).sum()
    out.backward()
    again = x.detach().clone().requires_grad_()
    product = (again * 2) * constant
    product.exp().mul(product).sum().backward()
    assert torch.equal(x.grad, again.grad)


def test_less_is_alive_after_the_forward_pass():
    """Counted in the tensors that the hooks hold, on a model whose blocks are gated and normed."""
    model = grown(lora(tiny.model(dtype=torch.bfloat16)))
    alive = []
    for lean in (False, True):
        kept = {}

        def hold(thing, kept=kept):
            for t in (thing if isinstance(thing, torch.Tensor) else getattr(thing, "narrow", None),):
                if t is not None and t.grad_fn is not None or isinstance(thing, lean_module._Narrowed):
                    kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
            return thing

        hooks = torch.autograd.graph.saved_tensors_hooks
        if lean:

            def spied(pack, unpack, hold=hold, hooks=hooks):
                return hooks(lambda t: hold(pack(t)), unpack)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.autograd.graph, "saved_tensors_hooks", spied)
                with lean_backward(), torch.autocast("cpu", torch.bfloat16):
                    loss = model(**tiny.inputs(model)).loss
        else:
            with hooks(hold, lambda t: t), torch.autocast("cpu", torch.bfloat16):
                loss = model(**tiny.inputs(model)).loss
        alive.append(sum(size for size, _ in kept.values()))
        del loss
    assert alive[1] < 0.85 * alive[0], alive


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

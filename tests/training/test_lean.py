from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_cases import lora, options

from shoestring.lab import tiny
from shoestring.training import lean as lean_module
from shoestring.training import train
from shoestring.training.lean import LeanBackward


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
    saving = LeanBackward(model)() if lean else contextlib.nullcontext()
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


def kept(lean, run):
    """What the hooks of `lean` put in the place of each saved tensor while `run` runs, and what `run` returns."""
    found = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def spied(pack, unpack):
        def note(tensor):
            found.append(pack(tensor))
            return found[-1]

        return hooks(note, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", spied)
        with lean():
            return found, run()


def test_a_gated_block_keeps_two_of_four():
    gate, up, down = (nn.Linear(64, 64, bias=False) for _ in range(3))
    x = torch.randn(32, 64)
    lean = LeanBackward(nn.ModuleList([gate, up, down]))
    found, out = kept(lean, lambda: down((F.silu(gate(x)) * up(x)).view(8, 4, 64)).sum())
    again = sorted(k.node.name() for k in found if isinstance(k, lean_module._Again))
    assert again == ["MulBackward0", "SiluBackward0"]
    moved = {k.copy.data_ptr() for k in found if isinstance(k, lean_module._Moved)}
    assert len(moved) == 3  # input, gate and up
    out.backward()
    assert down.weight.grad.abs().sum() > 0


def test_a_copy_is_kept_narrow_and_once():
    weight = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    hidden = (torch.randn(32, 64, dtype=torch.bfloat16) @ weight).float()
    found, out = kept(
        LeanBackward(nn.Identity()),
        lambda: hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True)),
    )
    narrow = [k for k in found if isinstance(k, lean_module._Narrowed)]
    assert len(narrow) == 2 and narrow[0] is narrow[1] and narrow[0].narrow.dtype == torch.bfloat16
    assert torch.equal(out.grad_fn._saved_self, hidden)


def test_a_product_with_a_constant_is_kept():
    x, constant = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)

    def run():
        product = (x * 2) * constant
        return product.exp().mul(product).sum()

    found, out = kept(LeanBackward(nn.Identity()), run)
    assert not any(isinstance(k, lean_module._Again) and k.node.name() == "MulBackward0" for k in found)
    assert torch.equal(torch.autograd.grad(out, x)[0], torch.autograd.grad(run(), x)[0])


def test_weights_are_left_where_they_are():
    layer = nn.Linear(64, 64)
    x = torch.randn(32, 64, requires_grad=True)
    found, _ = kept(LeanBackward(layer), lambda: layer(x))
    assert [t.data_ptr() for t in found if isinstance(t, torch.Tensor)] == [layer.weight.data_ptr()]


def test_views_and_parts_come_back_as_they_were():
    x = torch.randn(6, 64, 64, requires_grad=True)
    whole = x * 2
    uses = (
        lambda t: t.transpose(1, 2), lambda t: t[2:], lambda t: t[:, ::2], lambda t: t[:1], lambda t: t.flatten(0, 1),
        lambda t: t[:, :1].expand(6, 64, 64),
    )  # fmt: skip
    for use in uses:
        found, out = kept(LeanBackward(nn.Identity()), lambda use=use: use(whole).pow(3))
        saved = out.grad_fn._saved_self
        assert torch.equal(saved, use(whole)) and saved.stride() == use(whole).stride()
        assert isinstance(found[0], lean_module._Moved) == (use(whole)[0].numel() < 64 * 64 or len(use(whole)) > 1)


def test_blocks_serve_again_once_the_pass_is_over_and_not_before(monkeypatch):
    monkeypatch.setattr(lean_module, "_BLOCK_BYTES", 2**16)
    lean = LeanBackward(nn.Identity())
    x = torch.randn(64, 64, requires_grad=True)

    def step():
        with lean():
            return (x * 2).exp().pow(2).sum()

    expected = torch.autograd.grad(step(), x)[0]
    blocks = {b.data_ptr() for b in lean._blocks}
    assert blocks
    two = [step(), step()]  # both wait for their backward pass
    assert not lean._blocks or not {b.data_ptr() for b in lean._blocks} & blocks
    for loss in two:
        assert torch.equal(torch.autograd.grad(loss, x)[0], expected)
    del loss, two
    assert blocks <= {b.data_ptr() for b in lean._blocks}
    count = len(lean._blocks)
    for _ in range(5):
        torch.autograd.grad(step(), x)
    assert len(lean._blocks) == count


class ReturnsWhatItSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x * 3)
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0]


def test_a_gradient_that_looks_at_a_block_keeps_it():
    lean = LeanBackward(nn.Identity())
    x = torch.randn(64, 64, requires_grad=True)
    with lean():
        loss = ReturnsWhatItSaved.apply(x)
    loss.backward()
    del loss
    first = x.grad.clone()
    with lean():
        kept_open = (torch.randn(64, 64, requires_grad=True) * 5).exp().sum()
    assert torch.equal(x.grad, first)
    del kept_open


def test_second_derivatives_are_the_same():
    weight = torch.randn(64, 64, requires_grad=True)
    ends = []
    for lean in (LeanBackward(nn.Identity()), contextlib.nullcontext):
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
            monkeypatch.setattr("shoestring.training.trainer.LeanBackward", lambda model: contextlib.nullcontext)
        model = lora(tiny.model(dtype=torch.bfloat16), lora_dropout=0.1)
        chosen = options(max_steps=4, dtype="bfloat16", gradient_checkpointing=checkpointing)
        result = train(model, rows, [], chosen, tmp_path / str(lean))
        ends.append([r["loss"] for r in result.log] + [p.detach() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*ends, strict=True))

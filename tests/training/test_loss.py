from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import lora

from shoestring.lab import tiny
from shoestring.training.loss import (
    IGNORED,
    NextTokenLoss,
    auxiliary_loss,
    chunked_cross_entropy,
    last_hidden_and_head,
)

MIXTRAL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.02,
}
GEMMA2 = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "final_logit_softcapping": 30.0,
}


def plain(hidden, head, labels, num_items=None):
    logits = head(hidden)[:, :-1].float().flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / (num_items or max(1, int((labels[:, 1:] != -100).sum())))


def case(rows, length, width, vocabulary, dtype=torch.float32, bias=False, trained_head=False, ignored=0.0, seed=0):
    torch.manual_seed(seed)
    head = torch.nn.Linear(width, vocabulary, bias=bias).to(dtype).requires_grad_(trained_head)
    hidden = torch.randn(rows, length, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows, length))
    labels[torch.rand(rows, length) < ignored] = -100
    return hidden, head, labels


def gradients(loss, hidden, head):
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, wanted, materialize_grads=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.6, 0.97])
@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (3, 17, 7, 101), (2, 50, 16, 257)])
def test_equals_the_loss_over_whole_logits(shape, ignored, trained_head, bias):
    hidden, head, labels = case(*shape, bias=bias, trained_head=trained_head, ignored=ignored)
    ours = chunked_cross_entropy(hidden, head, labels, chunk_bytes=1)
    theirs = plain(hidden, head, labels)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(gradients(ours, hidden, head), gradients(theirs, hidden, head)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_as_near_to_the_truth_as_the_plain_loss():
    hidden, head, labels = case(2, 40, 32, 300, dtype=torch.bfloat16, trained_head=True, ignored=0.3)
    exact_hidden, exact_head = hidden.detach().float().requires_grad_(), torch.nn.Linear(32, 300, bias=False)
    exact_head.weight.data = head.weight.detach().float()
    truth = plain(exact_hidden, exact_head, labels)
    ours = chunked_cross_entropy(hidden, head, labels, chunk_bytes=1)
    theirs = plain(hidden, head, labels)
    assert abs(ours - truth) <= abs(theirs - truth) + 1e-4 * truth
    true = gradients(truth, exact_hidden, exact_head)
    for mine, other, right in zip(gradients(ours, hidden, head), gradients(theirs, hidden, head), true):
        assert (mine.float() - right).norm() <= 1.2 * (other.float() - right).norm() + 1e-3 * right.norm()


def test_any_other_head_is_run_chunk_by_chunk():
    class Scaled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.scale = inner, torch.nn.Parameter(torch.tensor(1.3))

        def forward(self, hidden):
            return self.inner(hidden) * self.scale

    hidden, head, labels = case(2, 21, 8, 33, trained_head=True, ignored=0.4)
    head = Scaled(head)
    ours, theirs = chunked_cross_entropy(hidden, head, labels, chunk_bytes=1), plain(hidden, head, labels)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(gradients(ours, hidden, head), gradients(theirs, hidden, head)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_nothing_labelled_is_a_finite_zero_with_a_gradient():
    hidden, head, labels = case(2, 5, 4, 9)
    loss = chunked_cross_entropy(hidden, head, torch.full_like(labels, -100), torch.tensor(0))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss == 0 and not gradient.any()


def test_num_items_divides_the_sum():
    hidden, head, labels = case(2, 9, 4, 9, ignored=0.2)
    torch.testing.assert_close(chunked_cross_entropy(hidden, head, labels, 7), plain(hidden, head, labels, 7))


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return out


def largest(work) -> int:
    with Largest() as seen:
        work()
    return seen.elements


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(monkeypatch):
    vocabulary, tokens = 4096, 8 * 64
    monkeypatch.setattr(tiny, "VOCAB", vocabulary)
    model = lora(tiny.model("llama"))
    ids = 3 + torch.arange(tokens).view(8, 64) % (vocabulary - 3)
    batch = {"input_ids": ids, "labels": ids}
    ours = NextTokenLoss(chunk_bytes=64 * vocabulary * 4)
    ours.check(model, batch)
    assert ours.reason is None
    assert largest(lambda: ours(model, batch).backward()) <= 64 * vocabulary
    assert largest(lambda: model(**batch).loss.backward()) >= (tokens - 8) * vocabulary


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_families_that_need_nothing_special_are_chunked(family):
    model = lora(tiny.model(family))
    check_against_own_loss(model, chunked=True)


def test_a_head_that_carries_an_adapter_is_chunked_and_trained():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny.model("llama", tie_word_embeddings=False), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    )
    torch.nn.init.normal_(model.get_output_embeddings().lora_B["default"].weight)
    check_against_own_loss(model, chunked=True)


def test_a_head_whose_forward_was_taken_over_is_called():
    model = tiny.model()
    head = model.get_output_embeddings()
    own = head.forward
    head.forward = lambda hidden: own(hidden.tanh())
    rows = tiny.inputs(model)
    loss = NextTokenLoss()
    assert torch.allclose(loss(model, rows), model(**rows).loss, atol=1e-5)
    assert loss.reason is None, "it is chunked nevertheless"
    changed = loss(model, rows)
    del head.forward
    assert not torch.allclose(changed, loss(model, rows), atol=1e-3)


def test_tied_weights_that_are_trained_get_both_gradients():
    check_against_own_loss(tiny.model("llama", tie_word_embeddings=True), chunked=True)


def test_capped_logits_keep_the_models_own_loss(monkeypatch):
    monkeypatch.setitem(tiny._SMALL, "gemma2", GEMMA2)
    model = tiny.model("gemma2")
    reason = check_against_own_loss(model, chunked=False)
    assert "changes the logits" in reason


def test_the_router_loss_of_experts_is_not_lost(monkeypatch):
    monkeypatch.setitem(tiny._SMALL, "mixtral", MIXTRAL)
    model = tiny.model("mixtral")
    assert "auxiliary" in check_against_own_loss(model, chunked=False)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_models_that_do_not_predict_the_next_token_keep_their_own_loss(family):
    model = tiny.model(family)
    ids = tiny.batch()
    ours = NextTokenLoss()
    loss = ours(model, {"input_ids": ids, "labels": ids})
    assert ours.reason
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)


def test_soft_prompts_shift_no_label():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny.model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    check_against_own_loss(model, chunked=True)


def test_the_check_draws_no_random_numbers():
    model = lora(tiny.model("llama"), lora_dropout=0.5).train()
    ids = tiny.batch()
    before = torch.get_rng_state()
    NextTokenLoss().check(model, {"input_ids": ids, "labels": ids})
    assert torch.equal(before, torch.get_rng_state())


def test_hidden_states_are_what_the_head_would_get():
    model, ids = tiny.model("llama"), tiny.batch()
    hidden, head, output = last_hidden_and_head(model, {"input_ids": ids})
    torch.testing.assert_close(head(hidden), model(input_ids=ids).logits)
    assert output.logits.shape[1] == 1


def check_against_own_loss(model, chunked: bool) -> str:
    ids = tiny.batch()
    labels = ids.clone()
    labels[0, :7] = -100
    mask = torch.ones_like(ids)
    mask[1, -4:], labels[1, -4:] = 0, -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    ours = NextTokenLoss(chunk_bytes=1)
    items = (labels[:, 1:] != -100).sum()
    loss = ours(model, batch, items)
    assert (ours.reason is None) == chunked, ours.reason
    theirs = model(**batch, num_items_in_batch=items).loss
    torch.testing.assert_close(loss, theirs)
    wanted = [p for p in model.parameters() if p.requires_grad]
    for mine, other in zip(
        torch.autograd.grad(loss, wanted, allow_unused=True), torch.autograd.grad(theirs, wanted, allow_unused=True)
    ):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    return ours.reason or ""


class Mixture(torch.nn.Module):
    """A block whose router wants its own term in the loss; `adds` puts it into a labelled call's loss as well."""

    def __init__(self, block):
        super().__init__()
        self.block, self.router = block, torch.nn.Linear(64, 4)
        self.term = None

    def forward(self, x):
        self.term = 0.1 * self.router(x).softmax(-1).mean((0, 1)).pow(2).sum() if self.training else None
        return self.block(x)

    def auxiliary_loss(self):
        return self.term


def mixture(adds):
    torch.manual_seed(0)
    model = tiny.model().train()
    mixed = model.model.layers[1].mlp = Mixture(model.model.layers[1].mlp)

    def add(module, args, output):
        if output.loss is not None and mixed.term is not None:
            output.loss, output.aux_loss = output.loss + mixed.term, mixed.term

    if adds:
        model.register_forward_hook(add)
    return model, mixed


@pytest.mark.parametrize("adds", [True, False])
def test_a_module_adds_its_own_term_once(adds):
    model, mixed = mixture(adds)
    inputs = tiny.inputs(model)
    plain = model(**inputs).loss + (0 if adds else mixed.term)
    next_token = NextTokenLoss()
    ours = next_token(model, inputs)
    assert next_token.reason is None
    torch.testing.assert_close(ours, plain)
    ours.backward()
    assert mixed.router.weight.grad.abs().sum() > 0
    model.eval()
    torch.testing.assert_close(next_token(model, inputs), model(**inputs).loss)


def test_the_term_of_a_part_of_the_batch_counts_as_the_part_does():
    model, mixed = mixture(True)
    inputs = tiny.inputs(model)
    labels = int((inputs["labels"][:, 1:] != IGNORED).sum())
    half = NextTokenLoss()(model, inputs, torch.tensor(2.0 * labels))
    torch.testing.assert_close(half, model(**inputs).loss / 2)


def test_terms_are_asked_of_classes_and_not_through_wrappers():
    model = lora(mixture(True)[0])
    model.train()
    inputs = tiny.inputs(model)
    model(**inputs)
    mixed = next(m for m in model.modules() if isinstance(m, Mixture))
    assert torch.equal(auxiliary_loss(model), mixed.term.float())
    assert auxiliary_loss(tiny.model()) is None

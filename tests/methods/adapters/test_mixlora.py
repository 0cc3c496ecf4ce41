from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from shoestring.core import catalog
from shoestring.lab import tiny
from shoestring.methods.adapters import mixlora
from shoestring.methods.adapters._experts import ROUTES, Load, MixLoraBlock, Pairs, balance, within_capacity
from shoestring.methods.adapters.mixlora import MixLoraConfig
from shoestring.models import shape_of
from shoestring.models.anatomy import FEED_FORWARDS

catalog.load("mixlora")
ROUTINGS = {
    "mixlora": {"top_k": 2},
    "mixlora-dynamic": {"top_p": 0.4},
    "mixlora-switch": {"expert_capacity": 2, "jitter_noise": 0.0},
}
SMALL = {"r": 4, "lora_alpha": 8, "num_experts": 4, "task_type": "CAUSAL_LM"}


def wrapped(family: str = "llama", stirred: bool = True, base: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = get_peft_model(base or other(family), MixLoraConfig(**{**SMALL, **options}))
    return (stir(model) if stirred else model).eval()


def other(family: str) -> Any:
    """A tiny model of a family that the laboratory has not."""
    if family in tiny.FAMILIES:
        return tiny.model(family)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def stir(model: Any, seed: int = 1, size: float = 0.1) -> Any:
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(size * torch.randn_like(p))
    return model


def block_of(model: Any, number: int = 0) -> MixLoraBlock:
    return [m for m in model.modules() if isinstance(m, MixLoraBlock)][number]


def hidden(rows: int = 2, length: int = 9, width: int = 64) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(rows, length, width)


def changed(block: MixLoraBlock, linear: str, expert: int, x: Tensor) -> Tensor:
    """`linear` under an expert, by its own whole weight (eq. 1)."""
    config = block.configs["default"]
    settings, base = config.pair(experts=True), getattr(block.base_layer, linear)
    a = getattr(block, f"mixlora_A_{linear}")["default"].view(config.num_experts, settings.r, -1)[expert]
    b = getattr(block, f"mixlora_B_{linear}")["default"].view(config.num_experts, -1, settings.r)[expert]
    weight = base.weight + settings.scale * b @ a
    if settings.use_dora:
        length = getattr(block, f"mixlora_magnitude_{linear}")["default"].view(config.num_experts, -1)[expert]
        weight = length[:, None] * weight / weight.norm(dim=1, keepdim=True).detach()
    return F.linear(x, weight, base.bias)


def naive(block: MixLoraBlock, x: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, each with weights of its own (eq. 3)."""
    form = block.form
    act = getattr(block.base_layer, form.activation)
    out = (1 - weights.sum(-1, keepdim=True)) * block.base_layer(x)
    for expert in range(weights.shape[1]):
        middle = form.middle(act, [changed(block, name, expert, x) for name in form.inner])
        out = out + weights[:, expert, None] * changed(block, form.down, expert, middle)
    return out


# ---------------------------------------------------------------- what a block computes


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True, "r": 2}], ids=["lora", "dora", "rslora"])
def test_a_block_equals_experts_with_weights_of_their_own_and_so_do_the_gradients(family, routing, kind):
    model = wrapped(family, routing_strategy=routing, router_init_range=1.0, **ROUTINGS[routing], **kind)
    block = block_of(model)
    x = hidden().requires_grad_()
    out = block(x)
    trained = [p for p in block.parameters() if p.requires_grad] + [x]
    flat = x.reshape(-1, 64)
    routed = ROUTES[routing](flat @ block.mixlora_router["default"].T, block.configs["default"])
    if routing == "mixlora-switch":
        routed = within_capacity(routed, 2, torch.ones(18, dtype=torch.bool), torch.arange(18) % 9 == 0)
        assert (routed.weights.sum(1) == 0).any(), "no token is over capacity, so the case is not tried"
    wanted = naive(block, flat, routed.weights).view_as(x)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    toward = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((o * toward).sum(), trained, retain_graph=True) for o in (out, wanted))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert all(g.abs().sum() > 0 for g in ours)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dora", [False, True])
def test_before_training_the_block_is_the_frozen_one_whatever_the_router_does(routing, dora):
    model = wrapped(stirred=False, routing_strategy=routing, router_init_range=3.0, use_dora=dora, **ROUTINGS[routing])
    block, x = block_of(model), hidden()
    torch.testing.assert_close(block(x), block.base_layer(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(tiny.model()), atol=1e-5, rtol=1e-5)


def rows_through(block: MixLoraBlock, x: Tensor) -> dict[str, list[int]]:
    seen: dict[str, list[int]] = {name: [] for name in block.form.linears}
    handles = [
        getattr(block.base_layer, name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]).shape[0])
        )
        for name in seen
    ]
    block(x)
    for handle in handles:
        handle.remove()
    return seen


def test_the_frozen_products_run_once_for_all_experts():
    seen = rows_through(block_of(wrapped()), hidden(2, 9))
    assert seen == {"gate_proj": [18], "up_proj": [18], "down_proj": [18]}, "once a token, however many experts"


def test_rows_rescaled_by_dora_cost_the_last_product_once_an_expert():
    seen = rows_through(block_of(wrapped(use_dora=True)), hidden(2, 9))
    assert seen["gate_proj"] == seen["up_proj"] == [18] and sum(seen["down_proj"]) == 2 * 18


def test_an_expert_computes_on_the_tokens_routed_to_it_alone(monkeypatch):
    block, x = block_of(wrapped()), hidden()
    # The last expert is out of every token's reach.
    block.mixlora_router["default"].data[3] = 0
    block.mixlora_router["default"].data[:3, :] = torch.randn(3, 64).abs()
    x = x.abs()
    done: dict[int, set[int]] = {}
    plain = Pairs.added

    def added(self: Any, expert: int, x: Tensor) -> Tensor:
        done.setdefault(expert, set()).add(len(x))
        return plain(self, expert, x)

    monkeypatch.setattr(Pairs, "added", added)
    block(x).sum().backward()
    p = (x.reshape(-1, 64) @ block.mixlora_router["default"].T).softmax(-1)
    counts = torch.bincount(p.topk(2).indices.flatten(), minlength=4).tolist()
    assert done == {expert: {n} for expert, n in enumerate(counts) if n} and counts[3] == 0
    for name in block.form.linears:
        a, b = (getattr(block, f"mixlora_{part}_{name}")["default"].grad.chunk(4) for part in "AB")
        assert (
            not a[3].any() and not b[3].any() and all(part[j].any() for part in (a, b) for j in range(3) if counts[j])
        )


def test_the_router_learns_from_the_answer_once_an_expert_differs():
    for stirred in (False, True):
        model = wrapped(stirred=stirred)
        block = block_of(model)
        block(hidden()).square().sum().backward()
        gradient = block.mixlora_router["default"].grad.abs().max()
        assert gradient > 1e-3 if stirred else gradient < 1e-4, (stirred, gradient)


def test_the_router_reckons_in_float32(monkeypatch):
    model = wrapped(base=tiny.model(dtype=torch.bfloat16))
    block = block_of(model)
    assert block.mixlora_router["default"].dtype == torch.float32
    kinds = []
    plain = ROUTES["mixlora"]
    monkeypatch.setitem(ROUTES, "mixlora", lambda logits, config: kinds.append(logits.dtype) or plain(logits, config))
    with torch.autocast("cpu", torch.bfloat16):
        out = block(hidden().bfloat16())
    assert kinds == [torch.float32] and out.dtype == torch.bfloat16


# ---------------------------------------------------------------- routings


def test_dynamic_routing_keeps_experts_until_they_cover_enough():
    p = torch.tensor([[0.5, 0.1, 0.35, 0.05], [0.1, 0.85, 0.03, 0.02], [0.25, 0.25, 0.25, 0.25]])
    config = MixLoraConfig(**SMALL, routing_strategy="mixlora-dynamic", top_p=0.8)
    found = ROUTES["mixlora-dynamic"](p.log(), config)
    assert found.chosen.sum(1).tolist() == [2, 1, 4], "the expert that crosses top_p is kept"
    torch.testing.assert_close(found.weights[0], torch.tensor([0.5, 0.0, 0.35, 0.0]))
    torch.testing.assert_close(found.rest, torch.tensor([0.15, 0.15, 0.0]))
    config = MixLoraConfig(**SMALL, routing_strategy="mixlora-dynamic", top_p=0.8, temperature=0.25)
    assert ROUTES["mixlora-dynamic"](p.log(), config).chosen.sum(1).tolist() == [1, 1, 4], "colder, fewer"


def switching(capacity: int, **options: Any) -> tuple[Any, MixLoraBlock]:
    """A switch whose router sends every token to expert 2."""
    model = wrapped(routing_strategy="mixlora-switch", expert_capacity=capacity, jitter_noise=0.0, **options)
    for number in range(2):
        router = block_of(model, number).mixlora_router["default"].data
        router.zero_()[2] = 1.0
    return model, block_of(model)


def test_a_token_too_many_gets_the_frozen_block_in_training_and_at_work_alike():
    _, block = switching(capacity=4)
    x = hidden(2, 9).abs()
    for training in (True, False):
        out, plain = block.train(training)(x), block.base_layer(x)
        torch.testing.assert_close(out[:, 4:], plain[:, 4:], atol=1e-6, rtol=1e-5)
        assert ((out - plain)[:, :4].abs().amax(-1) > 1e-3).all(), "four tokens of each text reach the expert"


def test_capacity_counts_texts_apart_and_no_padding():
    _, block = switching(capacity=2)
    x = hidden(1, 9).abs()
    block.call.positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 7, 8]])  # three texts, one behind the other
    kept = (block(x) - block.base_layer(x)).abs().amax(-1)[0] > 1e-4
    assert kept.tolist() == [True, True, False, False, True, True, False, True, True]
    block.call.positions, block.call.mask = None, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    kept = (block(x) - block.base_layer(x)).abs().amax(-1)[0] > 1e-4
    assert kept[3:].tolist() == [True, True, False, False, False, False]


def test_padding_on_the_left_changes_no_answer_of_a_switch():
    model, _ = switching(capacity=3)
    ids = tiny.batch(1, 8)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 5).long()[None]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        shifted = model(input_ids=padded, attention_mask=mask, position_ids=places).logits[:, 5:]
    torch.testing.assert_close(shifted, plain, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- the balance term


def recorded(model: Any, **inputs: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    """A pass of the model and the logits of every router in it."""
    logits: list[Tensor] = []
    plain = dict(ROUTES)
    for name, route in plain.items():
        ROUTES[name] = lambda found, config, route=route: logits.append(found) or route(found, config)
    try:
        return model(**inputs), tuple(logits)
    finally:
        ROUTES.update(plain)


def padded_inputs() -> dict[str, Tensor]:
    ids = tiny.batch(3, 10)
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [0] + [1] * 9])
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask == 0, -100, ids)}


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_loss_of_a_model_in_training_has_the_balance_term_of_all_layers(task):
    model = wrapped(router_aux_loss_coef=0.5, task_type=task).train()
    inputs = padded_inputs()
    output, logits = recorded(model, **inputs)
    assert len(logits) == 2
    wanted = 0.5 * load_balancing_loss_func(logits, 4, 2, inputs["attention_mask"])
    torch.testing.assert_close(output.aux_loss, wanted)
    torch.testing.assert_close(model.auxiliary_loss(), wanted)
    everywhere = 0.5 * load_balancing_loss_func(logits, 4, 2)
    assert abs(wanted - everywhere) > 1e-3, "padding would make no difference here, so the case is not tried"
    plain = model.eval()(**inputs)
    torch.testing.assert_close(output.loss, plain.loss + wanted)
    assert getattr(plain, "aux_loss", None) is None and model.auxiliary_loss() is None
    pair = model.train()(**inputs, return_dict=False)
    torch.testing.assert_close(pair[0], output.loss)
    half = model(**inputs, num_items_in_batch=2 * (inputs["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(half.loss, output.loss / 2)


def test_the_terms_value_says_how_even_the_load_is():
    def load(chosen: list[float], p: list[float]) -> Load:
        return Load(torch.tensor(8.0), torch.tensor(chosen), 8 * torch.tensor(p), torch.tensor(0.0), True)

    even = load([4.0, 4, 4, 4], [0.25] * 4)
    assert balance([even, even]) == pytest.approx(2.0), "k when even"
    assert balance([load([8.0, 0, 0, 0], [1.0, 0, 0, 0])]) == pytest.approx(4.0), "E when one has all"
    # The layers' sums are taken together before the product.
    assert balance([load([8.0, 0, 0, 0], [1, 0, 0, 0]), load([0, 8.0, 0, 0], [0, 1, 0, 0])]) == pytest.approx(2.0)


def test_the_switch_adds_the_size_of_the_logits():
    model = wrapped(routing_strategy="mixlora-switch", jitter_noise=0.0, router_aux_loss_coef=0.0,
                    router_z_loss_coef=0.3).train()  # fmt: skip
    inputs = padded_inputs()
    output, logits = recorded(model, **inputs)
    real = inputs["attention_mask"].reshape(-1).bool()
    torch.testing.assert_close(
        output.aux_loss, 0.3 * torch.cat([x[real] for x in logits]).logsumexp(-1).square().mean()
    )


def test_the_term_evens_out_a_skewed_router():
    """4 experts, 2 a token, one row of the router raised: expert 0 begins with half of all slots, the most there is."""
    torch.manual_seed(0)
    x = torch.randn(512, 64) + 1
    router = torch.nn.Parameter(torch.randn(4, 64) * 0.02)
    router.data[0] += 0.05
    config = MixLoraConfig(**SMALL)
    optimizer = torch.optim.AdamW([router], 1e-3)

    def load() -> Load:
        logits = x @ router.T
        chosen = ROUTES["mixlora"](logits, config).chosen
        return Load(torch.tensor(512.0), chosen.sum(0).float(), logits.softmax(-1).sum(0), torch.tensor(0.0), True)

    before = load()
    assert before.chosen[0] / before.chosen.sum() > 0.49 and balance([before]) > 2.3
    for _ in range(40):
        optimizer.zero_grad()
        balance([load()]).backward()
        optimizer.step()
    assert load().chosen.max() / load().chosen.sum() < 0.4 and balance([load()]) < 2.15


def test_the_chunked_loss_of_our_training_counts_the_term_once():
    from shoestring.training.loss import NextTokenLoss

    model = wrapped(router_aux_loss_coef=0.5).train()
    inputs, ours = padded_inputs(), NextTokenLoss()
    own = model(**inputs)
    assert own.aux_loss > 0.5
    torch.testing.assert_close(ours(model, inputs), own.loss)
    assert ours.reason is None
    model.eval()
    torch.testing.assert_close(ours(model, inputs), model(**inputs).loss)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_recomputed_layers_see_the_same_noise_and_count_once(routing):
    """Jitter and dropout are drawn, padding is there, and the balance term weighs much."""
    found = []
    for saving in (False, True):
        model = wrapped(
            routing_strategy=routing, router_aux_loss_coef=1.0, **{**ROUTINGS[routing], "jitter_noise": 0.3},
            lora_dropout=0.2,
        ).train()  # fmt: skip
        if saving:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        output = model(**padded_inputs())
        before = [model.base_model.call.loads["default"][layer] for layer in (0, 1)]
        output.loss.backward()
        after = [model.base_model.call.loads["default"][layer] for layer in (0, 1)]
        assert all(a is b for a, b in zip(before, after)), "what is computed anew is held on to"
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_checkpoints_that_would_cut_the_routers_off_are_an_error():
    model = wrapped().train()
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**tiny.inputs(model))
    quiet = wrapped(router_loss=False).train()
    quiet.enable_input_require_grads()
    quiet.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    quiet(**tiny.inputs(quiet)).loss.backward()


def test_noise_reaches_the_router_in_training_alone():
    model = wrapped(jitter_noise=0.5, router_init_range=1.0)
    block, x = block_of(model), hidden()
    assert torch.equal(block(x), block(x))
    block.train()
    routed = [recorded(lambda **_: block(x))[1][0] for _ in range(2)]
    assert not torch.allclose(*routed)
    # The experts' own input stays clean: with one expert the noise has nothing to change.
    alone = block_of(wrapped(jitter_noise=0.5, num_experts=1, top_k=1)).train()
    torch.testing.assert_close(alone(x), alone(x))


def test_the_load_of_every_layer_is_reported():
    model = wrapped()
    inputs = padded_inputs()
    _, logits = recorded(model, **inputs)
    report = model.expert_load()
    real = inputs["attention_mask"].reshape(-1).bool()
    assert [row["layer"] for row in report] == [0, 1]
    for row, found in zip(report, logits):
        counts = torch.bincount(found[real].topk(2).indices.flatten(), minlength=4)
        assert row["tokens"] == counts.tolist() and sum(row["tokens"]) == 2 * int(real.sum())
        share = counts / counts.sum()
        entropy = -(share * share.clamp(min=1e-9).log()).sum() / torch.tensor(4.0).log()
        assert row["entropy"] == pytest.approx(float(entropy), abs=1e-5)


# ---------------------------------------------------------------- attention, and what is chosen


def test_attention_and_experts_are_set_apart():
    model = wrapped(r=2, lora_alpha=8, expert_lora={"r": 6, "lora_alpha": 3, "use_rslora": True})
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    block = block_of(model)
    assert q.mixlora_A["default"].shape == (2, 64) and block.mixlora_A_up_proj["default"].shape == (4 * 6, 64)
    assert q.configs["default"].pair().scale == 4
    assert q.configs["default"].pair(experts=True).scale == pytest.approx(3 / 6**0.5)
    x = hidden()
    weight = q.base_layer.weight + 4 * q.mixlora_B["default"] @ q.mixlora_A["default"]
    torch.testing.assert_close(q(x), F.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_attention_may_stay_frozen_and_the_experts_may_change_some_layers_only():
    model = wrapped(target_modules=["gate_proj", "down_proj"], layers_to_transform=[1])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".layers.1.mlp.mixlora_" in n for n in trained)
    assert not any("up_proj" in n for n in trained)
    block = block_of(model)
    block.mixlora_B_up_proj["default"] = torch.zeros(4 * 96, 4)
    block.mixlora_A_up_proj["default"] = torch.zeros(4 * 4, 64)
    x = hidden()
    routed = ROUTES["mixlora"](x.reshape(-1, 64) @ block.mixlora_router["default"].T, block.configs["default"])
    wanted = naive(block, x.reshape(-1, 64), routed.weights).view_as(x)
    del block.mixlora_A_up_proj["default"], block.mixlora_B_up_proj["default"]
    torch.testing.assert_close(block(x), wanted, atol=1e-5, rtol=1e-5)


def test_dora_in_attention_rescales_the_rows():
    model = wrapped(use_dora=True)
    q, x = model.base_model.model.model.layers[0].self_attn.q_proj, hidden()
    weight = q.base_layer.weight + 2 * q.mixlora_B["default"] @ q.mixlora_A["default"]
    weight = q.mixlora_magnitude["default"][:, None] * weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(q(x), F.linear(x, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [name for name in FEED_FORWARDS if name != "llama"])
def test_every_family_starts_as_it_was_and_learns(family):
    plain = tiny.logits(other(family))
    model = wrapped(family, stirred=False)
    torch.testing.assert_close(tiny.logits(model), plain, atol=1e-5, rtol=1e-4)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = model(**tiny.inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_other_families_are_refused_with_a_list_of_those_it_knows(family):
    with pytest.raises(ValueError, match=r"gemma, gemma2, llama, mistral, phi, phi3, qwen2, qwen3") as error:
        get_peft_model(tiny.model(family), MixLoraConfig(**{**SMALL, "task_type": None}))
    assert f"({family})" in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 5}, "top_k=5"),
        ({"top_k": 0}, "top_k=0"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"routing_strategy": "mixtral"}, "mixlora-switch"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"expert_lora": {"r": 0}}, "expert_lora: r=0"),
        ({"expert_lora": {"rank": 4}}, "expert_lora has no setting rank"),
        ({"jitter_noise": -0.1}, "jitter_noise"),
        ({"expert_capacity": 0}, "expert_capacity"),
        ({"act_fn": "no_such"}, "no_such"),
    ],
)
def test_settings_that_cannot_be_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        MixLoraConfig(**{**SMALL, **options})


def test_targets_must_reach_a_feed_forward_block_and_nothing_foreign():
    with pytest.raises(ValueError, match=r"no feed-forward block.*gate_proj"):
        wrapped(target_modules=["q_proj", "v_proj"])
    with pytest.raises(TypeError, match="lm_head"):
        wrapped(target_modules=["up_proj", "lm_head"])


def test_no_setting_lets_it_merge():
    model = wrapped()
    for attempt in (model.merge_adapter, model.merge_and_unload, lambda: block_of(model).merge()):
        with pytest.raises(NotImplementedError, match="depends on the token"):
            attempt()


# ---------------------------------------------------------------- several adapters on one base


def two_adapters() -> Any:
    model = wrapped()
    model.add_adapter("two", MixLoraConfig(**{**SMALL, "num_experts": 6, "top_k": 3, "r": 2, "use_dora": True}))
    model.set_adapter("two")
    stir(model, seed=9)
    model.set_adapter("default")
    return model


def test_rows_of_a_batch_follow_their_own_adapter():
    model, ids = two_adapters(), tiny.batch(4, 8)
    alone: dict[str, Tensor] = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        alone[name] = tiny.logits(model, ids)
    with model.disable_adapter():
        alone["__base__"] = tiny.logits(model, ids)
    names = ["two", "default", "__base__", "two"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], atol=1e-5, rtol=1e-4)
    assert len(rows_of_gate(model, ids, names)) == 1, "the frozen products are shared by all adapters"
    model.set_adapter("default")
    assert torch.equal(tiny.logits(model, ids), alone["default"]), "an assignment outlives its call"
    with pytest.raises(ValueError, match="one for each row"):
        model(input_ids=ids, adapter_names=["two"])
    with pytest.raises(ValueError, match="three"):
        model(input_ids=ids, adapter_names=["three"] * 4)
    with pytest.raises(ValueError, match="do not act together"):
        model.base_model.set_adapter(["default", "two"])


def rows_of_gate(model: Any, ids: Tensor, names: list[str]) -> list[int]:
    seen: list[int] = []
    gate = block_of(model).base_layer.gate_proj
    handle = gate.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        model(input_ids=ids, adapter_names=names)
    handle.remove()
    return seen


def test_rows_of_a_batch_train_their_own_adapter():
    """Two adapters learn in one batch exactly what each would learn from its rows, balance terms included."""
    model, ids = two_adapters().train(), tiny.batch(4, 8)
    model.set_requires_grad(["default", "two"])
    output = model(input_ids=ids, labels=ids, adapter_names=["two", "default", "default", "two"])
    output.loss.backward()
    together = gradients(model)
    for name, rows in (("default", [1, 2]), ("two", [0, 3])):
        model.zero_grad()
        model.set_adapter(name)
        alone = model(input_ids=ids[rows], labels=ids[rows])
        # Half the labels are this adapter's; its balance term is a mean over its own tokens either way.
        ((alone.loss - model.auxiliary_loss()) / 2 + model.auxiliary_loss()).backward()
        for key, gradient in gradients(model).items():
            torch.testing.assert_close(together[key], gradient, atol=1e-5, rtol=1e-3)


def test_texts_of_a_batch_are_continued_by_their_own_adapter():
    model, ids = two_adapters(), tiny.batch(2, 6)
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    alone = []
    for row, name in enumerate(["default", "two"]):
        model.set_adapter(name)
        alone.append(model.generate(input_ids=ids[row : row + 1], **settings)[0])
    mixed = model.generate(input_ids=ids, adapter_names=["default", "two"], **settings)
    assert torch.equal(mixed, torch.stack(alone))
    beams = model.generate(input_ids=ids, adapter_names=["default", "two"], num_beams=2, **settings)
    assert beams.shape == mixed.shape


@pytest.mark.parametrize("routing", ["mixlora", "mixlora-dynamic"])
def test_padded_texts_are_continued_as_unpadded_ones(routing):
    model = wrapped(routing_strategy=routing, **ROUTINGS[routing])
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    short, long = tiny.batch(1, 5), tiny.batch(1, 9)
    ids = torch.cat([F.pad(short, (4, 0)), long])
    mask = torch.cat([F.pad(torch.ones_like(short), (4, 0)), torch.ones_like(long)])
    both = model.generate(input_ids=ids, attention_mask=mask, **settings)
    for row, alone in enumerate((short, long)):
        assert torch.equal(both[row, 9:], model.generate(input_ids=alone, **settings)[0, alone.shape[1] :])


# ---------------------------------------------------------------- files


def test_folders_are_in_the_authors_layout(tmp_path: Path):
    model = wrapped(use_dora=False, expert_lora={"r": 2})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {
        "mixlora.layers.1.mlp.moe_gate.weight": (4, 64),
        "mixlora.layers.0.mlp.gate_proj.experts.3.lora_A.weight": (2, 64),
        "mixlora.layers.0.mlp.up_proj.experts.0.lora_B.weight": (96, 2),
        "mixlora.layers.1.mlp.down_proj.experts.2.lora_A.weight": (2, 96),
        "mixlora.layers.1.self_attn.k_proj.lora_B.weight": (32, 4),
    }
    assert all(tuple(tensors[name].shape) == shape for name, shape in shapes.items())
    assert len(tensors) == 2 * (1 + 3 * 4 * 2 + 4 * 2) and all(name.startswith("mixlora.layers.") for name in tensors)
    block = block_of(model)
    third = tensors["mixlora.layers.0.mlp.gate_proj.experts.3.lora_A.weight"]
    assert torch.equal(third, block.mixlora_A_gate_proj["default"][6:])
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "MIXLORA", "routing_strategy": "mixlora", "expert_lora": {"r": 2}, "num_experts": 4, "top_k": 2,
        "router_aux_loss_coef": 0.01, "act_fn": "silu",
    }  # fmt: skip
    assert saved.items() >= wanted.items() and saved["target_modules"] == sorted(saved["target_modules"])


AUTHORS = {  # what the authors' code writes
    "bias": "none", "peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
    "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "routing_strategy": "mixlora", "num_experts": 4, "top_k": 2,
    "act_fn": "silu", "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj", "up_proj"],
    "expert_lora": {"bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": 2,
                    "lora_alpha": 4, "lora_dropout": 0.05},
}  # fmt: skip


def authors_folder(folder: Path, whole: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(4)
    sizes = {"q_proj": (64, 64), "v_proj": (64, 32), "gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        start = f"mixlora.layers.{layer}"
        tensors[f"{start}.mlp.moe_gate.weight"] = torch.randn(4, 64)
        for name, (wide, out) in sizes.items():
            attention = name[0] in "qv"
            places = (
                [f"{start}.self_attn.{name}"] if attention else [f"{start}.mlp.{name}.experts.{j}" for j in range(4)]
            )
            for place in places:
                tensors[f"{place}.lora_A.weight"] = torch.randn(4 if attention else 2, wide) / 8
                tensors[f"{place}.lora_B.weight"] = torch.randn(out, 4 if attention else 2) / 8
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(AUTHORS))
    return tensors


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_folder_of_the_authors_is_read(tmp_path: Path, file: str):
    tensors = authors_folder(tmp_path)
    (torch.save if file.endswith("bin") else save_file)(tensors, tmp_path / file)
    model: Any = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).eval()
    layer = model.base_model.model.model.layers[1]
    x = hidden()
    q = layer.self_attn.q_proj
    a, b = (tensors[f"mixlora.layers.1.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(q(x), q.base_layer(x) + 2 * x @ a.T @ b.T, atol=1e-5, rtol=1e-5)
    assert type(layer.self_attn.k_proj) is torch.nn.Linear, "it was not named"
    flat = x.reshape(-1, 64)
    p, index = (flat @ tensors["mixlora.layers.1.mlp.moe_gate.weight"].T).softmax(-1).topk(2)
    weights = torch.zeros(len(flat), 4).scatter(1, index, p / p.sum(1, keepdim=True))
    torch.testing.assert_close(layer.mlp(x), naive(layer.mlp, flat, weights).view_as(x), atol=1e-5, rtol=1e-5)


def test_files_that_do_not_belong_are_refused(tmp_path: Path):
    def load(change: Any, **config: Any) -> None:
        tensors = authors_folder(tmp_path)
        change(tensors)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({**AUTHORS, **config}))
        PeftModel.from_pretrained(tiny.model(), str(tmp_path))

    place = "mixlora.layers.0.mlp.up_proj.experts.1.lora_A.weight"
    for change, config, words in (
        (lambda t: None, {"num_experts": 8}, "holds 4 experts a layer, and its config says num_experts=8"),
        (lambda t: t.pop(place), {}, f"lacks {place}"),
        (lambda t: t.update({"mixlora.layers.7.mlp.moe_gate.weight": torch.zeros(4, 64)}), {}, "layers.7"),
        (lambda t: t.update({"base_model.model.model.layers.0.mlp.x": torch.zeros(1)}), {}, "layers.0.mlp.x"),
        (lambda t: t.update({place: torch.zeros(3, 64)}), {}, "another size"),
        (lambda t: None, {"routing_strategy": "mixtral"}, "routing_strategy='mixtral'"),
        (lambda t: None, {"bias": "all"}, "bias='all'"),
        (lambda t: None, {"sparse_step": 2}, "sparse_step"),
    ):
        with pytest.raises(ValueError, match=words):
            load(change, **config)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"routing_strategy": "mixlora-switch", "act_fn": "gelu"}])
def test_what_was_saved_answers_the_same_beside_another_adapter(tmp_path: Path, options: dict[str, Any]):
    model = wrapped(**options)
    model.save_pretrained(tmp_path)
    again: Any = wrapped()
    again.load_adapter(tmp_path, "layers")  # a name that is also a word in the keys
    again.set_adapter("layers")
    assert torch.equal(tiny.logits(again.eval()), tiny.logits(model))
    again.save_pretrained(tmp_path / "again", selected_adapters=["layers"])
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again" / "layers"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_head_trained_beside_it_is_saved_and_loaded(tmp_path: Path):
    base = other("mistral")
    model = wrapped(base=base, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(other("mistral"), str(tmp_path)).eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))


# ---------------------------------------------------------------- what stands around it


def test_unloading_leaves_nothing_behind():
    model = wrapped()
    base = model.unload()
    assert torch.equal(tiny.logits(base), tiny.logits(tiny.model()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert getattr(base.train()(**tiny.inputs(base)), "aux_loss", None) is None


def test_a_copy_hears_its_own_routers():
    model = wrapped().train()
    model(**tiny.inputs(model))
    kept = model.auxiliary_loss()
    twin = copy.deepcopy(model)
    assert twin.auxiliary_loss() is None
    twin(input_ids=tiny.batch(1, 5))
    assert twin.auxiliary_loss() is not None and model.auxiliary_loss() == kept


def test_what_is_not_a_number_stays_visible():
    x = hidden()
    x[0, 0, 0] = float("nan")
    assert block_of(wrapped())(x)[0, 0].isnan().any()


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dora", [False, True])
def test_experts_learn_beside_packed_integers(name: str, dora: bool, tmp_path: Path):
    tiny.model().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=catalog.load(name)(group_size=32))
    plain = tiny.logits(base)
    model = wrapped(base=base, stirred=False, use_dora=dora)
    torch.testing.assert_close(tiny.logits(model), plain, atol=1e-4, rtol=1e-4)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        loss = model(**tiny.inputs(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses


def test_the_price_follows_every_setting():
    for options in (
        {"use_dora": True},
        {"target_modules": ["up_proj"], "num_experts": 3},
        {"expert_lora": {"r": 2}, "layers_to_transform": [1]},
    ):
        model = wrapped(stirred=False, **options)
        counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shape = shape_of(tiny.model())
        price = mixlora.price(shape, {**{k: v for k, v in SMALL.items() if k != "task_type"}, **options})
        assert price.trainable == counted and price.shape.resident == shape.resident + 4 * counted


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_engines_torch_runner_answers_ragged_batches_layer_by_layer(routing):
    import numpy as np

    from shoestring.engine.runner import Batch
    from shoestring.engine.torch_runner import TorchRunner
    from shoestring.models.load import Loaded

    model = wrapped(routing_strategy=routing, router_init_range=1.0, **ROUTINGS[routing])
    texts = [tiny.batch(1, 11)[0].tolist(), tiny.batch(2, 7)[1].tolist()]
    with torch.no_grad():
        wanted = [model(torch.tensor([ids])).logits[0] for ids in texts]
    runner = TorchRunner(Loaded(model, None, Path("."), "tiny", "causal"), cache_dtype="fp32")
    runner.reserve(4)

    def numbers(values: list[int]) -> Any:
        return np.array(values, np.int32)

    def step(first: list[int], last: list[int]) -> Any:
        parts = [ids[a:b] for ids, a, b in zip(texts, first, last)]
        places = [range(a, b) for a, b in zip(first, last)]
        made = Batch(
            numbers(sum(parts, [])), numbers([p for part in places for p in part]), numbers([0, len(parts[0]),
            len(parts[0]) + len(parts[1])]), numbers(first), numbers([[0], [1]]),
        )  # fmt: skip
        middle = runner.run(made, 0, 1)
        return runner.logits(runner.run(made, 1, 2, middle), np.arange(made.tokens, dtype=np.int32))

    try:
        whole = routing == "mixlora-switch"  # its capacity counts the tokens of one call
        found = step([0, 0], [11, 7] if whole else [10, 6])
        split = 11 if whole else 10
        np.testing.assert_allclose(found[:split], wanted[0][:split], atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(found[split:], wanted[1][: len(found) - split], atol=1e-5, rtol=1e-4)
        if not whole:
            found = step([10, 6], [11, 7])
            np.testing.assert_allclose(found, torch.stack([wanted[0][-1], wanted[1][-1]]), atol=1e-5, rtol=1e-4)
    finally:
        runner.close()
    assert torch.equal(tiny.logits(model, torch.tensor([texts[0]]))[0], wanted[0])

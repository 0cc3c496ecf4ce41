from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shoestring import models
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.kernels import ops
from shoestring.lab import tiny
from shoestring.methods.quantizers import tequila
from shoestring.methods.quantizers._shared import packed_modules
from shoestring.methods.quantizers.tequila import TequilaConfig, TernaryLinear

ROWS = [{"input_ids": ids, "labels": ids} for ids in tiny.batch(8, 12).tolist()]


def layer(rows: int = 24, columns: int = 100, bias: bool = True, **options: Any) -> TernaryLinear:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) * 0.1
    return TernaryLinear(weight, torch.randn(rows) if bias else None, options.pop("group", 32), **options)


def by_hand(made: TernaryLinear) -> tuple[Tensor, Tensor]:
    """alpha T and T, group by group, from the definition."""
    weight = made.weight.detach()
    values, trits = torch.zeros_like(weight), torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], made.group):
            group = weight[row, start : start + made.group]
            alpha = group.abs().mean()
            trit = torch.where(group.abs() >= alpha / 2, group.sign(), 0)
            trits[row, start : start + made.group] = trit
            values[row, start : start + made.group] = trit * alpha.half().float()
    return values, trits


def test_forward_is_a_ternary_product_and_a_constant() -> None:
    made = layer(deadzone=0.01)
    values, trits = by_hand(made)
    x = torch.randn(7, 100)
    trace = 0.01 * (made.weight.detach() * (trits == 0)).sum(1)
    expected = x @ values.T + trace + made.bias.detach()
    assert torch.allclose(made(x), expected, atol=1e-5)
    assert torch.allclose(made(torch.zeros(1, 100)), trace + made.bias, atol=1e-6), "it does not depend on x"
    assert 0.2 < (trits == 0).float().mean() < 0.45


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
@pytest.mark.parametrize("deadzone", [1e-3, 0.5])
def test_gradients_are_the_closed_form(shape: tuple[int, ...], deadzone: float) -> None:
    made = layer(deadzone=deadzone)
    x = torch.randn(*shape, 100, requires_grad=True)
    y = made(x)
    g = torch.randn_like(y)
    kept = g.clone()
    y.backward(g)
    assert torch.equal(g, kept), "the gradient that comes in is left as it was"
    values, trits = by_hand(made)
    flat, x_flat = g.reshape(-1, 24), x.detach().reshape(-1, 100)
    expected = flat.T @ x_flat + (trits == 0) * deadzone * flat.sum(0).unsqueeze(1)
    assert (made.weight.grad - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.allclose(made.bias.grad, flat.sum(0), atol=1e-5)
    assert torch.allclose(x.grad, (g @ values).view_as(x), atol=1e-5)


def test_dead_weights_learn_also_where_their_input_is_zero() -> None:
    x = torch.randn(9, 100)
    x[:, 10] = 0
    for deadzone in (1e-3, 0.0):
        made = layer(deadzone=deadzone)
        made(x).square().sum().backward()
        dead = by_hand(made)[1][:, 10] == 0
        assert dead.any() and not dead.all()
        assert (made.weight.grad[~dead, 10] == 0).all()
        assert ((made.weight.grad[dead, 10] != 0) == (deadzone > 0)).all()


def test_without_lambda_it_is_the_straight_through_baseline() -> None:
    made = layer(deadzone=0.0)
    weight = made.weight.detach().clone().requires_grad_()
    values, _ = by_hand(made)
    x, target = torch.randn(9, 100), torch.randn(9, 24)
    F.mse_loss(made(x), target).backward()
    straight = F.linear(x, weight + (values - weight).detach(), made.bias.detach())
    F.mse_loss(straight, target).backward()
    assert torch.allclose(made.weight.grad, weight.grad, atol=1e-7)
    assert torch.equal(made.export()[2], made.bias), "nothing is merged into the bias"


def test_ternary_weight_networks_as_a_baseline() -> None:
    made = layer(scaling="twn")
    group = made.weight.detach()[3, 32:64]
    kept = group.abs() >= 0.75 * group.abs().mean()
    trits, scales = tequila.ternarize(made.weight, 32, "twn")
    assert torch.equal(trits[3, 32:64], torch.where(kept, group.sign(), 0).to(torch.int8))
    assert scales[3, 1] == group.abs()[kept].mean().half()


def test_groups_of_zeros_and_short_ones() -> None:
    weight = torch.randn(4, 70)
    weight[0] = 0
    weight[1, 64:] = 2.0
    for scaling in tequila.SCALINGS:
        trits, scales = tequila.ternarize(weight, 64, scaling)
        assert (trits[0] == 0).all() and (scales[0] == 0).all()
        assert scales[1, 1] == 2.0 and (trits[1, 64:] == 1).all(), "filling does not count"


def prepared(**options: Any) -> tuple[Any, TequilaConfig]:
    config = TequilaConfig(**options)
    return tequila.prepare(tiny.model(), config), config


def test_a_plain_loop_trains_and_the_packed_model_says_the_same(tmp_path: Path) -> None:
    model, config = prepared(group_size=32, deadzone=0.05)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight and not isinstance(head, TernaryLinear)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    model.train()
    for _ in range(12):
        loss = model(**tiny.inputs(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters()), "everything is trained"
    trained = tiny.logits(model.eval())
    numbers = {n: m.export() for n, m in model.named_modules() if isinstance(m, TernaryLinear)}
    tequila.convert(model, config)
    found = dict(packed_modules(model))
    assert found.keys() == numbers.keys() and len(found) == 14
    for name, module in found.items():
        trits, scales, bias = numbers[name]
        wide = scales.float().repeat_interleave(32, 1)[:, : trits.shape[1]]
        assert torch.equal(module.unpacked(), trits * wide) and torch.equal(module.bias, bias)
        assert str(module.format) == "ternary/32"
    # Activations are rounded to 8 bits now, and nothing else has changed.
    packed = tiny.logits(model)
    assert (packed - trained).norm() < 0.05 * trained.norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), packed)
    plain = tiny.logits(model.dequantize())
    assert (plain - trained).norm() < 1e-5 * trained.norm(), "with plain products exactly"


def test_what_the_dead_weights_add_is_in_the_bias() -> None:
    """An export without it is another model."""
    model, config = prepared(deadzone=0.5)
    trained = tiny.logits(model)
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.deadzone = 0.0
    without = tiny.logits(tequila.convert(model, config).dequantize())
    assert (without - trained).norm() > 0.01 * trained.norm()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_bytes_are_those_of_the_formula(group: int) -> None:
    model, config = prepared(group_size=group)
    tequila.convert(model, config)
    for name, module in packed_modules(model):
        groups = -(-module.in_features // group)
        stored = sum(t.numel() * t.element_size() for t in (*module.tensors().values(), module.bias))
        assert stored == module.out_features * (groups * (group // 4 + 2) + 4), name


def work(folder: Path, **training: Any) -> Work:
    return Work(Ledger(), folder, training={"max_steps": 3, "save_steps": 0, **tequila.TRAINING, **training})


def test_compress_trains_in_float32_and_says_how_little(tmp_path: Path) -> None:
    model = tiny.model(dtype=torch.bfloat16)
    config = TequilaConfig()
    with pytest.warns(UserWarning, match="tokens a parameter were trained on: expect an unusable model"):
        made = tequila.compress(model, config, ROWS, work(tmp_path, learning_rate=1e-5))
    assert config.facts() == {"trained_tokens": config.trained_tokens} and config.trained_tokens > 0
    assert made.config.quantization_config.to_dict()["trained_tokens"] == config.trained_tokens
    floats = [p for p in made.parameters() if p.is_floating_point()]
    assert floats and all(p.dtype == torch.bfloat16 for p in floats)


def test_small_steps_are_not_lost_in_a_model_of_half_precision(tmp_path: Path) -> None:
    """Below 2^-9 of a weight, where bfloat16 would not move."""
    seen: list[Tensor] = []
    model = tiny.model(dtype=torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    convert = tequila.convert
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(
            tequila, "convert", lambda m, *a: seen.append(m.model.layers[0].mlp.up_proj.weight) or convert(m, *a)
        )
        tequila.compress(model, TequilaConfig(), ROWS, work(tmp_path, learning_rate=1e-6))
    moved = seen[0].detach() - weight.float()
    assert seen[0].dtype == torch.float32 and (moved != 0).any()
    assert (moved.abs() < 2.0**-9 * weight.float().abs()).float().mean() > 0.9


def test_embeddings_are_packed_when_asked_and_stay_tied(tmp_path: Path) -> None:
    model, config = prepared(embeddings=8)
    tequila.convert(model, config)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight and str(table.format) == "int8/64"
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), tiny.logits(model))


def test_price_counts_the_new_biases(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    shape = models.shape_of(tmp_path)
    promised = tequila.price(shape, {"group_size": 64})
    model, config = prepared(group_size=64)
    tequila.convert(model, config)
    stored = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert sum(w.stored for w in promised.shape.weights if not w.tied) == stored
    assert promised.trainable == shape.parameters and promised.train_flops == 3.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"deadzone": -1}, "deadzone -1"),
        ({"deadzone": True}, "deadzone True"),
        ({"deadzone": float("nan")}, "deadzone nan"),
        ({"scaling": "absmin"}, "absmean"),
        ({"group_size": 100}, "group_size 100 is not possible. Use one of 32, 64, 128"),
        ({"epsilon": 1}, "no option epsilon"),
    ],
)
def test_values_that_are_not_possible(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TequilaConfig(**options)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ternary layers"):
        tequila.convert(tiny.model())
    model = tiny.model()
    model.model.layers[1].self_attn.q_proj.weight.data[3, 5] = torch.inf
    with pytest.raises(
        UsageError, match=r"layers\.1\.self_attn\.q_proj cannot be quantized: The weight has 1 infinite"
    ):
        tequila.prepare(model)
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="not trained are of no use"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TequilaConfig())


def test_the_code_that_stands_for_nothing_is_refused(tmp_path: Path) -> None:
    model, config = prepared()
    tequila.convert(model, config)
    module = model.model.layers[0].mlp.up_proj
    module.weight.data[2, 3] |= 3
    with pytest.raises(UsageError):
        module.unpacked()


@pytest.mark.skipif(not ops.backend()["native"], reason="no native library in this installation")
def test_the_kernels_see_the_same_model() -> None:
    model, config = prepared(deadzone=0.1)
    tequila.convert(model, config)
    fast = tiny.logits(model)
    best = ops.backend()["levels"][0]
    ops.set_isa("reference")
    try:
        slow = tiny.logits(model)
    finally:
        ops.set_isa(best)
    assert (fast - slow).norm() < 1e-4 * slow.norm()


def test_layers_left_alone_stay_plain() -> None:
    model = tequila.prepare(tiny.model(), TequilaConfig(modules_to_not_convert=["layers.0"]))
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert all((kind is nn.Linear) == ("layers.0" in name or name == "lm_head") for name, kind in kinds.items())


@pytest.mark.real
def test_two_blocks_of_the_default_model_are_trained_and_packed(tmp_path: Path) -> None:
    from shoestring.models import surgery

    model = models.load("smollm2").model
    surgery.drop_blocks(model, range(2, model.config.num_hidden_layers))
    rows = [{"input_ids": list(range(100, 164)), "labels": list(range(100, 164))}] * 4
    with pytest.warns(UserWarning, match="unusable"):
        made = tequila.compress(model, TequilaConfig(embeddings=8), rows, work(tmp_path, max_steps=1)).eval()
    layers = dict(packed_modules(made))
    assert sum(str(module.format) == "ternary/64" for module in layers.values()) == 14
    made.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=made.dtype)
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, made(ids).logits)

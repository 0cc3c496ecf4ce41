"""Formats by layer: the limit holds, bytes go where they help most, and rounding makes up for its errors."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, GPT2Config

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.kernels import formats, layout
from shoestring.lab import tiny, tiny_mixture
from shoestring.methods.quantizers import _fisher, mixed
from shoestring.methods.quantizers.mixed import Choice, MixedConfig
from shoestring.models import packed, shape_of
from shoestring.models.packed import ROOM
from shoestring.models.seal import seal

DIMS: Any = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]  # each with rotations and masks of its own


def rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny.batch(count, 24).tolist()]


def compressed(tmp_path: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return mixed.compress(tiny.model(), MixedConfig(**options), rows(), Work(Ledger(), tmp_path)).eval()


def size(model: Any) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}.values())


@pytest.mark.parametrize("bits", [4.5, 5.5, 7.0])
def test_the_limit_holds_and_is_used(tmp_path: Path, bits: float) -> None:
    limit = bits * sum(p.numel() for p in tiny.model().parameters()) / 8
    assert 0.93 * limit < size(compressed(tmp_path, bits=bits)) <= limit


def test_more_bytes_are_less_harm(tmp_path: Path) -> None:
    reference = tiny.logits(tiny.model())
    off = [(tiny.logits(compressed(tmp_path, bits=b)) - reference).norm().item() for b in (4.0, 5.0, 8.0)]
    assert off[0] > off[1] > off[2]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny mixture with formats by layer: the model, its folder and the limit."""
    folder = tmp_path_factory.mktemp("mixture")
    model = tiny_mixture.model()
    model.save_pretrained(folder / "plain")
    limit = MixedConfig(bits=5.5).limit(sum(p.numel() for p in model.parameters()))
    config = MixedConfig(bytes=limit, offered=[f"uniform{bits}/32" for bits in range(2, 7)])
    torch.manual_seed(0)
    made = mixed.compress(model, config, rows(), Work(Ledger(), folder)).eval()
    made.save_pretrained(folder / "packed")
    seal(folder / "packed", ROOM)
    return made, folder, limit


def test_experts_of_a_mixture_get_formats_within_the_limit(mixture: Any) -> None:
    model, folder, limit = mixture
    plan = packed.packing_of(model)
    experts = [spec for name, spec in plan.items() if ".experts." in name]
    assert len(experts) == 2 * model.config.num_hidden_layers and len(set(plan.values())) > 1
    floats = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    matrices = sum(layout.parse(plan[name]).bytes(m.rows, m.columns) for name, m in packed.packed_modules(model))
    stored = load_file(folder / "packed" / "model.safetensors").values()
    assert sum(tensor.nbytes for tensor in stored) == floats + matrices
    assert 0.95 * limit < floats + matrices <= limit
    price = mixed.price(shape_of(folder / "plain"), {"bytes": limit}).shape
    assert 0.95 * limit < sum(w.stored for w in price.weights if not w.tied) <= limit


def test_the_folder_of_a_mixture_is_read_as_it_was_made(mixture: Any) -> None:
    model, folder, _ = mixture
    again = AutoModelForCausalLM.from_pretrained(folder / "packed")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert packed.packing_of(again) == packed.packing_of(model)


def test_each_expert_learns_from_the_tokens_that_are_led_to_it() -> None:
    """Tokens that come to it only now count as the others do on average; too few tokens teach nothing."""
    experts = tiny_mixture.model().model.layers[0].mlp.experts
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    routes = torch.full((40, 2), 2)
    routes[:20, 1], routes[20:35, 1] = 0, 1
    before, weights = routes.clone(), torch.rand(40, 2, generator=torch.Generator().manual_seed(1))
    before[10:20, 1] = 3
    seen = mixed.Seen(torch.zeros(4, 128), [weights[:30], weights[30:]], torch.zeros(4, 64), None, [before])
    found = list(_fisher._expert_forms(mixed.Place(experts, "gate_up_proj"), seen, [(hidden, routes)]))
    own = torch.cat([weights[:10, 1], weights[:10, 1].mean().expand(10)])
    assert found[0] is not None and found[1] is None and found[3] is None
    torch.testing.assert_close(found[0], (hidden[:20] * own[:, None]).T @ hidden[:20])


def test_stored_buffers_count(tmp_path: Path) -> None:
    sizes = dict(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=8, n_routed_experts=8, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **sizes)).eval()
    limit = MixedConfig(bits=7.0).limit(sum(p.numel() for p in model.parameters()))
    assert size(mixed.compress(model, MixedConfig(bits=7.0), rows(), Work(Ledger(), tmp_path))) <= limit


def test_one_of_the_two_kinds_of_experts_alone_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 4.5, "modules_to_not_convert": ["layers.0.mlp.experts.down_proj"]}
    words = "One of the two tensors of model.layers.0.mlp.experts"
    with pytest.raises(UsageError, match=words):
        mixed.price(shape_of(tiny_mixture.model()), options)
    with pytest.raises(UsageError, match=words):
        mixed.compress(tiny_mixture.model(), MixedConfig(**options), rows(), Work(Ledger(), tmp_path))
    plan = {"model.layers.0.mlp.experts.down": "uniform4/32"}
    with pytest.raises(UsageError, match=words):
        mixed.compress(tiny_mixture.model(), MixedConfig(packing=plan), rows(), Work(Ledger(), tmp_path))


def test_experts_of_another_build_are_refused_before_any_work() -> None:
    sizes = dict(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes))
    with pytest.raises(UsageError, match="gpt_oss.*experts.gate_up_proj"):
        mixed.price(shape_of(model), {"bits": 4.5})


def test_what_is_too_small_says_how_small_it_can_be(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="the smallest on offer take"):
        compressed(tmp_path, bits=1.0)
    with pytest.raises(DoesNotFit, match="no choice of formats"):
        mixed.price(shape_of(tiny.model()), {"bits": 1.0})


def test_allocation_is_the_best_one_of_all() -> None:
    """Held against all plans, on choices of which more bytes are not always better."""
    from itertools import product

    generator = torch.Generator().manual_seed(0)
    choices = {}
    for name in "abcd":
        sizes = torch.randint(1, 40, (4,), generator=generator).tolist()
        found = torch.rand(4, generator=generator).tolist()
        choices[name] = [Choice(f"{name}{i}", size, harm) for i, (size, harm) in enumerate(zip(sizes, found))]
    by_spec = {c.spec: c for some in choices.values() for c in some}
    for limit in range(sum(min(c.bytes for c in some) for some in choices.values()), 160, 3):
        plan = mixed.allocate(choices, limit)
        assert list(plan) == list(choices)
        taken = [by_spec[spec] for spec in plan.values()]
        least = min(sum(c.harm for c in p) for p in product(*choices.values()) if sum(c.bytes for c in p) <= limit)
        assert sum(c.bytes for c in taken) <= limit
        assert sum(c.harm for c in taken) == pytest.approx(least)


def test_allocation_of_sizes_that_share_no_unit_stays_within_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    choices = {}
    for name in range(40):
        sizes = sorted(torch.randint(10**6, 10**8, (5,), generator=generator).tolist())
        choices[str(name)] = [Choice(str(i), size, 1 / size) for i, size in enumerate(sizes)]
    limit = 15 * 10**8
    plan = mixed.allocate(choices, limit)
    spent = sum(choices[name][int(spec)].bytes for name, spec in plan.items())
    assert 0.995 * limit < spent <= limit


@pytest.mark.parametrize("rounding", mixed.ROUNDING)
@pytest.mark.parametrize("place", ["down_proj", "v_proj", "embed_tokens", "experts.gate_up", "experts.down"])
def test_harm_predicts_the_divergence_of_one_layer(rounding: str, place: str) -> None:
    """To second order: the divergence that packing one layer alone causes, on the same tokens."""
    stack = "experts" in place
    # Weights of the usual range give a mixture divergences that float32 does not tell from none.
    make: Any = partial(tiny_mixture.model, initializer_range=0.1) if stack else tiny.model
    model = make().eval()
    ids = tiny.batch(64, 24)
    config = MixedConfig(bits=4.0, offered=["uniform4/32"], rounding=rounding)
    modules = {n: m for n, m in mixed.places(model, config) if n.endswith(place)}
    torch.manual_seed(0)
    seen = mixed.look(model, modules, ids)
    found = mixed.harms(model, modules, config, ids, seen)
    name = list(modules)[-1 if stack else 0]  # behind the last experts no router chooses otherwise
    before = model(ids).logits.log_softmax(-1)
    # Experts are packed both kinds at once; of which one is put into the other model.
    names = [f"{name.rpartition('.')[0]}.{part}" for part in packed.PARTS.values()] if stack else [name]
    both = dict(mixed.places(model, config))
    every = mixed.look(model, {other: both[other] for other in names}, ids)
    mixed._pack(model, dict.fromkeys(names, "uniform4/32"), config, ids, every)
    plain = make().eval()
    weight: Any = plain.get_parameter(f"{name}_proj" if stack else f"{name}.weight")
    weight.data = model.get_submodule(name).unpacked().view(weight.shape)
    after = plain(ids).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    assert 0.5 < found[name][0].harm / divergence < 2, (found[name][0].harm, divergence)


def test_compensation_is_foreseen() -> None:
    """What a layer's harm is expected to be falls when its rounding is compensated, where inputs hang together."""
    model = tiny.model().eval()
    ids = tiny.batch(64, 24)
    modules = {n: m for n, m in mixed.places(model, mixed.example()) if n.endswith("o_proj")}
    seen = mixed.look(model, modules, ids)
    one, other = (
        mixed.harms(model, modules, MixedConfig(bits=4.0, offered=["uniform3/32"], rounding=rounding), ids, seen)
        for rounding in mixed.ROUNDING
    )
    assert all(one[name][0].harm < 0.9 * other[name][0].harm for name in modules)


def test_tokens_that_do_not_matter_do_not_count() -> None:
    """Of two kinds of inputs only one has gradients: errors go where the other lies."""
    torch.manual_seed(0)
    format = formats.parse("uniform2/32")
    weight = torch.randn(40, 64)
    x = torch.randn(256, 64)
    weights = (torch.arange(256) < 128).float()
    plain, weighted = (mixed.rounded(weight, (x * w[:, None]).T @ x, format) for w in (torch.ones(256), weights))
    errors = [(x[:128] @ (format.unpack(made, 64) - weight).T).norm() for made in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]


def test_compensation_lowers_the_error_at_the_output() -> None:
    torch.manual_seed(0)
    mix = torch.randn(64, 64) / 8
    x = torch.randn(512, 64) @ mix  # inputs that depend on each other are what it lives on
    weight, format = torch.randn(40, 64) / 8, formats.parse("uniform3/32")
    plain = format.unpack(format.pack(weight), 64)
    made = format.unpack(mixed.rounded(weight, x.T @ x, format), 64)
    held_out = torch.randn(512, 64) @ mix
    error, before = ((held_out @ (w - weight).T).norm() for w in (made, plain))
    assert error < 0.8 * before


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(num_hidden_layers=3, layer_types=KINDS, sliding_window=8, head_dim=8, **DIMS),
        GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=64),
        BloomConfig(n_layer=3, n_head=4, hidden_size=32, vocab_size=64),
    ],
    ids=lambda config: config.model_type,
)
def test_blocks_run_one_by_one_as_the_model_runs_them(config: Any) -> None:
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    blocks = [block.module for block in _fisher.inspect(model).blocks]
    ids, last = torch.arange(6 * 32).view(6, 32) % 64, list[torch.Tensor]()
    states, calls = _fisher._calls(model, blocks, ids)
    for block, given in zip(blocks, zip(*calls, strict=True), strict=True):
        states = [_fisher._run(block, some, more) for some, more in zip(states, given, strict=True)]
    blocks[-1].register_forward_hook(
        lambda *given: last.append(given[2][0] if isinstance(given[2], tuple) else given[2])
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert torch.equal(torch.cat(states), last[0])


def test_inputs_that_never_come_leave_rounding_finite() -> None:
    format = formats.parse("uniform2/32")
    made = mixed.rounded(torch.randn(8, 40), torch.zeros(40, 40), format)
    assert torch.isfinite(format.unpack(made, 40)).all()


@pytest.mark.parametrize("number", [torch.nan, 2.0])
def test_forms_without_an_inverse_leave_rounding_finite(number: float) -> None:
    """Gradients that overflow, and what float32 makes of inputs that are all but the same."""
    torch.manual_seed(0)
    form = torch.eye(64)
    form[0, 1] = form[1, 0] = number
    format = formats.parse("uniform4/32")
    weight = torch.randn(8, 64)
    back = format.unpack(mixed.rounded(weight, form, format), 64)
    assert torch.isfinite(back).all() and (back - weight).norm() < 0.2 * weight.norm()


def test_a_plan_of_ones_own(tmp_path: Path) -> None:
    places = [name for name, _ in mixed.places(tiny.model(), mixed.example())]
    plan = {name: "uniform4/32" for name in places if name.endswith("up_proj")}
    model = compressed(tmp_path, packing=plan)
    assert packed.packing_of(model) == plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "need a limit"),
        ({"bits": 4, "bytes": 9}, "need a limit"),
        ({"bits": -1}, "bits=-1 is no limit"),
        ({"bits": 4, "rounding": "up"}, "rounding='up'"),
        ({"bits": 4, "offered": []}, "no formats are offered"),
        ({"bits": 4, "offered": ["int5/64"]}, "int5/64"),
        ({"bits": 4, "offered": ["uniform7/64"]}, "uniform7/64"),
        ({"bits": 4, "offered": ["ternary/64"]}, "no plain rounding"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MixedConfig(**options)


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text to calibrate on"):
        mixed.compress(tiny.model(), MixedConfig(bits=5.0), [], Work(Ledger(), tmp_path))


def test_narrow_weights_are_computed_with_as_they_are_where_the_machine_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned from text is what float32 weights of the same values show; the weights stay narrow."""
    narrow, ids = tiny.model().bfloat16(), tiny.batch(4, 24)
    wide = copy.deepcopy(narrow).float()
    monkeypatch.setattr(_fisher, "fast_bfloat16", lambda: False)
    monkeypatch.setattr(torch, "multinomial", lambda shares, count: shares.argmax(-1, keepdim=True))
    found, expected = (mixed.look(model, dict(mixed.places(model, mixed.example())), ids) for model in (narrow, wide))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for name, seen in expected.items():
        assert (found[name].columns - seen.columns).norm() < 0.01 * seen.columns.norm()
        assert (found[name].rows - seen.rows).norm() < 0.01 * seen.rows.norm()


def test_memory_is_that_of_the_model_and_one_block(tmp_path: Path) -> None:
    """The peak of a process of its own beyond the model: twice the logits of a window, their pieces, and free heap."""
    code = """
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from shoestring.core import probes
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.methods.quantizers import _fisher, mixed

torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32768, hidden_size=256, intermediate_size=704, num_hidden_layers=12, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=256,
)
model = LlamaForCausalLM(config).bfloat16().eval()
rows = [{"input_ids": torch.randint(0, 32768, (256,)).tolist()} for _ in range(2)]
made = mixed.MixedConfig(bits=5.0, calibration=512, offered=["uniform4/64", "uniform5/64"])
mixed.give_back_holes()
assert probes.reset_high_water()
before = probes.resident()
mixed.compress(model, made, rows, Work(Ledger(), Path()))
print(probes.high_water() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 190e6  # 34 MB of model, as much of logits

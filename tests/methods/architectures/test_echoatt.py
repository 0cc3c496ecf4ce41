"""EchoAtt: followers use the leader's matrix and compute none; chosen by measuring; healed in two stages."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoestring import data, models
from shoestring.core import catalog
from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.engine.native_runner import NativeRunner
from shoestring.engine.open import open_model
from shoestring.engine.runner import Batch
from shoestring.engine.torch_runner import TorchRunner
from shoestring.jobs.generate import generate
from shoestring.kernels.loader import load
from shoestring.lab import tiny
from shoestring.methods.architectures import _attention, _distill
from shoestring.models.gguf_writing import write_gguf
from shoestring.models.llama_like import NotNative, from_config
from shoestring.models.load import Loaded

torch.set_num_threads(1)
needs_library = pytest.mark.skipif(load().library is None, reason="no native library in this installation")
METHOD = catalog.module("echoatt")
CONTRACT = catalog.contract("architectures")
MAP = [0, 1, 1, 3, 3, 5]
# Weights large enough that attention tells tokens apart: else no test would see whose attention it is.
SIZES: dict[str, Any] = dict(num_hidden_layers=6, initializer_range=0.2)


def base(family: str = "llama", **changes: Any) -> PreTrainedModel:
    return tiny.model(family, **{**SIZES, **changes})


def of_family(family: str) -> PreTrainedModel:
    changes: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    changes |= {"sliding_window": 5} if family == "mistral" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=tiny.VOCAB, pad_token_id=0, head_dim=16, max_position_embeddings=256, **changes, **SIZES
    )
    return AutoModelForCausalLM.from_config(config).eval()


def shared(model: PreTrainedModel | None = None, share_map: list[int] = MAP) -> Any:
    return METHOD.student(model or base(), share_map)


def rows(count: int = 8, length: int = 12) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in tiny.batch(count, length).tolist()]


def work(folder: Path, **more: Any) -> Work:
    return Work(Ledger(), folder, **more)


def cache_bytes(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


# ---- copy: whose attention it is ----


def oracle(model: PreTrainedModel, share_map: list[int], ids: Tensor, **more: Any) -> Tensor:
    """Logits of the base, all its layers whole, whose attention function gives followers the leader's matrix."""
    seen: dict[int, Tensor] = {}

    def borrow(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
        layer, groups = module.layer_idx, q.shape[1] // k.shape[1]
        if share_map[layer] == layer:
            scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scaling + mask
            seen[layer] = torch.softmax(scores, -1)
        out = seen[share_map[layer]] @ v.repeat_interleave(groups, 1)
        return out.transpose(1, 2), None

    AttentionInterface.register("borrowing", borrow)
    AttentionMaskInterface.register("borrowing", eager_mask)
    model.set_attn_implementation("borrowing")
    with torch.no_grad():
        out: Tensor = model(ids, **more).logits
    model.set_attn_implementation("sdpa")
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("padded", [False, True])
def test_followers_take_the_matrix_of_the_same_pass(family: str, padded: bool) -> None:
    model = of_family(family)
    ids, more = tiny.batch(2, 11), {}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        got = shared(model)(ids, **more).logits
    wanted = oracle(model, MAP, ids, **more)
    real = more.get("attention_mask", torch.ones_like(ids)).bool()
    assert torch.allclose(got[real], wanted[real], atol=2e-4), (got - wanted)[real].abs().max()
    plain = tiny.logits(model, ids)
    assert not padded and (got - plain).abs().max() > 0.1 or padded, "sharing would change nothing: the test is blind"


def test_strips_are_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = shared(), tiny.batch(2, 23)
    whole = tiny.logits(model, ids)
    monkeypatch.setattr(_attention, "STRIP", 5)
    assert torch.allclose(tiny.logits(model, ids), whole, atol=1e-5)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 23, 8), torch.randn(2, 2, 23, 8), torch.randn(2, 2, 23, 8)
    part = nn.Module()
    part.keeps_weights, part.is_causal, part.num_key_value_groups = True, True, 2
    for mask in (None, torch.rand(2, 1, 23, 23) < 0.8, torch.randn(2, 1, 23, 23)):
        got, strips = _attention.attend(part, q, k, v, mask, scaling=0.3)
        assert [s.shape[3] for s in strips] == [5, 5, 5, 5, 3]
        assert [s.shape[4] for s in strips] == ([5, 10, 15, 20, 23] if mask is None else [23] * 5)
        wanted, _ = sdpa_attention_forward(part, q, k, v, mask, scaling=0.3)
        seen = torch.ones(2, 23).bool() if mask is None or mask.dtype != torch.bool else mask.any(-1)[:, 0]
        assert torch.allclose(got[seen], wanted[seen], atol=1e-5)
        again, _ = _attention.attend(part, None, None, v, mask, weights=strips)
        assert torch.equal(again, got)


def test_dropout_is_drawn_layer_by_layer() -> None:
    model = shared(base(attention_dropout=0.5))
    plain = tiny.logits(model)
    assert torch.equal(tiny.logits(model), plain), "dropout acts outside training"
    drawn: list[Tensor] = []
    real = nn.functional.dropout

    def watch(x: Tensor, p: float, **more: Any) -> Tensor:
        drawn.append(real(x, p, **more))
        return drawn[-1]

    model.train()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(_attention.nn.functional, "dropout", watch)
        model(tiny.batch())
    assert len(drawn) == 4  # two leaders and two followers; layers alone drop inside their fused attention
    assert not torch.equal(drawn[0] == 0, drawn[1] == 0)


# ---- copy: what is not there, and not computed ----


def test_followers_have_no_queries_and_no_keys() -> None:
    model, plain = shared(), base()
    names = set(model.state_dict())
    lost = set(plain.state_dict()) - names
    assert lost == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (2, 4) for p in "qk"}
    each = 64 * 64 + 64 * 32  # d d + d d_kv
    assert sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in model.parameters()) == 2 * each
    ids = tiny.batch(2, 9)
    caches = [m(ids, use_cache=True).past_key_values for m in (model, plain)]
    assert cache_bytes(caches[0]) == cache_bytes(caches[1]) * 10 // 12
    assert caches[0].get_seq_length() == 9


def flops(fn: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fn()
    return int(counter.get_total_flops())


def test_shared_attention_is_not_computed_again() -> None:
    """Counted: products with W_Q, W_K and of queries with keys are made in leaders only."""
    model, ids = shared(), tiny.batch(1, 12)
    in_layer = {i: flops(lambda i=i: None) for i in range(6)}
    scores: list[int] = []
    real = _attention._strips
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attention, "_strips", lambda q, k, *rest: (scores.append(q.shape[2]), real(q, k, *rest))[1])
        tiny.logits(model, ids)
    assert scores == [12, 12], "attention weights are not computed twice in two blocks"
    block = model.model.layers[2].self_attn
    x = torch.randn(1, 12, 64)
    weights = [torch.rand(1, 2, 2, 12, 12)]
    counted = flops(lambda: block(x, shared={1: weights}))
    value, out, mixed = 2 * 12 * 64 * 32, 2 * 12 * 64 * 64, 2 * 4 * 12 * 12 * 16
    assert counted == value + out + mixed and not any(in_layer.values())


def test_weights_are_given_back_after_the_last_follower() -> None:
    model = shared(share_map=[0, 1, 1, 1, 4, 5])
    held: list[set[int]] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda _, args, named, out: held.append(set(named["shared"])), with_kwargs=True
        )
    tiny.logits(model)
    assert held == [set(), {1}, {1}, set(), set(), set()]


def test_layers_that_do_not_share_run_as_before() -> None:
    plain = base()
    neutral = shared(plain, list(range(6)))
    assert neutral.config._attn_implementation == "sdpa" and torch.equal(tiny.logits(neutral), tiny.logits(plain))
    model, seen = shared(plain), []
    for layer in model.model.layers:
        kind = type(layer.self_attn).__name__
        seen.append((kind, bool(getattr(layer.self_attn, "keeps_weights", False))))
    alone, leads, follows = ("LlamaAttention", False), ("LlamaAttention", True), ("Follower", False)
    assert seen == [alone, leads, follows, leads, follows, alone]
    assert model.config._attn_implementation == _attention.NAME
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == _attention.NAME, "eager attention would keep what it dropped"


def test_a_static_cache_and_beams() -> None:
    model, ids = shared(), tiny.batch(2, 6)
    settings: dict[str, Any] = dict(max_new_tokens=7, min_new_tokens=7, do_sample=False)
    plain = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), plain)


def test_what_cannot_share_is_refused() -> None:
    model = shared()
    with pytest.raises(ValueError, match="checkpointing"):
        model.gradient_checkpointing_enable()
    with pytest.raises((ValueError, ImportError), match="(?i)flash|flex"):
        model.set_attn_implementation("flex_attention")
    with pytest.raises(ShoestringError, match="Layer 2 has no attention weights to take"):
        model.model.layers[2](torch.randn(1, 3, 64), position_embeddings=None)


@pytest.mark.parametrize("share_map", [[0, 1, 1], [0, 2, 2, 3, 4, 5], [0, 0, 1, 3, 4, 5], [-1, 1, 2, 3, 4, 5]])
def test_an_impossible_map_is_refused(share_map: list[int]) -> None:
    made = METHOD.MODELS[0][0]
    with pytest.raises(Exception, match="share_map"):
        made(num_hidden_layers=6, share_map=share_map)


def test_layers_of_different_windows_do_not_share() -> None:
    made = METHOD.MODELS[METHOD.FAMILIES.index("qwen2")][0]
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 4
    with pytest.raises(Exception, match="share_map"):
        made(num_hidden_layers=6, share_map=MAP, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    similar = torch.ones(6, 6)
    assert METHOD.place(similar, 1, 2, kinds) == [2]
    with pytest.raises(UsageError, match="cannot be placed"):
        METHOD.place(similar, 2, 2, kinds)


# ---- attend: what is measured, and what follows from it ----


def test_similarity_is_the_cosine_of_the_matrices() -> None:
    model, texts = base(), rows(3, 10)
    found = METHOD.measure(model, [{"input_ids": [5]}, *texts], texts=2, tokens=8)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    wanted = torch.zeros(6, 6)
    for row in texts[:2]:
        with torch.no_grad():
            maps = model(torch.tensor([row["input_ids"][:8]]), output_attentions=True).attentions
        for i, j in itertools.product(range(6), repeat=2):
            wanted[i, j] += nn.functional.cosine_similarity(maps[i].flatten(), maps[j].flatten(), 0) / 2
    assert torch.allclose(found.float(), wanted, atol=1e-5) and torch.allclose(found.diagonal().float(), torch.ones(6))


@pytest.mark.parametrize(("count", "size"), [(1, 2), (2, 2), (3, 2), (2, 3), (1, 4)])
def test_blocks_are_the_best_there_are(count: int, size: int) -> None:
    torch.manual_seed(count * 10 + size)
    layers = 11
    alike = torch.rand(layers, layers)
    alike = (alike + alike.T) / 2

    def worth(starts: Any) -> float:
        return sum(float(alike[s, s + 1 : s + size].mean()) for s in starts)

    possible = [
        starts
        for starts in itertools.combinations(range(1, layers - size), count)
        if all(b - a >= size for a, b in zip(starts, starts[1:]))
    ]
    found = METHOD.place(alike, count, size, [""] * layers)
    assert tuple(found) == max(possible, key=worth)
    assert found[0] >= 1 and found[-1] + size <= layers - 1, "first or last layer is in a block"


def test_the_choice_follows_the_model_and_is_kept(tmp_path: Path, tiny_folder: Path, corpus: Any) -> None:
    """Two layers made alike are found wherever they stand, and the artefact says what was measured."""
    for twin in (1, 3):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        own, copy = (model.model.layers[i] for i in (twin, twin + 1))
        copy.load_state_dict(own.state_dict())
        for part in (own.self_attn.o_proj, own.mlp.down_proj):
            part.weight.data.zero_()  # so that both read the same
        source, out = tmp_path / f"base-{twin}", tmp_path / f"out-{twin}"
        model.save_pretrained(source)
        for file in tiny_folder.glob("token*"):
            shutil.copy(file, source)
        step = Step("compress", "echoatt", {"share": 0.5, "heal": False})
        facts = CONTRACT.apply(METHOD, step, source, out, work(tmp_path / "work", train=corpus))
        kept = json.loads((out / "echoatt.json").read_text())
        assert kept["blocks"] == [[twin, twin + 1]] == facts["blocks"]
        assert kept["share_map"][twin + 1] == twin and kept["similarity"][twin][twin + 1] > 0.999
        assert AutoModelForCausalLM.from_pretrained(out).config.share_map == kept["share_map"]


def test_without_text_there_is_nothing_to_choose_by() -> None:
    with pytest.raises(UsageError, match="Add --data"):
        METHOD.convert(base(), METHOD.example(), [])
    with pytest.raises(UsageError, match="share=0.1 of its 4 inner layers"):
        METHOD.convert(base(), METHOD.EchoAttOptions(share=0.1), rows())


@pytest.mark.parametrize(
    "wrong", [{"block_size": 0}, {"share": 1.5}, {"texts": 1.5}, {"temperature": 0}, {"soft": -1}, {"top": 0}]
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        CONTRACT.config(METHOD, wrong)


# ---- adjust: the loss ----


def lesson(pupil: _distill.Pupil, batch: dict[str, Tensor]) -> _distill.Lesson:
    return pupil(**batch)


def padded_batch() -> dict[str, Tensor]:
    ids, mask = tiny.batch(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(student: Any, teacher: Any, layers: list[int], terms: _distill.Terms, batch: dict[str, Tensor]) -> Tensor:
    own, taught = (m(**batch, output_hidden_states=True) for m in (student, teacher))
    real = batch["attention_mask"].bool()
    z, t = own.logits[real], taught.logits[real].detach()
    p = torch.softmax(t / terms.temperature, -1)
    soft = (p * (p.log() - torch.log_softmax(z / terms.temperature, -1))).sum(-1).mean() * terms.temperature**2
    hard = nn.functional.cross_entropy(z, t.argmax(-1))
    inside = [
        (own.hidden_states[i + 1][real] - taught.hidden_states[i + 1][real]).pow(2).mean()
        / taught.hidden_states[i + 1][real].pow(2).mean()
        for i in layers
    ]
    return terms.inside * torch.stack(inside).mean() + terms.soft * soft + terms.hard * hard


@pytest.mark.parametrize("at_a_time", [4, 512])
def test_the_first_loss_has_its_three_terms(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_distill, "ROWS", at_a_time)
    monkeypatch.setattr(_distill, "draw", lambda logits: logits.argmax(-1))
    teacher, batch = base(), padded_batch()
    student, terms = shared(teacher), _distill.Terms(inside=0.7, soft=0.9, hard=0.3, temperature=3.0)
    wanted = by_hand(student, teacher, [2, 4], terms, batch)
    wanted.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters()}
    teacher.zero_grad()
    student.zero_grad()
    got = lesson(_distill.Pupil(student, teacher, [2, 4], terms), batch)
    assert torch.allclose(got.loss, wanted, rtol=1e-5) and min(got.inside, got.soft, got.hard) > 0
    got.loss.backward()
    for name, parameter in student.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5), name
    assert all(p.grad is None for p in teacher.parameters()), "the teacher is differentiated"


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    teacher = base()
    got = lesson(_distill.Pupil(shared(teacher, list(range(6))), teacher, [2], _distill.Terms()), padded_batch())
    assert got.inside == 0 and abs(float(got.soft)) < 1e-5


def test_pseudo_labels_are_drawn_from_the_teacher() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).expand(4000, -1)
    shares = torch.bincount(_distill.draw(logits), minlength=4) / 4000
    assert torch.allclose(shares, logits[0].softmax(0), atol=0.03)


def test_what_the_teacher_said_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_distill, "draw", lambda logits: logits.argmax(-1))
    teacher, batch = base(), padded_batch()
    student = shared(teacher)
    texts = [
        {"input_ids": row[mask].tolist()}
        for row, mask in zip(*map(list, (batch["input_ids"], batch["attention_mask"].bool())))
    ]
    plain = lesson(_distill.Pupil(student, teacher, [2], _distill.Terms()), batch)
    said: list[float] = []
    for top in (tiny.VOCAB, 40, 8):
        kept = _distill.Pupil(student, teacher, [2], _distill.Terms(top=top))
        kept.ask(texts)
        got = lesson(kept, batch)
        said.append(float(got.soft))
        assert torch.allclose(got.hard, plain.hard, rtol=1e-4) and torch.allclose(got.inside, plain.inside, rtol=1e-4)
    assert said[0] == pytest.approx(float(plain.soft), rel=1e-4)
    assert said[0] > said[1] > said[2] > 0, "what is kept of a distribution tells no more than all of it"
    silent = _distill.Pupil(student, teacher, [2], _distill.Terms(inside=0.0, top=8))
    silent.ask(texts)
    calls: list[int] = []
    for part in (teacher, teacher.model, teacher.lm_head):
        part.register_forward_hook(lambda *_: calls.append(1))
    got = lesson(silent, batch)
    assert not calls and torch.isfinite(got.loss), "the teacher was asked again"
    other = {**batch, "input_ids": batch["input_ids"].flip(1)}
    assert torch.isfinite(lesson(silent, other).loss) and calls, "a new text was answered from memory"


# ---- adjust: the training ----


def test_both_stages_train_and_the_teacher_stays(tmp_path: Path) -> None:
    teacher, texts = base(), rows(8)
    before = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    converted = METHOD.convert(teacher, METHOD.example(), texts)
    pupil = _distill.Pupil(converted.model, teacher, [2, 4], _distill.Terms())
    batch = {"input_ids": tiny.batch(8, 12), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
    with torch.no_grad():
        untrained = lesson(pupil, batch)
    training = {"learning_rate": 1e-3, "max_steps": 20, "per_device_train_batch_size": 8}
    chosen = replace(METHOD.example(), first_stage=1.0, hard=0.1)  # drawn tokens are noise in so short a run
    facts = METHOD.heal(converted, teacher, chosen, texts, [], work(tmp_path / "one", training=training))
    assert facts["first_stage"]["steps"] == 20 and facts["compared_after"] == [2, 4]
    with torch.no_grad():
        healed = lesson(pupil, batch)
        plain = converted.model(batch["input_ids"], labels=batch["input_ids"]).loss
    assert healed.soft < 0.8 * untrained.soft and healed.inside < 0.8 * untrained.inside
    training |= {"max_steps": 10}
    job = work(tmp_path / "two", training=training)
    facts = METHOD.heal(converted, teacher, METHOD.example(), texts, texts[:2], job)
    assert facts["first_stage"]["steps"] == 7 and facts["second_stage"]["steps"] == 3
    assert converted.model(batch["input_ids"], labels=batch["input_ids"]).loss < plain
    assert all(torch.equal(p, before[n]) for n, p in teacher.named_parameters()), "the teacher was trained"
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    log = (tmp_path / "two" / "second-stage" / "metrics.jsonl").read_text().splitlines()
    assert any("eval_loss" in json.loads(line) for line in log), "the second stage looks at the validation texts"


def test_stages_share_what_the_training_may_take(tmp_path: Path) -> None:
    budgets = METHOD._budgets
    first, second = budgets({"max_steps": 5, "max_seconds": 10.0}, 0.7)
    assert (first["max_steps"], second["max_steps"]) == (4, 1)
    assert (first["max_seconds"], second["max_seconds"]) == pytest.approx((7.0, 3.0))
    first, second = budgets({"num_train_epochs": 2.0}, 0.25)
    assert (first["num_train_epochs"], second["num_train_epochs"]) == (0.5, 1.5)
    assert budgets({"max_steps": 5}, 1.0)[1] is None and budgets({"max_steps": 5}, 0.0)[0] is None
    teacher, chosen = base(), METHOD.EchoAttOptions(share=1.0, heal=False)
    converted = METHOD.convert(teacher, chosen, rows())
    assert METHOD.heal(converted, teacher, chosen, rows(), [], work(tmp_path, training={"max_steps": 2})) == {}
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """The first stage that is done is not done again."""
    teacher, chosen = base(), METHOD.example()
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1}
    made = []
    for resume in (False, True):
        converted = METHOD.convert(teacher, chosen, rows())
        job = work(tmp_path, training=training, resume=resume)
        METHOD.heal(converted, teacher, chosen, rows(), [], job)
        made.append(tiny.logits(converted.model.eval()))
    assert torch.equal(*made)


def test_apply_heals_and_reports(tmp_path: Path, tiny_folder: Path, corpus: Any) -> None:
    step = Step("compress", "echoatt", {"share": 1.0, "texts": 2})
    job = work(tmp_path / "work", train=corpus, valid=corpus, training={"max_steps": 4, "max_length": 32})
    facts = CONTRACT.apply(METHOD, step, tiny_folder, tmp_path / "out", job)
    kept = json.loads((tmp_path / "out" / "echoatt.json").read_text())
    assert kept["healing"]["first_stage"]["steps"] == 3 and facts["healing"] == kept["healing"]
    assert facts["parameters"] == models.shape_of(tmp_path / "out").parameters
    assert "import shoestring.methods.architectures" in (tmp_path / "out" / "README.md").read_text()


def test_it_is_packed_and_adapted_like_any_model(tmp_path: Path) -> None:
    model = shared(base(initializer_range=0.02))
    model.save_pretrained(tmp_path / "model")
    room, packer = catalog.contract("quantizers"), catalog.module("int8")
    room.apply(packer, Step("compress", "int8", {}), tmp_path / "model", tmp_path / "packed", work(tmp_path))
    packed = models.load(tmp_path / "packed").model
    wanted = tiny.logits(model)
    assert (tiny.logits(packed) - wanted).norm() < 0.05 * wanted.norm()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    wrapped(**tiny.inputs(model)).loss.backward()
    held = [name for name, p in wrapped.named_parameters() if p.grad is not None and "layers.2.self_attn" in name]
    assert any("v_proj" in name for name in held) and not any("q_proj" in name for name in held)


def test_who_says_how_long_is_heard(tmp_path: Path) -> None:
    for said, steps in (({}, 200), ({"max_steps": 3}, 3), ({"num_train_epochs": 2}, None), ({"max_seconds": 9}, None)):
        assert CONTRACT._training(METHOD, work(tmp_path, training=said)).get("max_steps") == steps


def test_loading_without_the_room_names_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared().save_pretrained(tmp_path)
    assert models.load(tmp_path).model.config.share_map == MAP
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "shoestring_echoatt_llama")
    for read in (models.load, models.shape_of):
        with pytest.raises(UsageError, match="import shoestring.methods.architectures"):
            read(tmp_path)


# ---- the engine ----


@pytest.fixture(scope="module")
def tiny_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder with six layers."""
    folder = tmp_path_factory.mktemp("echo") / "base"
    shutil.copytree(tiny, folder)
    base(max_position_embeddings=256, tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(data: Path) -> Any:
    return globals()["data"].read(str(data))


def in_chunks(runner: Any, ids: list[int], sizes: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of a sequence that is read in chunks."""
    table, done, found = np.arange(8, dtype=np.int32)[None], 0, []
    for size in sizes:
        part = np.array(ids[done : done + size], np.int32)
        starts, context = np.array([0, size], np.int32), np.array([done], np.int32)
        made = Batch(part, np.arange(done, done + size, dtype=np.int32), starts, context, table)
        found.append(runner.logits(runner.run(made), np.arange(size)).copy())
        done += size
    return torch.from_numpy(np.concatenate(found))


@pytest.mark.parametrize(("cache", "close"), [("fp32", 1e-4), ("int8", 0.5)])
def test_the_engine_runs_it_with_values_alone_in_its_pages(cache: str, close: float) -> None:
    model, plain = shared(base(max_position_embeddings=256)), base(max_position_embeddings=256)
    ids = tiny.batch(1, 40)[0].tolist()
    wanted = tiny.logits(model, torch.tensor([ids]))[0]
    opened = [TorchRunner(Loaded(m, None, Path("."), "tiny", "causal"), cache_dtype=cache) for m in (model, plain)]
    assert opened[0].facts.block_bytes == opened[1].facts.block_bytes * 10 // 12
    opened[0].reserve(8)
    got = in_chunks(opened[0], ids, [17, 1, 1, 20, 1])
    assert (got - wanted).abs().max() < close, (got - wanted).abs().max()
    stores = opened[0]._attention.stores
    assert [keys.data.numel() == 0 for keys, _ in stores] == [False, False, True, False, True, False]
    with pytest.raises(ShoestringError, match="Layer 2 has no attention weights"):
        made = Batch(*(np.array(x, np.int32) for x in ([5], [0], [0, 1], [0])), np.arange(8, dtype=np.int32)[None])
        opened[0].run(made, 2, 4, torch.randn(1, 64))
    for runner in opened:
        runner.close()
    assert torch.equal(tiny.logits(model, torch.tensor([ids]))[0], wanted), "the runner did not give the model back"


@needs_library
@pytest.mark.parametrize("family", METHOD.FAMILIES)
def test_the_native_runner_computes_it_without_queries_and_keys(family: str, tmp_path: Path) -> None:
    plain = of_family(family)
    model = shared(plain)
    ids = tiny.batch(1, 40)[0].tolist()
    opened = []
    for name, kind in (("whole", plain), ("shared", model)):
        kind.save_pretrained(tmp_path / name)
        opened.append(NativeRunner(tmp_path / name, cache_dtype="fp32"))
    each = opened[0].facts.block_bytes // 6
    positions = 64 if family == "mistral" else 0  # of a window; who computes no scores need not know them
    assert opened[1].facts.block_bytes == each * 6 - 2 * ((each + positions) // 2)
    assert opened[1].facts.weight_bytes < opened[0].facts.weight_bytes
    opened[1].reserve(8)
    got = in_chunks(opened[1], ids, [17, 1, 1, 20, 1])
    wanted = tiny.logits(model, torch.tensor([ids]))[0]
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    opened[1].attention = lambda layer, q, k, v, batch: q
    with pytest.raises(UsageError, match="share attention weights"):
        in_chunks(opened[1], ids, [3])
    for runner in opened:
        runner.close()


@needs_library
def test_the_native_runner_computes_it_packed_and_adapted(tmp_path: Path, tiny_folder: Path) -> None:
    model = shared(base(initializer_range=0.02))
    model.save_pretrained(tmp_path / "model")
    room, packer = catalog.contract("quantizers"), catalog.module("int4")
    room.apply(packer, Step("compress", "int4", {}), tmp_path / "model", tmp_path / "packed", work(tmp_path))
    runner = NativeRunner(tmp_path / "packed", cache_dtype="fp32")
    runner.reserve(8)
    ids = tiny.batch(1, 20)[0].tolist()
    wanted = tiny.logits(models.load(tmp_path / "packed").model, torch.tensor([ids]))[0]
    assert "int4" in runner.facts.precision
    assert (in_chunks(runner, ids, [20]) - wanted).norm() < 0.02 * wanted.norm()
    runner.close()


@needs_library
def test_a_map_that_lies_is_refused_and_one_with_two_blocks_at_once_runs_in_torch(tmp_path: Path) -> None:
    config = shared().config.to_dict() | {"architectures": ["EchoAttLlamaForCausalLM"]}
    assert from_config(config).leaders == tuple(MAP)
    for bad in ([0, 1], [0, 2, 2, 3, 4, 5], [0, 0, 1, 3, 4, 5], "123456", [True] * 6, [-1, 1, 2, 3, 4, 5]):
        with pytest.raises(UsageError, match="config.json"):
            from_config({**config, "share_map": bad})
    with pytest.raises(NotNative, match="one layer at a time"):
        from_config({**config, "share_map": [0, 1, 2, 1, 2, 5]})
    with pytest.raises(NotNative, match="family"):
        from_config({**config, "model_type": "shoestring_echoatt_other"})


@needs_library
def test_a_span_that_cuts_a_block_is_refused(tmp_path: Path) -> None:
    shared().save_pretrained(tmp_path)
    NativeRunner(tmp_path, span=(3, 6)).close()
    with pytest.raises(UsageError, match="Layer 2 has no attention weights to take"):
        NativeRunner(tmp_path, span=(2, 6))


def test_generate_takes_a_converted_folder(tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "out"
    loaded = models.load(tiny_folder)
    shared(loaded.model).save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)
    with pytest.raises(UsageError, match="no exact form in GGUF"):
        write_gguf(out, tmp_path / "out.gguf")
    opened = open_model(out)
    assert opened.runner.facts.backend == ("torch" if load().library is None else "native")
    opened.runner.close()
    model, tokens = shared(loaded.model), loaded.tokenizer
    for word in range(5, 50):
        ids = tokens(f"w{word}", return_tensors="pt").input_ids
        wanted = tokens.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :], True)
        if len(wanted.split()) > 2:
            break
    assert "".join(generate(str(out), f"w{word}", raw=True, max_new_tokens=4)).split() == wanted.split()


# ---- the real thing ----


@pytest.mark.real
def test_on_the_default_model() -> None:
    """Neighbours that are alike share with little loss, those that are not with much."""
    loaded = models.load("smollm2")
    texts = data.read("python-docs")
    encoded = data.encode(texts.part(texts.examples[:6]), loaded.tokenizer, 96, on_long="truncate").rows
    similarity = METHOD.measure(loaded.model, encoded, 3, 64)
    neighbours = [float(similarity[i, i + 1]) for i in range(29)]
    assert neighbours[11] < 0.4 and min(neighbours[23:26]) > 0.8
    ids = torch.tensor([row["input_ids"] for row in encoded if len(row["input_ids"]) == 96])
    likely, unlikely = METHOD.place(similarity, 3, 2, [""] * 30), METHOD.place(-similarity, 3, 2, [""] * 30)
    losses = []
    with torch.no_grad():
        for starts in (likely, unlikely):
            losses.append(float(METHOD.student(loaded.model, METHOD.map_of(30, starts, 2))(ids, labels=ids).loss))
        plain = float(loaded.model(ids, labels=ids).loss)
    assert losses[0] - plain < 0.5 * (losses[1] - plain)

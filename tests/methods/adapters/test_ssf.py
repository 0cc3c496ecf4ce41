"""SSF and its pools: folding, choosing for each input, keys, the classifier, and what leaves the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GemmaConfig, MistralConfig

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.jobs.merge import merge
from shoestring.lab import tiny
from shoestring.methods.adapters.ssf import SsfConfig, register
from shoestring.models import shape_of
from shoestring.training import TrainOptions, train

register()
CONTRACT = catalog.contract("adapters")


def wrapped(base: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base if base is not None else tiny.model(), SsfConfig(**options)).eval()


def stirred(model: Any) -> Any:
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    return model


class Net(nn.Module):
    """A small network that is none of transformers', with every kind of site."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 2, stride=2)
        self.words = nn.Embedding(5, 8)
        self.norm = nn.LayerNorm(8)
        self.mid = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 1, 4, 4) -> (rows, 3)"""
        y = self.patch(x).flatten(2).transpose(1, 2) + self.words(torch.arange(4).expand(len(x), 4))
        return self.head(torch.relu(self.mid(self.norm(y))).mean(1))


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    sites = ["patch", "words", "norm", "mid"]
    return wrapped(Net(), target_modules=sites, **options)


def pooled(**options: Any) -> Any:
    return net(**{"pool": 5, "choose": 2, "query_size": 6, "classifier": "head", **options})


IMAGES = torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(3))
QUERIES = torch.randn(7, 6, generator=torch.Generator().manual_seed(4))


# ---------------------------------------------------------------- scale, shift, fold


def test_scale_and_shift_stand_behind_every_kind_of_layer() -> None:
    model = stirred(net())
    inner = model.base_model.model
    x = torch.randn(2, 1, 4, 4)
    base = inner.patch.base_layer(x)
    expected = base * inner.patch.ssf_scale["default"].view(-1, 1, 1) + inner.patch.ssf_shift["default"].view(-1, 1, 1)
    assert torch.allclose(inner.patch(x), expected, atol=1e-6)
    rows = torch.randn(2, 3, 8)
    expected = inner.mid.base_layer(rows) * inner.mid.ssf_scale["default"][0] + inner.mid.ssf_shift["default"][0]
    assert torch.allclose(inner.mid(rows), expected, atol=1e-6)


def test_all_kinds_fold_and_unfold_exactly() -> None:
    model = stirred(net())
    before = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    out = model(IMAGES)
    model.merge_adapter()
    assert model.base_model.model.mid.base_layer.bias is not None, "the shift became a bias"
    assert torch.allclose(model(IMAGES), out, atol=1e-5)
    assert not torch.equal(
        model.base_model.model.norm.base_layer.weight, before["base_model.model.norm.base_layer.weight"]
    )
    model.unmerge_adapter()
    after = {n: p for n, p in model.named_parameters() if "base_layer" in n}
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert torch.allclose(model.merge_and_unload()(IMAGES), out, atol=1e-5)


def test_a_start_with_noise_and_one_without() -> None:
    noisy, still = wrapped(), wrapped(init_std=0.0)
    scales = torch.cat([p.flatten() for n, p in noisy.named_parameters() if "ssf_scale" in n])
    shifts = torch.cat([p.flatten() for n, p in noisy.named_parameters() if "ssf_shift" in n])
    assert abs(float(scales.mean()) - 1) < 0.005 and abs(float(scales.std()) - 0.02) < 0.004
    assert abs(float(shifts.mean())) < 0.005 and abs(float(shifts.std()) - 0.02) < 0.004
    assert torch.equal(tiny.logits(still), tiny.logits(tiny.model())), "scale 1 and shift 0 change nothing"


def test_norms_without_a_bias_get_a_scale_alone() -> None:
    names = {n for n, p in wrapped().named_parameters() if p.requires_grad}
    assert any("input_layernorm.ssf_scale" in n for n in names)
    assert not any("norm.ssf_shift" in n for n in names)
    model = stirred(wrapped(shift="always"))
    assert any("input_layernorm.ssf_shift" in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="no place for the bias of model.*norm"):
        model.merge_and_unload()


def test_layer_norms_get_both() -> None:
    names = {n for n, p in wrapped(tiny.model("gpt2")).named_parameters() if p.requires_grad}
    assert any("ln_1.ssf_shift" in n for n in names) and any("ln_f.ssf_scale" in n for n in names)


def test_a_norm_that_stores_its_way_from_one_folds_as_one() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    base = AutoModelForCausalLM.from_config(GemmaConfig(vocab_size=64, num_key_value_heads=1, pad_token_id=0, **sizes))
    model = stirred(wrapped(base.eval(), shift="never"))
    out = tiny.logits(model)
    assert torch.allclose(tiny.logits(model.merge_and_unload()), out, atol=2e-4)


def test_a_merged_model_keeps_its_new_biases_when_it_is_saved(tmp_path: Path) -> None:
    model = stirred(wrapped())
    out = tiny.logits(model)
    merged = model.merge_and_unload()
    assert merged.config.attention_bias and merged.config.mlp_bias
    merged.save_pretrained(tmp_path)
    assert torch.allclose(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), out, atol=2e-4)


def test_only_the_biases_that_are_needed_are_made() -> None:
    merged = stirred(wrapped(target_modules=["q_proj"])).merge_and_unload()
    assert merged.config.attention_bias and not merged.config.mlp_bias
    attention = merged.model.layers[0].self_attn
    assert attention.q_proj.bias.abs().sum() > 0 and attention.k_proj.bias.abs().sum() == 0
    assert merged.model.layers[0].mlp.up_proj.bias is None


def test_a_family_without_room_for_biases_is_refused_unless_nothing_shifts() -> None:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = MistralConfig(vocab_size=64, num_key_value_heads=1, pad_token_id=0, **sizes)
    with pytest.raises(ValueError, match='MistralForCausalLM has no place.*shift="never"'):
        stirred(wrapped(AutoModelForCausalLM.from_config(config))).merge_and_unload()
    model = stirred(wrapped(AutoModelForCausalLM.from_config(config).eval(), shift="never"))
    out = tiny.logits(model)
    assert torch.allclose(tiny.logits(model.merge_and_unload()), out, atol=2e-4)


def test_the_job_that_merges_writes_a_plain_model(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = str(request.getfixturevalue("tiny"))
    model = stirred(wrapped(AutoModelForCausalLM.from_pretrained(folder), task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = folder
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    ids = torch.arange(4, 20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-3)


def test_counts_are_those_of_the_formula() -> None:
    # Channels of SmolLM2-135M: q 576, k and v 192, o 576, gate and up 1536, down 576, two norms of 576; 30 blocks.
    module = catalog.module("ssf")
    shape = shape_of(tiny.model())
    linear = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    norms = 5 * 64
    assert module.price(shape, {}).trainable == 2 * linear + norms
    assert module.price(shape, {"shift": "always"}).trainable == 2 * (linear + norms)
    assert module.price(shape, {"pool": 25, "choose": 3, "shift": "always"}).trainable == 25 * (
        2 * (linear + norms) + 64
    )
    model = wrapped(pool=25, choose=3, shift="always")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 25 * (2 * (linear + norms) + 64)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_packed_bases_are_scaled_and_shifted_and_not_merged(name: str, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=catalog.load(name)(group_size=32))
    plain = tiny.logits(base)
    model = wrapped(base, init_std=0.0)
    assert torch.allclose(tiny.logits(model), plain, atol=1e-5)
    layer, x = stirred(model).base_model.model.model.layers[0].self_attn.k_proj, torch.randn(2, 3, 64)
    expected = layer.base_layer(x) * layer.ssf_scale["default"][0] + layer.ssf_shift["default"][0]
    assert torch.allclose(layer(x), expected, atol=1e-6) and not torch.allclose(tiny.logits(model), plain)
    with pytest.raises(ValueError, match="packed integers"):
        model.merge_adapter()


# ---------------------------------------------------------------- the pool


def test_a_batch_gives_what_its_rows_give_alone() -> None:
    model = stirred(pooled())
    with model.base_model.asking(QUERIES):
        together = model(IMAGES)
    alone = []
    for image, query in zip(IMAGES, QUERIES):
        with model.base_model.asking(query[None]):
            alone.append(model(image[None]))
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert len({tuple(c) for c in choices(model).tolist()}) > 1, "the rows choose differently"


def choices(model: Any) -> torch.Tensor:
    with model.base_model.asking(QUERIES):
        return model.base_model.choices["default"].entries


def test_a_site_uses_the_plain_mean_of_the_nearest_entries() -> None:
    model = stirred(pooled())
    keys = model.base_model.ssf_keys["default"]
    nearest = torch.cosine_similarity(QUERIES[:, None], keys[None], dim=-1).topk(2, dim=1).indices
    assert torch.equal(choices(model).sort(1).values, nearest.sort(1).values)
    site = model.base_model.model.mid
    x = torch.randn(7, 3, 8)
    with model.base_model.asking(QUERIES):
        out = site(x)
    scale, shift = (p["default"][nearest].mean(1)[:, None] for p in (site.ssf_scale, site.ssf_shift))
    assert torch.allclose(out, site.base_layer(x) * scale + shift, atol=1e-6)


def test_the_classifier_is_pooled_shared_or_left_alone() -> None:
    head = pooled().base_model.model.head
    assert head.ssf_head_weight["default"].shape == (5, 3, 8) and head.ssf_head_bias["default"].shape == (5, 3)
    assert head.ssf_head_bias["default"].abs().sum() == 0 and head.ssf_head_weight["default"].std() > 0.3
    shared = pooled(pool_classifier=False)
    assert shared.base_model.model.head.ssf_head_weight["default"].shape == (1, 3, 8)
    assert isinstance(pooled(classifier=None).base_model.model.head, nn.Linear)
    model = stirred(pooled())
    weight, bias = (getattr(model.base_model.model.head, f"ssf_head_{n}")["default"] for n in ("weight", "bias"))
    x, entries = torch.randn(7, 8), choices(model)
    with model.base_model.asking(QUERIES):
        out = model.base_model.model.head(x)
    for row in range(7):
        expected = weight[entries[row]].mean(0) @ x[row] + bias[entries[row]].mean(0)
        assert torch.allclose(out[row], expected, atol=1e-6)


def test_a_classifier_may_start_as_it_is_in_the_base() -> None:
    model = pooled(classifier_from_base=True, init_std=0.0)
    torch.manual_seed(0)
    with model.base_model.asking(QUERIES):
        assert torch.allclose(model(IMAGES), Net()(IMAGES), atol=1e-6)


def test_the_loss_pulls_the_chosen_keys_and_only_them() -> None:
    model = pooled(key_weight=0.2).train()
    tuner = model.base_model
    keys = tuner.ssf_keys["default"]
    with tuner.asking(QUERIES[:1]):
        task = model(IMAGES[:1]).square().mean()
        (task + tuner.auxiliary_loss()).backward()
        chosen = tuner.choices["default"].entries[0]
    similarity = torch.cosine_similarity(QUERIES[:1], keys[chosen].detach()).sum()
    expected = 0.8 * task + 0.2 * (1 - similarity)
    assert torch.allclose((task + tuner.auxiliary_loss()) * 0.8, expected, atol=1e-6)
    moved = keys.grad.abs().sum(1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(chosen.tolist())
    before = torch.cosine_similarity(QUERIES[:1], keys.detach())
    with torch.no_grad():
        keys -= 0.05 * keys.grad
    assert (torch.cosine_similarity(QUERIES[:1], keys.detach()) - before)[chosen].min() > 0, "pulled towards the query"


def test_without_the_key_loss_the_keys_stay() -> None:
    model = pooled(key_weight=0.0).train()
    assert not model.base_model.ssf_keys["default"].requires_grad
    with model.base_model.asking(QUERIES):
        model(IMAGES)
        assert model.base_model.auxiliary_loss() is None


def test_entries_that_nobody_chose_stay_as_they_were() -> None:
    model = pooled().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.Adam(trained, 1e-2)
    seen: set[int] = set()
    for _ in range(3):
        with model.base_model.asking(QUERIES[:1]):
            loss = model(IMAGES[:1]).square().mean() + model.base_model.auxiliary_loss()
            seen |= set(model.base_model.choices["default"].entries.flatten().tolist())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rest = [i for i in range(5) if i not in seen]
    assert rest and all(torch.equal(p[rest], b[rest]) for p, b in zip(trained, before))
    assert all(not torch.equal(p[sorted(seen)], b[sorted(seen)]) for p, b in zip(trained, before))


def test_a_pool_merges_for_one_input_only() -> None:
    model = stirred(pooled())
    with pytest.raises(ValueError, match="merge_for"):
        model.merge_adapter()
    with model.base_model.asking(QUERIES[:1]):
        out = model(IMAGES[:1])
    with pytest.raises(ValueError, match="merge_for"):
        model.merge_adapter()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.base_model.merge_for(QUERIES[:1])
    assert torch.allclose(model(IMAGES[:1]), out, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="merge_for"):
        model.base_model.merge_for(QUERIES)


def test_usage_is_counted_and_collapse_is_told() -> None:
    model = pooled(pool=9).train()
    with model.base_model.asking(QUERIES[:1].expand(4, -1)):
        pass
    with pytest.warns(UserWarning, match="only 2 of 9 entries"):
        assert int(model.base_model.usage().sum()) == 8
    with model.base_model.asking(QUERIES):
        pass
    assert int(model.base_model.usage().sum()) == 8 + 14


def test_a_query_of_zeros_is_answered() -> None:
    model = pooled()
    with model.base_model.asking(torch.zeros(7, 6)):
        assert model(IMAGES).isfinite().all()


def test_a_network_of_its_own_must_be_asked() -> None:
    with pytest.raises(ValueError, match="asking"):
        pooled()(IMAGES)
    with pytest.raises(ValueError, match="query_size"):
        wrapped(Net(), target_modules=["mid"], pool=3)


def test_saved_and_loaded_pools_choose_and_answer_alike(tmp_path: Path) -> None:
    model = stirred(pooled())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path).eval()
    for one in (model, again):
        with one.base_model.asking(QUERIES):
            one.out = one(IMAGES)
    assert torch.equal(model.out, again.out)
    held = peft.get_peft_model_state_dict(model)
    assert "base_model.ssf_keys" in held and all(len(t) == 5 for t in held.values()), "entry i is row i everywhere"


# ---------------------------------------------------------------- language models


def test_the_query_is_the_frozen_models_and_of_the_prompt() -> None:
    model = stirred(wrapped(pool=4, choose=2))
    ids = tiny.batch()
    with torch.no_grad():
        states = tiny.model().model(ids).last_hidden_state
    assert torch.allclose(model.base_model.queries(input_ids=ids), states.mean(1), atol=1e-5)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, :9] = -100
    found = model.base_model.queries(input_ids=ids, labels=labels)
    assert torch.allclose(found[0], states[0, :5].mean(0), atol=1e-5)
    assert torch.allclose(found[1], states[1, :9].mean(0), atol=1e-5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    with torch.no_grad():
        shifted = tiny.model().model(padded, attention_mask=mask).last_hidden_state[:, 3:]
    assert torch.allclose(model.base_model.queries(padded, attention_mask=mask), shifted.mean(1), atol=1e-5)
    few = stirred(wrapped(pool=4, choose=2, query_tokens=3))
    assert torch.allclose(few.base_model.queries(input_ids=ids), states[:, :3].mean(1), atol=1e-5)


def test_queries_that_were_kept_give_the_same_as_asking_anew() -> None:
    model = stirred(wrapped(pool=4, choose=2))
    ids = tiny.batch()
    queries = model.base_model.queries(input_ids=ids)
    with model.base_model.asking(queries), torch.no_grad():
        kept = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, kept)


def test_rows_of_a_batch_do_not_see_each_others_choice() -> None:
    model = stirred(wrapped(pool=6, choose=2))
    ids = torch.stack([tiny.batch(1)[0], tiny.batch(1)[0].flip(0), torch.full((12,), 7)])
    with torch.no_grad():
        together = model(ids).logits
        alone = torch.cat([model(row[None]).logits for row in ids])
    assert torch.allclose(together, alone, atol=1e-5)


def test_entries_are_chosen_once_a_prompt_and_kept_while_it_goes_on() -> None:
    model = stirred(wrapped(pool=6, choose=2, task_type="CAUSAL_LM"))
    asked = []
    inner = model.base_model._choose
    model.base_model._choose = lambda queries: (asked.append(queries), inner(queries))
    model.generate(input_ids=tiny.batch(2, 6), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(asked) == 1


def test_a_pool_trains_with_transformers_loss() -> None:
    model = wrapped(pool=4, choose=2).train()
    out = model(**tiny.inputs(model))
    assert out.loss.item() == pytest.approx(
        (nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tiny.batch()[:, 1:].flatten())
         + model.base_model.auxiliary_loss()).item(), abs=1e-5
    )  # fmt: skip
    out.loss.backward()
    assert model.base_model.ssf_keys["default"].grad.abs().sum() > 0


def test_a_pool_trains_with_the_chunked_loss(tmp_path: Path) -> None:
    model = wrapped(pool=4, choose=2)
    keys = model.base_model.ssf_keys["default"]
    before = keys.detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in tiny.batch(4).tolist()]
    options = TrainOptions(learning_rate=1e-2, max_steps=3, per_device_train_batch_size=2, save_steps=0)
    found = train(model, rows, [], options, tmp_path)
    assert found.own_loss is None, "the key term is heard beside the chunked loss"
    assert not torch.equal(keys, before)
    assert int(model.base_model.usage().sum()) >= 3 * 2 * 2


def test_disabled_pools_ask_nothing_and_change_nothing() -> None:
    model = stirred(wrapped(pool=4, choose=2))
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.model()))
    assert torch.equal(tiny.logits(model.unload()), tiny.logits(tiny.model()))


def test_a_sequence_classifier_gets_its_own_pool() -> None:
    torch.manual_seed(0)
    config = tiny.model("bert").config
    config.num_labels = 3
    base = AutoModelForSequenceClassification.from_config(config).eval()
    model = wrapped(base, pool=3, choose=1, classifier="classifier")
    out = model(input_ids=tiny.batch(), labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3) and out.loss.isfinite()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": 2, "choose": 3}, "choose=3 of a pool of 2"),
        ({"choose": 0}, "choose=0"),
        ({"pool": 0}, "pool=0"),
        ({"key_weight": 1.0}, "below 1"),
        ({"key_weight": -0.1}, "key_weight=-0.1"),
        ({"shift": "some"}, "foldable, always, never"),
        ({"init_std": -1.0}, "init_std"),
        ({"classifier": "head", "task_type": "SEQ_CLS"}, "peft itself"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SsfConfig(**options)
    if "task_type" not in options:
        with pytest.raises(UsageError, match=words):
            CONTRACT.config(catalog.module("ssf"), options)


def test_a_model_that_could_not_be_adapted_is_left_clean() -> None:
    base = tiny.model()
    with pytest.raises(ValueError, match="no_such"):
        wrapped(base, target_modules=["no_such"])
    assert not base._forward_pre_hooks and not base._forward_hooks
    assert not wrapped(base).unload()._forward_pre_hooks


def test_a_site_that_is_no_layer_is_named() -> None:
    with pytest.raises(TypeError, match="model.layers.0.mlp is a LlamaMLP"):
        wrapped(target_modules=["mlp"])


@pytest.mark.parametrize("kind", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d"])
def test_norms_with_channels_second_scale_channels(kind: str) -> None:
    torch.manual_seed(0)
    made = {
        "BatchNorm2d": lambda: nn.BatchNorm2d(4),
        "GroupNorm": lambda: nn.GroupNorm(2, 4),
        "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    }
    norm = made[kind]()
    # As wide as it has channels, so that scaling the wrong axis would not show as an error.
    x = torch.randn(2, 4, 4, 4)
    plain = norm.eval()(x)
    model = stirred(wrapped(nn.Sequential(norm), target_modules=["0"]))
    site = model.base_model.model[0]
    scale, shift = (entries["default"][0].view(1, 4, 1, 1) for entries in (site.ssf_scale, site.ssf_shift))
    out = model(x)
    torch.testing.assert_close(out, plain * scale + shift)
    torch.testing.assert_close(model.merge_and_unload()(x), out)

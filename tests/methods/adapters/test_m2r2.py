"""M2R2: the fast stream in training, and at work in the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.engine.engine import Engine
from shoestring.lab import answering, tiny
from shoestring.lab.answering import DRAWN, GREEDY, PROMPTS, answers, exact
from shoestring.methods.adapters._exits import whole_pass
from shoestring.methods.adapters.m2r2 import StreamBlock
from shoestring.models.anatomy import mixtures, route
from shoestring.models.streams import side_by_side

Train = Callable[..., list[float]]
WIDE: dict[str, Any] = {"num_hidden_layers": 4, "initializer_range": 0.2}


def wrapped(**options: Any) -> Any:
    torch.manual_seed(0)
    module = catalog.module("m2r2")
    return catalog.contract("adapters").wrap(module, tiny.model(**WIDE), {"gates": [2, 3], "r": 16, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, train: Train) -> tuple[Any, Path, Path]:
    """A wrapped model after some training, the folder of its fast stream, and the folder of its base."""
    model = wrapped()
    train(model, 60)
    folder = tmp_path_factory.mktemp("fast")
    model.save_pretrained(str(folder))
    return model.eval(), folder, answering.folder(tmp_path_factory.mktemp("tiny"), **WIDE)


def opened(trained: tuple[Any, Path, Path], **options: Any) -> Engine:
    words = ",".join([f"m2r2,streams={trained[1]}", *(f"{k}={v}" for k, v in options.items())])
    return exact(trained[2], plugs=[words])


def slow(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tuple(model.base_model.model(input_ids=ids, output_hidden_states=True).hidden_states)


# ---- the stream ----


def test_it_starts_as_the_slow_stream_at_every_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, passed = wrapped().eval(), tiny.batch(2, 20), []
    both = StreamBlock.both
    monkeypatch.setattr(StreamBlock, "both", lambda self, *given: passed.append(both(self, *given)) or passed[-1])
    found, final, _ = model.base_model.fast("default", {"input_ids": ids})
    for index, x in enumerate(passed):
        assert torch.equal(x[:, :20], x[:, 20:]), f"behind block {index + 1} the streams differ"
    for gate, fast in found.items():  # the same sums, in another order
        assert torch.allclose(fast, slow(model, ids)[gate], atol=1e-5), f"gate {gate}"
    assert torch.equal(final, whole_pass(model.base_model.model, {"input_ids": ids})[0])


def test_it_starts_anew_behind_each_gate(trained: tuple[Any, Path, Path]) -> None:
    """Without what moves it between the gates it is the slow stream at the second, whatever it was at the first."""
    model, ids = wrapped(), tiny.batch(2, 20)
    with torch.no_grad():
        for index, block in enumerate(model.base_model.layers("default")):
            for part in (block.attention, block.mlp):
                part["default"].up.normal_(std=0.0 if index == 2 else 0.5)
    found, *_ = model.eval().base_model.fast("default", {"input_ids": ids})
    assert not torch.allclose(found[2], slow(model, ids)[2], atol=1e-2)
    assert torch.allclose(found[3], slow(model, ids)[3], atol=1e-5)


def test_it_learns_and_the_model_stays_what_it_was(trained: tuple[Any, Path, Path], train: Train) -> None:
    model = wrapped()
    losses = train(model, 40)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    for one in (model.eval(), trained[0]):
        assert torch.equal(tiny.logits(one), tiny.logits(tiny.model(**WIDE)))


def test_it_reads_keys_and_values_of_the_slow_stream(trained: tuple[Any, Path, Path]) -> None:
    """In plain torch: attention of the fast queries over the slow keys, then both additions."""
    model, ids = trained[0], tiny.batch(1, 9)
    base, tuner = model.base_model.model, model.base_model
    states = slow(model, ids)
    fast = states[0]
    rotary = base.model.rotary_emb(fast, torch.arange(9)[None])
    with torch.no_grad():
        for index, block in enumerate(base.model.layers[:2]):
            layer, attention = tuner.layers("default")[index], block.self_attn
            n, slow_n = block.input_layernorm(fast), block.input_layernorm(states[index])
            heads = lambda x, count: x.view(1, 9, count, 16).transpose(1, 2)
            q, k = heads(attention.q_proj(n), 4), heads(attention.k_proj(slow_n), 2)
            v = heads(attention.v_proj(slow_n), 2).repeat_interleave(2, 1)
            half = lambda x: torch.cat([-x[..., 8:], x[..., :8]], -1)
            q, k = (x * rotary[0][:, None] + half(x) * rotary[1][:, None] for x in (q, k))
            found = torch.nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v, is_causal=True)
            fast = fast + attention.o_proj(found.transpose(1, 2).flatten(2)) + layer.attention["default"](n)
            m = block.post_attention_layernorm(fast)
            fast = fast + layer.plain_mlp(m) + layer.mlp["default"](m)
        wanted, *_ = tuner.fast("default", {"input_ids": ids})
    assert torch.allclose(fast, wanted[2], atol=1e-4)


def test_padding_does_not_matter(train: Train) -> None:
    model = wrapped()
    train(model, 3)
    ids = tiny.batch(1, 12)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    mask = (torch.arange(17) < 12).long()[None]
    labels = padded.masked_fill(mask == 0, -100)
    short = model(input_ids=ids, labels=ids).loss
    assert torch.allclose(model(input_ids=padded, attention_mask=mask, labels=labels).loss, short, atol=1e-4)


def test_the_router_learns_where_gate_and_model_agree(train: Train) -> None:
    model = wrapped(gates=[3])
    train(model, 80)
    model.eval()
    ids = 3 + torch.randint(60, (24, 24), generator=torch.Generator().manual_seed(777))
    with torch.no_grad():
        found, final, head = model.base_model.fast("default", {"input_ids": ids})
        gate = model.base_model.layers("default")[2].gate["default"]
        right = (head(gate(found[3])).argmax(-1) == head(final).argmax(-1)).flatten()
        told = gate.whole(found[3]).flatten().sigmoid()
    assert 0.05 < right.float().mean() < 0.95
    order = told.argsort()
    half = len(order) // 2
    assert right[order[half:]].float().mean() > right[order[:half]].float().mean() + 0.05


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_blocks_of_other_builds(family: str) -> None:
    """Called by place and not by name, with dropout in training; or with norms behind attention and MLP too."""
    small: Any = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0.5)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=3,
                head_dim=16,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            )  # fmt: skip
        ),
    }
    torch.manual_seed(0)
    base = small[family]()
    model = catalog.contract("adapters").wrap(catalog.module("m2r2"), base, {"gates": [1, 2], "r": 4})
    ids = tiny.batch(2, 12)
    for one in (model.eval(), model.train()):
        found, final, _ = one.base_model.fast("default", {"input_ids": ids})
        with torch.no_grad():
            wanted = model.eval().base_model.model(input_ids=ids, output_hidden_states=True)
        for gate, fast in found.items():
            assert torch.allclose(fast, wanted.hidden_states[gate], atol=1e-5)
        assert torch.allclose(final, wanted.hidden_states[-1], atol=1e-5)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    ups = [p for name, p in model.named_parameters() if name.endswith("up")]
    assert len(ups) == 4 and all(p.grad is not None and p.grad.any() for p in ups)


# ---- at work ----


def test_never_leaving_is_plain_decoding_and_the_cache_is_as_large(trained: tuple[Any, Path, Path]) -> None:
    with exact(trained[2], runner="torch") as plain, opened(trained, threshold=1) as engine:
        assert answers(engine) == answers(plain)
        assert answers(engine, DRAWN) == answers(plain, DRAWN)
        assert engine.facts.block_bytes == plain.facts.block_bytes
        assert engine.counts().plugged["exit_after_2"] == 0


def test_what_the_engine_sees_at_a_gate_is_the_stream_of_training(trained: tuple[Any, Path, Path]) -> None:
    with opened(trained, threshold=1) as engine:
        policy, seen = engine.hooks.exit, []

        def looking(layer: int, hidden: torch.Tensor, group: Any) -> list[bool]:
            seen.append((layer, [list(a.tokens) for a in group], hidden.clone()))
            return [False] * len(group)

        policy.leave = looking  # type: ignore[method-assign, union-attr]
        answers(engine, GREEDY, PROMPTS[:3])
    for layer, texts, hidden in seen[::5]:
        for text, both in zip(texts, hidden):
            found, *_ = trained[0].base_model.fast("default", {"input_ids": torch.tensor([text])})
            assert torch.allclose(both[1], found[layer][0, -1], atol=1e-3)
            assert torch.allclose(both[0], slow(trained[0], torch.tensor([text]))[layer][0, -1], atol=1e-3)


@pytest.mark.parametrize("by", ["confidence", "router"])
def test_a_lower_threshold_leaves_more_often(trained: tuple[Any, Path, Path], by: str) -> None:
    left = []
    for threshold in (0.95, 0.3, 0.0):
        with opened(trained, threshold=threshold, by=by) as engine:
            answers(engine)
            counts = engine.counts().plugged
            left.append(counts["exit_after_2"] + counts["exit_after_3"])
            assert not getattr(engine.hooks.exit, "_past", None)
    assert left == sorted(left) and left[-1] == 96


def test_drafts_change_nothing_on_fifty_prompts(trained: tuple[Any, Path, Path]) -> None:
    rng = np.random.default_rng(3)
    prompts = [list(map(int, rng.integers(3, 64, rng.integers(1, 30)))) for _ in range(50)]
    with exact(trained[2], runner="torch") as plain, opened(trained, exact="true", sure=0) as engine:
        assert answers(engine, GREEDY, prompts) == answers(plain, GREEDY, prompts)
        counts = engine.counts()
        assert counts.accepted_draft_tokens > 0.1 * counts.draft_tokens


def test_drawn_answers_too_and_lower_layers_run_once(trained: tuple[Any, Path, Path]) -> None:
    with exact(trained[2], runner="torch") as plain, opened(trained, exact="true", length=3) as engine:
        run, rows = engine.runner.run, {0: 0, 2: 0}

        def counting(batch: Any, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
            if (first, last) != (0, 0):
                rows[first] += batch.tokens
            return run(batch, first, last, hidden)

        engine.runner.run = counting  # type: ignore[method-assign]
        assert answers(engine, DRAWN) == answers(plain, DRAWN)
        assert rows[0] == rows[2] > 96
        assert engine.pool.used == 0


@pytest.mark.real
def test_two_streams_cost_less_than_two_passes() -> None:
    """Weights are read once: on the default model a step with both streams against two steps."""
    import time

    from shoestring.engine.open import open_model
    from shoestring.engine.runner import Batch

    runner: Any = open_model("smollm2", runner="torch", threads=1).runner
    runner.reserve(4)
    one = Batch(
        np.array([5], np.int32), np.zeros(1, np.int32), np.array([0, 1], np.int32), np.zeros(1, np.int32),
        np.zeros((1, 1), np.int32),
    )  # fmt: skip
    start = runner.run(one, 0, 0)
    both = torch.cat([start, start])

    def seconds(hidden: torch.Tensor) -> float:
        best = []
        for _ in range(8):
            began = time.process_time()
            runner.run(one, 0, 10, hidden.clone())
            best.append(time.process_time() - began)
        return min(best)

    assert seconds(both) < 1.6 * seconds(start)
    runner.close()


# ---- through mixtures of experts ----


def spread(**options: Any) -> Any:
    """A tiny mixture of 4 layers with 8 experts, two of which a token meets, with a fast stream."""
    base = catalog.module("expert_offloading").base(initializer_range=0.2)
    torch.manual_seed(0)
    return catalog.contract("adapters").wrap(catalog.module("m2r2"), base, {"gates": [2, 3], "r": 16, **options})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, train: Train) -> tuple[Any, Path, Path]:
    """As `trained`, of a mixture."""
    model = spread()
    train(model, 30)
    folder = tmp_path_factory.mktemp("fast")
    model.save_pretrained(str(folder))
    make = catalog.module("expert_offloading").base
    return model.eval(), folder, answering.folder(tmp_path_factory.mktemp("mixture"), make)


def met(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """What the experts are called with while both streams pass, one call a block below the last gate."""
    calls: list[Any] = []
    parts = [model.get_submodule(found.experts) for found in mixtures(model)]
    handles = [part.register_forward_pre_hook(lambda _, given: calls.append(given)) for part in parts]
    with torch.no_grad():
        model.base_model.fast("default", {"input_ids": ids})
    for handle in handles:
        handle.remove()
    return calls[len(parts) :]


def test_through_a_mixture_it_starts_as_the_slow_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, passed = spread().eval(), tiny.batch(2, 20), []
    both = StreamBlock.both
    monkeypatch.setattr(StreamBlock, "both", lambda self, *given: passed.append(both(self, *given)) or passed[-1])
    found, *_ = model.base_model.fast("default", {"input_ids": ids})
    assert len(passed) == 3 and all(torch.equal(x[:, :20], x[:, 20:]) for x in passed)
    for gate, fast in found.items():
        assert torch.allclose(fast, slow(model, ids)[gate], atol=1e-5)


def test_through_a_mixture_it_learns_and_the_model_stays(mixed: tuple[Any, Path, Path], train: Train) -> None:
    model = spread()
    before = tiny.logits(model.eval())
    losses = train(model.train(), 30)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert not any(p.requires_grad for m in mixtures(model) for p in model.get_submodule(m.router).parameters())
    assert torch.equal(before, tiny.logits(model.eval()))


def test_both_streams_meet_the_same_experts(mixed: tuple[Any, Path, Path]) -> None:
    """In plain torch: p + experts(m; choices and gates of the slow stream) + B m."""
    model, ids = mixed[0], tiny.batch(2, 9)
    block, layer = model.base_model.model.model.layers[0], model.base_model.layers("default")[0]
    out: list[Any] = []
    handle = block.mlp.experts.register_forward_hook(lambda *given: out.append(given[-1]))
    calls = met(model, ids)
    handle.remove()
    for x, choices, gates in calls:
        x, choices, gates = (part.unflatten(0, (2, 2, 9)) for part in (x, choices, gates))
        assert torch.equal(choices[:, 0], choices[:, 1]) and torch.equal(gates[:, 0], gates[:, 1])
        assert not torch.allclose(x[:, 0], x[:, 1], atol=1e-2)
    m, slow_m = (calls[0][0].unflatten(0, (2, 2, 9))[:, i] for i in (1, 0))
    with torch.no_grad():
        _, gates, choices = route(block.mlp.gate, slow_m.flatten(0, 1))
        wanted = block.mlp.experts(m.flatten(0, 1), choices, gates).unflatten(0, (2, 9))
        assert torch.allclose(out[1].unflatten(0, (2, 2, 9))[:, 1], wanted, atol=1e-5)
        with side_by_side(9):
            both = layer.feeds(torch.cat([slow_m, m], 1))
        assert torch.allclose(both[:, 9:], wanted + layer.mlp["default"](m), atol=1e-5)


def test_an_mlp_may_answer_with_more_than_states(trained: tuple[Any, Path, Path], monkeypatch: Any) -> None:
    layer, x = trained[0].base_model.layers("default")[0], torch.randn(1, 6, 64)
    with torch.no_grad(), side_by_side(3):
        wanted, plain = layer.feeds(x), layer.plain_mlp
        monkeypatch.setattr(layer, "plain_mlp", lambda x: (plain(x), "logits"))
        found, more = layer.feeds(x)
    assert torch.equal(found, wanted) and more == "logits"


def both_plugs(mixed: tuple[Any, Path, Path], **options: Any) -> Engine:
    word = ",".join([f"m2r2,streams={mixed[1]}", *(f"{k}={v}" for k, v in options.items())])
    return exact(mixed[2], plugs=["expert_offloading,slots=6,confidence=0,always=true", word])


def test_experts_come_and_go_and_answers_stay(mixed: tuple[Any, Path, Path]) -> None:
    with exact(mixed[2]) as plain:
        wanted, drawn = answers(plain), answers(plain, DRAWN)
    with both_plugs(mixed, threshold=1) as engine:
        assert answers(engine) == wanted and answers(engine, DRAWN) == drawn
        counts = engine.counts().plugged
        assert counts["expert_slots"] == 6 and counts["expert_misses"] > 0
    with both_plugs(mixed, exact="true", sure=0) as engine:
        assert answers(engine) == wanted
        assert engine.counts().draft_tokens > 0


def test_the_fast_stream_is_asked_for_the_experts_to_come(mixed: tuple[Any, Path, Path]) -> None:
    model, _, _ = mixed
    with both_plugs(mixed, threshold=1) as engine:
        owner, seen = engine.hooks.weights, []
        plain = owner.predictor  # type: ignore[union-attr]
        owner.predictor = lambda *given: seen.append((given[0], given[1], list(plain(*given)))) or seen[-1][2]  # type: ignore[union-attr]
        (text,) = answers(engine, GREEDY, PROMPTS[:1])
    told = met(model, torch.tensor([[*PROMPTS[0], *text]]))
    rows = len(PROMPTS[0]) + len(text)
    routers = [model.get_submodule(found.router) for found in mixtures(model)]
    decoding = [entry for entry in seen if len(entry[1]) == (1 if entry[0] == 3 else 2)]
    assert len(decoding) == 4 * (len(text) - 1)
    for number, (layer, x, guesses) in enumerate(decoding):
        if layer < 3:
            at = len(PROMPTS[0]) + number // 4
            assert torch.allclose(x[1], told[layer][0][rows + at], atol=1e-3)
            likely = route(routers[layer + 1], x[1:])[2][0].tolist()
            assert [(later, e) for later, e, _ in guesses if later > layer] == [(layer + 1, e) for e in likely]


def test_a_record_of_routes_is_of_the_model_alone(mixed: tuple[Any, Path, Path]) -> None:
    def routes(*words: str) -> Any:
        with exact(mixed[2], plugs=["expert_routing", *words]) as engine:
            answers(engine, GREEDY, PROMPTS[:1])
            return engine.hooks.watch.recorder.trace()  # type: ignore[union-attr]

    one, other = routes(), routes(f"m2r2,streams={mixed[1]},threshold=1")
    assert len(one.steps) == len(PROMPTS[0]) + 15
    assert np.array_equal(one.experts, other.experts) and np.array_equal(one.steps, other.steps)


# ---- what is refused ----


def test_an_untrained_stream_is_refused(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    wrapped().save_pretrained(str(tmp_path))
    with pytest.raises(UsageError, match="never trained"):
        exact(trained[2], plugs=[f"m2r2,streams={tmp_path}"])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"gates": [4]}, "do not stand below"), ({"gates": [3, 2]}, "not ascending"), ({"activation": "tan"}, "tan")],
)
def test_streams_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        wrapped(**options)


def test_another_depth_is_refused(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    short = answering.folder(tmp_path, num_hidden_layers=3, initializer_range=0.2)
    with pytest.raises((UsageError, ValueError), match="do not stand below"):
        exact(short, plugs=[f"m2r2,streams={trained[1]}"])

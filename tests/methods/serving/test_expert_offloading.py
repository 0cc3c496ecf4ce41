"""Experts in a file: the same bits as in memory, caches under a bound, a loader that works beside the computation."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring.core.errors import UsageError
from shoestring.lab import tiny
from shoestring.methods.serving import _expert_bits as bits
from shoestring.methods.serving import _expert_file as files
from shoestring.methods.serving import _expert_guess as guess
from shoestring.methods.serving import _placement as placement
from shoestring.methods.serving import expert_offloading as eo
from shoestring.methods.serving import expert_routing
from shoestring.methods.serving._expert_replay import ORACLE, Together, replay
from shoestring.methods.serving._expert_slots import POLICIES, Slots, policy
from shoestring.methods.serving._expert_trial import Trial
from shoestring.models.anatomy import mixtures
from shoestring.models.routing import Trace, watch

Config = eo.ExpertOffloadingConfig
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_local_experts=8, num_experts=8, n_routed_experts=8,
    num_experts_per_tok=3, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1,
    shared_expert_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128,
)  # fmt: skip


def mixture(family: str = "mixtral", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{k: v for k, v in SIZES.items() if hasattr(config, k)})
    made = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "gate.weight" in name or "router" in name else 0.1)
    return made.to(dtype)


def passes(model: Any) -> list[torch.Tensor]:
    """Logits of a prompt and of six steps of decoding."""
    with torch.no_grad():
        out = model(tiny.batch(2, 9), use_cache=True)
        found = [out.logits]
        for token in range(3, 9):
            out = model(torch.full((2, 1), token), past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---------------------------------------------------------------- exact


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads compute, until the test has ended."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3", "qwen2_moe"])
def test_bit_for_bit_the_resident_model_in_every_family(family: str, threads: Callable[[int], None]) -> None:
    """Also with several threads, which divide the rows of a product: then it matters which rows stand together."""
    model, wanted = mixture(family), {}
    for count in (1, 2):
        threads(count)
        wanted[count] = passes(model)
    owner = eo.offload(model, Config(slots=4))
    for count, logits in wanted.items():
        threads(count)
        assert equal(logits, passes(model)), count
    assert owner.stats()["expert_misses"] > 0
    owner.close()


@pytest.mark.parametrize("how", eo.COMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_with_any_places_policy_and_guess(how: str, dtype: torch.dtype) -> None:
    plain = mixture(dtype=dtype)
    plain.set_experts_implementation(how)
    wanted = passes(plain)
    for config in (
        Config(slots=3, prefetch="none"), Config(slots=5, policy="lru", ahead=2),
        Config(slots=9, policy="lfu", quota=True),
        Config(slots=0.5, prefetch="history", delay_ms=0.2), Config(slots=1.0, policy="random", confidence=0.0),
    ):  # fmt: skip
        model = mixture(dtype=dtype)
        model.set_experts_implementation(how)
        owner = eo.offload(model, config)
        assert equal(wanted, passes(model)), config
        owner.close()


def test_wrong_guesses_change_nothing_and_are_counted() -> None:
    model = mixture()
    wanted = passes(model)

    def never(layer: int, hidden: torch.Tensor, choices: torch.Tensor) -> list[tuple[int, int, float]]:
        met = set(choices.flatten().tolist())
        return [((layer + 1) % 3, e, 1.0) for e in range(8) if e not in met]

    owner = eo.offload(model, Config(slots=7), predictor=never)
    assert equal(wanted, passes(model)) and equal(wanted, passes(model))
    assert owner.pool.tally.guessed and owner.stats()["expert_bytes_wasted"] > 0
    owner.close()


def test_read_part_by_part_it_is_the_same_model(tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path / "model")
    loaded = eo.load(Config(slots=4, folder=str(tmp_path / "experts")), tmp_path / "model", dtype="float32")
    assert equal(passes(model), passes(loaded.model))
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    left = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in loaded.model.parameters())
    assert left == experts and not any(p.is_meta for p in loaded.model.parameters())
    eo.offloader(loaded.model).close()  # type: ignore[union-attr]


def test_a_file_of_experts_that_were_changed_since_is_written_anew(tmp_path: Path) -> None:
    """Their routers are the same, as those of a model whose experts alone were tuned or pruned."""
    model, config = mixture(), Config(slots=4, folder=str(tmp_path / "experts"))
    for _ in range(2):
        model.save_pretrained(tmp_path / "model")
        loaded = eo.load(config, tmp_path / "model", dtype="float32")
        assert equal(passes(model), passes(loaded.model))
        eo.offloader(loaded.model).close()  # type: ignore[union-attr]
        with torch.no_grad():
            model.get_submodule(mixtures(model)[0].experts).down_proj.mul_(1.5)
    with pytest.raises(UsageError, match="has other experts"):
        eo.offload(model, config)


# ---------------------------------------------------------------- caches and traces


def drawn(seed: int = 0, layers: int = 2, count: int = 16, tokens: int = 300) -> Trace:
    """Routes that stay near where they were."""
    draw = np.random.default_rng(seed)
    experts = np.zeros((tokens, layers, 2), np.int32)
    likely = np.arange(count, 0, -1) / np.arange(count + 1).sum()
    for layer in range(layers):
        now = draw.choice(count, 2, replace=False)
        popular = draw.permutation(count)
        for token in range(tokens):
            if draw.random() < 0.35:
                now = popular[np.sort(draw.choice(count, 2, replace=False, p=likely))]
            experts[token, layer] = now
    return Trace(experts, np.full(experts.shape, 0.5, np.float32), np.arange(tokens, dtype=np.int32), (count,) * layers)


def test_belady_bounds_every_policy_and_locality_pays() -> None:
    for slots in (4, 8):
        found = [
            {name: replay(drawn(seed, layers=1), name, slots).hit_rate for name in (*POLICIES, ORACLE)}
            for seed in range(3)
        ]
        assert all(rates[ORACLE] >= rate for rates in found for rate in rates.values()), found
        means = {name: np.mean([rates[name] for rates in found]) for name in POLICIES}
        assert means["lfu"] > means["random"] and (slots > 4 or means["lru"] > means["random"]), means
    with pytest.raises(UsageError, match="1 slots are too few"):
        replay(drawn(), "lru", 1)


def test_belady_is_the_best_there_is_on_a_short_trace() -> None:
    """Against all choices of who leaves, tried one by one."""
    trace = drawn(3, layers=1, count=5, tokens=9)
    visits = [tuple(experts) for _, experts in trace.visits()]

    def best(number: int, held: frozenset[int]) -> int:
        if number == len(visits):
            return 0
        wanted = frozenset(visits[number])
        hits, base = len(wanted & held), held | wanted
        from itertools import combinations

        over = max(0, len(base) - 3)
        return hits + max(best(number + 1, base - set(gone)) for gone in combinations(sorted(base - wanted), over))

    assert replay(trace, ORACLE, 3).hits == best(0, frozenset())


def test_a_model_at_work_hits_as_its_replayed_trace() -> None:
    for name in ("lru", "lfu", "cost"):
        model = mixture()
        with watch(model) as recorder:
            owner = eo.offload(model, Config(slots=9, policy=name, prefetch="none"))
        with watch(model) as recorder, torch.no_grad():
            past = None
            for token in range(3, 40):
                out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
                past = out.past_key_values
        tally, found = owner.pool.tally, replay(recorder.trace(), name, 9)
        assert (tally.hits, tally.misses) == (found.hits, found.misses), name
        owner.close()


def test_what_each_policy_lets_go() -> None:
    def leaves(name: str, uses: list[int]) -> Any:
        slots = Slots(3, policy(name, 1))
        for expert in uses:
            slots.visit(0)
            slots.use((0, expert))
            if (0, expert) not in slots.held:
                slots.admit((0, expert), 0, {(0, expert)})
        return slots.admit((0, 9), 0, {(0, 9)})[1]

    assert leaves("lru", [1, 2, 3, 1]) == (0, 2)
    assert leaves("lfu", [1, 1, 2, 3, 3]) == (0, 2)
    assert leaves("lfu", [1] * 8 + [2, 3] * 200) == (0, 1), "old uses count for ever"
    slots = Slots(2, policy("lru", 1))
    assert sorted(slots.admit((0, e), 0, {(0, 0), (0, 1)})[0] for e in (0, 1)) == [0, 1]
    assert slots.admit((0, 2), 0, {(0, 0), (0, 1)}) == (-1, None), "one in use was let go"


def test_a_quota_keeps_layers_apart() -> None:
    slots = Slots(4, policy("lru", 2), quota=2)
    for key in ((0, 0), (0, 1), (1, 0), (0, 2)):
        slots.use(key)
        slots.admit(key, key[0], {key})
    assert set(slots.held) == {(0, 1), (0, 2), (1, 0)}


# ---------------------------------------------------------------- guesses


def test_counts_linear_map_and_router_guess_what_follows() -> None:
    trace = drawn()
    trace.experts[:, 1] = (trace.experts[:, 0] + 5) % 16
    together = Together((16, 16)).learn(trace)
    assert set(together.likely(0, [3]).argsort()[-1:]) == {8}
    model = mixture()
    with watch(model, hidden=True) as recorder, torch.no_grad():
        model(tiny.batch(8, 60))
    linear = guess.fit_linear(recorder, 3)
    found = guess.recalls(linear, recorder)
    assert all(share is not None and share > 0.5 for share in found), found
    routers = [model.get_submodule(m.router) for m in mixtures(model)]
    by_router = guess.ByRouter(routers, 3, 0.0, 1, lambda *_: ())
    x = recorder.states(0)[:1]
    with torch.no_grad():
        wanted = set(routers[1](x)[2][0].tolist())
    assert {e for layer, e, _ in by_router(0, x, torch.zeros(1, 3, dtype=torch.long)) if layer == 1} == wanted
    assert guess.recalls(by_router, recorder)[0] is None, "no router knows the next token"
    assert not list(guess.ByRouter(routers, 3, 1.0, 1, lambda *_: ())(0, x, torch.zeros(1, 3, dtype=torch.long)))


def test_a_trained_map_is_kept_and_refused_by_other_models(tmp_path: Path) -> None:
    linear = guess.ByLinear([torch.randn(33, 8) for _ in range(3)], 2)
    linear.save(tmp_path / "p")
    again = guess.ByLinear.load(tmp_path / "p", 32, (8, 8, 8), 2)
    assert all(torch.equal(a, b) for a, b in zip(again.weights, linear.weights))
    with pytest.raises(UsageError, match="another model"):
        guess.ByLinear.load(tmp_path / "p", 32, (8, 8), 2)


# ---------------------------------------------------------------- what is read ahead


def visit(owner: eo.Offloader, layer: int, *experts: int, guess: tuple[tuple[int, int], ...] = ()) -> None:
    """A layer asks for these experts, guesses, and has its experts computed."""
    pool = owner.pool
    pool.enter(layer)
    given = pool.want(layer, [((layer, expert), "") for expert in experts])
    pool.guess(layer, guess)
    pool.wait(given)
    pool.done(given)


def test_who_is_guessed_stays_until_its_layer_has_come() -> None:
    owner = eo.offload(mixture(), Config(slots=3, policy="lru", prefetch="none"))
    visit(owner, 1, 0, 1)
    visit(owner, 2, 0, guess=((1, 1),))
    visit(owner, 0, 0, 3)  # the two that were used longest ago would go
    assert set(owner.pool.slots.held) == {(1, 1), (0, 0), (0, 3)}, "it was guessed, and left"
    visit(owner, 1, 2)  # it was asked for another, and the guess was wrong
    assert set(owner.pool.slots.held) == {(0, 0), (0, 3), (1, 2)}
    owner.close()


@pytest.mark.quiet
def test_a_guess_takes_no_place_before_it_is_read_and_is_given_up_when_its_layer_has_come() -> None:
    owner = eo.offload(mixture(), Config(slots=4, policy="lru", prefetch="none", delay_ms=40))
    pool = owner.pool
    visit(owner, 2, 0, 2, 4, 6)
    pool.enter(0)
    asked = pool.want(0, [((0, 1), "")])
    pool.guess(0, [(1, 5)])
    assert (1, 5) not in pool.slots.held and len(pool.slots.held) == 4
    pool.wait(asked)
    pool.done(asked)
    visit(owner, 1, 7)
    begun = pool.tally.bytes
    time.sleep(0.06)  # in which a loader that went on with it would have read it
    assert (1, 5) not in pool.slots.held and pool.tally.guessed == 0 and pool.tally.bytes == begun
    assert len(pool.slots.held) < 4 or (2, 6) in pool.slots.held
    owner.close()


@pytest.mark.quiet
def test_a_guess_that_was_begun_is_gone_on_with_when_it_comes_true() -> None:
    owner = eo.offload(mixture(), Config(slots=4, policy="lru", prefetch="none", delay_ms=40))
    pool = owner.pool
    visit(owner, 0, 1, guess=((1, 5),))
    time.sleep(0.02)
    begun = pool.tally.stall
    visit(owner, 1, 5)
    assert pool.tally.late == 1 and 0 < pool.tally.stall - begun < 0.035
    assert pool.tally.bytes == 2 * pool.file.records[(0, 0), ""].size
    owner.close()


def test_guessing_goes_on_where_passes_get_faster_and_ends_where_they_get_slower() -> None:
    draw, now, kinds = np.random.default_rng(0), 0.0, list[bool]()
    trial = Trial(lambda: now)

    def passes(count: int, guessing: float) -> list[bool]:
        nonlocal now
        kinds.clear()
        for _ in range(count):
            kinds.append(trial.on)
            trial.begin()
            # Contexts grow, and each pass waits for other experts.
            now += (1 + now / 5000) * (guessing if trial.on else 1.0) * draw.uniform(0.7, 1.3)
            trial.end()
        return kinds

    assert trial.on and trial.gain is None
    assert passes(2000, 1.25).count(True) < 100, "it went on though it was slower"
    assert trial.gain and abs(trial.gain - 0.8) < 0.1
    passes(3000, 0.8)
    assert sum(kinds[-500:]) > 450 and trial.gain > 1, "it never came back though it was faster"


def test_a_predictor_that_only_costs_time_is_asked_no_more() -> None:
    def slow(layer: int, hidden: torch.Tensor, choices: torch.Tensor) -> list[tuple[int, int, float]]:
        asked.append(layer)
        time.sleep(0.003)
        return []

    for always in (False, True):
        model, asked = mixture(), list[int]()
        owner = eo.offload(model, Config(slots=1.0, always=always), predictor=slow)
        with torch.no_grad():
            for _ in range(60):
                model(torch.tensor([[3]]))
        assert len(asked) == 3 * 60 if always else 0 < len(asked) <= 3 * 40
        assert always or owner.stats()["expert_guess_gain"] < 0.9
        owner.close()


# ---------------------------------------------------------------- the loader


def test_reading_goes_on_while_the_model_computes() -> None:
    """The loader works during calls of the predictor, which here take the time of a slow layer."""
    model = mixture()
    with watch(model) as recorder:
        passes(model)
    router = guess.ByRouter([model.get_submodule(m.router) for m in mixtures(model)], 3, 0.0, 1, lambda *_: ())
    windows: list[tuple[float, float]] = []

    def slow(layer: int, hidden: torch.Tensor, choices: torch.Tensor) -> Any:
        begin = time.perf_counter()
        time.sleep(0.01)
        windows.append((begin, time.perf_counter()))
        return router(layer, hidden, choices)

    owner = eo.offload(model, Config(slots=12, delay_ms=3), predictor=slow)
    passes(model)
    loads = [(b, e) for kind, _, b, e in owner.pool.tally.timeline if kind == "load"]
    inside = sum(max(0.0, min(e, y) - max(b, x)) for b, e in loads for x, y in windows)
    assert inside > 0.3 * sum(e - b for b, e in loads) and recorder.passes
    owner.close()


def test_neighbours_are_read_at_once_and_bytes_are_counted() -> None:
    model = mixture()
    owner = eo.offload(model, Config(slots=1.0, prefetch="none"))
    with torch.no_grad():
        model(tiny.batch(4, 30))
    tally, record = owner.pool.tally, owner.pool.file.records[(0, 0), ""]
    assert tally.reads < tally.loads and tally.bytes == tally.loads * record.size
    owner.close()


def test_a_file_that_ends_too_early_is_an_error_where_it_is_waited_for(tmp_path: Path) -> None:
    model = mixture()
    wanted = passes(model)
    owner = eo.offload(model, Config(slots=4, folder=str(tmp_path)))
    file = tmp_path / "experts.safetensors"
    whole = file.read_bytes()
    with file.open("r+b") as opened:
        opened.truncate(5000)
    for _ in range(2):
        with pytest.raises(UsageError, match="ends too early"):
            passes(model)
    with file.open("r+b") as opened:
        opened.write(whole)
    assert equal(wanted, passes(model)), "what could not be read once is read when it can be"
    file.unlink()
    assert equal(wanted, passes(model)), "a file that is open does not go away"
    owner.close()
    with pytest.raises(UsageError, match="closed"):
        passes(model)


def test_a_file_is_there_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture()
    with monkeypatch.context() as broken:
        broken.setattr(files, "_packed", lambda *_: (_ for _ in ()).throw(RuntimeError("the power fails")))
        with pytest.raises(RuntimeError, match="power"):
            eo.offload(model, Config(slots=4, folder=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_file_without_small_copies_says_so(tmp_path: Path) -> None:
    eo.offload(mixture(), Config(slots=4, folder=str(tmp_path))).close()
    with pytest.raises(UsageError, match="no copies of int8/32"):
        eo.offload(mixture(), Config(slots=4, folder=str(tmp_path), small=0.5, small_width="int8/32"))


# ---------------------------------------------------------------- modes that change answers


def test_skipping_leaves_out_the_second_expert_below_beta() -> None:
    model = mixture()
    experts = model.get_submodule(mixtures(model)[0].experts)
    x, choices = torch.randn(2, 32), torch.tensor([[0, 1, 2], [3, 4, 5]])
    gates = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])
    with torch.no_grad():
        first = experts(
            x, choices, torch.tensor([[0.6, 0.3, 0.0], [0.4, 0.35, 0.25]]) * torch.tensor([[1 / 0.9], [1.0]])
        )
        plain = experts(x, choices, torch.tensor([[0.6, 0.0, 0.0], [0.4, 0.35, 0.25]]))
    for config, wanted in (
        (Config(slots=1.0, skip=0.4), first),
        (Config(slots=1.0, mass=0.6, renormalise=False), None),
        (Config(slots=1.0, skip=0.55, renormalise=False), plain),
    ):
        fresh = mixture()
        owner = eo.offload(fresh, config)
        with torch.no_grad():
            out = fresh.get_submodule(mixtures(fresh)[0].experts)(x, choices, gates)
        if wanted is None:
            assert owner.skipped == 3 and owner.met == 6  # 0.6 is enough alone; 0.4 + 0.35 is
        else:
            assert torch.allclose(out, wanted, atol=1e-6), config
        assert not config.exact
        owner.close()


def test_small_copies_are_read_for_small_gates_only() -> None:
    model = mixture()
    wanted = passes(model)
    for share in (1e-9, 1.0):
        fresh = mixture()
        owner = eo.offload(fresh, Config(slots=4, small=share, small_width="int8/32", prefetch="none"))
        found = passes(fresh)
        assert (owner.pool.tally.small > 0) == (share == 1.0) and equal(wanted, found) == (share < 1)
        assert all(torch.allclose(a, b, atol=0.1) for a, b in zip(wanted, found))
        owner.close()


def test_bits_go_where_errors_count() -> None:
    costs = [[{b: 100.0 * 4.0**-b for b in bits.BITS}, {b: 4.0**-b for b in bits.BITS}]]
    ((much, little),) = bits.allocate(costs, 4.0)
    assert much > little and much + little == 8
    model = mixture()
    with watch(model) as recorder, torch.no_grad():
        model(tiny.batch(4, 30))
    found = bits.errors(model, recorder.trace())
    assert all(e[b] >= e[b + 1] for layer in found for e in layer for b in bits.BITS[:-1])
    assert bits.round_experts(model, [[3] * 8] * 3) == 3.0


# ---------------------------------------------------------------- memory, errors


@pytest.mark.real
def test_resident_memory_is_that_of_the_places(tmp_path: Path) -> None:
    """Of a fresh process, at its peak, against one that holds all experts."""
    sizes = dict(SIZES, hidden_size=256, intermediate_size=1024, num_experts_per_tok=2, head_dim=64)
    config = AutoConfig.for_model("mixtral", **{k: v for k, v in sizes.items() if k != "num_experts"})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")  # 24 experts of 3 MiB
    code = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from shoestring.methods.serving import expert_offloading as eo
import transformers.models.mixtral.modeling_mixtral
def own(word):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(word)) * 1024
folder = Path(sys.argv[1])
before = own("VmRSS")
config = eo.ExpertOffloadingConfig(slots=eval(sys.argv[2]), folder=str(folder.parent / "experts"))
model = eo.load(config, folder, dtype="float32").model
with torch.no_grad():
    model(torch.arange(3, 60)[None])
print(own("VmHWM") - before)
eo.offloader(model).close()
"""

    def peak(slots: float) -> int:
        command = [sys.executable, "-c", code, str(tmp_path / "model"), repr(slots)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout)

    peak(0.25)  # writes the file
    quarter, whole = peak(0.25), peak(1.0)
    # 18 experts of 3 MiB are less; what reading them takes besides is part of both peaks.
    assert 0.6 * 54 < (whole - quarter) / 2**20 < 1.2 * 54, (quarter, whole)


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 slots are too few"):
        eo.offload(mixture(), Config(slots=2))
    with pytest.raises(UsageError, match="LlamaForCausalLM has no experts"):
        eo.offload(tiny.model())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not understood"):
        eo.offload(mixture("llama4_text"))
    eo.offload(mixture(), Config(slots=4, folder=str(tmp_path))).close()
    other = mixture()
    with torch.no_grad():
        other.get_submodule(mixtures(other)[0].router).weight.add_(1)
    with pytest.raises(UsageError, match="another model"):
        eo.offload(other, Config(slots=4, folder=str(tmp_path)))
    batched = mixture()
    batched.set_experts_implementation("batched_mm")
    with pytest.raises(UsageError, match="batched_mm"):
        eo.offload(batched)
    for wrong in (
        {"slots": 0}, {"slots": 1.5}, {"policy": "lur"}, {"prefetch": "x"}, {"skip": 2}, {"mass": 0},
        {"prefetch": "linear"},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="3 layers"):
        eo.offload(mixture(), Config(skip=(0.1, 0.2)))
    twice = mixture()
    owner = eo.offload(twice)
    with pytest.raises(UsageError, match="in a file already"):
        eo.offload(twice)
    owner.close()


# ---------------------------------------------------------------- placement and the meter


def test_placement_evens_the_load_and_copies_the_hot() -> None:
    load = [80.0, 10, 10, 10, 10, 10, 10, 10]
    even, copied = placement.place(load, 4), placement.place(load, 4, replicas=2)
    assert max(map(len, copied.homes)) == 3 and len(copied.homes[0]) == 3
    experts = np.repeat(np.arange(8, dtype=np.int32), np.array(load, int))[:, None, None]
    experts = experts[np.random.default_rng(0).permutation(len(experts))]
    trace = Trace(experts, np.ones(experts.shape, np.float32), np.zeros(len(experts), np.int32), (8,))
    flows = [placement.flow(trace, 0, p, 16) for p in (placement.in_order(8, 4), even, copied)]
    assert flows[0].imbalance >= flows[1].imbalance > flows[2].imbalance
    for found, placed in zip(flows, (placement.in_order(8, 4), even, copied)):
        away = sum(n % 4 not in placed.homes[e] for n, e in enumerate(experts[:, 0, 0]))
        assert found.bytes == 2 * away * 16 * 2 and found.dropped == 0
    assert placement.flow(trace, 0, placement.in_order(8, 4), 16, capacity=1.0).dropped > 0.2


def test_the_onlooker_writes_what_a_replay_reads(tmp_path: Path) -> None:
    from types import SimpleNamespace

    model = mixture()
    hooks = expert_routing.plug(
        expert_routing.ExpertRoutingConfig(file=str(tmp_path / "t"), passes=4),
        SimpleNamespace(runner=SimpleNamespace(model=model)),
    )
    passes(model)
    assert hooks.watch.stats()["routing_tokens"] == 8  # four passes of two answers
    hooks.close()
    trace = Trace.load(tmp_path / "t")
    assert trace.counts == (8, 8, 8) and 0 < replay(trace.as_decoding(), "lru", 16).hit_rate < 1
    assert all(0 < beta < 1 for beta in expert_routing.median_ratios(trace))
    assert replace(expert_routing.Meter.read({"slots": "0.5"})).slots == (0.5,)
    for wrong, words in (
        ({"slot": 1}, "no option"), ({"tokens": "many"}, "no whole number"), ({"devices": 2.5}, "no whole number"),
        ({"load_ms": "slow"}, "no number"), ({"bits": 9}, "2 to 6"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            expert_routing.Meter.read(wrong)

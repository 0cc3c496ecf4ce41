"""One contract that every runner keeps, whatever computes inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runner_cases import CONFIGS, VOCAB, FloatPages, Part, batch, in_chunks, logits, make, open_runner, pages, text

from shoestring.core.errors import UsageError
from shoestring.engine.runner import BLOCK, Batch, Runner

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dots1")
NATIVE = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "granite", *MIXTURES)
EXPERTS = (*MIXTURES, "gpt_oss")
BLOCKS = 24
SAME = 4e-3  # the same arithmetic in another order: a key may round to its neighbour in bfloat16
NEAR = 0.03  # the model in float32 without a cache


@pytest.fixture(
    scope="module", params=[*(("torch", f) for f in CONFIGS), *(("native", f) for f in NATIVE)], ids="-".join
)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A runner of a tiny model, the model's folder, its kind and family."""
    kind, family = request.param
    folder = tmp_path_factory.mktemp("models") / family
    make(family).save_pretrained(folder)
    # A router may choose other experts after the slightest rounding.
    runner = open_runner(kind, folder, cache_dtype="fp32" if family in EXPERTS else "bf16")
    runner.reserve(BLOCKS)
    yield SimpleNamespace(runner=runner, folder=folder, kind=kind, family=family)
    runner.close()


@pytest.fixture
def runner(opened: SimpleNamespace) -> Runner:
    return opened.runner


@pytest.fixture(scope="module")
def lora(opened: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA folders of different ranks and targets."""
    targets = {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "gpt_neox": ["query_key_value", "dense"],
        "opt": ["q_proj", "v_proj", "fc1"],
        "phi": ["q_proj", "dense", "fc2"],
    }.get(opened.family, ["q_proj", "v_proj", "o_proj"] + ["up_proj"] * (opened.family not in EXPERTS))
    folders = []
    for seed, (rank, names) in enumerate([(4, targets), (7, targets[:1])]):
        folder = tmp_path_factory.mktemp("lora")
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=names, init_lora_weights=False, use_rslora=seed == 1)
        get_peft_model(make(opened.family), config).save_pretrained(folder)
        folders.append(folder)
    return folders


def merged(family: str, folder: Path, ids: list[int]) -> np.ndarray:
    model = PeftModel.from_pretrained(make(family), folder).merge_and_unload()
    return own(model, ids)


def own(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far off, as a share of how much the wanted values differ among themselves."""
    assert found.shape == wanted.shape
    return float(np.sqrt(((found - wanted) ** 2).mean()) / wanted.std())


# ---- one sequence ----


def test_prefill_is_the_model(opened: SimpleNamespace) -> None:
    ids = text(50)
    found, wanted = logits(opened.runner, Part(ids, pages(50))), own(make(opened.family), ids)
    # Keys and values are rounded to bfloat16 on their way into the cache.
    assert off(found, wanted) < NEAR
    assert (found.argmax(1) == wanted.argmax(1)).mean() > 0.95


@pytest.mark.parametrize("sizes", [[1] * 50, [7, 1, 16, 3, 1, 1, 21], [33, 17], [16, 16, 16, 2]], ids=len)
def test_chunks_do_not_matter(runner: Runner, sizes: list[int]) -> None:
    ids = text(50)
    whole = logits(runner, Part(ids, pages(50)))
    assert off(in_chunks(runner, ids, pages(50, 8), sizes), whole) < SAME


def test_positions_need_not_be_slots(opened: SimpleNamespace) -> None:
    """Tokens that were left out of a prompt leave a gap in the positions."""
    ids, kept = text(30), [0, 1, 2, 3, *range(18, 30)]
    some = [ids[i] for i in kept]
    found = in_chunks(opened.runner, some, pages(16), [len(some)], positions=kept)
    model = make(opened.family)
    with torch.no_grad():
        wanted = model(torch.tensor([some]), position_ids=torch.tensor([kept])).logits[0].numpy()
    if any("sliding" in str(kind) for kind in getattr(model.config, "layer_types", None) or []) or (
        opened.family == "mistral"
    ):
        # transformers measures windows in places of its cache: only what no window has cut can be compared.
        found, wanted = found[:4], wanted[:4]
    assert off(found, wanted) < NEAR


# ---- batches ----


def test_batch_is_its_sequences(runner: Runner) -> None:
    """Prompts, parts of prompts and single tokens together give what each gives alone."""
    lengths, news = [40, 17, 16, 33, 1, 9], [1, 1, 16, 5, 1, 2]
    texts = [text(n, seed) for seed, n in enumerate(lengths)]
    tables, first = [], 0
    for n in lengths:
        tables.append(pages(n, first))
        first += len(tables[-1])
    alone = [logits(runner, Part(ids, table)) for ids, table in zip(texts, tables)]
    parts = []
    for ids, table, new in zip(texts, tables, news):
        if len(ids) > new:
            runner.run(batch(Part(ids[:-new], table)))
        parts.append(Part(ids[-new:], table, len(ids) - new))
    together = logits(runner, *parts)
    wanted = np.concatenate([found[-new:] for found, new in zip(alone, news)])
    assert off(together, wanted) < SAME


def test_shared_pages(runner: Runner) -> None:
    """Two sequences may read the same pages."""
    ids, one, two = text(32), text(5, 1), text(9, 2)
    runner.run(batch(Part(ids, [3, 4])))
    together = logits(runner, Part(one, [3, 4, 5], 32), Part(two, [3, 4, 6], 32))
    for tail, found in ((one, together[:5]), (two, together[5:])):
        assert off(found, logits(runner, Part(ids + tail, [9, 10, 11]))[32:]) < SAME


# ---- ranges of layers ----


def test_layers_in_two_calls(runner: Runner) -> None:
    made = batch(Part(text(20), pages(20)), Part(text(7, 1), [5]))
    whole = runner.to_host(runner.run(made))
    for border in range(runner.facts.layers + 1):
        half = runner.run(made, 0, border)
        assert runner.to_host(half).shape == (27, runner.facts.hidden)
        carried = runner.from_host(runner.to_host(half))
        assert off(runner.to_host(runner.run(made, border, None, carried)), whole) < SAME


def test_a_layer_range_fills_its_own_pages(runner: Runner) -> None:
    ids, table = text(21), pages(21)
    made = batch(Part(ids[:20], table))
    half = runner.run(made, 0, 1)
    runner.run(made, 1, None, half)
    found = logits(runner, Part(ids[20:], table, 20))
    assert off(found, logits(runner, Part(ids, pages(21, 6)))[20:]) < SAME


def test_layer_zero_takes_hidden_states(runner: Runner) -> None:
    """Layer 0 computes from hidden states as well, and adds no positions to them again."""
    made = batch(Part(text(12), [0]))
    start = runner.from_host(runner.to_host(runner.run(made, 0, 0)))
    assert off(runner.to_host(runner.run(made, 0, None, start)), runner.to_host(runner.run(made))) < SAME


def test_rows_and_normed(opened: SimpleNamespace) -> None:
    ids = text(20)
    hidden = opened.runner.run(batch(Part(ids, pages(20))))
    everything = opened.runner.logits(hidden, np.arange(20, dtype=np.int32)).copy()
    some = opened.runner.logits(hidden, np.array([19, 3], np.int32)).copy()
    assert some.dtype == np.float32 and some.shape == (2, VOCAB)
    assert off(some, everything[[19, 3]]) < SAME
    model = make(opened.family)
    with torch.no_grad():
        wanted = model.base_model(torch.tensor([ids]))[0][0].numpy()
    normed = opened.runner.normed(hidden, np.array([0, 19], np.int32))
    assert off(normed, wanted[[0, 19]]) < NEAR


# ---- token trees, forks ----

#   prompt -> a -> b -> c
#               -> d -> e
#          -> f
TREE, PARENTS = [10, 11, 12, 13, 14, 15], [-1, 0, 1, 0, 3, -1]
CHAINS = [[0, 1, 2], [0, 3, 4], [5]]


def test_tree_is_its_branches(runner: Runner) -> None:
    ids, table = text(19), pages(25)
    runner.run(batch(Part(ids, table)))
    other = Part(text(8, 1), [20])
    found = logits(runner, other, Part(TREE, table, 19, PARENTS))[8:]
    for chain in CHAINS:
        alone = logits(runner, Part(ids + [TREE[i] for i in chain], pages(25, 4)))[19:]
        assert off(found[chain], alone) < SAME


def test_tree_behind_known_tokens(runner: Runner) -> None:
    """A chunk may begin with plain tokens that the tree follows."""
    ids, table = text(30), pages(36)
    runner.run(batch(Part(ids[:25], table)))
    parents = [-1, 0, 1, 2, 3] + [4 if p < 0 else 5 + p for p in PARENTS]
    found = logits(runner, Part(ids[25:] + TREE, table, 25, parents))
    for chain in CHAINS:
        alone = logits(runner, Part(ids + [TREE[i] for i in chain], pages(36, 4)))[30:]
        assert off(found[5:][chain], alone) < SAME


def test_move_slots_keeps_a_branch(runner: Runner) -> None:
    ids, table = text(14), pages(30)
    for chain in CHAINS:
        runner.run(batch(Part(ids, table)))
        runner.run(batch(Part(TREE, table, 14, PARENTS)))
        runner.move_slots(table, [(14 + node, 14 + place) for place, node in enumerate(chain) if node != place])
        kept = ids + [TREE[i] for i in chain]
        found = logits(runner, Part([50, 51], table, len(kept)))
        assert off(found, logits(runner, Part(kept + [50, 51], pages(30, 6)))[-2:]) < SAME


def test_move_slots_in_order(runner: Runner) -> None:
    """A slot that was moved away from may be moved to afterwards, across pages."""
    ids = text(20)
    runner.run(batch(Part(ids, [2, 5])))
    runner.move_slots([2, 5], [(15, 0), (16, 15), (19, 16)])
    found = logits(runner, Part([7], [2, 5], 17, positions=[40]))
    # The same keys and values, put there by tokens that see nothing else's difference: compare after a second move.
    runner.move_slots([2, 5], [(0, 18), (18, 0)])
    assert off(logits(runner, Part([7], [2, 5], 17, positions=[40])), found) < SAME


def test_copied_blocks_go_their_own_way(runner: Runner) -> None:
    ids, one, two = text(20), text(6, 1), text(6, 2)
    runner.run(batch(Part(ids, [1, 2])))
    runner.copy_blocks([(2, 7)])
    together = logits(runner, Part(one, [1, 2], 20), Part(two, [1, 7], 20))
    for tail, found, table in ((one, together[:6], [1, 2]), (two, together[6:], [1, 7])):
        assert off(found, logits(runner, Part(ids + tail, [10, 11]))[20:]) < SAME
        more = logits(runner, Part([33], table, 26))
        assert off(more, logits(runner, Part([*ids, *tail, 33], [10, 11]))[26:]) < SAME


# ---- adapters ----


def test_adapters_share_a_batch(opened: SimpleNamespace, lora: list[Path]) -> None:
    runner, ids = opened.runner, text(20)
    plain = logits(runner, Part(ids, [0, 1]))
    one, two = (runner.add_adapter(str(folder)) for folder in lora)
    assert one != two and min(one, two) >= 0
    together = logits(
        runner, Part(ids, [0, 1]), Part(ids, [2, 3], adapter=one), Part(ids, [4, 5], adapter=two), Part(ids[:5], [6])
    )
    assert off(together[:20], plain) < SAME
    assert off(together[60:], plain[:5]) < SAME
    for found, folder in ((together[20:40], lora[0]), (together[40:60], lora[1])):
        wanted = merged(opened.family, folder, ids)
        assert off(plain, wanted) > 5 * NEAR
        # The pairs are kept in bfloat16 where the runner says so.
        assert off(found, wanted) < NEAR
    runner.drop_adapter(one)
    with pytest.raises(UsageError):
        runner.run(batch(Part(ids, [2, 3], adapter=one)))
    wanted = merged(opened.family, lora[1], ids)
    assert off(logits(runner, Part(ids, [4, 5], adapter=two)), wanted) < NEAR
    runner.drop_adapter(two)
    np.testing.assert_array_equal(logits(runner, Part(ids, [0, 1])), plain)


def test_adapter_of_another_model(opened: SimpleNamespace, lora: list[Path], tmp_path: Path) -> None:
    other = make(opened.family, **({"n_embd": 32} if opened.family == "gpt2" else {"hidden_size": 32, "head_dim": 8}))
    config = LoraConfig(r=2, target_modules=list(LoraConfig.from_pretrained(lora[0]).target_modules))
    get_peft_model(other, config).save_pretrained(tmp_path)
    with pytest.raises(UsageError):
        opened.runner.add_adapter(str(tmp_path))
    good = opened.runner.add_adapter(str(lora[0]))
    opened.runner.drop_adapter(good)


# ---- attention elsewhere ----


def test_attention_worker(opened: SimpleNamespace) -> None:
    runner, seen, elsewhere = opened.runner, [], FloatPages(BLOCKS)

    def worker(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, made: Batch) -> np.ndarray:
        seen.append((layer, q.shape, k.shape, v.dtype))
        return elsewhere(layer, q, k, v, made)

    made = batch(Part(text(20), pages(20)), Part(text(9, 1), [6]))
    wanted = runner.to_host(runner.run(made))
    runner.attention = worker
    try:
        if opened.family in ("gemma2", "gpt_oss", "mistral"):
            with pytest.raises(UsageError):
                runner.run(made)
            return
        found = runner.to_host(runner.run(made))
    finally:
        runner.attention = None
    facts = runner.facts
    assert [layer for layer, *_ in seen] == list(range(facts.layers))
    assert seen[0][1:3] == ((29, facts.heads, facts.head_dim), (29, facts.kv_heads, facts.head_dim))
    assert seen[0][3] == np.float32
    assert off(found, wanted) < NEAR
    assert off(runner.to_host(runner.run(made)), wanted) < SAME


# ---- what is refused ----


def _changed(**changes: Any) -> Batch:
    base = batch(Part([5, 6, 7], [1, 2], 14))
    return Batch(**{**vars(base), **{name: np.array(value, np.int32) for name, value in changes.items()}})


@pytest.mark.parametrize(
    "changes",
    [
        dict(ids=[5, VOCAB, 7]),
        dict(ids=[5, -1, 7]),
        dict(tables=[[1, BLOCKS]]),
        dict(tables=[[-1, 2]]),
        dict(contexts=[30]),
        dict(contexts=[-1]),
        dict(positions=[14, -1, 16]),
        dict(positions=[14, 15, 1 << 20]),
        dict(parents=[-1, 1, 0]),
        dict(parents=[-1, -2, 0]),
        dict(adapters=[-1, -1, 77]),
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_outside_is_refused_and_nothing_written(runner: Runner, changes: dict[str, Any]) -> None:
    ids = text(31)
    runner.run(batch(Part(ids[:30], [1, 2])))
    with pytest.raises(UsageError):
        runner.run(_changed(**changes))
    assert off(logits(runner, Part(ids[30:], [1, 2], 30)), logits(runner, Part(ids, [4, 5]))[30:]) < SAME


def test_other_arguments_are_refused(runner: Runner) -> None:
    made = batch(Part([5, 6], [1]))
    hidden = runner.run(made)
    layers = runner.facts.layers
    for call in (
        lambda: runner.run(made, 0, layers + 1),
        lambda: runner.run(made, 2, 1, hidden),
        lambda: runner.run(made, -1),
        lambda: runner.run(made, 1),
        lambda: runner.run(batch(Part([5, 6, 7], [1])), 1, None, hidden),
        lambda: runner.logits(hidden, np.array([2], np.int32)),
        lambda: runner.logits(hidden, np.array([-1], np.int32)),
        lambda: runner.copy_blocks([(0, BLOCKS)]),
        lambda: runner.copy_blocks([(-1, 0)]),
        lambda: runner.move_slots([0], [(0, BLOCK)]),
        lambda: runner.move_slots([BLOCKS], [(0, 1)]),
        lambda: runner.drop_adapter(99),
    ):
        with pytest.raises(UsageError):
            call()


# ---- the cache in eight bits; facts ----


def test_int8_cache(opened: SimpleNamespace) -> None:
    ids, wanted = text(50), own(make(opened.family), text(50))
    small = open_runner(opened.kind, opened.folder, cache_dtype="int8")
    try:
        small.reserve(BLOCKS)
        whole = logits(small, Part(ids, pages(50)))
        assert 0 < off(whole, wanted) < 4 * NEAR
        assert off(in_chunks(small, ids, pages(50, 8), [30, 1, 1, 18]), whole) < NEAR
        assert small.facts.block_bytes < 0.8 * opened.runner.facts.block_bytes
        small.copy_blocks([(pages(50)[0], 20)])
        moved = logits(small, Part([4], [20, *pages(50)[1:]], 50))
        assert off(moved, logits(small, Part([4], pages(50), 50))) < SAME
    finally:
        small.close()


def test_facts(opened: SimpleNamespace) -> None:
    facts, config = opened.runner.facts, make(opened.family).config
    assert (facts.backend, facts.family) == (opened.kind, opened.family)
    assert (facts.layers, facts.hidden, facts.vocab) == (3, 64, VOCAB)
    assert facts.heads == 4 and facts.kv_heads == getattr(config, "num_key_value_heads", 4)
    assert facts.context == 128 and 2 in facts.eos
    windows = 4 if opened.family in ("gemma2", "gpt_oss", "mistral") else 0
    exact = BLOCK * 3 * 2 * facts.kv_heads * facts.head_dim * (4 if opened.family in EXPERTS else 2)
    assert exact <= facts.block_bytes <= exact + BLOCK * windows * 3
    assert facts.weight_bytes >= 4 * 64 * VOCAB

"""What must not depend on how tokens are batched, split or shared among threads: equal to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from llamas import Chain, batch, bfloat16, dirty_cache, family, feed, native, needs_library, pages, sharing, tiny_model

from shoestring.kernels.llama import PROJECTIONS, Adapter, Llama

pytestmark = needs_library

RANDOM = np.random.default_rng(0)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 64, count)]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return native(family("llama"))


@pytest.fixture(scope="module", params=["llama", "window", "int8 pages", "fp32 pages", "shared weights"])
def setting(request) -> tuple[Llama, str]:
    if request.param == "window":
        return native(family("mistral", sliding_window=20)), "bf16"
    if request.param == "shared weights":  # with a window and scales, which their kernel has to leave where they are
        return sharing(native(family("mistral", sliding_window=200)), [0, 1, 1]), "int8"
    return native(family("llama")), request.param.removesuffix(" pages") if " pages" in request.param else "bf16"


def test_chunks_batches_and_threads_do_not_change_a_bit(setting, isa):
    model, type = setting
    lengths = [1, 300, 40, 17, 290]
    prompts = [tokens(n, n) for n in lengths]
    alone = []
    for prompt in prompts:
        cache, chain = dirty_cache(model, 20, type), Chain(pages(310))
        alone.append(feed(model, cache, chain, prompt))
    for threads in (1, 2, 3):
        cache, first = dirty_cache(model, 70, type), 0
        chains = []
        for n in lengths:
            chains.append(Chain(pages(n + 1, first)))
            first += len(chains[-1].table)
        parts: list[list[np.ndarray]] = [[] for _ in prompts]
        done = [0] * len(prompts)
        chunk = 3
        while any(d < n for d, n in zip(done, lengths)):  # chunks of growing, unequal size, several sequences at once
            now = [(i, prompts[i][done[i] : done[i] + chunk + 40 * i]) for i, n in enumerate(lengths) if done[i] < n]
            made = batch([(chains[i], ids) for i, ids in now])
            logits = model.logits(model.run(cache, made, threads=threads), np.arange(len(made.ids)), threads)
            for (i, ids), start in zip(now, made.starts):
                parts[i].append(logits[start : start + len(ids)])
                done[i] += len(ids)
                chains[i].filled += len(ids)
            chunk += 5
        for whole, some in zip(alone, parts):
            np.testing.assert_array_equal(np.concatenate(some), whole)


def test_a_sequence_may_read_what_another_writes_in_the_same_step(llama):
    """Two requests with one prefix: the second finds the first one's page, though both come in one batch."""
    prompt = tokens(32)
    cache = dirty_cache(llama, 8)
    want = feed(llama, cache, Chain([4, 5]), prompt)
    cache = dirty_cache(llama, 8)
    made = batch([(Chain([0, 1], 16), prompt[16:]), (Chain([0, 2], 0), prompt[:16])])
    got = llama.logits(llama.run(cache, made, threads=2), np.arange(32))
    np.testing.assert_array_equal(np.concatenate([got[16:], got[:16]]), want)


def test_a_tree_is_its_chains(setting, isa):
    model, type = setting
    prompt, tree, parents = tokens(45), tokens(7, 9), [-1, 0, 0, 1, -1, 2, 3]
    depth = [0, 1, 1, 2, 0, 2, 3]
    cache, chain = dirty_cache(model, 12, type), Chain(pages(60))
    feed(model, cache, chain, prompt)
    made = batch([(chain, tree)], parents=parents, positions=[45 + d for d in depth])
    got = model.logits(model.run(cache, made, threads=2), np.arange(7))
    for leaf in (4, 5, 6):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        cache, chain = dirty_cache(model, 12, type), Chain(pages(60))
        feed(model, cache, chain, prompt)
        want = feed(model, cache, chain, [tree[i] for i in path])
        # Slots differ from those of the chain, and with them the order of sums.
        np.testing.assert_allclose(got[path], want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_a_long_line_of_a_tree_has_the_bits_of_plain_decoding(setting, isa):
    """More than sixteen deep, across the end of a span of 256 slots, among guesses that were wrong."""
    model, type = setting
    prompt, line, wrong = tokens(230), tokens(40, 9), tokens(40, 3)
    tree, parents, depth, places = [line[0]], [-1], [0], [0]
    for i in range(1, len(line)):
        for guess in (wrong[i], line[i]) if i % 3 == 0 else (line[i],):
            tree.append(guess)
            parents.append(places[-1])
            depth.append(i)
        places.append(len(tree) - 1)
    cache, chain = dirty_cache(model, 24, type), Chain(pages(300))
    feed(model, cache, chain, prompt)
    made = batch([(chain, np.array(tree))], parents=parents, positions=[230 + d for d in depth])
    got = model.logits(model.run(cache, made, threads=2), np.array(places))
    cache, chain = dirty_cache(model, 24, type), Chain(pages(300))
    feed(model, cache, chain, prompt)
    np.testing.assert_array_equal(got, np.concatenate([feed(model, cache, chain, [token]) for token in line]))


def test_moved_slots_continue_the_accepted_branch(setting):
    model, type = setting
    prompt, tree, parents, depth = tokens(30), tokens(5, 1), [-1, -1, 1, 1, 3], [0, 0, 1, 1, 2]
    after = tokens(4, 5)
    cache, chain = dirty_cache(model, 12, type), Chain(pages(60))
    feed(model, cache, chain, prompt)
    model.run(cache, batch([(chain, tree)], parents=parents, positions=[30 + d for d in depth]))
    model.move(cache, chain.table, [(31, 30), (33, 31), (34, 32)])
    chain.filled = 33
    got = feed(model, cache, chain, after)
    cache, chain = dirty_cache(model, 12, type), Chain(pages(60))
    feed(model, cache, chain, prompt)
    feed(model, cache, chain, [tree[1], tree[3], tree[4]])
    want = feed(model, cache, chain, after)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_copied_pages_hold_the_same(setting):
    model, type = setting
    prompt, rest = tokens(40), tokens(20, 3)
    cache, chain = dirty_cache(model, 12, type), Chain([0, 1, 2, 3])
    feed(model, cache, chain, prompt)
    cache.copy([(2, 9), (0, 7)])
    fork = Chain([7, 1, 9, 10], 40)
    np.testing.assert_array_equal(feed(model, cache, fork, rest), feed(model, cache, chain, rest))


def test_windows_go_by_position_and_not_by_slot():
    """Tokens whose positions jump over a gap no longer see what lies before it."""
    model = native(family("mistral", sliding_window=8, num_hidden_layers=1))
    ids = tokens(40)
    cache, chain = dirty_cache(model, 12), Chain(pages(60))
    positions = [*range(20), *range(100, 120)]
    hidden = model.run(cache, batch([(chain, ids)], positions=positions))
    got = model.logits(hidden, np.arange(20, 40))
    other = Chain(pages(60, 5))
    made = batch([(other, ids[20:])], positions=positions[20:])
    want = model.logits(model.run(cache, made), np.arange(20))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    chain.filled = 40
    last = model.logits(model.run(cache, batch([(chain, [5])], positions=[500])), np.arange(1))
    alone = model.logits(model.run(cache, batch([(Chain([11]), [5])], positions=[500])), np.arange(1))
    np.testing.assert_allclose(last, alone, rtol=0, atol=1e-4 * np.abs(alone).max())


def test_layers_in_ranges_are_the_whole(setting):
    model, type = setting
    ids = tokens(33)
    want = feed(model, dirty_cache(model, 6, type), Chain(pages(33)), ids)
    cache, made = dirty_cache(model, 6, type), batch([(Chain(pages(33)), ids)])
    hidden = model.run(cache, made, last=1)
    kept = hidden.copy()
    hidden = model.run(cache, made, first=1, last=1, hidden=hidden)
    np.testing.assert_array_equal(hidden, kept)
    hidden = model.run(cache, made, first=1, hidden=hidden)
    np.testing.assert_array_equal(model.logits(hidden, np.arange(33)), want)


def test_attention_elsewhere_gives_the_same(llama):
    """A worker that keeps everything in float32: the difference is what pages round."""
    ids = tokens(300)
    want = feed(llama, dirty_cache(llama, 20), Chain(pages(300)), ids)
    seen = []

    def attend(layer, q, k, v):
        seen.append(layer)
        k, v = (
            (bfloat16(t.reshape(-1)).astype(np.uint32) << 16).view(np.float32).reshape(t.shape) for t in (k, v)
        )  # as pages hold them
        k, v = (np.repeat(t, llama.heads // llama.kv_heads, axis=1) for t in (k, v))
        score = np.einsum("qhd,khd->hqk", q, k) * llama.head_dim**-0.5
        score = np.where(np.tril(np.ones(score.shape[1:], bool)), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", weight / weight.sum(-1, keepdims=True), v)

    made = batch([(Chain([]), ids)])
    hidden = llama.run(None, made, attend=attend, threads=2)
    assert seen == [0, 1, 2]
    assert np.abs(llama.logits(hidden, np.arange(300)) - want).max() < 1e-3 * np.abs(want).max()

    def fails(layer, q, k, v):
        raise RuntimeError("the other side is gone")

    with pytest.raises(RuntimeError, match="other side"):
        llama.run(None, made, attend=fails)


def additions(model: Llama, rank: int, seed: int) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    random, parts = np.random.default_rng(seed), {}
    for layer in range(len(model.blocks)):
        for name in PROJECTIONS:
            matrix = getattr(model.blocks[layer], name)
            a, b = random.normal(size=(rank, matrix.cols)), random.normal(size=(matrix.rows, rank))
            parts[layer, name] = ((a * matrix.cols**-0.5).astype("f"), (b * 0.3).astype("f"))
    return parts


def merged(made, parts: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]):
    import torch

    for (layer, name), (a, b) in parts.items():
        block = made.model.layers[layer]
        owner = block.self_attn if name in "qkvo" else block.mlp
        getattr(owner, f"{name}_proj").weight.data += torch.from_numpy(b @ a)
    return made


@pytest.mark.parametrize("name", ["llama", "granite"])
def test_low_rank_additions_are_merged_weights(name, isa):
    made = family(name, **(dict(residual_multiplier=0.4) if name == "granite" else {}))
    model = native(made)
    parts = [additions(model, rank, rank) for rank in (5, 16)]
    parts.append({key: parts[1][key] for key in [(1, "q"), (1, "down")]})
    lows = [model.adapter(low) for low in parts]
    ids = tokens(70)
    plain = feed(model, dirty_cache(model, 6, "fp32"), Chain(pages(70)), ids)
    chains = [Chain(pages(70, 6 * i)) for i in range(4)]
    numbers = [n for n in (0, -1, 1, 2) for _ in ids]
    made_batch = batch([(chain, ids) for chain in chains], adapters=numbers)
    hidden = model.run(dirty_cache(model, 24, "fp32"), made_batch, adapters=lows, threads=2)
    got = model.logits(hidden, np.arange(280)).reshape(4, 70, -1)
    np.testing.assert_array_equal(got[1], plain)
    for number, result in ((0, got[0]), (1, got[2]), (2, got[3])):
        again = family(name, **(dict(residual_multiplier=0.4) if name == "granite" else {}))
        other = native(merged(again, parts[number]))
        want = feed(other, dirty_cache(other, 6, "fp32"), Chain(pages(70)), ids)
        assert np.abs(want - plain).max() > 0.1 * np.abs(plain).max()
        np.testing.assert_allclose(result, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("format", ["bf16", "int8", "binary4"])
@pytest.mark.parametrize("rank", [3, 16, 40])
def test_additions_in_eight_bits_stay_near_the_exact_ones(format, rank, isa):
    model, ids = native(family("llama"), format), tokens(70)
    parts = {key: (a, b * np.float32(0.1)) for key, (a, b) in additions(model, rank, 0).items()}
    low = model.adapter(parts)
    assert {m.format for pair in low.parts.values() for m in pair} == {"int8"}
    for key, pair in low.parts.items():
        for matrix, values in zip(pair, parts[key], strict=True):
            off = np.abs(matrix.rows_of(np.arange(matrix.rows)) - values)
            padded = np.zeros((matrix.rows, -(-matrix.cols // matrix.group) * matrix.group), np.float32)
            padded[:, : matrix.cols] = values
            largest = np.abs(padded.reshape(matrix.rows, -1, matrix.group)).max(2).repeat(matrix.group, 1)
            assert (off <= largest[:, : matrix.cols] / 252).all()

    def answer(chosen: Llama, added: Adapter | None) -> np.ndarray:
        made = batch([(Chain(pages(70)), ids)], adapters=None if added is None else [0] * 70)
        hidden = chosen.run(dirty_cache(chosen, 6), made, adapters=[added], threads=2)
        return chosen.logits(hidden, np.arange(70))

    exact = native(family("llama"))
    plain, changed = answer(exact, None), answer(exact, exact.adapter(parts))
    off, changed_off = np.abs(answer(model, None) - plain).mean(), np.abs(answer(model, low) - changed).mean()
    assert np.abs(changed - plain).mean() > 0.2 * np.abs(plain).mean()
    assert changed_off < 1.25 * off  # what the weights' own format loses hides what the additions' loses


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "binary4"])
def test_results_with_adapters_do_not_depend_on_the_batch(format, isa):
    model = native(family("llama"), format)
    lows = [model.adapter(additions(model, rank, rank)) for rank in (8, 16, 33)]
    ids = tokens(71)

    def alone(number: int) -> np.ndarray:
        cache, chain = dirty_cache(model, 6), Chain(pages(71))
        found = []
        for some in (ids[:70], ids[70:]):
            made = batch([(chain, some)], adapters=[number] * len(some))
            found.append(model.logits(model.run(cache, made, adapters=lows), np.arange(len(some))))
            chain.filled += len(some)
        return np.concatenate(found)

    numbers = [0, 1, 1, -1, 2, 1, 0]
    cache, chains = dirty_cache(model, 42), [Chain(pages(71, 6 * i)) for i in range(7)]
    made = batch([(chain, ids[:70]) for chain in chains], adapters=[n for n in numbers for _ in range(70)])
    hidden = model.run(cache, made, adapters=lows, threads=2)
    got = model.logits(hidden, np.arange(490)).reshape(7, 70, -1)
    for chain in chains:
        chain.filled = 70
    last = model.run(cache, batch([(chain, ids[70:]) for chain in chains], adapters=numbers), adapters=lows, threads=2)
    decoded = model.logits(last, np.arange(7))
    for place, number in enumerate(numbers):
        want = alone(number)
        np.testing.assert_array_equal(got[place], want[:70])
        np.testing.assert_array_equal(decoded[place], want[70])


def test_many_tokens_pass_in_parts():
    model = native(tiny_model("llama", seed=0, max_position_embeddings=2048), positions=2048)
    ids = tokens(700)
    cache, chain = dirty_cache(model, 50), Chain(pages(700))
    whole = feed(model, cache, chain, ids, threads=2)
    cache, chain = dirty_cache(model, 50), Chain(pages(700))
    parts = [feed(model, cache, chain, ids[i : i + 90]) for i in range(0, 700, 90)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)

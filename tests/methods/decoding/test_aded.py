"""ADED: the table, the search on toy tables, what pays, and answers that are those of plain decoding."""

from __future__ import annotations

import json
import math
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shoestring.core.errors import UsageError
from shoestring.engine.engine import Engine
from shoestring.engine.hooks import Draft, Hooks, Verified
from shoestring.engine.native_runner import NativeRunner
from shoestring.engine.request import Constraint, Request, Sampling
from shoestring.engine.sequence import Sequence as Answer
from shoestring.engine.tokenizer import Tokenizer
from shoestring.lab import answering, tiny
from shoestring.methods.decoding import _costs, _latest, _tree, _trigrams
from shoestring.methods.decoding._latest import Latest
from shoestring.methods.decoding._trigrams import Trigrams, count
from shoestring.methods.decoding.aded import (
    WAYS,
    AdedConfig,
    AdedDrafter,
    Guesses,
    Known,
    Text,
    generate,
    search,
    whole,
)

PAPER = AdedConfig(prompts=False, always=True)


def table(texts: Sequence[Sequence[int]], **options: Any) -> Trigrams:
    return Trigrams(count(texts), **options)


def known(table: Trigrams) -> Known:
    """Where every guess is as likely as any other."""
    return Known(table, Latest(1000), 0, [0.5] * WAYS)


def pair(a: int, b: int) -> Text:
    return Text(_latest.end([a, b]))


def answer(tokens: list[int], isolation: str = "", temperature: float = 0.0) -> Answer:
    request = Request(list(tokens), Sampling(temperature=temperature), isolation=isolation)
    return Answer(request, 0, tokens, len(tokens))


def paths(guesses: Guesses) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(guesses.tokens, guesses.parents):
        found.append((found[parent] if parent >= 0 else ()) + (token,))
    return set(found)


# ---- the table ----


def test_a_triple_counts_inside_a_document() -> None:
    counted = count([[1, 2, 3, 1, 2, 4, 1, 2, 3], [3, 5], [9], [2, 3, 5]])
    view = Trigrams(counted).view(0, 1, 2)
    assert view is not None
    assert dict(zip(view.tokens, view.values)) == pytest.approx({3: 2 / 3, 4: 1 / 3})
    assert Trigrams(counted).view(0, 3, 3) is None and Trigrams(counted).view(0, 1, 3) is None
    assert counted.counts.sum() == 8


def test_counting_in_parts_is_counting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = [[rng.randrange(5) for _ in range(rng.randrange(30))] for _ in range(40)]
    wanted = Counter(t for text in texts for t in zip(text, text[1:], text[2:]))
    monkeypatch.setattr(_trigrams, "_PART", 50)
    found = count(texts)
    ids = [(int(t) >> 42, int(t) >> 21 & 0x1FFFFF, int(t) & 0x1FFFFF) for t in found.triples]
    assert dict(zip(ids, found.counts.tolist())) == wanted


def test_the_file_keeps_all_and_memory_the_likeliest(tmp_path: Path) -> None:
    texts = [[1, 2, c] for c in range(3, 33) for _ in range(c)]
    count(texts, "mine").save(tmp_path / "t")
    loaded = _trigrams.load(tmp_path / "t", "mine")
    assert len(loaded.triples) == 30
    view = Trigrams(loaded, successors=12).view(0, 1, 2)
    assert view is not None and view.tokens == tuple(range(32, 20, -1))
    assert view.values[0] == pytest.approx(32 / sum(range(3, 33)))  # not renormalised


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    class Words:
        vocab = 3

        def __init__(self, *texts: bytes) -> None:
            self.texts = texts

        def token_bytes(self, token: int) -> bytes:
            return self.texts[token]

    one, other = Words(b"a", b"b", b"c"), Words(b"a", b"c", b"b")
    assert _trigrams.identity(one) != _trigrams.identity(other)
    assert _trigrams.identity(one) != _trigrams.identity(Words(b"ab", b"", b"c"))
    count([[0, 1, 2]], _trigrams.identity(one)).save(tmp_path / "t")
    with pytest.raises(UsageError, match="another tokenizer"):
        AdedDrafter(AdedConfig(table=str(tmp_path / "t")), other)
    assert AdedDrafter(AdedConfig(table=str(tmp_path / "t")), one).stats()["draft_pairs_counted"] == 1


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UsageError, match="cannot be read"):
        _trigrams.load(tmp_path / "text", "")
    damaged = count([[1, 2, 3, 4]], "x")
    replace(damaged, triples=damaged.triples[::-1].copy()).save(tmp_path / "t")
    with pytest.raises(UsageError, match="damaged"):
        _trigrams.load(tmp_path / "t", "x")


def test_a_table_is_made_of_a_corpus_once(tmp_path: Path) -> None:
    at = answering.folder(tmp_path / "model")
    corpus, file = tmp_path / "corpus.jsonl", tmp_path / "kept" / "table"
    corpus.write_text(json.dumps({"text": "w5 w6 w7 w8 w5 w6 w7"}) + "\n")
    word = f"aded,corpus={corpus},table={file}"
    with answering.exact(at, plugs=[word]) as engine:
        assert engine.counts().plugged["draft_pairs_counted"] == 4
    corpus.unlink()
    with answering.exact(at, plugs=[f"aded,table={file}"]) as engine:
        assert engine.counts().plugged["draft_pairs_counted"] == 4
    corpus.write_text(json.dumps({"text": "w5 w6 w7"}) + "\n")
    with pytest.raises(UsageError, match="another corpus"):
        answering.exact(at, plugs=[word])
    with pytest.raises(UsageError, match="There is no table"):
        answering.exact(at, plugs=[f"aded,table={tmp_path / 'none'}"])


def test_a_window_is_learnt_in_every_step() -> None:
    learnt = Trigrams(window=4)
    text = [1, 2, 3, 9, 1, 2, 3]
    for end in range(3, 8):
        learnt.learn(0, text[:end])
    # 1 2 3 stood in the window of 4 twice, and at the end once.
    view = learnt.view(0, 1, 2)
    assert view is not None and view.values == pytest.approx((3 * 0.04,))
    for _ in range(200):
        learnt.learn(0, text)
    view = learnt.view(0, 1, 2)
    assert view is not None and view.values == (3.0,)
    assert learnt.learnt == 5 - 1


def test_counted_values_are_learnt_on_top_of() -> None:
    both = table([[1, 2, 3], [1, 2, 4]])
    both.learn(0, [1, 2, 4])
    view = both.view(0, 1, 2)
    assert view is not None and view.tokens == (4, 3) and view.values == pytest.approx((0.54, 0.5))
    other = both.view(1, 1, 2)  # somebody else's
    assert other is not None and other.values == pytest.approx((0.5, 0.5))


def test_entries_are_capped_and_the_least_recent_goes() -> None:
    small = Trigrams(entries=10)
    for a in range(50):
        small.learn(0, [a, a + 1, a + 2])
        small.learn(0, [0, 1, 2])
        assert len(small) <= 10
    assert small.view(0, 0, 1) is not None and small.view(0, 49, 50) is not None
    assert small.view(0, 20, 21) is None
    for c in range(500):
        small.learn(0, [7, 7, c])
    row = small.view(0, 7, 7)
    assert row is not None and len(row.tokens) == small.successors
    assert all(len(row.values) <= 4 * small.successors for row in small._rows.values())


def test_what_came_last_is_known_to_its_owner() -> None:
    latest = Latest(4)
    text = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert latest.learn(0, text[:7], 0, 0) == 0  # what follows 1 2 3 was not expected yet
    assert latest.learn(0, text, 7, 0) == 3  # then three tokens came as the last time
    assert latest.after(0, _latest.end([4, 1, 2])) == 3
    assert latest.after(1, _latest.end([4, 1, 2])) is None and latest.after(0, _latest.end([1, 2])) is None
    assert latest.learn(0, [1, 2, 3, 5], 3, 3) == 0 and latest.after(0, _latest.end([1, 2, 3])) == 5
    latest.learn(0, [*range(20)], 0, 0)
    assert (
        len(latest) == 4
        and latest.after(0, _latest.end([16, 17, 18])) == 19
        and latest.after(0, _latest.end([1, 2, 3])) is None
    )


def test_a_longer_repetition_says_more_than_what_came_last() -> None:
    latest, phrase = Latest(100), [11, 12, 13]
    first, second = [1, 2, 3, *phrase, 4, 5], [6, 7, 8, *phrase, 9, 10]
    text = first + second
    run = latest.learn(0, text, 0, 0)
    assert latest.after(0, _latest.end([0, *phrase])) == 9
    assert latest.after(0, _latest.end(first[:6])) == 4 and latest.after(0, _latest.end(second[:6])) == 9
    assert latest.learn(0, text := [*text, *first], len(first + second), run) == 5
    assert latest.after(0, _latest.end(text)) == 6
    assert latest.after(1, _latest.end(first[:6])) is None
    latest.learn(1, [1, 2, 3, *phrase, 77], 0, 0)
    assert latest.after(0, _latest.end(first[:6])) == 4 and latest.after(1, _latest.end(first[:6])) == 77


def test_many_threads_learn_and_draft_at_once() -> None:
    drafter = AdedDrafter(replace(PAPER, entries=200))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(6):
                mine = answer([rng.randrange(9) for _ in range(5)])
                for _ in range(30):
                    draft = drafter.propose(mine, 64)
                    assert all(parent < i for i, parent in enumerate(draft.parents))
                    drafter.observe([Verified(mine, draft, ())], 1 + len(draft.tokens), 1e-3)
                    mine.tokens.append(rng.randrange(9))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and drafter.stats()["draft_passes"] == 4 * 6 * 30


# ---- the search ----

TOY = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 0], [2, 3, 1], [2, 0, 1], [3, 1, 2], [0, 1, 2]]


def by_the_book(
    values: dict[tuple[int, ...], dict[int, float]], a: int, b: int, config: AdedConfig
) -> dict[tuple[int, ...], int]:
    """Visits and scores of each path of the toy's search, written from the paper's formula, with full paths as keys.

    Only for tables in which roll-outs have no choice: every pair below the root's children has one successor.
    """
    visits: dict[tuple[int, ...], int] = defaultdict(int)
    scores: dict[tuple[int, ...], float] = defaultdict(float)
    grown: dict[tuple[int, ...], list[int]] = {}
    for _ in range(config.iterations):
        path: tuple[int, ...] = ()
        way = [path]
        while grown.get(path) and len(path) + 1 < config.states:
            row = values[(a, b, *path)[-2:]]

            def puct(c: int, path: tuple[int, ...] = path, row: dict[int, float] = row) -> float:
                child = (*path, c)
                if not visits[child]:
                    return math.inf
                n = visits[path]
                widen = (config.explore + math.log((n + config.settle + 1) / config.settle)) * row[c] * math.sqrt(n)
                return scores[child] / visits[child] + widen / (1 + visits[child])

            path = (*path, max(grown[path], key=puct))
            way.append(path)
        pair = (a, b, *path)[-2:]
        if len(path) + 1 < config.states and pair in values and path not in grown:
            grown[path] = sorted(values[pair], key=lambda c: -values[pair][c])
            path = (*path, grown[path][0])
            way.append(path)
        whole_way = list(path)
        while len(whole_way) + 1 < config.states and (a, b, *whole_way)[-2:] in values:
            (only,) = values[(a, b, *whole_way)[-2:]]
            whole_way.append(only)
        told = (a, b, *whole_way)
        score = 1 + sum(values[told[i : i + 2]][told[i + 2]] for i in range(len(whole_way)))
        for step in way:
            visits[step] += 1
            scores[step] += score
    return dict(visits)


@pytest.mark.parametrize("iterations", [1, 2, 3, 7, 150])
def test_visits_are_those_of_the_formula(iterations: int) -> None:
    config = AdedConfig(iterations=iterations, paths=100)
    values: dict[tuple[int, ...], dict[int, float]] = {
        (1, 2): {3: 0.75, 0: 0.25},
        (2, 3): {1: 1.0},
        (2, 0): {1: 1.0},
        (3, 1): {2: 1.0},
        (0, 1): {2: 1.0},
    }
    wanted = by_the_book(values, 1, 2, config)
    found = search(known(table(TOY)), pair(1, 2), config)
    told: list[tuple[int, ...]] = []
    for i, parent in enumerate(found.parents):
        told.append((told[parent] if parent >= 0 else ()) + (found.tokens[i],))
    seen = {path: visits for path, visits in zip(told, found.visits) if visits}
    assert seen == {path: visits for path, visits in wanted.items() if path}
    assert sum(visits for path, visits in seen.items() if len(path) == 1) == iterations


def test_paths_have_their_likeliest_successor_and_no_more_than_the_states() -> None:
    found = search(known(table(TOY)), pair(1, 2), AdedConfig())
    assert paths(found) == {(3,), (3, 1), (3, 1, 2), (3, 1, 2, 3), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)}
    short = search(known(table(TOY)), pair(1, 2), AdedConfig(states=2))
    assert paths(short) == {(3,), (3, 1), (0,), (0, 1)}


def test_the_most_visited_paths_are_taken() -> None:
    wide = table([[1, 2, c] for c in range(3, 15) for _ in range(c * c)] + [[2, c, c + 20] for c in range(3, 15)])
    found = search(known(wide), pair(1, 2), AdedConfig(paths=4))
    taken = [(v, t) for v, t, p in zip(found.visits, found.tokens, found.parents) if p < 0]
    everything = search(known(wide), pair(1, 2), AdedConfig(paths=1000))
    best = sorted(((v, t) for v, t, p in zip(everything.visits, everything.tokens, everything.parents) if p < 0))
    assert sorted(taken) == best[-len(taken) :] and 14 in {t for _, t in taken}


def test_the_same_table_gives_the_same_draft() -> None:
    rng = random.Random(1)
    texts = [[rng.randrange(6) for _ in range(200)]]
    one, two = (search(known(table(texts)), pair(1, 2), AdedConfig()) for _ in range(2))
    assert one == two and len(one.tokens) > 24


def test_what_is_taken_whole_is_what_the_search_finds() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        counted = known(table([[rng.randrange(12) for _ in range(40)]]))
        for a in range(12):
            for b in range(12):
                everything = whole(counted, pair(a, b), PAPER, 0.0)
                if everything is not None and everything.tokens:
                    assert paths(search(counted, pair(a, b), PAPER)) == paths(everything)


def test_the_search_beats_sampling_from_the_table() -> None:
    """With as many nodes, what is searched for is accepted at least as far as what is drawn from the table."""
    rng = random.Random(3)
    chances = {(a, b): [rng.random() ** 4 for _ in range(8)] for a in range(8) for b in range(8)}
    text = [0, 1]
    for _ in range(40_000):
        text.append(rng.choices(range(8), chances[text[-2], text[-1]])[0])
    counted = table([text])
    config = AdedConfig(states=4, paths=12)

    def drawn(a: int, b: int, nodes: int) -> set[tuple[int, ...]]:
        made: set[tuple[int, ...]] = set()
        while len(made) < nodes:
            path: tuple[int, ...] = ()
            for _ in range(4):
                view = counted.view(0, *(a, b, *path)[-2:])
                assert view is not None
                path = (*path, rng.choices(view.tokens, view.values)[0])
                made.add(path)
                if len(made) >= nodes:
                    break
        return made

    def accepted(made: set[tuple[int, ...]], come: tuple[int, ...]) -> int:
        return max((n for n in range(1, 5) if come[:n] in made), default=0)

    searched = sampled = 0
    for _ in range(600):
        at = rng.randrange(len(text) - 10)
        a, b, *come = text[at : at + 6]
        found = paths(search(known(counted), pair(a, b), config))
        searched += accepted(found, tuple(come))
        sampled += accepted(drawn(a, b, len(found)), tuple(come))
    assert searched > 1.02 * sampled > 300


# ---- answers ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.folder(tmp_path_factory.mktemp("aded") / "model")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    made = []
    for i in range(50):
        part = [rng.randrange(3, tiny.VOCAB) for _ in range(rng.randrange(2, 12))]
        made.append(part * (1 + i % 3))
    return made


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[Engine]:
    with answering.exact(model) as engine:
        yield engine


@pytest.mark.parametrize("runner", ["native", "torch"])
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_fifty_answers_are_those_of_plain_decoding(
    model: Path, plain: Engine, prompts: list[list[int]], runner: str, drawn: bool
) -> None:
    sampling = Sampling(max_tokens=24, ignore_eos=True)
    if drawn:
        sampling = replace(sampling, temperature=0.7, top_p=0.9, seed=3)
    with answering.exact(model, runner=runner) as reference:
        wanted = answering.answers(reference, sampling, prompts)
    for config in (PAPER, AdedConfig()):
        with answering.exact(model, runner=runner, hooks=Hooks(drafter=AdedDrafter(config))) as engine:
            assert answering.answers(engine, sampling, prompts) == wanted
            if config.always:
                assert engine.counts().accepted_draft_tokens > (20 if drawn else 60)


def test_the_second_time_takes_fewer_passes_and_a_frozen_table_does_not(model: Path) -> None:
    sampling = Sampling(max_tokens=40, ignore_eos=True)
    steps: dict[float, list[int]] = {0.04: [], 0.0: []}
    texts = [[(i * i + 7 * i) % 50 + 3 for i in range(k, k + 9)] for k in range(4)]
    counted = count([[t, t, t] for t in range(5)])
    for increment, told in steps.items():
        drafter = AdedDrafter(replace(PAPER, increment=increment))
        drafter.table = Trigrams(counted, increment=increment)
        with answering.exact(model, hooks=Hooks(drafter=drafter)) as engine:
            for _ in range(2):
                before = engine.counts().steps
                for text in texts:
                    answering.answers(engine, sampling, [text])
                told.append(engine.counts().steps - before)
    assert steps[0.0][0] == steps[0.0][1]
    assert steps[0.04][1] < 0.6 * steps[0.04][0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.3, presence_penalty=0.4),
        Sampling(temperature=1.0, seed=2, frequency_penalty=0.6, min_tokens=20),
        Sampling(logit_bias=((5, 4.0), (9, -50.0))),
    ],
    ids=["penalties", "drawn with penalties", "bias"],
)
def test_settings_hold_at_every_node(model: Path, plain: Engine, sampling: Sampling) -> None:
    sampling = replace(sampling, max_tokens=32, ignore_eos=True)
    drafter = AdedDrafter(PAPER)
    with answering.exact(model, hooks=Hooks(drafter=drafter)) as engine:
        for _ in range(2):
            assert answering.answers(engine, sampling) == answering.answers(plain, sampling)
        assert engine.counts().accepted_draft_tokens > 40


def test_a_constraint_holds_at_every_node(model: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models

    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["<pad>", "<s>", "</s>", *letters, *(a + b for a in "abcd" for b in letters)][: tiny.VOCAB]
    inner = Inner(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(words[:3])
    sampling = Sampling(max_tokens=40, temperature=0.8, seed=4, constraint=Constraint("regex", "((ab|ba)c){14}"))
    found = []
    drafter = AdedDrafter(PAPER)
    for hooks in (Hooks(), Hooks(drafter=drafter), Hooks(drafter=drafter)):
        runner = NativeRunner(model, dtype="fp32", cache_dtype="fp32", threads=1)
        with Engine((runner, Tokenizer(inner, eos=(2,))), hooks=hooks, context=128) as engine:
            ((one,),) = engine.generate([[3, 4, 5] * 4], sampling)
            found.append((one.tokens, one.text))
    assert found[0] == found[1] == found[2] and len(found[0][1]) == 42
    assert drafter.stats()["draft_tokens_per_pass"] > 1.3


def test_draws_have_the_models_distribution(model: Path) -> None:
    """Two tokens drawn a thousand times with drafts at hand are distributed as the model says, not as the drafts do."""
    prompt, size = [3, 4, 5, 6] * 3, 1500
    bias = tuple((token, 50.0) for token in (3, 4, 5, 6))  # a vocabulary of four

    def sampling(seed: int) -> Sampling:
        return Sampling(max_tokens=2, ignore_eos=True, temperature=1.5, seed=seed, logit_bias=bias)

    # Exact chances of each pair of tokens, from the model itself.
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chances = {}
    for first in ((), *((t,) for t in (3, 4, 5, 6))):
        with torch.no_grad():
            chances[first] = (net(torch.tensor([[*prompt, *first]])).logits[0, -1, 3:7] / 1.5).softmax(-1).tolist()
    drafter = AdedDrafter(replace(PAPER, increment=0.0))
    drafter.table = table([[5, 6, 3, 3], [6, 3, 4, 4], [5, 6, 4, 4], [6, 4, 5, 6]], increment=0.0)
    seen: Counter[tuple[int, ...]] = Counter()
    with answering.exact(model, hooks=Hooks(drafter=drafter), max_sequences=16) as engine:
        for start in range(0, size, 100):
            requests = [Request(list(prompt), sampling(seed)) for seed in range(start, start + 100)]
            for request in requests:
                engine.submit(request)
            told_of: dict[str, tuple[int, ...]] = {}
            while not engine.idle:
                for delta in engine.step():
                    told_of[delta.request_id] = told_of.get(delta.request_id, ()) + delta.tokens
            seen.update(told_of.values())
        assert engine.counts().steps < size  # many at once
    expected = {(a, b): chances[()][a - 3] * chances[(a,)][b - 3] for a in range(3, 7) for b in range(3, 7)}
    # Sixteen cells; 37.7 is the 0.1 % point of chi-squared with 15 degrees of freedom. Rare cells go together.
    cells = sorted((p * size, seen[pair]) for pair, p in expected.items())
    while cells[0][0] < 5:
        (p, n), (q, m) = cells[:2]
        cells = sorted([(p + q, n + m), *cells[2:]])
    assert sum((n - p) ** 2 / p for p, n in cells) < 37.7
    assert sum(seen.values()) == size and len(cells) >= 4


def test_clients_do_not_learn_from_each_other(model: Path) -> None:
    drafter = AdedDrafter(PAPER)
    text = [3, 9, 4, 8, 5, 7] * 4

    def passes(isolation: str) -> int:
        before = engine.counts().steps
        request = Request(list(text), Sampling(max_tokens=30, ignore_eos=True), isolation=isolation)
        engine.submit(request)
        while not engine.idle:
            engine.step()
        return engine.counts().steps - before

    with answering.exact(model, hooks=Hooks(drafter=drafter), prefix_cache=False) as engine:
        first = passes("one")
        assert passes("other") == first
        assert passes("one") < first


# ---- what pays ----


def costs(*seconds: float) -> _costs.Costs:
    return _costs.Costs([np.interp(size, range(1, len(seconds) + 1), seconds) for size in _costs.SIZES])


def learnt(config: AdedConfig, text: list[int]) -> AdedDrafter:
    drafter = AdedDrafter(config)
    for _ in range(80):
        drafter.table.learn(0, text)
    return drafter


def told(drafter: AdedDrafter, truth: Sequence[int], seconds: _costs.Costs, steps: int) -> tuple[list[int], float]:
    """Decode `truth` with a machine of such costs: nodes of each draft, and speed against plain decoding."""
    mine = answer(list(truth[:4]))
    nodes: list[int] = []
    spent, at = 0.0, 4
    while len(nodes) < steps and at < len(truth):
        draft = drafter.propose(mine, 64)
        drafter._search = 0.0  # a machine whose time is told, so that no clock decides
        node, taken = -1, []
        for token in truth[at:]:
            node = next((j for j, t in enumerate(draft.tokens) if t == token and draft.parents[j] == node), -2)
            if node < 0:
                break
            taken.append(token)
        new = truth[at : at + len(taken) + 1]
        passed = seconds.base(1 + len(draft.tokens))
        drafter.observe([Verified(mine, draft, tuple(taken))], 1 + len(draft.tokens), passed)
        mine.tokens += new
        at += len(new)
        nodes.append(len(draft.tokens))
        spent += passed
    return nodes, (at - 4) * seconds.base(1) / spent


def test_nothing_is_drafted_where_further_tokens_cost_as_much_as_the_first() -> None:
    steep = _costs.Costs([float(size) for size in _costs.SIZES])
    drafter = AdedDrafter(AdedConfig())
    drafter.costs = _costs.Costs([float(size) for size in _costs.SIZES])
    nodes, speed = told(drafter, [3, 4, 5, 6, 7] * 60, steep, 220)
    assert sum(nodes) == 4 and speed > 0.97  # two nodes, twice, to see whether it is still so


def test_a_wrong_curve_is_found_out() -> None:
    flat = _costs.Costs([1 + 0.05 * (size - 1) for size in _costs.SIZES])
    drafter = AdedDrafter(AdedConfig())
    drafter.costs = _costs.Costs([float(size) for size in _costs.SIZES])  # measured while others held it up
    nodes, _ = told(drafter, [3, 4, 5, 6, 7] * 400, flat, 1000)
    assert sum(nodes[:64]) == 0 and sum(nodes[-100:]) >= 180


def test_guesses_that_never_come_true_are_given_up_and_taken_up_again() -> None:
    flat = _costs.Costs([1 + 0.05 * (size - 1) for size in _costs.SIZES])
    drafter = AdedDrafter(AdedConfig())
    drafter.costs = _costs.Costs([1 + 0.05 * (size - 1) for size in _costs.SIZES])
    rng = random.Random(2)
    noise = [rng.randrange(12) for _ in range(3000)]
    nodes, speed = told(drafter, noise, flat, 2500)
    assert speed > 0.97
    bare = AdedDrafter(replace(PAPER, increment=0.04))
    assert told(bare, noise, flat, 500)[1] < 0.9  # as it is without measuring
    nodes, speed = told(drafter, [23, 22, 21, 20, 23, 23, 21, 21, 22] * 60, flat, 200)
    assert speed > 2 and nodes[-1] >= 3


def test_text_that_is_copied_is_drafted_in_long_pieces() -> None:
    rng = random.Random(6)
    piece = [rng.randrange(10) for _ in range(80)]  # many a pair has several successors
    machine = [1 + 0.05 * (size - 1) for size in _costs.SIZES]
    speeds = []
    for entries in (1000, 0):
        drafter = AdedDrafter(AdedConfig())
        drafter.costs, drafter.latest = _costs.Costs(machine), Latest(entries)
        nodes, speed = told(drafter, piece * 8, _costs.Costs(machine), 1000)
        speeds.append(speed)
        if entries:
            assert sum(n > drafter.config.states for n in nodes[-20:]) >= 15
    assert speeds[0] > 1.3 * speeds[1] > 1.3


def test_text_that_is_hardly_looked_at_is_learnt_all_the_same() -> None:
    drafter = AdedDrafter(replace(AdedConfig(), cap=100.0))
    drafter.costs = _costs.Costs([float(size) for size in _costs.SIZES])
    text = [*range(400)]
    looks: list[int] = []
    learn = drafter.table.learn
    drafter.table.learn = lambda owner, tokens, steps=1: looks.append(steps) or learn(owner, tokens, steps)  # type: ignore
    told(drafter, text, _costs.Costs([float(size) for size in _costs.SIZES]), 400)
    assert len(looks) < 100 and sum(looks) > 380
    values = [drafter.table.view(0, a, a + 1).values[0] for a in range(100, 300)]  # type: ignore[union-attr]
    assert sum(values) / 200 == pytest.approx(14 * 0.04, rel=0.05) and min(values) >= 8 * 0.04 - 1e-9


def test_branches_are_drafted_where_they_are_cheap_and_chains_where_not() -> None:
    rng = random.Random(4)
    truth: list[int] = [3, 4]
    while len(truth) < 3000:  # every other token is a toss, what follows it is sure
        toss = rng.choice([5, 6])
        truth += [toss, toss + 10, toss + 20, 3, 4]
    shapes = {}
    for name, each in (("cheap", 0.01), ("dear", 0.6)):
        machine = [1 + each * (size - 1) for size in _costs.SIZES]
        drafter = AdedDrafter(AdedConfig())
        drafter.costs = _costs.Costs(machine)
        told(drafter, truth[:2500], _costs.Costs(machine), 1000)
        drafts = []
        for start in range(2500, 2560):
            mine = answer(truth[start : start + 20])
            drafts.append(drafter.propose(mine, 64))
        shapes[name] = sum(len(set(d.parents)) < len(d.parents) for d in drafts)
        assert sum(len(d.tokens) >= 2 for d in drafts) >= 12
    assert shapes["cheap"] >= 10 and shapes["dear"] == 0  # of twelve tosses


def test_a_chain_can_be_asked_for() -> None:
    drafter = learnt(replace(PAPER, tree=False), [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2])
    draft = drafter.propose(answer([9, 1, 2]), 64)
    assert draft.parents == tuple(range(-1, len(draft.tokens) - 1)) and len(draft.tokens) > 1
    tree = learnt(PAPER, [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2]).propose(answer([9, 1, 2]), 64)
    assert len(set(tree.parents)) < len(tree.parents)
    assert len(learnt(replace(PAPER, nodes=2), [1, 2, 3, 4, 5] * 3).propose(answer([1, 2]), 64).tokens) == 2
    assert len(learnt(PAPER, [1, 2, 3, 4, 5] * 3).propose(answer([1, 2]), 3).tokens) == 3


def test_the_curve_is_that_of_the_runner(model: Path) -> None:
    class Clock:
        """A second for each token, and one more where a long pass has left its own in the caches: the clock goes on
        when the runner runs."""

        now, before = 0.0, 0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    with answering.exact(model) as engine:
        run = engine.runner.run

        def slow(batch: Any, *more: Any, **others: Any) -> Any:
            clock.now += 2.0 + batch.tokens + (batch.tokens == 1 and clock.before > 8)
            clock.before = batch.tokens
            return run(batch, *more, **others)

        engine.runner.run = slow  # type: ignore[method-assign]
        found = _costs.measured(engine.runner, engine.pool.count, clock)
        assert [found.base(n) for n in (1, 2, 7, 16, 64, 80)] == pytest.approx([3, 4, 9, 18, 66, 82])
        tight = _costs.measured(engine.runner, 1, clock)
        assert [tight.base(n) for n in (1, 8, 64)] == pytest.approx([3, 10, 66])


def test_costs_follow_what_passes_take() -> None:
    following = costs(1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
    for _ in range(200):
        following.observe(1, 2.0)
    assert following.of(1) == pytest.approx(2.0, rel=0.01)
    assert following.of(4) == pytest.approx(2 * 1.3, rel=0.1)  # longer contexts slow down all sizes
    for _ in range(100):
        following.observe(4, 5.0)
    assert following.of(4) == pytest.approx(5.0, rel=0.05) and following.of(1) < 5


def test_statistics_say_what_was_done(model: Path) -> None:
    drafter = AdedDrafter(PAPER)
    with answering.exact(model, hooks=Hooks(drafter=drafter)) as engine:
        answering.answers(engine, Sampling(max_tokens=40, ignore_eos=True), [[9] * 12])
        counts, said = engine.counts(), engine.counts().plugged
    assert said["draft_passes"] == counts.steps - 1
    assert said["draft_tokens_per_pass"] * said["draft_passes"] == pytest.approx(counts.generation_tokens - 1)
    assert said["draft_nodes_per_pass"] * said["draft_passes"] == pytest.approx(counts.draft_tokens)
    assert said["draft_ms_per_pass"] > 0 and said["draft_pairs_held"] > 0 and said["draft_triples_learnt"] > 0


def test_settings_are_checked() -> None:
    for bad in ({"window": 2}, {"nodes": 0}, {"increment": -1.0}, {"tree": 1}, {"states": 1}, {"settle": 0.0},
                {"cap": "high"}, {"increment": math.nan}, {"entries": 1.5}):  # fmt: skip
        with pytest.raises(UsageError):
            AdedConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="tokenizer"):
        AdedDrafter(AdedConfig(corpus="file"))


# ---- transformers ----


@pytest.fixture(scope="module")
def net() -> Any:
    return tiny.model(num_hidden_layers=3, initializer_range=0.3).eval()


class Bush:
    """Hides the right continuation in a tree of wrong guesses."""

    def __init__(self, truth: Sequence[int]) -> None:
        self.truth, self.lengths = list(truth), list[int]()

    def propose(self, answer: Answer, limit: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for token in self.truth[len(answer.tokens) : len(answer.tokens) + min(limit, 4)]:
            tokens += [(token + 1) % tiny.VOCAB, token, (token + 2) % tiny.VOCAB]
            parents += [parent] * 3
            parent = len(tokens) - 2
        return Draft(tuple(tokens), tuple(parents))

    def observe(self, verified: Sequence[Verified], tokens: int, seconds: float) -> None:
        self.lengths.append(len(verified[0].accepted))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_finds_the_right_branch(net: Any, attention: str) -> None:
    net.set_attn_implementation(attention)
    ids = torch.tensor([[5, 9, 11, 3]])
    given = dict(max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = net.generate(ids, **given)
    bush = Bush(plain[0].tolist())

    def custom(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
               **more: Any) -> Any:  # fmt: skip
        return _tree.generate(bush, model, input_ids, logits_processor, stopping_criteria, generation_config, **more)

    assert torch.equal(net.generate(ids, custom_generate=custom, **given), plain)
    assert sum(bush.lengths) >= 22 and max(bush.lengths) == 4


@pytest.mark.parametrize(
    "settings",
    [
        dict(do_sample=False, repetition_penalty=1.4),
        dict(do_sample=True, temperature=0.7, top_p=0.9),
        dict(do_sample=True, top_k=5, no_repeat_ngram_size=3, min_new_tokens=20),
        dict(do_sample=False, eos_token_id=[7, 8]),
    ],
    ids=["penalty", "drawn", "drawn with processors", "ends"],
)
def test_transformers_gives_the_same_tokens(net: Any, settings: dict[str, Any]) -> None:
    drafter = AdedDrafter(PAPER)
    given = dict(max_new_tokens=40, eos_token_id=None, pad_token_id=0) | settings
    for k in range(6):
        ids = torch.tensor([[(k * 5 + i * i) % 60 + 3 for i in range(3)] * 3])
        torch.manual_seed(k)
        wanted = net.generate(ids, **given)
        for _ in range(2):
            torch.manual_seed(k)
            assert torch.equal(net.generate(ids, custom_generate=generate, drafter=drafter, **given), wanted)
    assert drafter.stats()["draft_tokens_per_pass"] > 1.3


def test_transformers_keeps_the_cache_of_the_accepted_path(net: Any) -> None:
    ids = torch.tensor([[5, 9, 11, 3] * 3])
    given = dict(max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True)
    drafter = AdedDrafter(PAPER)
    wanted = net.generate(ids, **given)
    for _ in range(2):
        found = net.generate(ids, custom_generate=generate, drafter=drafter, **given)
    for ours, theirs in zip(found.past_key_values.layers, wanted.past_key_values.layers):
        held = theirs.keys.shape[2]
        assert ours.keys.shape[2] >= held
        torch.testing.assert_close(ours.keys[:, :, :held], theirs.keys, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(ours.values[:, :, :held], theirs.values, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_beams=2), "beams"),
        (dict(output_scores=True, return_dict_in_generate=True), "not kept"),
        (dict(attention_mask=torch.tensor([[0, 1, 1, 1]])), "padding"),
    ],
)
def test_transformers_refuses_what_it_cannot(net: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        net.generate(
            torch.tensor([[5, 9, 11, 3]]), custom_generate=generate, max_new_tokens=4, pad_token_id=0, **change
        )


def test_transformers_refuses_batches_and_other_caches(net: Any) -> None:
    with pytest.raises(UsageError, match="one sequence"):
        net.generate(torch.tensor([[5, 9], [6, 7]]), custom_generate=generate, max_new_tokens=4, pad_token_id=0)
    from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

    sliding: Any = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, sliding_window=8)
    )  # fmt: skip
    recurrent: Any = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4))
    for other in (sliding, recurrent):
        with pytest.raises(UsageError, match="cannot give up the rows"):
            other.generate(torch.tensor([[5, 9]]), custom_generate=generate, max_new_tokens=4, pad_token_id=0)


# ---- the default model ----


@pytest.mark.real
def test_the_default_model_writes_the_same_in_fewer_passes() -> None:
    talk = [{"role": "user", "content": "Write the numbers from 1 to 30, one on each line."}]
    sampling = Sampling(max_tokens=48)
    numbers: dict[str, Any] = dict(dtype="fp32", cache_dtype="fp32", context=256)
    with Engine("smollm2", **numbers) as engine:
        ((wanted,),) = engine.generate([talk], sampling)
    with Engine("smollm2", plugs=["aded,always=true"], **numbers) as engine:
        for _ in range(2):
            before = engine.counts().steps
            ((found,),) = engine.generate([talk], sampling)
            assert found.tokens == wanted.tokens
        assert engine.counts().steps - before < 0.5 * len(wanted.tokens)

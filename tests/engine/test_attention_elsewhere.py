"""A worker that keeps keys and values by block and slot: pages are shared and found again, and may be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from runner_cases import VOCAB, FloatPages, make, open_runner, text

from shoestring.engine.engine import Engine
from shoestring.engine.hooks import Hooks
from shoestring.engine.request import Request, Sampling
from shoestring.engine.runner import BLOCK, Batch, CacheLost
from shoestring.engine.tokenizer import Tokenizer


class Remote(FloatPages):
    """Keeps pages; with `loses` it forgets everything at that call, once."""

    def __init__(self, loses: int = -1) -> None:
        super().__init__(0)
        self.calls, self.loses, self.order = 0, loses, list[str]()

    def reserve(self, blocks: int) -> None:
        self.slots = blocks * BLOCK

    def begin(self, layer: int, q: np.ndarray, batch: Batch) -> None:
        self.early = layer, q.copy()
        self.order.append("begin")

    def __call__(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, made: Batch) -> np.ndarray:
        self.calls += 1
        if self.calls == self.loses:
            for keys, values in self.kept.values():
                keys[...] = values[...] = np.nan
            raise CacheLost("Gone")
        if self.order:
            assert self.early[0] == layer
            np.testing.assert_array_equal(self.early[1], q)
            self.order.append("call")
        return super().__call__(layer, q, k, v, made)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for pages in self.kept.values():
            for kept in pages:
                blocks = kept.reshape(-1, BLOCK, *kept.shape[1:])
                for source, target in pairs:
                    blocks[target] = blocks[source]

    def move_slots(self, table: Sequence[int], moves: Sequence[tuple[int, int]]) -> None:
        for pages in self.kept.values():
            for kept in pages:
                for source, target in moves:
                    a, b = (table[s // BLOCK] * BLOCK + s % BLOCK for s in (source, target))
                    kept[b] = kept[a]


SAMPLINGS = [
    Sampling(max_tokens=30, ignore_eos=True),
    Sampling(max_tokens=30, ignore_eos=True, temperature=0.8, seed=6, n=3),
    Sampling(max_tokens=24, ignore_eos=True, repetition_penalty=1.2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    make("llama").save_pretrained(made)
    return made


@pytest.fixture(params=["native", "torch"])
def opener(request: pytest.FixtureRequest, folder: Path) -> Iterator[Callable[..., Engine]]:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models

    opened: list[Engine] = []
    tokenizer = Tokenizer(Inner(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, "w0")), eos=(2,))

    def start(worker: Remote | None = None, **options: object) -> Engine:
        runner = open_runner(request.param, folder, cache_dtype="fp32")
        opened.append(Engine((runner, tokenizer), hooks=Hooks(attention=worker), max_step_tokens=64, **options))
        return opened[-1]

    yield start
    for engine in opened:
        engine.close()


def answers(engine: Engine) -> list[tuple[int, ...]]:
    """Three prompts that begin alike, together, and the first one again."""
    prompts = [text(40, seed=1) + text(8, seed=i) for i in range(3)]
    for i, prompt in enumerate(prompts):
        engine.submit(Request(prompt, SAMPLINGS[i], id=f"r{i}"))
    found: dict[tuple[str, int], list[int]] = {}
    again = True
    while not engine.idle or again:
        if engine.idle:
            again = False
            engine.submit(Request(prompts[0], SAMPLINGS[0], id="again"))
        for delta in engine.step():
            assert not delta.error
            found.setdefault((delta.request_id, delta.index), []).extend(delta.tokens)
    return [tuple(found[key]) for key in sorted(found)]


def test_pages_are_found_and_forked_as_in_the_runners_own_cache(opener: Callable[..., Engine]) -> None:
    worker, plain = Remote(), opener()
    engine = opener(worker)
    assert answers(engine) == answers(plain)
    assert engine.counts().prefix_hits == plain.counts().prefix_hits > 0


def test_queries_come_before_keys_and_values(opener: Callable[..., Engine]) -> None:
    worker = Remote()
    engine = opener(worker)
    answers(engine)
    if engine.facts.backend == "native":  # modules of transformers give all three at once
        assert worker.order == ["begin", "call"] * worker.calls
    else:
        assert not worker.order


def test_under_pressure(opener: Callable[..., Engine]) -> None:
    few = 8 * opener().facts.block_bytes
    engine = opener(Remote(), memory=few)
    assert answers(engine) == answers(opener())
    assert engine.counts().preemptions > 0


@pytest.mark.parametrize("call", [1, 4, 41])
def test_what_is_lost_is_computed_again(opener: Callable[..., Engine], call: int) -> None:
    engine = opener(Remote(loses=call))
    assert answers(engine) == answers(opener())
    assert engine.counts().preemptions > 0
    engine.pool.check(sequence.blocks for sequence in engine.scheduler.running)


def test_the_runner_holds_no_cache(opener: Callable[..., Engine]) -> None:
    runner = opener(Remote()).runner
    if runner.facts.backend == "native":
        assert runner._cache is None
    else:
        assert not runner._attention.stores


def test_another_error_is_raised(opener: Callable[..., Engine]) -> None:
    class Broken(Remote):
        def begin(self, layer: int, q: np.ndarray, batch: Batch) -> None:
            raise RuntimeError("no way")

        def __call__(self, *_: object) -> np.ndarray:
            raise RuntimeError("no way")

    with pytest.raises(RuntimeError, match="no way"):
        answers(opener(Broken()))

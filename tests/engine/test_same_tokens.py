"""Both runners say the same: the default model's greedy answers to twenty prompts, two hundred tokens each.

The native runner writes the answers token by token, all prompts side by side. The torch runner then reads each answer
and says at every place which token it would have written: without a difference it writes the same answer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runner_cases import PROMPTS, Greedy, Part, batch, greedy, open_runner, pages, plain_attention

STEPS = 200
# Two logits closer than this may change places: keys and values are rounded to bfloat16 in the cache, and with bfloat16
# weights torch also rounds every activation and the logits themselves, to steps of an eighth where they are about 20.
TIE = {"float32": 0.1, "bfloat16": 0.75}

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder() -> Path:
    from shoestring.models import resolve

    return resolve("smollm2")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_greedy_tokens(dtype: str, folder: Path, prompts: list[list[int]], capsys: pytest.CaptureFixture) -> None:
    native = open_runner("native", folder, dtype=dtype)
    written = greedy(native, prompts, STEPS)
    native.close()
    reread = reading(folder, dtype, prompts, written)
    differs = reread.tokens != written.tokens
    # How much the reader prefers its own token over the written one.
    gaps = reread.margins[differs]
    with capsys.disabled():
        print(
            f"\n{dtype}: {(~differs).all(1).sum()} of {len(prompts)} answers equal; {differs.sum()} of {differs.size} "
            f"tokens differ, by {gaps.max(initial=0):.3f} in logits at most"
        )
    assert gaps.max(initial=0) <= TIE[dtype]
    assert differs.mean() < {"float32": 0.005, "bfloat16": 0.05}[dtype]


def test_same_arithmetic(folder: Path, prompts: list[list[int]]) -> None:
    """With attention in float32 for both, so that no cache rounds anything, the same logits come out."""
    made = batch(*(Part(ids, [2 * row, 2 * row + 1]) for row, ids in enumerate(prompts)))
    found = []
    for kind in ("native", "torch"):
        runner = open_runner(kind, folder)
        runner.reserve(2 * len(prompts))
        runner.attention = lambda _, *arrays: plain_attention(*arrays)
        found.append(runner.logits(runner.run(made), np.arange(made.tokens, dtype=np.int32)).copy())
        runner.close()
    native, torch_ = found
    assert (native.argmax(1) == torch_.argmax(1)).all()
    assert np.abs(native - torch_).max() < 2e-3


def reading(folder: Path, dtype: str, prompts: list[list[int]], written: Greedy) -> Greedy:
    """The reader's likeliest token at every place of the answers, and its margin over the written one or the next."""
    runner = open_runner("torch", folder, dtype=dtype)
    tokens, margins = [], []
    try:
        runner.reserve(-(-max(map(len, prompts)) // 16) + STEPS // 16 + 1)
        for prompt, answer in zip(prompts, written.tokens):
            ids = [*prompt, *map(int, answer[:-1])]
            hidden = runner.run(batch(Part(ids, pages(len(ids)))))
            found = runner.logits(hidden, np.arange(len(prompt) - 1, len(ids), dtype=np.int32))
            best = found.argmax(1)
            rest = found.copy()
            rest[np.arange(STEPS), best] = -np.inf
            other = np.where(best == answer, rest.max(1), found[np.arange(STEPS), answer])
            tokens.append(best)
            margins.append(found.max(1) - other)
    finally:
        runner.close()
    return Greedy(np.array(tokens), np.array(margins))

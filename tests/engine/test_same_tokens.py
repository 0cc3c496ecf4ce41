"""Both runners say the same: the default model's greedy answers to twenty prompts, two hundred tokens each.

The native runner writes the answers token by token, all prompts side by side. The torch runner then reads each answer
and says at every place which token it would have written: without a difference it writes the same answer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from runner_cases import PROMPTS, Greedy, Part, batch, greedy, open_runner, pages

from shoestring.engine.runner import BLOCK, Runner

STEPS = 200
# How the runners compute: (weights, whether keys and values stay in float32), and how close two logits may be to change
# places. Exact arithmetic leaves no room. A cache in bfloat16 rounds what differs in the last bit to neighbours. With
# weights in bfloat16 torch rounds every activation too, and the logits themselves: to eighths where they are above 16.
CASES = {("float32", True): 0.0, ("float32", False): 0.05, ("bfloat16", False): 0.5}

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


@pytest.mark.parametrize(("dtype", "exact"), CASES, ids=str)
def test_same_greedy_tokens(
    dtype: str, exact: bool, folder: Path, prompts: list[list[int]], capsys: pytest.CaptureFixture
) -> None:
    cache_dtype = "fp32" if exact else "bf16"
    native = open_runner("native", folder, dtype=dtype, cache_dtype=cache_dtype)
    written = greedy(native, prompts, STEPS)
    native.close()
    reread = reading(open_runner("torch", folder, dtype=dtype, cache_dtype=cache_dtype), prompts, written)
    differs = reread.tokens != written.tokens
    gaps = reread.margins[differs]
    with capsys.disabled():
        print(
            f"\n{dtype}{', exact cache' if exact else ''}: {(~differs).all(1).sum()} of {len(prompts)} answers equal; "
            f"{differs.sum()} of {differs.size} tokens differ, by {gaps.max(initial=0):.3f} in logits at most"
        )
    if exact:
        assert not differs.any()
        assert np.abs(written.margins - reread.margins).max() < 5e-3
    assert gaps.max(initial=0) <= CASES[dtype, exact]
    assert differs.mean() < (0.005 if dtype == "float32" else 0.05)


def test_float32_throughout_is_strict(folder: Path, prompts: list[list[int]]) -> None:
    """The first of the cases in brief."""
    native = open_runner("native", folder, cache_dtype="fp32")
    written = greedy(native, prompts[:3], 24)
    native.close()
    reread = reading(open_runner("torch", folder, cache_dtype="fp32"), prompts[:3], written)
    np.testing.assert_array_equal(reread.tokens, written.tokens)
    assert np.abs(written.margins - reread.margins).max() < 5e-3


def reading(runner: Runner, prompts: list[list[int]], written: Greedy) -> Greedy:
    """The reader's likeliest token at every place of the answers, and its margin over the written one or the next."""
    tokens, margins, steps = [], [], written.tokens.shape[1]
    try:
        runner.reserve(-(-max(map(len, prompts)) // BLOCK) + steps // BLOCK + 2)
        for prompt, answer in zip(prompts, written.tokens):
            ids = [*prompt, *map(int, answer[:-1])]
            hidden = runner.run(batch(Part(ids, pages(len(ids)))))
            found = runner.logits(hidden, np.arange(len(prompt) - 1, len(ids), dtype=np.int32))
            best = found.argmax(1)
            rest = found.copy()
            rest[np.arange(steps), best] = -np.inf
            other = np.where(best == answer, rest.max(1), found[np.arange(steps), answer])
            tokens.append(best)
            margins.append(found.max(1) - other)
    finally:
        runner.close()
    return Greedy(np.array(tokens), np.array(margins))

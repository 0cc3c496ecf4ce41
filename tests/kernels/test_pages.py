"""Attention over pages without a model, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.kernels.pages import Pages, page_bytes

HEADS, KV_HEADS, DIM, LAYERS = 6, 3, 24, 2
TABLE = np.array([[5, 1, 7, 2]], np.int32)


def filled(type: str, length: int = 50) -> tuple[Pages, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    pages = Pages.fresh(LAYERS, 9, KV_HEADS, DIM, type)
    pages.data[...] = 255  # what was never written is NaN
    k, v = rng.standard_normal((2, length, KV_HEADS, DIM)).astype(np.float32)
    at = np.arange(length)
    for layer in range(LAYERS):
        pages.store(layer, (TABLE[0][at // 16] * 16 + at % 16).astype(np.int32), k * (layer + 1), v)
    return pages, k, v


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q [tokens, heads, dim]; seen [tokens, keys] bool."""
    k, v = (np.repeat(x, HEADS // KV_HEADS, 1) for x in (k, v))
    scores = np.where(seen[:, None], np.einsum("qhd,khd->qhk", q, k) / DIM**0.5, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("qhk,khd->qhd", weights / total, v), (top + np.log(total))[..., 0]


@pytest.mark.parametrize(("type", "near"), [("fp32", 1e-5), ("bf16", 2e-2), ("int8", 5e-2)])
def test_a_chunk_over_what_is_there(type: str, near: float) -> None:
    pages, k, v = filled(type)
    q = np.random.default_rng(1).standard_normal((10, HEADS, DIM)).astype(np.float32)
    starts, contexts = np.array([0, 10], np.int32), np.array([40], np.int32)
    out, log_sums = pages.attend(1, q, starts, contexts, TABLE)
    want, want_sums = attended(q, 2 * k, v, np.arange(50) <= 40 + np.arange(10)[:, None])
    assert np.abs(out - want).max() < near and np.abs(log_sums - want_sums).max() < 5 * near


def test_as_many_slots_as_are_said() -> None:
    pages, k, v = filled("fp32")
    q = np.random.default_rng(1).standard_normal((4, HEADS, DIM)).astype(np.float32)
    seen = np.array([50, 0, 17, 1], np.int32)
    out, log_sums = pages.attend(0, q, np.array([0, 4], np.int32), np.zeros(1, np.int32), TABLE, seen=seen)
    some = seen > 0
    want, want_sums = attended(q[some], k, v, np.arange(50) < seen[some, None])
    assert np.abs(out[some] - want).max() < 1e-5 and np.abs(log_sums[some] - want_sums).max() < 1e-5
    assert not out[1].any() and np.isneginf(log_sums[1]).all(), "nothing is seen: 0 and no weight"


def test_a_tree_sees_its_ancestors() -> None:
    pages, k, v = filled("fp32")
    q = np.random.default_rng(1).standard_normal((4, HEADS, DIM)).astype(np.float32)
    parents = np.array([-1, 0, 0, 2], np.int32)
    out, _ = pages.attend(0, q, np.array([0, 4], np.int32), np.array([30], np.int32), TABLE, parents=parents)
    seen = np.zeros((4, 50), bool)
    seen[:, :30] = True
    for token, line in enumerate([[0], [0, 1], [0, 2], [0, 2, 3]]):
        seen[token, [30 + at for at in line]] = True
    assert np.abs(out - attended(q, k, v, seen)[0]).max() < 1e-5


@pytest.mark.parametrize("type", ["fp32", "bf16"])
def test_moved_and_copied(type: str) -> None:
    pages, *_ = filled(type)
    before = [tuple(x.copy() for x in pages._read(*place)) for place in ((5, 3), (1, 0))]
    pages.move(TABLE[0], np.array([[3, 41], [16, 3]]))
    pages.copy(7, 8)
    for told, place in ((before[0], (7, 9)), (before[0], (8, 9)), (before[1], (5, 3))):
        for a, b in zip(told, pages._read(*place)):
            np.testing.assert_array_equal(a, b)


def test_what_lies_outside_is_refused() -> None:
    pages, *_ = filled("fp32")
    one, q = np.array([0, 1], np.int32), np.zeros((1, HEADS, DIM), np.float32)
    zero = np.zeros(1, np.int32)
    kept = pages.data.copy()
    for bad in (
        lambda: pages.store(0, np.array([9 * 16], np.int32), q[:, :KV_HEADS], q[:, :KV_HEADS]),
        lambda: pages.store(0, zero, q, q),
        lambda: pages.attend(0, q, one, np.array([64], np.int32), TABLE),
        lambda: pages.attend(0, q, one, np.array([-1], np.int32), TABLE),
        lambda: pages.attend(0, q, one, zero, np.array([[9]], np.int32)),
        lambda: pages.attend(0, q, one, zero, TABLE, seen=np.array([65])),
        lambda: pages.attend(0, q, one, zero, TABLE, parents=zero),
        lambda: pages.attend(0, q[:, :2], one, zero, TABLE),
        lambda: page_bytes(3, 25),
        lambda: page_bytes(3, 24, "fp8"),
    ):
        with pytest.raises(UsageError):
            bad()
    np.testing.assert_array_equal(pages.data, kept)
    with pytest.raises(DoesNotFit):
        Pages.fresh(1 << 20, 1 << 20, 8, 64)

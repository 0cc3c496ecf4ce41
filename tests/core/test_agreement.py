"""Loyalty, fidelity and compression against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shoestring.core.agreement import Agreement, compression_ratio, remaining
from shoestring.core.errors import UsageError


def log(rows):
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, dtype=np.float64))


def test_the_same_distributions_agree_wholly():
    rows = log([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    agreement = Agreement()
    agreement.add(rows, rows)
    assert agreement.label_loyalty().value == 1
    assert agreement.changed().value == 0
    assert agreement.probability_loyalty().value == pytest.approx(1)
    assert agreement.kl().value == pytest.approx(0)


def test_disjoint_distributions_agree_in_nothing():
    agreement = Agreement()
    agreement.add(log([[1, 0]]), log([[0, 1]]))
    assert agreement.label_loyalty().value == 0
    assert agreement.probability_loyalty().value == pytest.approx(0)
    agreement.add(log([[0.5, 0.5]]), log([[0.5, 0.5]]))
    assert (agreement.kl().value, agreement.kl().error, agreement.kl().n) == (math.inf, None, 2)


def test_by_hand():
    # p = (3/4, 1/4), q = (1/4, 3/4), m = (1/2, 1/2)
    agreement = Agreement()
    agreement.add(log([[0.75, 0.25]]), log([[0.25, 0.75]]))
    js = 0.75 * math.log2(1.5) + 0.25 * math.log2(0.5)
    assert agreement.probability_loyalty().value == pytest.approx(1 - math.sqrt(js))
    assert agreement.kl().value == pytest.approx(0.5 * math.log(3))
    assert agreement.label_loyalty().value == 0


def test_a_class_the_teacher_excludes_adds_nothing():
    agreement = Agreement()
    agreement.add(log([[1, 0]]), log([[0.5, 0.5]]))
    assert agreement.kl().value == pytest.approx(math.log(2))
    js = 0.5 * math.log2(4 / 3) + 0.5 * (0.5 * math.log2(2 / 3) + 0.5 * math.log2(2))
    assert agreement.probability_loyalty().value == pytest.approx(1 - math.sqrt(js))


def test_chunks_add_up_to_the_whole_and_errors_are_standard_errors():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 150, 40))
    p, q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    whole, chunks = Agreement(), Agreement()
    whole.add(p, q)
    for start in range(0, 150, 37):
        chunks.add(p[start : start + 37].astype(np.float32), q[start : start + 37].astype(np.float32))
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert whole.kl().value == pytest.approx(kl.mean())
    assert whole.kl().error == pytest.approx(kl.std(ddof=1) / math.sqrt(150))
    low, high = whole.kl().interval
    assert low < kl.mean() < high
    assert whole.label_loyalty().value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    for figure in ("kl", "label_loyalty", "probability_loyalty"):
        a, b = getattr(whole, figure)(), getattr(chunks, figure)()
        assert (a.value, a.error, a.n) == (pytest.approx(b.value, abs=1e-6), pytest.approx(b.error, abs=1e-6), b.n)


def test_padding_does_not_count():
    p, q = log([[[0.9, 0.1], [0.9, 0.1]]]), log([[[0.9, 0.1], [0.1, 0.9]]])
    agreement = Agreement()
    agreement.add(p, q, keep=[[True, False]])
    assert (agreement.label_loyalty().value, agreement.label_loyalty().n) == (1, 1)
    assert agreement.label_loyalty().error is None
    agreement.add(p, q, keep=[[False, False]])
    assert agreement.label_loyalty().n == 1


def test_mistakes():
    with pytest.raises(UsageError, match="log_softmax"):
        Agreement().add([[1.0, 2.0]], [[1.0, 2.0]])
    with pytest.raises(UsageError, match="differ in shape"):
        Agreement().add([[0.0]], [[0.0, 1.0]])
    with pytest.raises(UsageError, match="keep has 2 positions"):
        Agreement().add([[0.0]], [[0.0]], keep=[True, True])
    with pytest.raises(UsageError, match="no positions"):
        Agreement().kl()


def test_compression():
    assert compression_ratio(540, 98) == pytest.approx(5.51, abs=0.01)
    assert remaining(200, 50) == 0.25
    for wrong in ((1, 0), (0, 1), (-1, 1)):
        with pytest.raises(UsageError):
            compression_ratio(*wrong)
    with pytest.raises(UsageError, match="cannot be what is left"):
        remaining(10, 11)

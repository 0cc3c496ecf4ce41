"""What every operator computes, number for number: the reference and the interpreter share these and nothing else.

Matrix products are of INT8 numbers with exact sums; between them values are fp16, and a row is rounded to INT8 with one
scale where it becomes an operand. Reductions are of numbers that add up exactly in float64, so their order is free.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_LEAST = np.float16(6.2e-5)  # a scale below it would lose its own digits


def rounded(rows: Array) -> tuple[Array, Array]:
    """fp16 rows [..., K] as INT8 of the same dimensions and an fp16 scale each [...]."""
    values = rows.astype(np.float32)
    scale = np.maximum((np.abs(values).max(-1) / np.float32(127)).astype(np.float16), _LEAST)
    return np.clip(np.rint(values / scale.astype(np.float32)[..., None]), -127, 127).astype(np.int8), scale


def product(left: Array, right: Array) -> Array:
    """INT8 [M, K] times INT8 [N, K], transposed: int32 [M, N]. Exact: no sum comes near 2^53."""
    return np.asarray(np.rint(left.astype(np.float64) @ right.astype(np.float64).T), np.int32)


def scaled(sums: Array, rows: Array, outputs: Array, bias: Array | None = None) -> Array:
    """int32 sums [M, N] as fp16: (sum + bias) times the scale of the row [M] times that of the output [N]."""
    whole = sums.astype(np.int64) if bias is None else sums.astype(np.int64) + bias
    factor = rows.astype(np.float32)[:, None] * outputs.astype(np.float32)[None]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((whole.astype(np.float32) * factor).astype(np.float16))


def rmsnorm(rows: Array, weight: Array, epsilon: float) -> Array:
    values = rows.astype(np.float64)
    inverse = 1 / np.sqrt(np.ascontiguousarray(values * values).mean(-1, keepdims=True) + epsilon)
    return np.asarray(((values * inverse).astype(np.float32) * weight.astype(np.float32)).astype(np.float16))


def softmax(rows: Array, counts: Array) -> Array:
    """Rows [R, T] of which the first counts[r] elements take part; the others come out as 0."""
    out = np.zeros(rows.shape, np.float16)
    for row, count, into in zip(rows, counts, out):
        taken = row[: int(count)].astype(np.float32)
        powers = np.exp(taken - taken.max()).astype(np.float16)
        into[: int(count)] = (powers.astype(np.float64) / powers.astype(np.float64).sum()).astype(np.float16)
    return out


def silu(values: Array) -> Array:
    x = values.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((x / (1 + np.exp(-x))).astype(np.float16))


def add(a: Array, b: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((a.astype(np.float32) + b.astype(np.float32)).astype(np.float16))


def mul(a: Array, b: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((a.astype(np.float32) * b.astype(np.float32)).astype(np.float16))


def turned(x: Array, cosines: Array, sines: Array) -> Array:
    """Rotary positions of heads [..., head size]; `sines` has its first half negated. Three operations in fp16."""
    half = x.shape[-1] // 2
    return add(mul(x, cosines), mul(np.concatenate([x[..., half:], x[..., :half]], -1), sines))

"""What the matrix formats mean and what their product is, in plain numpy: the oracle of the native kernels."""

from __future__ import annotations

import numpy as np


def weight(
    format: str, rows: int, cols: int, source: np.ndarray, group: int = 32, scales: np.ndarray | None = None
) -> np.ndarray:
    """The stored matrix as float32 [rows, cols]; `source`, `group` and `scales` as `matrix.make` takes them."""
    stored = source.reshape(-1).view(np.uint8)
    if format == "fp32":
        return stored.view(np.float32).reshape(rows, cols).copy()
    if format == "bf16":
        return from_bfloat16(stored.view(np.uint16)).reshape(rows, cols)
    groups = -(-cols // group)
    if format in ("int8", "int4"):
        assert scales is not None
        d = from_bfloat16(scales.reshape(rows, groups, 1).view(np.uint16))
        blocks = stored.reshape(rows, groups, -1)
        q = blocks.view(np.int8).astype(np.float32) if format == "int8" else _nibbles(blocks) - 8
        return (d * q).reshape(rows, -1)[:, :cols].copy()
    if format.startswith("binary"):
        assert scales is not None
        planes = int(format[-1])
        numbers = scales.view(np.float16).reshape(rows, groups, planes + 1).astype(np.float32)
        bits = np.unpackbits(stored.reshape(rows, planes, groups, -1), axis=3, bitorder="little")
        values = np.zeros((rows, groups, group), np.float32)
        with np.errstate(all="ignore"):
            for plane in range(planes):
                values += numbers[..., plane : plane + 1] * np.where(bits[:, plane], np.float32(1), np.float32(-1))
            return (values + numbers[..., planes:]).reshape(rows, -1)[:, :cols].copy()
    if format.startswith(("uniform", "trit", "ternary")):
        assert scales is not None
        return _in_torch(f"{format}/{group}", rows, cols, stored, scales)
    blocks = stored.reshape(rows, groups, -1)
    d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    if format == "q8_0":
        return (d * blocks[..., 2:].view(np.int8).astype(np.float32)).reshape(rows, cols)
    if format == "q4_0":
        return (d * (_nibbles(blocks[..., 2:]) - 8)).reshape(rows, cols)
    m = blocks[..., 2:4].copy().view(np.float16).astype(np.float32)
    return (d * _nibbles(blocks[..., 4:]) + m).reshape(rows, cols)


def _in_torch(spec: str, rows: int, cols: int, stored: np.ndarray, scales: np.ndarray) -> np.ndarray:
    import torch

    from shoestring.kernels import formats

    made = formats.parse(spec)
    tensors = {"weight": torch.from_numpy(stored), "scales": torch.from_numpy(scales.view(np.float16))}
    shaped = {name: tensors[name].view(dims) for name, (_, dims) in made.layout.tensors(rows, cols).items()}
    return np.asarray(made.unpack(shaped, cols).numpy())


def rounded(x: np.ndarray, kind: str, group: int = 32) -> np.ndarray:
    """x [tokens, cols] as a format of this kind sees it, float32.

    "float32" leaves it, "bfloat16" rounds each value, "q8" rounds to int8 codes with a scale of absmax / 127 for each
    token and group (halves to even; a group with an infinity or a NaN is NaN throughout, one below 2^-120 is zero).
    """
    x = np.asarray(x, np.float32)
    if kind == "float32":
        return x
    if kind == "bfloat16":
        return from_bfloat16(to_bfloat16(x))
    tokens, cols = x.shape
    padded = np.zeros((tokens, -(-cols // group) * group), np.float32)
    padded[:, :cols] = x
    groups = padded.reshape(tokens, -(-cols // group), group)
    top = np.abs(groups).max(axis=2, keepdims=True)
    with np.errstate(all="ignore"):
        codes = np.rint(groups * (np.float32(127) / top))
        values = codes * (top / np.float32(127))
    values = np.where(top < np.float32(2.0**-120), np.float32(0), values)
    values = np.where(np.isfinite(top), values, np.float32(np.nan))
    return values.reshape(padded.shape)[:, :cols]


def multiply(weight: np.ndarray, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x @ weight.T + bias, summed in float64."""
    with np.errstate(all="ignore"):
        y = x.astype(np.float64) @ weight.astype(np.float64).T
    return y if bias is None else y + bias


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest, halves to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), near)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """Codes of each block: the low nibbles of all its bytes, then the high ones."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=-1).astype(np.float32)

"""Rounding that makes up for its errors: GPTQ on ternary grids, for many matrices of one size at once."""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.kernels.formats import dictionary

BLOCK = 128  # columns whose errors reach the rest of the matrix together
DAMPING, LEAST = 0.1, 1e-6


def gptq(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round each column to its row's grid and let the columns that are still to come make up for the error.

    Args:
        weight: [matrices, rows, columns]; the grids are those of its rows, `dictionary.ends`.
        hessian: [matrices, columns, columns], X^T X of each matrix's inputs up to a factor; the identity rounds to
            the nearest value, and so does one that has no inverse.

    Returns:
        Symbols, uint8 of the weight's shape, and the rows' smallest and largest values, float32 [matrices, rows].
    """
    rest = weight.float().clone()
    low, high = dictionary.ends(rest)
    factor = inverse_factor(hessian)
    symbols = torch.empty(rest.shape, dtype=torch.uint8)
    columns = rest.shape[-1]
    for start in range(0, columns, BLOCK):
        end = min(columns, start + BLOCK)
        block, inner = rest[:, :, start:end].clone(), factor[:, start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            column = block[:, :, j : j + 1]
            symbols[:, :, start + j] = dictionary.to_symbols(column, low, high)[:, :, 0]
            rounded = dictionary.values(symbols[:, :, start + j, None], low, high)
            error = (column - rounded) / inner[:, j : j + 1, j : j + 1]  # eq. 3: (w - q) / U_ii
            block[:, :, j:] -= error @ inner[:, j : j + 1, j:]  # eq. 3: W -= err U_i
            errors[:, :, j] = error[:, :, 0]
        rest[:, :, end:] -= errors @ factor[:, start:end, end:]
    return symbols, low, high


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of each damped matrix [matrices, n, n]; of the identity where there is
    no such factor, which leaves the others of the batch as they are."""
    made = hessian.float().clone()
    diagonal = made.diagonal(dim1=1, dim2=2)
    diagonal += (DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(LEAST)  # eq. 3
    unit = torch.eye(made.shape[-1])
    made[~torch.isfinite(made).all(-1).all(-1)] = unit
    while True:
        lower, failed = torch.linalg.cholesky_ex(made)
        lower[failed > 0] = unit
        inverse = torch.cholesky_inverse(lower)
        upper, also = torch.linalg.cholesky_ex(inverse, upper=True)
        wrong = (failed > 0) | (also > 0) | ~torch.isfinite(upper).all(-1).all(-1)
        if not wrong.any():
            return upper
        made[wrong] = unit

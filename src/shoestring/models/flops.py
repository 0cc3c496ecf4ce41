"""Floating-point operations of a piece of work: counted where torch sees them, by formula where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from shoestring.core.shape import Shape

_Dims = tuple[int, ...]


def _attention(query: _Dims, key: _Dims, value: _Dims, *_: Any, **__: Any) -> int:
    return _attention_products(query, key, value, scores=1, values=1)


def _attention_backward(_grad: _Dims, query: _Dims, key: _Dims, value: _Dims, *_: Any, **__: Any) -> int:
    # The scores are computed once more, then come the gradients of query and key, of value and of the probabilities.
    return _attention_products(query, key, value, scores=3, values=2)


def _attention_products(query: _Dims, key: _Dims, value: _Dims, scores: int, values: int) -> int:
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[-2] * (scores * width + values * value[-1])


def _grouped(left: _Dims, right: _Dims, *_: Any, **__: Any) -> int:
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2 * groups * left[-2] * left[-1] * right[-1]


# Products that torch's own counter leaves out: attention on the CPU, and the experts of a mixture.
_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
}


def count_flops(
    fn: Callable[[], Any], shape: Shape | None = None, tokens: int = 0, context: int = 0
) -> tuple[int, str]:
    """Run `fn` and count its matrix FLOPs (2 per multiply-add; element-wise work is left out).

    Args:
        shape, tokens, context: for a model with kernels that torch's counter cannot see: then the formula for `tokens`
            forward tokens that attend over `context` positions on average is taken instead, if it is larger.

    Returns:
        (FLOPs, "counted" or "modelled").
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        fn()
    counted = counter.get_total_flops()
    if shape is not None and tokens:
        expected = forward_flops(shape, tokens, context)
        # Far less than the formula means that the products ran in kernels outside torch.
        if counted < 0.5 * expected:
            return int(expected), "modelled"
    return int(counted), "counted"


def forward_flops(shape: Shape, tokens: int, context: int = 0) -> float:
    """Forward pass: 2 FLOPs per multiplied weight and token, plus attention over `context` positions."""
    return shape.flops_per_token(context) * tokens


def training_flops(
    shape: Shape, tokens: int, context: int = 0, *, base_trained: bool = True, recompute: bool = False
) -> float:
    """Forward and backward pass of `tokens` tokens.

    Backward passes the error through each matrix (as dear as the forward pass) and, for trained matrices, computes its
    gradient (as dear again): 3x the forward pass in full training, 2x when the base is frozen and only a small adapter
    is trained; attention's products have no weights, so their backward is twice their forward in both (2.5 times when
    the kernel computes the scores again). Gradient checkpointing (`recompute`) adds one more forward pass.
    """
    weights = forward_flops(shape, tokens)
    attention = forward_flops(shape, tokens, context) - weights
    return weights * ((3 if base_trained else 2) + recompute) + attention * (3 + recompute)

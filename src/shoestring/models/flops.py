"""Floating-point operations of a piece of work: counted where torch sees them, by formula where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from shoestring.core.shape import Shape


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
    with FlopCounterMode(display=False) as counter:
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
    gradient (as dear again): 3x the forward pass in full training, 2x when the base is frozen and only a small adapter is
    trained; attention's products have no weights, so their backward is twice their forward in both. Gradient checkpointing
    (`recompute`) adds one more forward pass.
    """
    weights = forward_flops(shape, tokens)
    attention = forward_flops(shape, tokens, context) - weights
    return weights * ((3 if base_trained else 2) + recompute) + attention * (3 + recompute)

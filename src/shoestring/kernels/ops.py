"""Products and look-ups on packed weights, for every caller: native where it can be, plain torch where not.

The format and its arithmetic stand in `shoestring.kernels.reference`. Weights are used as they are stored (they may be
memory-mapped); nothing is prepared in advance and no whole weight is ever unpacked.

Without gradients a call goes straight to the library. Under autograd, `torch.compile` or a dispatch mode it goes
through the operator `torch.ops.shoestring.quantized_linear`, which differentiates with respect to x and bias.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shoestring.core.errors import ShoestringError, UsageError, nearest
from shoestring.kernels import reference
from shoestring.kernels.loader import LEVELS, REFERENCE, load

__all__ = [
    "Product",
    "backend",
    "dequantize",
    "embedding",
    "quantize",
    "quantized_linear",
    "recorded",
    "set_isa",
    "set_threads",
    "threads",
]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_LAYER = struct.Struct("@7q")  # SkLayer of native/kernels.h

_loaded = load()
_library: Any = _loaded.library
_reason = _loaded.reason
_threads: int | None = None


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Round a matrix [out, in] to packed codes and bfloat16 scales [out, groups], to the bit as `reference.quantize`.

    Raises:
        UsageError: an unknown format, not a matrix, or not all numbers finite.
    """
    weight = weight.detach()
    if _library is None or weight.dtype not in _TYPES or not weight.is_cpu or _indirect(weight):
        return reference.quantize(weight, bits, group)
    packed, scales = reference.empty(weight, bits, group)
    source = weight.contiguous()
    failed = _library.sk_round(
        source.data_ptr(),
        _TYPES[weight.dtype],
        packed.data_ptr(),
        scales.data_ptr(),
        *weight.shape,
        bits,
        group,
        threads(),
    )
    if failed:
        reference.refuse_not_finite(weight)
        raise ShoestringError(f"A matrix of {list(weight.shape)} could not be rounded")
    return packed, scales


def quantized_linear(
    x: Tensor, packed: Tensor, scales: Tensor, bits: int, group: int, in_features: int, bias: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias with a packed weight and activations rounded to int8.

    Args:
        x: [..., in_features], any floating point type, any strides, any number of tokens.
        packed, scales: as `quantize` returns them.
        bias: [out], or None.

    Returns:
        [..., out] in x's type, summed in float32. The same bits for any number of threads.

    Raises:
        UsageError: shapes or types that do not belong together.
    """
    if recorded(x, bias):
        return torch.ops.shoestring.quantized_linear(x, packed, scales, bits, group, in_features, bias)
    return _linear(x, packed, scales, bits, group, in_features, bias)


class Product:
    """`quantized_linear` for a module that keeps its weight: what was checked once is not checked at every call.

    A call takes x [..., in_features] and the module's own tensors, and returns what `quantized_linear` returns. The
    check is repeated when other tensors are passed, or the same ones with their values elsewhere.
    """

    def __init__(self, bits: int, group: int, in_features: int) -> None:
        self.bits, self.group, self.in_features = bits, group, in_features
        # One tuple, replaced whole: a call on another thread sees the old or the new, never parts of both.
        self._known: tuple[Any, ...] = (None,) * 7

    def __reduce__(self) -> tuple[Any, ...]:
        # Addresses mean nothing in a copy or in another process.
        return Product, (self.bits, self.group, self.in_features)

    def __call__(self, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if recorded(x, bias):
            return torch.ops.shoestring.quantized_linear(
                x, packed.flatten(1), scales, self.bits, self.group, self.in_features, bias
            )
        known_packed, known_scales, known_bias, known_dtype, places, layer, rows = self._known
        shape = x.shape
        if (
            packed is known_packed
            and scales is known_scales
            and bias is known_bias
            and x.dtype is known_dtype
            and (packed.data_ptr(), scales.data_ptr(), bias is not None and bias.data_ptr()) == places
            and shape
            and shape[-1] == self.in_features
            and x.is_cpu
            and x.is_contiguous()
            and _library is not None
        ):
            return _run(x, layer, rows)
        y = _linear(x, packed.flatten(1), scales, self.bits, self.group, self.in_features, bias)
        self._remember(x.dtype, packed, scales, bias)
        return y

    def _remember(self, dtype: torch.dtype, packed: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        if not (_fits_library(packed, scales, dtype) and packed.is_contiguous() and scales.is_contiguous()):
            return
        if bias is not None and not (bias.is_cpu and bias.is_contiguous() and bias.dtype is dtype):
            return
        places = (packed.data_ptr(), scales.data_ptr(), bias is not None and bias.data_ptr())
        layer = _layer(packed, scales, self.bits, self.group, self.in_features, bias)
        self._known = (packed, scales, bias, dtype, places, layer, scales.shape[0])


def recorded(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd, torch.compile or a dispatch mode must see the call."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
    )


def embedding(
    ids: Tensor, packed: Tensor, scales: Tensor, bits: int, group: int, hidden: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows `ids` of a packed table, [*ids.shape, hidden] in `dtype`.

    Raises:
        UsageError: an id outside the table, or shapes that do not belong together.
    """
    if _indirect(ids):
        return reference.embedding(ids, packed, scales, bits, group, hidden, dtype)
    rows = _check_weight(packed, scales, bits, group, hidden)
    if not _fits_library(packed, scales, dtype):
        if ids.is_cpu and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise _outside(ids, rows)
        return reference.embedding(ids, packed, scales, bits, group, hidden, dtype)
    flat = ids.to(torch.int64).contiguous()
    packed, scales = packed.contiguous(), scales.contiguous()
    y = torch.empty((*ids.shape, hidden), dtype=dtype)
    failed = _library.sk_rows(
        flat.data_ptr(), packed.data_ptr(), scales.data_ptr(), y.data_ptr(),
        0, flat.numel(), hidden, rows, _TYPES[dtype], bits, group,
    )  # fmt: skip
    if failed:
        raise _outside(ids, rows)
    return y


def _outside(ids: Tensor, rows: int) -> UsageError:
    return UsageError(
        f"Token ids {int(ids.min())}..{int(ids.max())} do not fit a table of {rows} rows",
        remedy="Use the tokenizer that belongs to the model",
    )


def dequantize(packed: Tensor, scales: Tensor, bits: int, group: int, in_features: int) -> Tensor:
    """The weight as float32 [out, in_features]."""
    if _indirect(packed) or not _fits_library(packed, scales, torch.float32):
        return reference.dequantize(packed, scales, bits, group, in_features)
    rows = _check_weight(packed, scales, bits, group, in_features)
    packed, scales = packed.contiguous(), scales.contiguous()
    y = torch.empty((rows, in_features))
    _library.sk_rows(
        None, packed.data_ptr(), scales.data_ptr(), y.data_ptr(), 0, rows, in_features, rows, 0, bits, group
    )
    return y


def backend() -> dict[str, Any]:
    """What computes: isa, native, the levels this CPU can run, and why the library is not used when it is not."""
    if _library is None:
        return {"isa": REFERENCE, "native": False, "levels": [REFERENCE], "reason": _reason}
    levels = [*_library.sk_isas().decode().split(), REFERENCE]
    return {"isa": _library.sk_isa().decode(), "native": True, "levels": levels, "reason": ""}


def set_isa(name: str) -> str:
    """Use the best level not above `name` ("reference": plain torch) from now on; returns the level in force.

    Raises:
        UsageError: no level has that name.
    """
    global _library, _reason
    if name not in LEVELS:
        raise UsageError(f"{name} names no instruction set", remedy=nearest(name, LEVELS))
    if name == REFERENCE or _loaded.library is None:
        _library, _reason = None, _loaded.reason or "plain torch was asked for"
        return REFERENCE
    _library, _reason = _loaded.library, ""
    _library.sk_set_isa(name.encode())
    return _library.sk_isa().decode()


def set_threads(count: int | None) -> None:
    """Threads of a call; None follows torch.get_num_threads()."""
    global _threads
    if count is not None and count < 1:
        raise UsageError(f"{count} threads cannot compute anything", remedy="Use 1 or more, or None to follow torch")
    _threads = count


def threads() -> int:
    """The most that may work on a call."""
    return _threads or torch.get_num_threads()


def _indirect(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(tensor) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def _fits_library(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> bool:
    return _library is not None and dtype in _TYPES and packed.device.type == scales.device.type == "cpu"


def _check_weight(packed: Tensor, scales: Tensor, bits: int, group: int, in_features: int) -> int:
    """The number of rows. The library trusts its arguments, so this must hold before any call."""
    reference.check_format(bits, group)
    groups = -(-in_features // group)
    rows = scales.shape[0]
    if (
        scales.shape != (rows, groups)
        or packed.shape != (rows, groups * group * bits // 8)
        or scales.dtype is not torch.bfloat16
        or packed.dtype is not (torch.uint8 if bits == 4 else torch.int8)
    ):
        raise UsageError(
            f"Packed weight {packed.dtype} {list(packed.shape)} with scales {scales.dtype} {list(scales.shape)} is not"
            f" a {bits}-bit weight of {in_features} inputs in groups of {group}",
            remedy="Pass the tensors as shoestring.kernels.ops.quantize returned them",
        )
    return rows


def _linear(
    x: Tensor, packed: Tensor, scales: Tensor, bits: int, group: int, in_features: int, bias: Tensor | None
) -> Tensor:
    rows = _check_weight(packed, scales, bits, group, in_features)
    shape = x.shape
    if not shape or shape[-1] != in_features:
        raise UsageError(f"An input of shape {list(shape)} does not end in the layer's {in_features} features")
    if bias is not None and bias.shape != (rows,):
        raise UsageError(f"A bias of shape {list(bias.shape)} does not fit {rows} outputs")
    if not (_fits_library(packed, scales, x.dtype) and x.is_cpu):
        if not x.dtype.is_floating_point:
            raise UsageError(f"An input of {x.dtype} is not floating point")
        return reference.quantized_linear(x, packed, scales, bits, group, in_features, bias)
    packed, scales = packed.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    return _run(x.contiguous(), _layer(packed, scales, bits, group, in_features, bias), rows)


def _layer(packed: Tensor, scales: Tensor, bits: int, group: int, in_features: int, bias: Tensor | None) -> bytes:
    """The library's SkLayer. It holds addresses: the tensors must outlive its use."""
    offset = 0 if bias is None else bias.data_ptr()
    return _LAYER.pack(packed.data_ptr(), scales.data_ptr(), offset, in_features, scales.shape[0], bits, group)


def _run(x: Tensor, layer: bytes, rows: int) -> Tensor:
    """x is contiguous and fits the layer, which was checked: from here on everything is trusted."""
    *leading, in_features = x.shape
    leading.append(rows)
    y = x.new_empty(leading)
    tokens = x.numel() // in_features
    failed = _library.sk_linear(layer, x.data_ptr(), y.data_ptr(), tokens, _TYPES[x.dtype], threads())
    if failed:
        raise ShoestringError("A quantized layer could not run", "memory for its activations ran out")
    return y


def _input_grad(grad: Tensor, packed: Tensor, scales: Tensor, bits: int, group: int, in_features: int) -> Tensor:
    """grad [..., out] @ weight, unpacking a block of rows at a time; rounding of activations counts as identity."""
    flat = grad.reshape(-1, grad.shape[-1])
    total = torch.zeros(len(flat), in_features, dtype=torch.float32, device=grad.device)
    step = max(1, reference.BLOCK // in_features)
    for start in range(0, len(scales), step):
        part = slice(start, start + step)
        weight = dequantize(packed[part], scales[part], bits, group, in_features)
        total += flat[:, part] @ weight.to(grad.dtype)
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


_operators = torch.library.Library("shoestring", "DEF")
_operators.define(
    "quantized_linear(Tensor x, Tensor packed, Tensor scales, int bits, int group, int in_features,"
    " Tensor? bias) -> Tensor"
)
_operators.define(
    "input_grad(Tensor grad, Tensor packed, Tensor scales, int bits, int group, int in_features) -> Tensor"
)
_operators.impl("quantized_linear", _linear, "CompositeExplicitAutograd")
_operators.impl("input_grad", _input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("shoestring::quantized_linear", lib=_operators)
def _linear_shape(x, packed, scales, bits, group, in_features, bias):
    return x.new_empty(*x.shape[:-1], scales.shape[0])


@torch.library.register_fake("shoestring::input_grad", lib=_operators)
def _input_grad_shape(grad, packed, scales, bits, group, in_features):
    return grad.new_empty(*grad.shape[:-1], in_features)


def _keep_for_backward(ctx, inputs, output):
    _, packed, scales, ctx.bits, ctx.group, ctx.in_features, _ = inputs
    ctx.save_for_backward(packed, scales)


def _backward(ctx, grad):
    packed, scales = ctx.saved_tensors
    x_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = torch.ops.shoestring.input_grad(grad, packed, scales, ctx.bits, ctx.group, ctx.in_features)
    if ctx.needs_input_grad[6]:
        bias_grad = grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad
    return x_grad, None, None, None, None, None, bias_grad


torch.library.register_autograd(
    "shoestring::quantized_linear", _backward, setup_context=_keep_for_backward, lib=_operators
)


@register_flop_formula([torch.ops.shoestring.quantized_linear, torch.ops.shoestring.input_grad])
def _flops(x_shape, packed_shape, scales_shape, bits, group, in_features, *args, out_shape=None, **kwargs) -> int:
    tokens = 1
    for size in x_shape[:-1]:
        tokens *= size
    return 2 * tokens * scales_shape[0] * in_features

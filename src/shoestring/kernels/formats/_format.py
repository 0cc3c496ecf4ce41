"""What every format of packed weights answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.kernels import ops, reference
from shoestring.kernels.layout import Layout

DTYPES = {"U8": torch.uint8, "I8": torch.int8, "BF16": torch.bfloat16, "F16": torch.float16}
Tensors = Mapping[str, Tensor]


class Format:
    """A matrix [rows, cols] as packed tensors.

    Attributes:
        layout: types and sizes of the tensors.
        rounds: whether a product rounds its activations to int8 by groups; if not, it is that of the plain weight.
    """

    rounds: ClassVar[bool] = True

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __str__(self) -> str:
        return str(self.layout)

    @property
    def native(self) -> bool:
        """Whether products run on the native kernels where they can; if not, always in torch."""
        return self.rounds

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a float matrix, each number rounded to the nearest that the format has.

        Raises:
            UsageError: not a matrix, not finite, or the format has no plain rounding.
        """
        raise UsageError(f"{self} has no plain rounding", remedy="Use the method that fits its codes")

    def unpack(self, tensors: Tensors, cols: int) -> Tensor:
        """The matrix, float32 [rows, cols]."""
        raise NotImplementedError

    def bound(self, tensors: Tensors, cols: int) -> Tensor:
        """The largest error that `pack` may make of each number, [rows, cols]."""
        raise UsageError(f"{self} has no plain rounding")

    def rows(self, tensors: Tensors, ids: Tensor, cols: int) -> Tensor:
        """Rows `ids` [count] of the matrix, float32 [count, cols]."""
        return self.unpack({name: tensor[ids] for name, tensor in tensors.items()}, cols)

    def multiply(self, x: Tensor, tensors: Tensors, cols: int, rows: int) -> Tensor:
        """x [..., cols] @ matrix.T in x's type, in plain torch; what the native kernels are held against."""
        tokens = x.reshape(-1, cols)
        if not self.rounds:
            weight = self.unpack(tensors, cols)
            return F.linear(x, weight.to(x.dtype))
        rounded = reference.round_activations(tokens, self.layout.group)
        y = torch.empty(len(tokens), rows, dtype=x.dtype, device=x.device)
        step = max(1, reference.BLOCK // cols)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            weight = self.unpack({name: tensor[part] for name, tensor in tensors.items()}, cols)
            y[:, part] = F.linear(rounded, weight).to(x.dtype)
        return y.view(*x.shape[:-1], rows)

    def empty(self, rows: int, cols: int, device: torch.device | str = "meta") -> dict[str, Tensor]:
        """Tensors of the right types and sizes, without values."""
        return {
            name: torch.empty(dims, dtype=DTYPES[dtype], device=device)
            for name, (dtype, dims) in self.layout.tensors(rows, cols).items()
        }


class Product:
    """x @ matrix.T + bias for a module that keeps the tensors: on the native kernels where it can be, else in torch.

    The kernels' own layout is made at the first call and kept beside the tensors; it is as large as they are. Under
    autograd it differentiates with respect to x and bias.
    """

    def __init__(self, format: Format, rows: int, cols: int) -> None:
        self.format, self.size = format, (rows, cols)
        self._made: tuple[Any, Any] = (None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Addresses mean nothing in a copy or in another process.
        return Product, (self.format, *self.size)

    def __call__(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        if bias is not None and not self.format.native and not x.is_meta and not ops.recorded(x, bias):
            # As a plain layer does it: the bias is added before the sum is rounded.
            self._check(x)
            return F.linear(x, self.format.unpack(tensors, self.size[1]).to(x.dtype), bias.to(x.dtype))
        y = _Differentiable.apply(x, self, tensors) if ops.recorded(x, bias) else self.plain(x, tensors)
        return y if bias is None else y + bias.to(y.dtype)

    def plain(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Without gradients and without the bias."""
        rows, cols = self.size
        self._check(x)
        if x.is_meta:  # of which formats as long as their content have no length
            return x.new_empty(*x.shape[:-1], rows)
        weight = tensors["weight"]
        if not (self.format.native and x.is_cpu and weight.is_cpu and ops.backend()["native"]) or _traced(x):
            return self.format.multiply(x, tensors, cols, rows)
        key = (weight.data_ptr(), weight._version)
        if self._made[0] != key:
            arrays = {name: _bits(tensor) for name, tensor in tensors.items()}
            self._made = key, self.format.layout.matrix(arrays, rows, cols)
        y = self._made[1].multiply(x.reshape(-1, cols).float().numpy(), ops.threads())
        return torch.from_numpy(y).to(x.dtype).view(*x.shape[:-1], rows)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.size[1]:
            raise UsageError(f"An input of {x.shape[-1]} features does not fit a layer of {self.size[1]}")

    def gradient(self, grad: Tensor, tensors: Tensors) -> Tensor:
        """grad [..., rows] @ matrix in grad's type; rounding of activations counts as identity."""
        if grad.is_meta:
            return grad.new_empty(*grad.shape[:-1], self.size[1])
        return grad @ self.format.unpack(tensors, self.size[1]).to(grad.dtype)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, tensors: Tensors) -> Tensor:
        ctx.product, ctx.tensors = product, tensors
        return product.plain(x.detach(), tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.product.gradient(grad, ctx.tensors) if ctx.needs_input_grad[0] else None, None, None


def _traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def _bits(tensor: Tensor) -> Any:
    """The tensor's bytes as numpy has them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()

"""A backward pass that keeps less: what autograd can make again at once, or holds in twice the bytes, is not kept.

Under a frozen base the activations are most of what training takes. Three things are done about them, and none changes
a gradient by a bit:

- A product of two activations, or an activation function, whose own inputs the graph keeps anyway is not kept: a gated
  feed-forward keeps gate, activated gate, up and their product, and only two of the four say something new. Such a
  tensor is made again from its node's inputs when the backward pass asks for it, by the same operation.
- A float32 copy of a bfloat16 tensor, as norms make one to compute in, is kept as the bfloat16 it came from.
- Short-lived tensors leave holes between those that are kept, and an aligned piece of the same size does not fit into
  such a hole: without help the holes come to as much as the activations. Every so many bytes the pages of the holes
  are given back to the system.

Nothing of the model runs twice and no module is looked at: this stands between autograd and what it saves, so it works
for any model and any adapter, and what it does not know is kept as ever.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_BYTES = 2**18  # below that, what is saved is not worth a call
_TRIM_BYTES = 2**28  # between two calls that give holes back: each costs some hundredths of a second
_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
# Nodes that keep their inputs, and how to make their output again from these.
_AGAIN: dict[str, Callable[[Any], Tensor]] = {
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
}


@contextmanager
def lean_backward() -> Iterator[None]:
    """Within the block a forward pass keeps less for its backward pass; gradients stay what they are, bit for bit."""
    kept_bytes = 0
    narrowed: weakref.WeakValueDictionary[int, _Narrowed] = weakref.WeakValueDictionary()

    def pack(tensor: Tensor) -> Tensor | _Again | _Narrowed:
        nonlocal kept_bytes
        node, size = tensor.grad_fn, tensor.numel() * tensor.element_size()
        if node is None or size < _LEAST_BYTES:
            return tensor
        kept_bytes += size
        if kept_bytes > _TRIM_BYTES:
            kept_bytes = 0
            give_back_holes()
        if node.name() == "ToCopyBackward0" and _from_bfloat16(tensor, node):
            # Several operations save the same copy: they share what stands for it.
            known = narrowed.get(id(tensor))
            if known is None or known.of() is not tensor:
                known = narrowed[id(tensor)] = _Narrowed(tensor)
            return known
        while node.name() in _RESHAPES and tensor.is_contiguous():
            node = node.next_functions[0][0]
            if node is None:
                return tensor
        return _Again(node, tensor) if _can_be_made_again(node) else tensor

    def unpack(kept: Tensor | _Again | _Narrowed) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.tensor()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Narrowed:
    """A float32 tensor whose numbers are all bfloat16 numbers."""

    def __init__(self, tensor: Tensor) -> None:
        self.of = weakref.ref(tensor)
        self.narrow = tensor.detach().to(torch.bfloat16)

    def tensor(self) -> Tensor:
        return self.narrow.float()


class _Again:
    """A tensor that is made again by the node of the graph that made it."""

    def __init__(self, node: Any, tensor: Tensor) -> None:
        self.node, self.shape, self.dtype = node, tensor.shape, tensor.dtype

    def tensor(self) -> Tensor:
        with torch.no_grad():
            made = _AGAIN[self.node.name()](self.node)
        assert made.dtype == self.dtype
        return made.view(self.shape)


def _can_be_made_again(node: Any) -> bool:
    """Whether the graph keeps every input of `node`: a product keeps each only for the gradient of the other."""
    if node.name() not in _AGAIN:
        return False
    inputs = [source for source, _ in node.next_functions]
    return all(source is not None for source in inputs) and (node.name() != "MulBackward0" or len(inputs) == 2)


def _from_bfloat16(tensor: Tensor, node: Any) -> bool:
    source, number = node.next_functions[0]
    if tensor.dtype != torch.float32 or source is None:
        return False
    return source._input_metadata[number].dtype == torch.bfloat16


def _trim() -> Any:
    """`malloc_trim` of glibc; other systems' libraries have no such call, or no such holes."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


_MALLOC_TRIM = _trim()


def give_back_holes() -> None:
    """Let the system have the memory that is free between pieces in use."""
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)

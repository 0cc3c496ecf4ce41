"""A backward pass that keeps less, and keeps it in one place.

Under a frozen base the activations are most of what training takes. Three things are done about them, and none changes
a gradient by a bit:

- A product of two activations, or an activation function, whose own inputs the graph keeps anyway is not kept: a gated
  feed-forward keeps gate, activated gate, up and their product, and only two of the four say something new. Such a
  tensor is made again from its node's inputs when the backward pass asks for it, by the same operation.
- A float32 copy of a bfloat16 tensor, as norms make one to compute in, is kept as the bfloat16 it came from.
- What is kept is moved out of the heap into blocks that stay from step to step. On the heap it would lie among the
  short-lived tensors of the forward pass and leave holes behind that no later one fits into; those holes can take as
  much memory as the activations themselves.

Nothing of the model runs twice and no module is looked at: this stands between autograd and what it saves, so it works
for any model and any adapter, and what it does not know is kept as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_LEAST_BYTES = 2**17  # below that, what is saved is not worth a call
_BLOCK_BYTES = 2**26  # above the largest piece that the heap is asked for: such blocks are the system's own
_ALIGNED = 64
_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
# Nodes that keep their inputs, and how to make their output again from these.
_AGAIN: dict[str, Callable[[Any], Tensor]] = {
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
}


class LeanBackward:
    """For one model and one run; a forward pass inside `with lean():` keeps less for its backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._blocks: list[Tensor] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        own = {t.untyped_storage()._cdata for t in chain(self.model.parameters(), self.model.buffers())}
        shelf = _Shelf(self._blocks)
        narrowed: weakref.WeakValueDictionary[int, _Narrowed] = weakref.WeakValueDictionary()

        def pack(tensor: Tensor) -> Tensor | _Again | _Narrowed | _Moved:
            if type(tensor) is not Tensor or tensor.numel() * tensor.element_size() < _LEAST_BYTES:
                return tensor
            node: Any = tensor.grad_fn
            if node is not None and node.name() == "ToCopyBackward0" and _from_bfloat16(tensor, node):
                # Several operations save the same copy: they share what stands for it.
                known = narrowed.get(id(tensor))
                if known is None or known.of() is not tensor:
                    known = narrowed[id(tensor)] = _Narrowed(tensor, shelf)
                return known
            while node is not None and node.name() in _RESHAPES and tensor.is_contiguous():
                node = node.next_functions[0][0]
            if node is not None and _can_be_made_again(node):
                return _Again(node, tensor)
            if tensor.untyped_storage()._cdata in own:
                return tensor
            return shelf.move(tensor)

        def unpack(kept: Tensor | _Again | _Narrowed | _Moved) -> Tensor:
            return kept if isinstance(kept, Tensor) else kept.tensor()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


class _Shelf:
    """Where the tensors of one forward pass are kept. Its blocks go back when the last of them is gone."""

    def __init__(self, blocks: list[Tensor]) -> None:
        self.free, self.blocks, self.used = blocks, list[Tensor](), _BLOCK_BYTES
        self.moved: dict[int, tuple[StorageWeakRef, Tensor]] = {}
        weakref.finalize(self, blocks.extend, self.blocks)

    def room(self, size: int) -> Tensor:
        """Bytes, uint8 (size,)."""
        if size > _BLOCK_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        if self.used + size > _BLOCK_BYTES:
            self.blocks.append(self._block())
            self.used = 0
        start, self.used = self.used, -(-(self.used + size) // _ALIGNED) * _ALIGNED
        return self.blocks[-1][start : start + size]

    def move(self, tensor: Tensor) -> Tensor | _Moved:
        """The tensor's storage is copied once, however many tensors look at it."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_neg() or tensor.is_conj():
            return tensor
        if 2 * tensor.numel() * tensor.element_size() < storage.nbytes():
            return tensor  # a small part of something large: most of what would be copied nobody asked for
        known = self.moved.get(storage._cdata)
        if known is None or known[0].expired():
            copy = self.room(storage.nbytes())
            copy.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
            # The weak reference keeps the storage's address from being given to another one meanwhile.
            known = self.moved[storage._cdata] = (StorageWeakRef(storage), copy)
        return _Moved(known[1], tensor, self)

    def _block(self) -> Tensor:
        while self.free:
            block = self.free.pop()
            # A gradient that is a view of a saved tensor would change under its owner.
            if _users(block) == _ALONE:
                return block
        return torch.empty(_BLOCK_BYTES, dtype=torch.uint8)


class _Moved:
    """A tensor that lies on the shelf."""

    def __init__(self, copy: Tensor, tensor: Tensor, shelf: _Shelf) -> None:
        self.copy, self.shelf, self.dtype = copy, shelf, tensor.dtype
        self.like = (tensor.shape, tensor.stride(), tensor.storage_offset())

    def tensor(self) -> Tensor:
        shape, stride, offset = self.like
        whole = self.copy.view(self.dtype)
        return whole.as_strided(shape, stride, whole.storage_offset() + offset)


class _Narrowed:
    """A float32 tensor whose numbers are all bfloat16 numbers."""

    def __init__(self, tensor: Tensor, shelf: _Shelf) -> None:
        self.of, self.shelf = weakref.ref(tensor), shelf
        if tensor.device.type == "cpu":
            self.narrow = shelf.room(2 * tensor.numel()).view(torch.bfloat16).view(tensor.shape)
            self.narrow.copy_(tensor.detach())
        else:
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


def _users(tensor: Tensor) -> int:
    """How many tensors look at the storage, and this call."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_ALONE = _users(torch.empty(1))

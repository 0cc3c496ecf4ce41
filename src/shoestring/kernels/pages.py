"""Keys and values in pages, and attention over them, for a process that has no model. No torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.kernels.llama import CACHE_TYPES, PAGE, allocate
from shoestring.kernels.matrix import library


class _SkPages(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("pages", "kv_heads", "head_dim", "type"))]


class _SkQuery(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q", "out", "log_sums", "starts", "contexts", "tables", "parents", "seen")),
        *((n, ctypes.c_int64) for n in ("tokens", "sequences", "table_stride", "heads")),
        ("scale", ctypes.c_double),
    ]


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages of every layer: uint8 [layers, pages, bytes of a page]. Memory is taken as pages are first written.

    Args:
        type: of the numbers, one of `kernels.llama.CACHE_TYPES`.

    Raises:
        UsageError: a head_dim or type that the kernels do not have. DoesNotFit: the memory is not to be had.
    """

    data: np.ndarray
    kv_heads: int
    head_dim: int
    type: str

    @classmethod
    def fresh(cls, layers: int, pages: int, kv_heads: int, head_dim: int, type: str = "fp32") -> Pages:
        size = page_bytes(kv_heads, head_dim, type)
        memory = allocate(layers * pages * size, "cache").reshape(layers, pages, size)
        return cls(memory, kv_heads, head_dim, type)

    def store(self, layer: int, slots: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """k and v float32 [tokens, kv_heads, head_dim] into slots int32 [tokens]: page * PAGE + place, -1: not kept.

        Raises:
            UsageError: a slot that is not there; nothing was written.
        """
        k, v = (np.ascontiguousarray(x, np.float32) for x in (k, v))
        if not len(slots) == len(k) == len(v) or k.shape[1:] != (self.kv_heads, self.head_dim) or k.shape != v.shape:
            raise UsageError(f"Keys {k.shape} and values {v.shape} do not fit pages of {self.kv_heads} heads")
        places = np.ascontiguousarray(slots, np.int32)
        struct = self._struct(layer)
        code = library().sk_pages_store(
            ctypes.byref(struct), places.ctypes.data, k.ctypes.data, v.ctypes.data, len(places)
        )
        if code:
            raise UsageError(f"The slots do not all lie in {self.data.shape[1]} pages")

    def attend(
        self,
        layer: int,
        q: np.ndarray,
        starts: np.ndarray,
        contexts: np.ndarray,
        tables: np.ndarray,
        *,
        seen: np.ndarray | None = None,
        parents: np.ndarray | None = None,
        scale: float | None = None,
        threads: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Attention of q float32 [tokens, heads, head_dim] over a ragged batch, and log sum exp(score) [tokens, heads].

        A token that sees nothing gets 0 and -inf.

        Args:
            starts, contexts, tables, parents: as of `engine.runner.Batch`, int32 and contiguous.
            seen: int32 [tokens], how many slots of its table a token sees; None: those of its sequence up to its own.
            scale: of scores; None is 1 / sqrt(head_dim).

        Raises:
            UsageError: an index outside its range.
        """
        q = np.ascontiguousarray(q, np.float32)
        if q.ndim != 3 or q.shape[2] != self.head_dim:
            raise UsageError(f"Queries {q.shape} do not fit heads of {self.head_dim}")
        if seen is None:
            seen = np.repeat(contexts - starts[:-1], np.diff(starts)) + np.arange(1, len(q) + 1)
        seen = np.ascontiguousarray(seen, np.int32)
        if len(starts) != len(contexts) + 1 or len(tables) != len(contexts) or len(seen) != len(q):
            raise UsageError("The arrays of the batch do not belong together")
        out, log_sums = np.empty_like(q), np.empty(q.shape[:2], np.float32)
        arrays = (q, out, log_sums, starts, contexts, tables, parents, seen)
        query = _SkQuery(
            *(None if a is None else a.ctypes.data for a in arrays), len(q), len(contexts), tables.shape[1], q.shape[1],
            self.head_dim**-0.5 if scale is None else scale,
        )  # fmt: skip
        struct = self._struct(layer)
        if library().sk_pages_attend(ctypes.byref(struct), ctypes.byref(query), threads):
            raise UsageError("The batch does not fit the pages: an index lies outside its range")
        return out, log_sums

    def copy(self, source: int, target: int) -> None:
        """Copy a whole page in every layer."""
        self.data[:, target] = self.data[:, source]

    def move(self, table: np.ndarray, moves: np.ndarray) -> None:
        """Copy slots (from, to) [moves, 2] of the sequence with this table, in order, in every layer."""
        for source, target in moves.tolist():
            keys, values = self._read(int(table[source // PAGE]), source % PAGE)
            place = np.array([int(table[target // PAGE]) * PAGE + target % PAGE], np.int32)
            for layer in range(len(self.data)):
                self.store(layer, place, keys[layer : layer + 1], values[layer : layer + 1])

    def _read(self, page: int, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Key and value of one slot in every layer, float32 [layers, kv_heads, head_dim]; not of int8 pages."""
        size, width = {"fp32": 4, "bf16": 2}[self.type], -(-self.head_dim // 16) * 16
        each, dim = 4 // size, self.head_dim
        blocks = self.data[:, page].reshape(len(self.data), self.kv_heads, -1)
        numbers = blocks.view(np.float32 if size == 4 else np.uint16)
        split = -(-dim // each) * each * PAGE
        keys = numbers[..., :split].reshape(*blocks.shape[:2], -1, PAGE, each)[..., place, :]
        rest = numbers[..., split : split + width * PAGE].reshape(*blocks.shape[:2], PAGE // each, width, each)
        both = keys.reshape(*blocks.shape[:2], -1)[..., :dim], rest[..., place // each, :dim, place % each]
        if size == 2:
            both = tuple((x.astype(np.uint32) << 16).view(np.float32) for x in both)  # type: ignore[assignment]
        return both

    def _struct(self, layer: int) -> _SkPages:
        return _SkPages(
            self.data[layer].ctypes.data, self.data.shape[1], self.kv_heads, self.head_dim, CACHE_TYPES.index(self.type)
        )


def page_bytes(kv_heads: int, head_dim: int, type: str = "fp32") -> int:
    """Bytes of a page of one layer.

    Raises:
        UsageError: what the kernels do not have.
    """
    size = int(library().sk_pages_bytes(kv_heads, head_dim, CACHE_TYPES.index(type))) if type in CACHE_TYPES else -1
    if size < 0:
        raise UsageError(f"There are no pages of {kv_heads} heads of {head_dim} dimensions in {type}")
    return size

"""How packed weights lie in a file: the tensors of every format, their types and sizes. No torch.

A format is written `name/number`: `int4/64` is 4-bit codes in groups of 64 columns; of a format whose length depends on
what it holds, such as `sparse/4096`, the number is its length in bytes. `shoestring.kernels.formats` has the values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError, nearest
from shoestring.kernels import matrix

GROUPS = (32, 64, 128)
ITEM = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2}  # types by their safetensors names -> bytes
FOR_FILES = ("huffman",)  # no kernels multiply them: they are read into plain bfloat16, to the bit
_SPEC = re.compile(r"([a-z]+)(\d?)(o?)/(\d{1,12})")
# Name -> numbers of bits or planes it comes with.
_KINDS: dict[str, tuple[int, ...]] = {
    "int": (4, 8), "uniform": (2, 3, 4, 5, 6), "ternary": (0,), "tritplanes": (0,), "binary": (2, 3, 4),
    **dict.fromkeys((*matrix.SAY_THEIR_SIZE, *FOR_FILES), (0,)),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The tensors of a packed matrix.

    Attributes:
        kind: of `int`, `uniform`, `ternary`, `tritplanes`, `binary`, and those of `matrix.SAY_THEIR_SIZE`
            and of `FOR_FILES`.
        planes: bits of a code, or bit planes; 0 where the kind has but one number of them.
        offset: binary codes only: groups have an offset beside the scales of their planes.
        number: columns of a group, or bytes where the content decides on the length.
    """

    kind: str
    planes: int
    offset: bool
    number: int

    def __str__(self) -> str:
        return f"{self.kind}{self.planes or ''}{'o' * self.offset}/{self.number}"

    @property
    def native(self) -> str:
        """The format's name in the kernels."""
        return f"{self.kind}{self.planes or ''}"

    @property
    def group(self) -> int:
        """Columns that share scales; 32 where none do."""
        return 32 if self.says_its_size else self.number

    @property
    def says_its_size(self) -> bool:
        return self.used_as_stored or self.kind in FOR_FILES

    @property
    def used_as_stored(self) -> bool:
        """Whether the kernels read the stored bytes where they stand."""
        return self.kind in matrix.SAY_THEIR_SIZE

    def groups(self, cols: int) -> int:
        return -(-cols // self.group)

    def tensors(self, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and dimensions of each tensor of a matrix [rows, cols], `weight` first."""
        if self.says_its_size:
            return {"weight": ("U8", (self.number,))}
        groups = self.groups(cols)
        width = groups * self.group
        scales = ("F16", (rows, groups, matrix.SCALES[self.native] - (self.kind == "binary" and not self.offset)))
        if self.kind == "int":
            # Three dimensions keep 8-bit codes from passing for a float weight of the same shape.
            codes = ("I8", (rows, groups, self.group)) if self.planes == 8 else ("U8", (rows, width // 2))
            return {"weight": codes, "scales": ("BF16", (rows, groups))}
        if self.kind == "ternary":
            return {"weight": ("U8", (rows, width // 4)), "scales": ("F16", (rows, groups))}
        if self.kind == "tritplanes":
            return {"weight": ("U8", (rows, width // 2)), "scales": scales}
        if self.kind == "binary":
            return {"weight": ("U8", (rows, self.planes, width // 8)), "scales": scales}
        return {"weight": ("U8", (rows, width * self.planes // 8)), "scales": scales}

    def bytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix [rows, cols] on disk."""
        total = 0
        for dtype, dims in self.tensors(rows, cols).values():
            size = ITEM[dtype]
            for d in dims:
                size *= d
            total += size
        return total

    def matrix(
        self, tensors: Mapping[str, np.ndarray], rows: int, cols: int, bias: np.ndarray | None = None, **given: Any
    ) -> matrix.Matrix:
        """The matrix as the kernels read it; `given` as `matrix.make` takes it.

        Args:
            tensors: bytes of each tensor, uint8 of any shape, or numbers of 16 bits.
        """
        if self.kind in FOR_FILES:
            from shoestring.kernels import huffman

            coded = huffman.unpack(tensors["weight"].reshape(-1).view(np.uint8), rows, cols)
            place = (given.get("memory") or matrix.Memory()).take(2 * rows * cols).view(np.uint16)
            numbers = coded.decode(threads=given.get("threads", 1), out=place)
            return matrix.make("bf16", rows, cols, numbers, bias=bias, **given)
        scales = None
        if "scales" in tensors:
            wanted = matrix.SCALES[self.native]
            scales = tensors["scales"].view(np.uint16).reshape(rows, self.groups(cols), -1)
            if scales.shape[2] < wanted:  # the kernels always add an offset
                scales = np.concatenate([scales, np.zeros((*scales.shape[:2], 1), np.uint16)], axis=2)
        return matrix.make(
            self.native, rows, cols, tensors["weight"], group=self.group, scales=scales, bias=bias, **given
        )


def parse(spec: str) -> Layout:
    """The layout that `spec` names.

    Raises:
        UsageError: there is no such format.
    """
    match = _SPEC.fullmatch(str(spec))
    if match:
        kind, planes, offset, number = match[1], int(match[2] or 0), bool(match[3]), int(match[4])
        if planes in _KINDS.get(kind, ()) and (not offset or kind == "binary"):
            made = Layout(kind, planes, offset, number)
            if made.says_its_size or number in GROUPS:
                return made
            raise UsageError(
                f"{str(spec)[:60]} names a group of {number} columns",
                remedy=f"Use one of {', '.join(map(str, GROUPS))}",
            )
    raise UsageError(f"{str(spec)[:60]!r} names no weight format", remedy=nearest(str(spec)[:60], _names()))


def _names() -> list[str]:
    return [f"{kind}{planes or ''}/64" for kind, all_planes in _KINDS.items() for planes in all_planes]

"""What formats of the room share: the options of a method that packs every linear layer in one format, and its price.

A method subclasses `FormatConfig`: `format` names the format its layers get, and `pack`, where rounding to the nearest
is not what it does, makes the tensors. Modules, loading and saving are those of `shoestring.models.packed`.
"""

from __future__ import annotations

from typing import Any

import torch

from shoestring.core.errors import UsageError
from shoestring.core.shape import Shape
from shoestring.kernels import formats
from shoestring.kernels.formats import Format
from shoestring.kernels.layout import GROUPS, parse
from shoestring.models.packed import Packed, PackedConfig, PackedLinear, PackedQuantizer, packed_modules, priced

__all__ = [
    "FormatConfig",
    "GroupConfig",
    "Packed",
    "PackedLinear",
    "PackedQuantizer",
    "packed_modules",
    "price",
]


class FormatConfig(PackedConfig):
    """Every linear layer of the blocks in one format, the token table in plain integers.

    Args:
        group_size: weights that share scales, along the input dimension.
        embeddings: bits of the embedding table and of a head tied to it (8 or 4); None leaves them as they are.
        modules_to_not_convert: names, or parts of names, of modules to leave alone.
    """

    groups = GROUPS

    def __init__(
        self,
        group_size: int = 32,
        embeddings: int | None = 8,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(modules_to_not_convert, **kwargs)
        self.group_size, self.embeddings = group_size, embeddings
        if group_size not in self.groups:
            raise UsageError(
                f"group_size {group_size!r} is not possible", remedy=f"Use one of {', '.join(map(str, self.groups))}"
            )
        if embeddings not in (None, 8, 4):
            raise UsageError(
                f"embeddings {embeddings!r} is not possible", remedy="Use 8, 4, or None to leave them as they are"
            )

    @property
    def format(self) -> str:
        """The format of linear layers, such as `int4/64`."""
        raise NotImplementedError

    def spec_of(self, name: str, rows: int, columns: int, embedding: bool) -> str | None:
        """The format of the module called `name`, in words; None to leave it alone."""
        if self.left_alone(name):
            return None
        if not embedding:
            return self.format
        return None if self.embeddings is None else f"int{self.embeddings}/{self.group_size}"

    def format_of(self, name: str, rows: int, columns: int, embedding: bool) -> Format | None:
        spec = self.spec_of(name, rows, columns, embedding)
        return None if spec is None else formats.parse(spec)

    def pack(self, weight: torch.Tensor, format: Format, name: str) -> dict[str, torch.Tensor]:
        # The token table is rounded to plain integers whatever the method does with layers.
        plain = str(format) != self.format
        return format.pack(weight) if plain else self.fit(weight, format, name)

    def fit(self, weight: torch.Tensor, format: Format, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a linear layer's weight [rows, columns] in the method's own format."""
        return format.pack(weight)


class GroupConfig(FormatConfig):
    """Plain integers in groups. A method sets `bits`."""

    bits = 0

    @property
    def format(self) -> str:
        return f"int{self.bits}/{self.group_size}"

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "bits": self.bits}


def price(shape: Shape, config: FormatConfig, *, experts: bool = True) -> Shape:
    """The shape after quantization: bytes of what is packed in its format, the rest untouched.

    Args:
        experts: whether the method packs experts that one tensor holds.
    """

    def size(name: str, rows: int, columns: int, embedding: bool) -> int | None:
        spec = config.spec_of(name, rows, columns, embedding)
        return None if spec is None else parse(spec).bytes(rows, columns)

    return priced(shape, size, experts=experts)

"""dfloat11: store bfloat16 weights in 11 bits without losing one, as their exponents hold 2.6 bits of news.

How it works
    1. A bfloat16 number is a sign, 8 bits of exponent and 7 of mantissa. Sign and mantissa are as good as random; the
       exponents of a trained matrix are few, and some are much commoner than others.
    2. Sign and mantissa stay as one byte a number. The exponents of a matrix get a Huffman code; its words, at most 32
       bits long, form one stream (if a word would be longer, the rarest exponents count as equally rare).
    3. The stream is cut into chunks of 8 bytes and blocks of 4096. Five bits a chunk say where the first word begins in
       it, 32 bits a block which number that is: every chunk and every block can be decoded by itself.
    4. Decoding asks tables of 256 entries with one byte of the stream after the other. Every bit comes back.
    5. In transformers a matrix is decoded just before it is used and forgotten after; rows of the token table are
       found without decoding what is before them. The engine decodes once, when it loads, and runs plain bfloat16.
    6. `coding="fixed"` is not the paper's: the 16 commonest exponents of a matrix have codes of 4 bits and the others
       are listed. 12 bits a number, and the engine multiplies from the codes as they are, faster than from bfloat16.

Where it bends
    The paper codes the matrices of a block together, to give a GPU enough work in one launch; here each matrix has a
    code of its own, which is a little shorter and lets a layer be decoded alone (the arrays of a unit are the same
    otherwise, and `shoestring.kernels.huffman.encode` takes several matrices). The speed of GPUs that would have to
    fetch weights from elsewhere has no counterpart: on a CPU a token costs decoding the whole model, unless the engine
    runs it.
    Weights that bfloat16 does not hold are refused, or rounded when `cast` allows it. An exponent of 240 and more
    has no code: such a matrix stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shoestring.core.errors import UsageError, nearest
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.kernels import formats, reference
from shoestring.kernels.formats import Format
from shoestring.models.packed import PackedConfig, priced

METHOD = Method(
    paper=Paper(
        "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length Float",
        "2025-04",
        arxiv="2504.11651",
    ),
    provides="Dfloat11Config",
    saves=("storage", "memory"),
    combines={
        "adapters": "yes",
        "pruners": "prune first: the code then sees what is left",
        "quantizers": "the weights are integers already, whose bits hold nothing to leave out",
    },
    expects={"check_bytes_are_as_promised": "the length of a code is known when the weights have been read"},
)

FORMATS = {"huffman": "huffman", "fixed": "exponents"}  # coding -> format
# Bits a number in trained models: 2.66 of code on top of 8, 5 for every 64 and 32 for every 32768 of those; 4 of code.
_BITS = {"huffman": 8 + 2.66 * (1 + 5 / 64 + 32 / 32768), "fixed": 12.0}
_FIXED_BYTES = {"huffman": 64 + 3 * 256, "fixed": 64}  # of a matrix: its head and tables


class Dfloat11Config(PackedConfig):
    """`AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16", quantization_config=Dfloat11Config())`.

    Args:
        coding: `huffman` as published, for files; `fixed` for running (12 bits, read without decoding first).
        cast: round weights that are not bfloat16 numbers, which loses their last bits; else they are refused.
        modules_to_not_convert: names, or parts of names, of modules to leave alone.
    """

    method = "dfloat11"

    def __init__(
        self,
        coding: str = "huffman",
        cast: bool = False,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(modules_to_not_convert, **kwargs)
        self.coding, self.cast = coding, cast
        if coding not in FORMATS:
            raise UsageError(f"coding {coding!r} is not possible", remedy=nearest(str(coding), FORMATS))

    def format_of(self, name: str, rows: int, columns: int, embedding: bool) -> Format | None:
        return None if self.left_alone(name) else formats.parse(f"{FORMATS[self.coding]}/0")

    def pack(self, weight: torch.Tensor, format: Format, name: str) -> dict[str, torch.Tensor]:
        reference.check_matrix(weight)
        reference.refuse_not_finite(weight)
        if not self.cast and not is_bfloat16(weight):
            raise UsageError(
                "it has numbers that bfloat16 does not hold",
                "rounding them would lose what the method promises to keep",
                "Set cast to round them all the same, or start from a model that is stored in bfloat16",
            )
        return format.pack(weight)


def is_bfloat16(weight: torch.Tensor) -> bool:
    """Whether every number of a float tensor is one that bfloat16 holds."""
    return weight.dtype == torch.bfloat16 or torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)


def example() -> Dfloat11Config:
    return Dfloat11Config(cast=True)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying. `cast` changes nothing in a model that is stored in bfloat16."""
    return {"cast": True, "coding": "huffman"}, {"cast": True, "coding": "fixed"}


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """What trained weights take; the real length is known when they have been read."""
    config = Dfloat11Config(**options)

    def size(name: str, rows: int, columns: int, embedding: bool) -> int | None:
        if config.left_alone(name):
            return None
        each_row = 4 if config.coding == "fixed" else 0
        return round(_FIXED_BYTES[config.coding] + each_row * (rows + 1) + rows * columns * _BITS[config.coding] / 8)

    return Price(priced(shape, size, runs=True))

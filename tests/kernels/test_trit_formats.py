"""ternary and tritplanes in torch: where each code lies, what comes back, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.kernels import formats
from shoestring.kernels.formats._format import Product

GROUPS = (32, 64, 128)


def drawn(rows: int, cols: int, group: int, scales: int) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    planes = [torch.randint(-1, 2, (rows, cols), generator=draw) for _ in range(scales)]
    return planes, torch.randn(rows, -(-cols // group), scales, generator=draw).half()


def encoded(name: str, rows: int, cols: int, group: int) -> tuple[Any, dict[str, Tensor], Tensor]:
    """The format, tensors, and the matrix they stand for."""
    format: Any = formats.parse(f"{name}/{group}")
    planes, scales = drawn(rows, cols, group, 2 if name == "tritplanes" else 1)
    wide = scales.float().repeat_interleave(group, 1)[:, :cols]
    matrix = sum(plane * wide[..., i] for i, plane in enumerate(planes))
    tensors = format.encode(*planes, scales if name == "tritplanes" else scales[..., 0])
    return format, tensors, torch.as_tensor(matrix)


@pytest.mark.parametrize("name", ["ternary", "tritplanes"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("cols", [1, 33, 64, 300])
def test_what_was_stored_comes_back(name: str, group: int, cols: int) -> None:
    format, tensors, matrix = encoded(name, 5, cols, group)
    assert torch.equal(format.unpack(tensors, cols), matrix)
    assert torch.equal(format.rows(tensors, torch.tensor([3, 0]), cols), matrix[[3, 0]])
    for key, empty in format.empty(5, cols).items():
        assert tensors[key].shape == empty.shape and tensors[key].dtype == empty.dtype
    bits = {"ternary": 2 + 16 / group, "tritplanes": 4 + 32 / group}[name]
    groups = -(-cols // group)
    assert sum(t.nbytes for t in tensors.values()) * 8 == bits * 5 * groups * group
    assert format.layout.bytes(5, cols) == sum(t.nbytes for t in tensors.values())


def test_where_each_trit_lies() -> None:
    """Byte j of a block of 64 columns: j, j + 16, j + 32, j + 48 from the low bits; plane 1 after plane 0."""
    zero = torch.zeros(1, 128, dtype=torch.int64)
    for column in (0, 1, 17, 47, 63, 64, 127):
        trits = zero.clone()
        trits[0, column] = 1
        block, inside = divmod(column, 64)
        one = torch.full((1, 32), 0b01010101, dtype=torch.uint8)
        one[0, block * 16 + inside % 16] += 1 << 2 * (inside // 16)
        ternary: Any = formats.parse("ternary/128")
        assert torch.equal(ternary.encode(trits, torch.ones(1, 1))["weight"], one)
        both: Any = formats.parse("tritplanes/64")
        for plane in (0, 1):
            found = both.encode(*((trits, zero), (zero, trits))[plane], torch.ones(1, 2, 2))["weight"]
            cut = found.view(1, 2, 2, 16)
            assert torch.equal(cut[:, :, plane].flatten(1), one)
            assert (cut[:, :, 1 - plane] == 0b01010101).all()


@pytest.mark.parametrize("name", ["ternary", "tritplanes"])
def test_the_code_that_no_trit_has_is_refused(name: str) -> None:
    format, tensors, _ = encoded(name, 4, 100, 64)
    product, x = Product(format, 4, 100), torch.randn(2, 100)
    assert torch.isfinite(product(x, tensors, None)).all()
    tensors["weight"][2, 5] |= 0b1100
    with pytest.raises(UsageError, match="code 3"):
        format.unpack(tensors, 100)
    with pytest.raises(UsageError):
        product(x, tensors, None)


@pytest.mark.parametrize("name", ["ternary", "tritplanes"])
def test_numbers_that_do_not_fit_are_refused(name: str) -> None:
    format: Any = formats.parse(f"{name}/64")
    planes, scales = drawn(2, 64, 64, 2)
    wrong = [planes[0], planes[1].clone()]
    wrong[1][0, 0] = 2
    if name == "ternary":
        planes, wrong, scales = planes[:1], wrong[1:], scales[..., 0]
    with pytest.raises(UsageError, match="no trits"):
        format.encode(*wrong, scales)
    with pytest.raises(UsageError, match="beyond float16"):
        format.encode(*planes, scales.float() + 1e6)
    with pytest.raises(UsageError, match="no plain rounding"):
        format.pack(torch.randn(2, 64))

"""uniform2 to uniform6 in torch: codes come back, rounding keeps its bound, what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.kernels import formats

BITS, GROUPS = (2, 3, 4, 5, 6), (32, 64, 128)


def weight(rows: int, cols: int) -> Tensor:
    made = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.05
    made[0] = 0
    made[1] = made[1].abs() + 3  # far from zero on one side
    made[2] = 0.125
    return made


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("cols", [1, 33, 64, 300])
def test_codes_come_back(bits: int, group: int, cols: int) -> None:
    format: Any = formats.parse(f"uniform{bits}/{group}")
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << bits, (5, cols), generator=draw)
    scales, offsets = torch.randn(2, 5, -(-cols // group), generator=draw).half()
    tensors = format.encode(codes, scales, offsets)
    assert torch.equal(format.codes(tensors, cols).long(), codes)
    wide = [v.float().repeat_interleave(group, 1)[:, :cols] for v in (scales, offsets)]
    assert torch.equal(format.unpack(tensors, cols), (codes - (1 << bits - 1)) * wide[0] + wide[1])
    groups = -(-cols // group)
    assert sum(t.nbytes for t in tensors.values()) * 8 == (bits + 32 / group) * 5 * groups * group
    for key, empty in format.empty(5, cols).items():
        assert tensors[key].shape == empty.shape and tensors[key].dtype == empty.dtype


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("cols", [1, 33, 300])
def test_plain_rounding_keeps_its_bound_and_zeros_stay_zeros(bits: int, group: int, cols: int) -> None:
    format = formats.parse(f"uniform{bits}/{group}")
    original = weight(20, cols)
    tensors = format.pack(original)
    back = format.unpack(tensors, cols)
    assert ((back - original).abs() <= format.bound(tensors, cols)).all()
    assert (back[0] == 0).all() and (back[original == 0] == 0).all()


def test_more_bits_are_better() -> None:
    original = weight(64, 256)[3:]
    errors = []
    for bits in BITS:
        format = formats.parse(f"uniform{bits}/64")
        errors.append(float((format.unpack(format.pack(original), 256) - original).norm() / original.norm()))
    assert all(more > 2 * less > 0 for more, less in zip(errors, errors[1:]))
    assert errors == pytest.approx([0.45, 0.19, 0.09, 0.044, 0.022], rel=0.15)


@pytest.mark.parametrize("bits", BITS)
def test_numbers_that_do_not_fit_are_refused(bits: int) -> None:
    format: Any = formats.parse(f"uniform{bits}/64")
    ones = torch.ones(2, 1)
    with pytest.raises(UsageError, match="do not fit"):
        format.encode(torch.full((2, 64), 1 << bits), ones, ones)
    with pytest.raises(UsageError, match="beyond float16"):
        format.encode(torch.zeros(2, 64, dtype=torch.long), ones * 1e6, ones)
    with pytest.raises(UsageError, match="1 NaN"):
        format.pack(torch.tensor([[0.0, torch.nan]]))

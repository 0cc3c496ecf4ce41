"""Sums of planes of signs: what the tensors mean, how uniform codes become such sums, and the product by look-up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.kernels import formats, matrix, ops

SPECS = [f"binary{planes}{offset}/{group}" for planes in (2, 3, 4) for offset in ("", "o") for group in (32, 64, 128)]
native = pytest.mark.skipif(not ops.backend()["native"], reason="no native library in this installation")


def random_tensors(spec: str, rows: int, cols: int) -> dict[str, Tensor]:
    """Any bytes, and scales as weights have them."""
    format = formats.parse(spec)
    made = format.empty(rows, cols, "cpu")
    return {
        "weight": torch.randint(0, 256, made["weight"].shape, dtype=torch.uint8),
        "scales": (torch.randn(made["scales"].shape) * 0.02).half(),
    }


@pytest.mark.parametrize("spec", SPECS)
def test_numbers_are_sums_of_signs(spec: str) -> None:
    """One at a time, from the stored bytes."""
    format = formats.parse(spec)
    rows, cols, group, planes = 3, 150, format.layout.group, format.layout.planes
    tensors = random_tensors(spec, rows, cols)
    values = format.unpack(tensors, cols)
    assert values.shape == (rows, cols)
    for row, column in ((0, 0), (1, 31), (2, 149), (0, 77), (2, 9)):
        numbers = tensors["scales"][row, column // group].float().tolist()
        expected = numbers[planes] if format.layout.offset else 0.0
        for plane in range(planes):
            bit = int(tensors["weight"][row, plane, column // 8]) >> column % 8 & 1
            expected += numbers[plane] if bit else -numbers[plane]
        assert values[row, column].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_encode_is_the_inverse_of_unpack(spec: str) -> None:
    format = formats.parse(spec)
    rows, cols, planes = 5, 100, format.layout.planes
    groups = format.layout.groups(cols)
    bits = torch.randint(0, 2, (rows, planes, cols))
    scales, offsets = torch.randn(rows, groups, planes).half(), torch.randn(rows, groups).half()
    tensors = format.encode(bits, scales, offsets if format.layout.offset else None)
    for name, (_, dims) in format.layout.tensors(rows, cols).items():
        assert tuple(tensors[name].shape) == dims
    wide = scales.float().repeat_interleave(format.layout.group, 1)[:, :cols].transpose(1, 2)
    expected = (wide * (bits * 2 - 1)).sum(1)
    if format.layout.offset:
        expected += offsets.float().repeat_interleave(format.layout.group, 1)[:, :cols]
    assert torch.allclose(format.unpack(tensors, cols), expected, atol=1e-5)


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_uniform_codes_are_converted_exactly(planes: int) -> None:
    format = formats.parse(f"binary{planes}o/32")
    codes = torch.randint(0, 1 << planes, (7, 90))
    step, zero = torch.randint(1, 128, (7, 3)) * 2.0**-12, torch.randint(0, 1 << planes, (7, 3))
    tensors = format.from_codes(codes, step, zero)
    steps, zeros = (numbers.repeat_interleave(32, 1)[:, :90] for numbers in (step, zero))
    assert torch.equal(format.unpack(tensors, 90), steps * (codes - zeros))


@pytest.mark.parametrize("planes", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_uniform_matrix_is_imported(planes: int, group: int) -> None:
    torch.manual_seed(planes)
    uniform, format = formats.parse(f"uniform{planes}/{group}"), formats.parse(f"binary{planes}o/{group}")
    weight = torch.randn(9, 300) * 0.05
    weight[2] = 0
    packed = uniform.pack(weight)
    values = uniform.unpack(packed, 300)
    made = format.from_uniform(uniform, packed, 300)
    offset = made["scales"][..., -1].float().abs().repeat_interleave(group, 1)[:, :300]
    assert ((format.unpack(made, 300) - values).abs() <= 2.0**-11 * offset + 1e-7).all()
    assert torch.equal(format.unpack(made, 300)[2], torch.zeros(300))
    with pytest.raises(UsageError, match=f"Use binary{planes}o/{group}"):
        formats.parse(f"binary{planes}/{group}").from_uniform(uniform, packed, 300)


@pytest.mark.parametrize("spec", SPECS)
def test_plain_rounding_stays_within_its_bound(spec: str) -> None:
    format = formats.parse(spec)
    torch.manual_seed(1)
    for size in (1.0, 1e-4, 300.0):
        weight = torch.randn(8, 200) * size
        weight[0] = 0
        weight[1] = 0.5 * size
        weight[2] = weight[2].abs()  # zero is at one end of the range
        weight[3, 5] = 50 * size
        tensors = format.pack(weight)
        error = (format.unpack(tensors, 200) - weight).abs()
        assert (error <= format.bound(tensors, 200)).all()
    assert torch.equal(format.unpack(format.pack(torch.zeros(2, 40)), 40), torch.zeros(2, 40))


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_zeros_stay_zeros_where_there_is_an_offset(planes: int) -> None:
    format = formats.parse(f"binary{planes}o/64")
    torch.manual_seed(2)
    weight = torch.randn(50, 300) * 0.03
    weight[torch.rand_like(weight) < 0.3] = 0
    values = format.unpack(format.pack(weight), 300)
    assert (values[weight == 0] == 0).all()
    without = formats.parse(f"binary{planes}/64")
    assert (without.unpack(without.pack(weight), 300) != 0).all()


def test_more_planes_and_smaller_groups_are_closer() -> None:
    torch.manual_seed(3)
    weight = torch.randn(40, 256)

    def error(spec: str) -> float:
        format = formats.parse(spec)
        return (format.unpack(format.pack(weight), 256) - weight).norm().item()

    for offset in ("", "o"):
        assert error(f"binary4{offset}/32") < error(f"binary4{offset}/128") < error(f"binary3{offset}/32")
        assert error(f"binary3{offset}/32") < error(f"binary2{offset}/32")


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.full((2, 64), torch.nan), "NaN"),
        (torch.full((2, 64), 1e6), "beyond float16"),
        (torch.zeros(3), "Only a matrix"),
        (torch.zeros(3, 4, dtype=torch.int64), "Only a matrix"),
    ],
)
def test_refusals(weight: Tensor, words: str) -> None:
    for spec in ("binary3/64", "binary3o/64"):
        with pytest.raises(UsageError, match=words):
            formats.parse(spec).pack(weight)


def test_offsets_belong_to_the_formats_that_have_them() -> None:
    bits, scales, offsets = torch.zeros(1, 2, 32), torch.ones(1, 1, 2), torch.ones(1, 1)
    with pytest.raises(UsageError, match="binary2/32 has no offset"):
        formats.parse("binary2/32").encode(bits, scales, offsets)
    with pytest.raises(UsageError, match="binary2o/32 has an offset"):
        formats.parse("binary2o/32").encode(bits, scales)


@native
@pytest.mark.parametrize("spec", SPECS)
def test_the_product_is_that_of_the_plain_numbers(isa: str, spec: str) -> None:
    """Also with offsets far from 0, which a product without them would miss."""
    format = formats.parse(spec)
    torch.manual_seed(4)
    for rows, cols in ((1, 1), (17, 33), (48, 300), (5, 7)):
        tensors = random_tensors(spec, rows, cols)
        if format.layout.offset:
            tensors["scales"][..., -1] += 0.1
        made = format.layout.matrix({k: t.numpy().reshape(-1).view(np.uint8) for k, t in tensors.items()}, rows, cols)
        weight = format.unpack(tensors, cols)
        assert np.array_equal(made.rows_of(np.arange(rows)), weight.numpy())
        for tokens in (1, 2, 3, 4, 5, 9):
            x = torch.randn(tokens, cols)
            expected = format.multiply(x, tensors, cols, rows)
            got = torch.from_numpy(made.multiply(x.numpy()))
            scale = (x.abs() @ weight.abs().T) + 1e-9
            assert ((got - expected).abs() / scale).max() < 1e-5, (rows, cols, tokens)


@native
def test_sums_are_exact_integers_at_the_ends_of_the_range(isa: str) -> None:
    """Every sum of four codes that a table can hold, with every sign, sums of whole groups at both ends among them."""
    format = formats.parse("binary2o/128")
    rows, cols = 32, 128
    torch.manual_seed(5)
    bits = torch.randint(0, 2, (rows, 2, cols))
    bits[0], bits[1] = 1, 0
    for k in range(16):  # the same four signs all along
        bits[2 + k] = k >> torch.arange(cols) % 4 & 1
    scales, offsets = torch.ones(rows, 1, 2), torch.zeros(rows, 1)
    scales[..., 1] = 0.5
    tensors = format.encode(bits, scales, offsets)
    made = format.layout.matrix({k: t.numpy().reshape(-1).view(np.uint8) for k, t in tensors.items()}, rows, cols)
    x = torch.randint(-127, 128, (40, cols)).float()
    x[0], x[1] = 127, -127
    x[2] = torch.tensor([127.0, -127.0]).repeat(cols // 2)
    x[:, 0] = 127  # so that a step is exactly one
    expected = (x.double() @ format.unpack(tensors, cols).double().T).float()
    assert np.array_equal(made.multiply(x.numpy()), expected.numpy())


@native
@pytest.mark.parametrize("name", ["binary2", "binary3", "binary4"])
def test_sizes_that_no_matrix_has_are_refused(name: str) -> None:
    number, library = matrix.FORMATS.index(name), matrix.library()
    for rows, cols, group in ((-1, 64, 64), (4, 0, 64), (4, 64, 16), (4, 64, 48), (1 << 62, 64, 32), (4, 1 << 62, 32)):
        assert library.sk_packed_size(number, rows, cols, group) == -1
    planes = int(name[-1])
    assert library.sk_packed_size(number, 17, 65, 64) == 2 * 2 * (planes * 128 + (planes + 1) * 32)

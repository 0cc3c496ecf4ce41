"""The kernels of every instruction set this CPU has, against plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UsageError
from shoestring.kernels import ops, reference

FORMATS = list(itertools.product((4, 8), (32, 64, 128)))
# The last ones reach a second block of tokens, and a second slice of the tile's depth.
SHAPES = [(1, 1), (1, 64), (3, 31), (33, 96), (5, 100), (70, 160), (64, 576), (2, 1100), (35, 2080)]


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-20)).item()


@pytest.mark.parametrize("bits,group", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_that_of_the_reference_to_the_bit(isa, bits, group, dtype):
    for features, size in ((1, 1.0), (31, 1e-3), (64, 1e-38), (300, 1e4), (128, 1e-41), (576, 0.05)):
        weight = torch.randn(9, features) * size
        weight[1], weight[2], weight[3], weight[4] = 0.0, -0.0, 0.5, -0.5
        weight[5] = weight[5].sign() * size  # several of the largest magnitude, the first decides
        weight = weight.to(dtype)
        ops.set_threads(2)
        for made, wanted in zip(ops.quantize(weight, bits, group), reference.quantize(weight, bits, group)):
            assert torch.equal(made.view(torch.uint8), wanted.view(torch.uint8)), (features, size)
        turned = weight.t().contiguous().t()
        assert torch.equal(ops.quantize(turned, bits, group)[0], ops.quantize(weight, bits, group)[0])
        for wrong in (torch.nan, torch.inf, -torch.inf):
            weight[-1, -1] = wrong
            with pytest.raises(UsageError, match="1 (NaN|infinite) values"):
                ops.quantize(weight, bits, group)


@pytest.mark.parametrize("bits,group", FORMATS)
def test_native_equals_reference_on_odd_shapes(level, bits, group):
    for rows, features in SHAPES:
        packed, scales = ops.quantize(torch.randn(rows, features) * 0.05, bits, group)
        bias = torch.randn(rows)
        for tokens in (0, 1, 2, 3, 7, 8, 33):
            x = torch.randn(tokens, features)
            y = ops.quantized_linear(x, packed, scales, bits, group, features, bias)
            expected = reference.quantized_linear(x, packed, scales, bits, group, features, bias)
            assert y.shape == expected.shape == (tokens, rows)
            assert error(y, expected) < 1e-4, (rows, features, tokens)


@pytest.mark.parametrize("bits", (4, 8))
def test_more_tokens_than_one_block(level, bits):
    packed, scales = ops.quantize(torch.randn(40, 64), bits, 32)
    x = torch.randn(200, 64)
    expected = reference.quantized_linear(x, packed, scales, bits, 32, 64)
    assert error(ops.quantized_linear(x, packed, scales, bits, 32, 64), expected) < 1e-4


@pytest.mark.parametrize("bits,group", FORMATS)
@pytest.mark.parametrize("tokens", (1, 40))
def test_extreme_weights(level, bits, group, tokens):
    weight = torch.randn(6, 300) * 0.02
    weight[0] = 0
    weight[1] = 0.5
    weight[2] = -3.0
    weight[3, 7] = 1e4
    weight[4] = 1e-30
    weight[5, :group] = 0
    packed, scales = ops.quantize(weight, bits, group)
    x = torch.rand(tokens, 300)  # all of one sign: the offsets of unsigned codes do not cancel by luck
    x[0, 5] = 1e6
    y = ops.quantized_linear(x, packed, scales, bits, group, 300)
    expected = reference.quantized_linear(x, packed, scales, bits, group, 300)
    assert torch.isfinite(y).all()
    assert (y[:, 0] == 0).all()
    for row in range(6):
        assert error(y[:, row], expected[:, row]) < 1e-4, row


def test_other_tokens_do_not_change_a_bit(level):
    """A token alone and one in a batch meet the same sums, as long as both are few or both are many."""
    if level == "reference":
        pytest.skip("torch chooses its own order of sums")
    packed, scales = ops.quantize(torch.randn(50, 320), 4, 64)
    x = torch.randn(60, 320)
    few = ops.quantized_linear(x[:10], packed, scales, 4, 64, 320)
    assert torch.equal(ops.quantized_linear(x[7:8], packed, scales, 4, 64, 320), few[7:8])
    many = ops.quantized_linear(x, packed, scales, 4, 64, 320)
    assert torch.equal(ops.quantized_linear(x[:31], packed, scales, 4, 64, 320), many[:31])


def test_not_a_number_stays_with_its_token(level):
    packed, scales = ops.quantize(torch.randn(4, 128), 8, 32)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for tokens in (4, 40):
            x = torch.randn(tokens, 128)
            x[2, 100] = bad
            y = ops.quantized_linear(x, packed, scales, 8, 32, 128)
            assert torch.isnan(y[2]).all()
            assert torch.isfinite(y[torch.arange(tokens) != 2]).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_types_strides_and_leading_dimensions(level, dtype):
    packed, scales = ops.quantize(torch.randn(10, 96), 4, 32)
    wide = torch.randn(3, 96, 5).to(dtype)
    x = wide.transpose(1, 2)
    assert not x.is_contiguous()
    y = ops.quantized_linear(x, packed, scales, 4, 32, 96)
    assert y.dtype == dtype and y.shape == (3, 5, 10)
    expected = reference.quantized_linear(x, packed, scales, 4, 32, 96)
    assert error(y, expected) < {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-3}.get(dtype, 5e-3)
    assert ops.quantized_linear(x[0, 0], packed, scales, 4, 32, 96).shape == (10,)
    assert error(ops.quantized_linear(x[0, 0], packed, scales, 4, 32, 96), y[0, 0]) < 1e-5


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("tokens", (1, 3, 100))
def test_threads_do_not_change_a_bit(level, bits, tokens):
    packed, scales = ops.quantize(torch.randn(1500, 576), bits, 64)
    x = torch.randn(tokens, 576)
    results = []
    for threads in (1, 2, 3):
        ops.set_threads(threads)
        results += [ops.quantized_linear(x, packed, scales, bits, 64, 576) for _ in range(5)]
    assert all(torch.equal(results[0], other) for other in results)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70), features=st.integers(1, 400), tokens=st.integers(0, 50), form=st.sampled_from(FORMATS),
    level=st.sampled_from(ops.backend()["levels"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(rows, features, tokens, form, level, seed):
    bits, group = form
    ops.set_isa(level)
    random = torch.Generator().manual_seed(seed)
    packed, scales = ops.quantize(torch.randn(rows, features, generator=random), bits, group)
    x = torch.randn(tokens, features, generator=random)
    y = ops.quantized_linear(x, packed, scales, bits, group, features)
    expected = reference.quantized_linear(x, packed, scales, bits, group, features)
    # A single activation that falls on the other side of a half moves a small product by a whole step.
    bound = 0.01 * x.abs().amax() * scales.float().abs().amax() * 8 if tokens else 0
    assert ((y - expected).abs() <= bound + 1e-5).all()


@pytest.mark.parametrize("bits,group", FORMATS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_rows_and_dequantize_are_exact(level, bits, group, dtype):
    packed, scales = ops.quantize(torch.randn(20, 150), bits, group)
    ids = torch.tensor([[3, 19, 0], [3, 7, 7]])
    y = ops.embedding(ids, packed, scales, bits, group, 150, dtype)
    assert y.dtype == dtype and y.shape == (2, 3, 150)
    assert torch.equal(y, reference.embedding(ids, packed, scales, bits, group, 150, dtype))
    weight = ops.dequantize(packed, scales, bits, group, 150)
    assert torch.equal(weight, reference.dequantize(packed, scales, bits, group, 150))
    assert ops.embedding(ids[:0], packed, scales, bits, group, 150, dtype).shape == (0, 3, 150)


def test_reads_nothing_past_the_end(level):
    """The packed weight ends where a page of a mapped file ends, and the page after it cannot be read."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    for bits, group, rows, features in (
        (4, 32, 5, 96),
        (4, 64, 5, 64),
        (4, 128, 3, 384),
        (8, 32, 5, 96),
        (8, 64, 3, 64),
    ):
        packed, scales = ops.quantize(torch.randn(rows, features), bits, group)
        memory = mmap.mmap(-1, 2 * page)
        whole = torch.frombuffer(memory, dtype=packed.dtype)
        assert libc.mprotect(whole.data_ptr() + page, page, 0) == 0
        guarded = whole[page - packed.numel() : page].view(packed.shape)
        guarded.copy_(packed)
        for tokens in (1, 40):
            x = torch.randn(tokens, features)
            y = ops.quantized_linear(x, guarded, scales, bits, group, features)
            assert torch.equal(y, ops.quantized_linear(x, packed, scales, bits, group, features))

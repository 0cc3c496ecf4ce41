"""bfloat16 in exponent codes and without zeros: every bit comes back, products have the bits of plain bfloat16's."""

from __future__ import annotations

import mmap
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from shoestring.core.errors import UsageError
from shoestring.kernels import formats, huffman, matrix, ops
from shoestring.kernels.formats import exponents, sparse

NATIVE = Path(__file__).parents[2] / "native"
CODERS = {"exponents": exponents, "sparse": sparse}
SHAPES = [(1, 1), (5, 33), (16, 64), (33, 129), (40, 300), (70, 576)]

needs_native = pytest.mark.skipif(not ops.backend()["native"], reason="no native library in this installation")
coders = pytest.mark.parametrize("name", CODERS)


def numbers(name: str, rows: int, cols: int) -> torch.Tensor:
    """Magnitudes over many exponents, a row of zeros, every special number; half zeros for the sparse one."""
    made = (torch.randn(rows, cols) * torch.exp2(3 * torch.randn(rows, cols))).bfloat16()
    if name == "sparse":
        made[torch.rand(rows, cols) < 0.5] = 0
    made[rows // 2] = 0
    return made


def special() -> torch.Tensor:
    """Every bit pattern that bfloat16 has, those of NaN and -0 among them."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(256, 256).view(torch.bfloat16)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16)


@coders
def test_every_bit_comes_back(name):
    coder = CODERS[name]
    for values in (special(), special().t().contiguous(), *(numbers(name, *shape) for shape in SHAPES)):
        data, cols = coder.encode(values), values.shape[1]
        assert torch.equal(bits(coder.decode(data, cols)), bits(values))
        ids = torch.randint(0, len(values), (9,))
        assert torch.equal(bits(coder.decode(data, cols, ids)), bits(values[ids]))
        format = formats.parse(f"{name}/{data.numel()}")
        assert torch.equal(format.pack(values)["weight"], data)
        odd = torch.cat((torch.zeros(1, dtype=torch.uint8), data))[1:]  # files promise no alignment
        assert torch.equal(bits(coder.decode(odd, cols)), bits(values))


@coders
def test_rows_and_columns_of_nothing(name):
    for shape in ((0, 5), (3, 64)):
        values = torch.zeros(shape).bfloat16()
        assert torch.equal(CODERS[name].decode(CODERS[name].encode(values), shape[1]), values)


def test_sizes_are_those_of_the_formula():
    torch.manual_seed(0)
    values = (0.02 * torch.randn(512, 576)).bfloat16()
    data = exponents.encode(values)
    listed = struct.unpack_from("<q", data.numpy().tobytes(), 24)[0]
    assert data.numel() == 64 + 4 * 513 + 4 * listed + 512 * 576 * 3 // 2
    assert 0 < listed < 1e-3 * values.numel() and data.numel() < 0.76 * values.numel() * 2
    values[torch.rand(values.shape) < 0.5] = 0
    count = int((values != 0).sum())
    assert sparse.encode(values).numel() == sparse.size(512, 576, count) == 128 + 4 * 513 + 512 * 72 + 2 * count
    # Two of four is no case of its own: a bit for each column and 16 for each number.
    half = torch.ones(64, 1024).bfloat16() * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(256).bfloat16()
    assert 9 <= sparse.encode(half).numel() * 8 / half.numel() < 9.06


@needs_native
@coders
def test_products_have_the_bits_of_bfloat16(isa, name):
    random = np.random.default_rng(0)
    for rows, cols in SHAPES:
        values = numbers(name, rows, cols)
        bias = random.standard_normal(rows).astype(np.float32)
        plain = matrix.make("bf16", rows, cols, bits(values).numpy(), bias=bias)
        made = matrix.make(name, rows, cols, CODERS[name].encode(values).numpy(), bias=bias)
        assert np.array_equal(made.rows_of(np.arange(rows)), plain.rows_of(np.arange(rows)))
        for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 200):
            x = random.standard_normal((tokens, cols)).astype(np.float32)
            expected = plain.multiply(x)
            assert np.array_equal(made.multiply(x), expected), (rows, cols, tokens)
            assert np.array_equal(made.multiply(x, threads=3), expected), (rows, cols, tokens)


@needs_native
@coders
def test_not_a_number_and_infinity_behave_as_in_bfloat16(isa, name):
    values = numbers(name, 33, 130)
    values[17, 129] = float("nan")
    plain = matrix.make("bf16", 33, 130, bits(values).numpy())
    made = matrix.make(name, 33, 130, CODERS[name].encode(values).numpy())
    x = np.random.default_rng(1).standard_normal((9, 130)).astype(np.float32)
    x[3, 100] = np.inf
    y = made.multiply(x)
    assert np.array_equal(y, plain.multiply(x), equal_nan=True)
    assert np.isnan(y[:, 17]).all() and not np.isfinite(y[3]).any()
    others = np.arange(33) != 17
    assert np.isfinite(np.delete(y, 3, 0)[:, others]).all()


@needs_native
@coders
def test_bytes_are_read_to_their_end_and_no_further(isa, name):
    """The last byte is the last one of a mapping, as in a mapped file; what follows cannot be read."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    data = CODERS[name].encode(numbers(name, 5, 70)).numpy()
    block = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    pages = np.frombuffer(block, np.uint8)
    address = pages.ctypes.data + mmap.PAGESIZE
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    try:
        here = pages[mmap.PAGESIZE - len(data) : mmap.PAGESIZE]
        here[:] = data
        made = matrix.make(name, 5, 70, here)
        assert made.data.ctypes.data == here.ctypes.data
        for tokens in (1, 4, 9):
            made.multiply(np.ones((tokens, 70), np.float32))
    finally:
        libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ)


def lies(name: str) -> dict[str, np.ndarray]:
    """Bytes of a 4 x 70 matrix that contradict themselves or it, each in one way."""
    values = numbers(name, 4, 70)
    values[0, 3], values[3, 69] = 2.0**90, 2.0**-90
    good = CODERS[name].encode(values).numpy()
    made: dict[str, np.ndarray] = {"empty": good[:0], "cut": good[:-1], "long": np.append(good, 0).astype(np.uint8)}

    def change(word: str, at: int, format: str, number: int) -> None:
        made[word] = good.copy()
        struct.pack_into(format, made[word], at, number)

    change("name", 0, "<B", 0)
    change("rows", 8, "<q", 5)
    change("many rows", 8, "<q", 1 << 61)
    change("columns", 16, "<q", 71)
    for count in (-1, 0, 1 << 40, (1 << 63) - 1):
        change(f"count {count}", 24, "<q", count)
    change("first end", 64, "<I", 1)
    change("falling ends", 64 + 4, "<I", 0xFFFFFFFF)
    change("last end", 64 + 16, "<I", 0)
    if name == "exponents":
        change("column", 64 + 20, "<I", 70)
        change("far column", 64 + 20, "<I", 0xFFFFFF)
    else:
        change("more bits than numbers", 64 + 20, "<Q", (1 << 64) - 1)
        change("bits beyond the last column", 64 + 28, "<Q", 1 << 63)
    return made


@coders
def test_bytes_that_lie_are_refused(name):
    for word, data in lies(name).items():
        if ops.backend()["native"]:
            with pytest.raises(UsageError):
                matrix.make(name, 4, 70, data)
        with pytest.raises(UsageError):
            CODERS[name].decode(torch.from_numpy(data), 70)
            pytest.fail(word)
    data = CODERS[name].encode(numbers(name, 4, 70))
    for ids in ([4], [-1]):
        with pytest.raises(UsageError):
            CODERS[name].decode(data, 70, torch.tensor(ids))


def test_matrices_that_are_too_wide_are_refused():
    with pytest.raises(UsageError, match="too large"):
        sparse.encode(torch.zeros(1, 1 << 24, dtype=torch.bfloat16))


def test_layers_with_a_bias_round_as_plain_ones():
    for name in (*CODERS, "huffman"):
        weight, bias = torch.randn(48, 70).bfloat16(), torch.randn(48).bfloat16()
        x = torch.randn(3, 70).bfloat16()
        tensors = formats.parse(f"{name}/0").pack(weight)
        format = formats.parse(f"{name}/{tensors['weight'].numel()}")
        from shoestring.kernels.formats._format import Product

        made = Product(format, 48, 70)
        assert torch.equal(made(x, tensors, bias), torch.nn.functional.linear(x, weight, bias))
        assert torch.equal(made(x, tensors, None), torch.nn.functional.linear(x, weight))
        with pytest.raises(UsageError):
            made(x[:, 1:], tensors, bias)


@pytest.mark.parametrize("isa_flags", ["base", "avx512bf16"])
def test_damaged_bytes_under_sanitizers(isa_flags, tmp_path):
    flags = {"base": [], "avx512bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"]}[isa_flags]
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if flags and (platform.machine() != "x86_64" or isa_flags not in ops.backend()["levels"]):
        pytest.skip(f"this CPU has no {isa_flags}")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    kernels = tmp_path / "kernels.cpp"
    kernels.write_text("".join(f'#include "{name}.cpp"\n' for name in ("exponents", "sparse", "prepare")))
    files = [kernels, NATIVE / "matrix.cpp", NATIVE / "huffman.cpp", Path(__file__).parent / "blob_fuzz.cpp"]
    command = [compiler, "-std=c++17", "-O1", *sanitize, *flags, f"-DISA={isa_flags}", f"-I{NATIVE}"]
    built = subprocess.run([*command, *map(str, files), "-o", str(tmp_path / "fuzz")], capture_output=True, text=True)
    if "cannot find -l" in built.stderr:
        pytest.skip("the compiler brings no sanitizers")
    assert built.returncode == 0, built.stderr[-4000:]
    good = tmp_path / "good"
    for name, rows, cols in (("exponents", 7, 130), ("sparse", 7, 130), ("huffman", 60, 300)):
        values = numbers(name, rows, cols)
        data = huffman.pack(bits(values).numpy().view(np.uint16)) if name == "huffman" else None
        good.write_bytes((CODERS[name].encode(values).numpy() if data is None else data).tobytes())
        run = subprocess.run(
            [str(tmp_path / "fuzz"), name, str(rows), str(cols), str(good), "1500" if data is None else "300"],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{name}: {run.stderr[-4000:]}"
        passed, _, rounds, _ = run.stdout.split()
        # Some must be taken and some refused, or nothing was tried.
        assert 0 < int(passed) < int(rounds), run.stdout

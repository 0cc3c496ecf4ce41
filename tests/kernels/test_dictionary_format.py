"""The ternary dictionary code: the kernels against the formula in torch, at every instruction level."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from shoestring.core.errors import UsageError
from shoestring.kernels import matrix, ops
from shoestring.kernels.formats import dictionary, parse
from shoestring.kernels.formats._format import Product

SHAPES = [(1, 1), (3, 2), (5, 7), (17, 33), (40, 384), (4, 1000), (0, 5)]


def ternary(rows: int, cols: int, zeros: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.rand(rows, cols)
    symbols = torch.where(draw < zeros, 0, torch.where(draw < (1 + zeros) / 2, 1, 2)).to(torch.uint8)
    return symbols, -torch.rand(rows).bfloat16().float(), torch.rand(rows).bfloat16().float()


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("zeros", [0.0, 0.6, 0.885, 1.0])
def test_product_and_rows(rows: int, cols: int, zeros: float, isa: str) -> None:
    made = ternary(rows, cols, zeros)
    weight = dictionary.values(*made)
    stored = matrix.make("dictionary", rows, cols, dictionary.encode(*made).numpy())
    x = torch.randn(21, cols)
    want = x.double() @ weight.double().T
    got = torch.from_numpy(stored.multiply(x.numpy()))
    assert torch.allclose(got.double(), want, atol=1e-5 * cols**0.5, rtol=1e-5)
    alone = [torch.from_numpy(stored.multiply(x[i : i + 1].numpy())) for i in range(21)]
    assert torch.equal(torch.cat(alone), got), "a token's result depends on its batch"
    assert torch.equal(torch.from_numpy(stored.rows_of(np.arange(rows))), weight)


def test_bias_and_threads(isa: str) -> None:
    made, bias = ternary(700, 300, 0.8), torch.randn(700)
    stored = matrix.make("dictionary", 700, 300, dictionary.encode(*made).numpy(), bias=bias.numpy())
    x = torch.randn(9, 300)
    one, two = stored.multiply(x.numpy(), 1), stored.multiply(x.numpy(), 3)
    assert np.array_equal(one, two)
    assert torch.allclose(torch.from_numpy(one), x @ dictionary.values(*made).T + bias, atol=1e-4)


def test_not_a_number_stays_in_its_token(isa: str) -> None:
    stored = matrix.make("dictionary", 6, 40, dictionary.encode(*ternary(6, 40, 0.0)).numpy())
    x = torch.randn(3, 40)
    plain = stored.multiply(x.numpy())
    x[1, 7] = float("nan")
    got = stored.multiply(x.numpy())
    assert np.isnan(got[1]).all() and np.array_equal(got[[0, 2]], plain[[0, 2]])


def test_untrusted_bytes_are_refused_as_torch_refuses_them() -> None:
    """Whatever the library takes decodes to whole rows, so that no product reads beyond the bytes."""
    if not ops.backend()["native"]:
        pytest.skip("needs the native library")
    sound = dictionary.encode(*ternary(9, 21, 0.8)).numpy()
    draw, taken = random.Random(0), 0
    for trial in range(1500):
        bytes_ = sound.copy()
        for _ in range(draw.choice((1, 1, 2, 5))):
            bytes_[draw.randrange(len(bytes_))] = draw.randrange(256)
        if trial % 7 == 0:
            bytes_ = bytes_[: draw.randrange(len(bytes_))].copy()
        try:
            native = matrix.make("dictionary", 9, 21, bytes_)
        except UsageError:
            native = None
        try:
            symbols, low, high = dictionary.decode(torch.from_numpy(bytes_.copy()), 21)
            fits = len(symbols) == 9
        except UsageError:
            fits = False
        assert (native is not None) == fits, trial
        if native is not None:
            taken += 1
            assert np.array_equal(native.rows_of(np.arange(9)), dictionary.values(symbols, low, high).numpy())
    assert 0 < taken < 1500


@pytest.mark.parametrize("flags", [[], ["-march=x86-64-v4"]], ids=["base", "avx512"])
def test_damaged_bytes_under_sanitizers(flags: list[str], tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or (flags and "avx512vnni" not in ops.backend()["levels"]):
        pytest.skip("no C++ compiler, or no such CPU")
    (tmp_path / "sound").write_bytes(dictionary.encode(*ternary(9, 21, 0.8)).numpy().tobytes())
    here, native = Path(__file__).parent, Path(__file__).parents[2] / "native"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = [str(native / "dictionary.cpp"), str(here / "dictionary_fuzz.cpp")]
    command = [compiler, "-std=c++17", *flags, "-DISA=base", *sanitize, f"-I{native}", *files, "-o", "fuzz"]
    built = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if "sanitize" in built.stderr or "asan" in built.stderr:
        pytest.skip("the compiler brings no sanitizers")
    assert built.returncode == 0, built.stderr[-2000:]
    run = subprocess.run([str(tmp_path / "fuzz"), str(tmp_path / "sound"), "5000"], capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr[-2000:]


def test_gradients_reach_the_input(level: str) -> None:
    made = ternary(12, 30, 0.7)
    packed = dictionary.encode(*made)
    product = Product(parse(f"dictionary/{len(packed)}"), 12, 30)
    x = torch.randn(4, 30, requires_grad=True)
    y = product(x, {"weight": packed}, None)
    y.square().sum().backward()
    weight = dictionary.values(*made)
    assert torch.allclose(y, x @ weight.T, atol=1e-5)
    assert torch.allclose(x.grad, 2 * (x @ weight.T) @ weight, atol=1e-4)  # type: ignore[arg-type]

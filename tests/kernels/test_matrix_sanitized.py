"""The matrix formats under AddressSanitizer and UBSan: random shapes and bytes, memory of exactly the right size."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from shoestring.kernels import ops

NATIVE = Path(__file__).parents[2] / "native"
# As few units as there can be: reading the compiler's headers once a format would take longer than all the rest.
UNITS = (
    ("fp32", "bf16", "int8", "int4", "q8_0", "q4_0", "q4_1", "uniform", "ternary", "tritplanes", "binary", "exponents",
     "sparse", "prepare"),
    ("dictionary",),
)  # fmt: skip
FLAGS = {
    "base": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitizer")
    (folder / "empty.cpp").write_text("int main() {}")
    built = subprocess.run(
        [found, *SANITIZE, str(folder / "empty.cpp"), "-o", str(folder / "empty")], capture_output=True
    )
    if built.returncode or subprocess.run([str(folder / "empty")], capture_output=True).returncode:
        pytest.skip("the compiler brings no sanitizers")
    return found


@pytest.mark.parametrize("isa", FLAGS)
def test_random_shapes_and_bytes(compiler, isa, tmp_path):
    if isa != "base" and (platform.machine() != "x86_64" or isa not in ops.backend()["levels"]):
        pytest.skip(f"this CPU has no {isa}")
    files = [NATIVE / "matrix.cpp", Path(__file__).parent / "matrix_fuzz.cpp"]
    for i, unit in enumerate(UNITS):
        files.append(tmp_path / f"unit{i}.cpp")
        files[-1].write_text("".join(f'#include "{name}.cpp"\n' for name in unit))
    flags = ["-std=c++17", "-O0", *SANITIZE, *FLAGS[isa], f"-DISA={isa}", f"-I{NATIVE}"]
    command = [compiler, *flags, *map(str, files)]
    built = subprocess.run([*command, "-o", str(tmp_path / "fuzz")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    run = subprocess.run([str(tmp_path / "fuzz"), "1500"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr[-4000:]

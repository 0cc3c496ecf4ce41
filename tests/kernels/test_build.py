"""What the native sources must not do: leak an instruction set into another, or bring a second thread runtime."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shoestring.kernels import loader

NATIVE = Path(__file__).parents[2] / "native"
FLAGS = {
    "base": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512vnni": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mprefer-vector-width=512"],
}
KERNELS = re.search(r"SK_KERNELS ([^)]*)", (NATIVE / "isa.cmake").read_text())[1].split()


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_sources_include_no_library(name):
    includes = set(re.findall(r'#include [<"]([^>"]+)', (NATIVE / name).read_text()))
    own = {path.name for path in NATIVE.glob("*.h")}
    assert includes <= own | {"immintrin.h", "cstdint"}


@pytest.mark.parametrize("name", sorted(path.name for path in NATIVE.glob("*.h")))
def test_shared_headers_include_no_library(name):
    includes = set(re.findall(r'#include [<"]([^>"]+)', (NATIVE / name).read_text()))
    assert all(include in ("immintrin.h", "cstdint") or (NATIVE / include).is_file() for include in includes)


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")
@pytest.mark.parametrize("isa", FLAGS)
def test_kernel_objects_share_no_symbol(isa, tmp_path):
    """A weak symbol compiled for a new CPU may be the copy that the linker keeps for all."""
    if isa != "base" and "x86" not in subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True).stdout:
        pytest.skip("flags of another architecture")
    for name in KERNELS:
        target = tmp_path / f"{name}.o"
        # Unoptimised, nothing is inlined away that a real build might leave behind.
        flags = ["-std=c++17", "-O0", "-fno-exceptions", "-fno-rtti", f"-DISA={isa}", *FLAGS[isa]]
        subprocess.run(["g++", *flags, "-c", str(NATIVE / name), "-o", str(target)], check=True)
        symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
        for line in symbols.splitlines():
            kind, symbol = line[17:].split(" ", 1)
            assert kind not in "WVuwv", line
            assert kind != "T" or symbol.startswith(f"{isa}::"), line


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_where_there_is_a_compiler_there_is_a_library(monkeypatch):
    """An installation falls back to plain torch in silence: sources that do not compile would go unseen."""
    monkeypatch.delenv("SHOESTRING_ISA", raising=False)
    found = loader.load()
    assert found.library is not None, found.reason


def test_library_uses_no_openmp():
    library = loader.load().library
    if library is None or not shutil.which("readelf"):
        pytest.skip("no native library in this installation, or no readelf")
    needed = subprocess.run(["readelf", "-d", library._name], capture_output=True, text=True, check=True).stdout
    assert "gomp" not in needed and "libomp" not in needed


def test_types_come_from_the_header():
    header = (NATIVE / "kernels.h").read_text()
    names = re.findall(r"^SK_API .*? (\w+)\(", header, re.MULTILINE)
    assert "sk_linear" in names
    library = loader.load().library
    if library is None:
        pytest.skip("no native library in this installation")
    for name in names:
        arguments = re.search(rf"{name}\((.*?)\);", header)[1]
        count = 0 if arguments == "void" else arguments.count(",") + 1
        assert len(getattr(library, name).argtypes) == count

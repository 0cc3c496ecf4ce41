"""The machine as far as a plan needs it: what the interpreter itself takes, and what there is."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from shoestring.core.errors import ShoestringError
from shoestring.core.files import write_text
from shoestring.models.cache import cache_dir

# What a process that serves a model has loaded before it reads any weight.
_IMPORTS = "torch, transformers, peft, shoestring.models, shoestring.methods.quantizers"
_PROBE = f"""
import {_IMPORTS}
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin
from shoestring.core import probes
print(probes.resident())
"""
_ENGINE = """
import shoestring.engine.engine, shoestring.engine.native_runner
from shoestring.core import probes
print(probes.resident())
"""
_READ, _PASSES = 1 << 28, 8


@dataclass(frozen=True)
class Machine:
    """Bytes and counts. `floor` is the resident memory of an interpreter with everything imported and no model read."""

    cores: int
    memory: int
    floor: int


def machine() -> Machine:
    """This machine. The floor is measured once in a process of its own and remembered for these package versions."""
    return Machine(len(os.sched_getaffinity(0)), psutil.virtual_memory().total, _floor())


def engine_floor() -> int:
    """Resident bytes of a process of the engine before it reads a model."""
    return _probed(_ENGINE)


def bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory together: the fastest of several passes over a quarter of
    a gigabyte, which no cache holds. The C library searches for a byte that is not there."""
    search = ctypes.CDLL(None).memchr
    search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    share = -(-_READ // threads)
    pages = bytearray(b"\1") * (share * threads)  # written, as pages never written would all be the same one
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            began = time.perf_counter()
            list(pool.map(lambda part: search(start + part * share, 2, share), range(threads)))
            fastest = min(fastest, time.perf_counter() - began)
    return share * threads / fastest


def _floor() -> int:
    key = {name: version(name) for name in ("torch", "transformers", "peft")} | {"python": sys.version}
    file = cache_dir() / "floor.json"
    if file.is_file():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["key"] == key:
                return int(known["bytes"])
        except (ValueError, KeyError, TypeError):
            pass  # an unreadable memory is measured again
    floor = _probed(_PROBE)
    with suppress(ShoestringError):  # where the cache cannot be written it is measured each time
        write_text(file, json.dumps({"key": key, "bytes": floor}))
    return floor


def _probed(code: str) -> int:
    """What a fresh interpreter prints last."""
    places = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": places},
    )
    return int(done.stdout.split()[-1])

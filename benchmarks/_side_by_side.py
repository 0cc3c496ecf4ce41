"""Models held by several processes, asked in turns; and how fast this memory can be read at all."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _models import big_gguf, coded, packed, requantized
from _peers import ENVIRONMENT, gguf
from shoestring.models import resolve

_ARM = Path(__file__).with_name("_arm.py")


@dataclass(frozen=True)
class Arm:
    """Who computes what: kind of `_arm.py`, its Python, the model."""

    name: str
    kind: str
    python: str
    model: Path


class Asked:
    """A process of `_arm.py` that has its model loaded."""

    def __init__(self, arm: Arm, threads: int) -> None:
        words = [arm.python, str(_ARM), arm.kind, str(arm.model), str(threads)]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.process = subprocess.Popen(words, **pipes)
        self.bytes = int(self._answer()["bytes"])

    def times(self, prompt: int, tokens: int) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended")  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def asked(arms: list[Arm], threads: int) -> Iterator[dict[str, Asked]]:
    """All arms, loaded and waiting."""
    with ExitStack() as stack:
        found: dict[str, Asked] = {}
        for arm in arms:
            found[arm.name] = Asked(arm, threads)
            stack.callback(_end, found[arm.name].process)
        yield found


def _end(process: subprocess.Popen) -> None:
    assert process.stdin
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def sets(names: list[str], given: Any, folder: Path) -> Iterator[tuple[str, list[Arm]]]:
    """The comparisons called `names`, their models made in `folder`: (name, arms), ours first."""
    file, here, peer = gguf(given.model), sys.executable, given.llama_python
    for name in names:
        if name == "4-bit":
            arms = [Arm("ours", "ours", here, file)] + ([Arm("llama.cpp", "llama", peer, file)] if peer else [])
        elif name == "bf16":
            plain = resolve(file)
            same = coded(plain, folder, "fixed")
            arms = [Arm("ours", "ours", here, plain), Arm("ours, codes of one length", "ours", here, same)]
            arms.append(Arm("transformers", "transformers", here, plain))
            if peer:
                same = requantized(peer, file, folder / "bf16.gguf", given.threads)
                arms.append(Arm("llama.cpp", "llama", peer, same))
        else:
            same = big_gguf(file, folder / "big.gguf")
            arms = [Arm("ours, int4", "ours", here, packed(resolve(file), folder / "big", "int4/64", "int4/64"))]
            arms += [Arm("ours, Q4_0", "ours", here, same)] + ([Arm("llama.cpp", "llama", peer, same)] if peer else [])
        yield name, arms


class Memory:
    """Reads as many bytes as a model has weights, by as many threads: the C library searches an absent byte."""

    def __init__(self, size: int, threads: int) -> None:
        self.pages = np.ones(size, np.uint8)  # written once: pages of zeros would be one page
        self.threads = threads
        self._search = ctypes.CDLL(None).memchr
        self._search.argtypes, self._search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p

    def seconds(self, repeats: int = 7) -> float:
        """The fastest of several passes."""
        share = -(-len(self.pages) // self.threads)
        parts = [self.pages[at : at + share] for at in range(0, len(self.pages), share)]
        with ThreadPoolExecutor(self.threads) as pool:
            best = float("inf")
            for _ in range(repeats + 1):
                began = time.perf_counter()
                list(pool.map(lambda part: self._search(part.ctypes.data, 2, len(part)), parts))
                best = min(best, time.perf_counter() - began)
        return best

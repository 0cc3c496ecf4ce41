"""bfloat16 without losing a bit: bytes, how fast they become numbers again, loading from a cold disk, and decode speed.

    python benchmarks/lossless.py [--model smollm2] [--rounds 5] [--threads N] [--json FILE]

Huffman codes are for files: every matrix of the packed folder is decoded by one thread, and a round's figure is all of
them over its processor time; loading is the engine's, with the file dropped from the system's cache before, against
reading the bfloat16 file from the cold disk into memory (which the engine itself does not: it maps the file, so the
first token pays for the disk). Codes of one length are for running: the engine's median token against that in bfloat16,
in turns, both loaded once.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from _models import coded
from _peers import arguments, circumstances, keep, ratios, shown, spread, turns
from _side_by_side import Arm, asked
from engine_decode import compared, printed
from shoestring.engine.native_runner import NativeRunner
from shoestring.kernels import huffman
from shoestring.models import resolve
from shoestring.models.llama_like import packing
from shoestring.models.tensors import open_source

FILE = "model.safetensors"


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    source = resolve(given.model)
    report: dict[str, Any] = {"circumstances": circumstances(given.threads)}
    with tempfile.TemporaryDirectory(dir=source.parent) as place:  # on the same disk
        folders = {coding: coded(source, Path(place), coding) for coding in ("huffman", "fixed")}
        whole = (source / FILE).stat().st_size
        report["share_of_bfloat16"] = {c: (folder / FILE).stat().st_size / whole for c, folder in folders.items()}
        report["compress_s"] = {c: float((folder / "seconds").read_text()) for c, folder in folders.items()}
        report["decoding_GB_per_s"] = spread(decoding(folders["huffman"], given.rounds))
        report["cold"] = cold(source, folders["huffman"], given)
        arms = [
            Arm("ours, bfloat16", "ours", sys.executable, source),
            Arm("ours, codes of one length", "ours", sys.executable, folders["fixed"]),
        ]
        with asked(arms, given.threads) as processes:
            report["decode"] = found = compared(processes, given)
        runs = found["runs"]
        report["codes_over_bfloat16"] = ratios(runs[arms[1].name], runs[arms[0].name])
    report["circumstances"]["load_average_after"] = circumstances(given.threads)["load_average"]
    keep(given.json, report)
    for coding, share in report["share_of_bfloat16"].items():
        print(f"{coding:10} {share:.2%} of the bfloat16 file")
    print(f"decoding   {shown(report['decoding_GB_per_s'], '.2f')} GB/s of bfloat16, one core")
    for name, seconds in report["cold"]["seconds"].items():
        print(f"{name:40} {shown(seconds, '.3f')} s")
    printed("decode", found)
    print(f"codes of one length over bfloat16: {shown(report['codes_over_bfloat16'], '.2f')}")
    return 0


def decoding(folder: Path, rounds: int) -> list[float]:
    """GB of bfloat16 a second of a core's time, all matrices of a folder, each round."""
    opened = open_source(folder)
    read = []
    for name in packing(opened):
        if f"{name}.weight" not in opened.tensors:  # a head that borrows the table's
            continue
        data = np.array(opened.tensors[f"{name}.weight"].data)
        read.append(huffman.unpack(data, None, int(data[16:24].view(np.int64)[0])))
    whole = sum(2 * matrix.rows * matrix.cols for matrix in read)
    found = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        for matrix in read:
            matrix.decode()
        found.append(whole / (time.process_time() - begin) / 1e9)
    return found[1:]  # the first round only warms up


def cold(source: Path, packed: Path, given: Any) -> dict[str, Any]:
    """Seconds until all numbers are in memory, from files that the system had to read from the disk."""

    def plain() -> None:
        np.fromfile(source / FILE, np.uint8)

    ways: dict[str, tuple[Path, Callable[[], Any]]] = {
        "bfloat16 file read": (source, plain),
        "packed folder loaded by the engine": (packed, lambda: NativeRunner(packed, threads=given.threads)),
    }
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in turns(list(ways), given.rounds):
        folder, load = ways[name]
        forget(folder / FILE)
        begin = time.perf_counter()
        load()
        runs[name].append(time.perf_counter() - begin)
    first, second = runs.values()
    rate = (source / FILE).stat().st_size / statistics.median(first)
    return {
        "seconds": {name: spread(values) for name, values in runs.items()},
        "file_over_packed": ratios(first, second),
        "disk_bytes_per_s": rate,
        "runs": runs,
    }


def forget(file: Path) -> None:
    """Drop a file from the system's cache; what is not on the disk yet is written first."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())

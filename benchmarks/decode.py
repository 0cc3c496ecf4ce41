"""Decode speed of a packed model against transformers bfloat16, side by side in one run.

    python benchmarks/decode.py [--method int4] [--model smollm2] [--rounds 5] [--threads 1] [--json FILE]

Each round runs both arms in processes of their own, one after the other, the order swapped from round to round, so
that whatever else the machine does meets both. The ratio is the median over rounds with its range.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from shoestring.core import catalog
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.jobs.at_work import at_work
from shoestring.models import resolve

FIGURES = ("decode_tokens_per_s", "prefill_tokens_per_s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", default="int4")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    module = catalog.module(given.method)
    plain = resolve(given.model)
    with tempfile.TemporaryDirectory() as place:
        packed = Path(place, "packed")
        step = Step("compress", given.method)
        catalog.contract("quantizers").apply(module, step, plain, packed, Work(Ledger(), Path(place)))
        arms = {"transformers bfloat16": (plain, "bfloat16"), given.method: (packed, "bfloat16")}
        found: dict[str, list[dict]] = {name: [] for name in arms}
        for turn in range(given.rounds):
            for name, (folder, dtype) in list(arms.items())[:: 1 if turn % 2 == 0 else -1]:
                found[name].append(at_work(folder, dtype=dtype, threads=given.threads, new_tokens=given.new_tokens))
    base, ours = found.values()
    ratios = [b["decode_tokens_per_s"]["median"] / a["decode_tokens_per_s"]["median"] for a, b in zip(base, ours)]
    print(f"{'':24}{'decode tok/s':>22}{'prefill tok/s':>22}{'peak memory':>14}{'storage':>11}")
    for name, runs in found.items():
        cells = []
        for figure in FIGURES:
            values = [run[figure]["median"] for run in runs]
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})")
        memory = statistics.median(run["peak_memory"] for run in runs)
        print(f"{name:24}{cells[0]:>22}{cells[1]:>22}{memory / 1e6:>11.0f} MB{runs[0]['storage'] / 1e6:>8.0f} MB")
    print(
        f"decode ratio {statistics.median(ratios):.2f}x "
        f"(range {min(ratios):.2f}-{max(ratios):.2f} over {len(ratios)} rounds), "
        f"{ours[0]['threads']} threads, load average {os.getloadavg()[0]:.1f}"
    )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"command": sys.argv, "ratios": ratios, "runs": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Decode speed of one answer: ours beside llama.cpp and transformers on the same numbers, and beside the memory.

    python benchmarks/engine_decode.py [--llama-python PYTHON] [--sets 4-bit,bf16,1B] [--rounds 5] [--json FILE]

Sets: the default model in its own four bits; the same numbers in bfloat16, plain and in codes of one length, which lose
no bit; a random Llama of 1.07 billion parameters in four bits. Every model is loaded once, by a process of its own, and
asked in turns. Ours is the whole engine with its scheduler and sampler; llama.cpp is `llama_decode` and the largest
logit. A round's figure is its median token; the bound is one pass over as many bytes as the weights have, by as many
threads, measured in every round.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _peers import arguments, circumstances, keep, ratios, shown, spread, turns
from _side_by_side import Memory, asked, sets


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--sets", default="4-bit,bf16,1B")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "sets": {}}
    with tempfile.TemporaryDirectory() as place:
        for name, arms in sets(given.sets.split(","), given, Path(place)):
            with asked(arms, given.threads) as processes:
                report["sets"][name] = compared(processes, given)
            printed(name, report["sets"][name])
    report["circumstances"]["load_average_after"] = circumstances(given.threads)["load_average"]
    keep(given.json, report)
    return 0


def compared(processes: dict[str, Any], given: Any) -> dict[str, Any]:
    """Tokens per second of each arm and of the memory, and ours over each peer and over the memory, by rounds."""
    ours = [name for name in processes if name.startswith("ours")]
    memory = {name: Memory(processes[name].bytes, given.threads) for name in ours}
    speeds: dict[str, list[float]] = {name: [] for name in [*processes, *(f"memory of {name}" for name in ours)]}
    best: dict[str, float] = {}
    for turn, arm in turns(list(speeds), given.rounds + 1):
        if arm in processes:
            each = processes[arm].times(given.prompt, given.tokens)["each"]
            found, fastest = 1 / statistics.median(each), 1 / min(each)
        else:
            found = fastest = 1 / memory[arm.removeprefix("memory of ")].seconds()
        if turn:  # the first round only warms up
            speeds[arm].append(found)
            best[arm] = max(best.get(arm, 0), fastest)
    return {
        "tokens_per_s": {arm: spread(values) for arm, values in speeds.items()},
        "fastest_token_per_s": best,
        "weight_bytes": {name: processes[name].bytes for name in ours},
        "ours_over": {
            f"{mine} / {arm}": ratios(speeds[mine], speeds[arm])
            for mine in ours
            for arm in speeds
            if not arm.startswith("ours") and (arm in processes or arm == f"memory of {mine}")
        },
        "runs": speeds,
    }


def printed(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name:26} {'tokens/s, median (range)':>28} {'fastest token':>15}")
    for arm, values in found["tokens_per_s"].items():
        print(f"{arm:26} {shown(values):>28} {found['fastest_token_per_s'][arm]:>15.1f}")
    for pair, values in found["ours_over"].items():
        print(f"  {pair:40} {shown(values, '.2f')}")


if __name__ == "__main__":
    sys.exit(main())

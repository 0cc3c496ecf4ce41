"""Time from a prompt to its first token: ours beside llama.cpp and transformers on the same numbers.

    python benchmarks/engine_prefill.py [--llama-python PYTHON] [--sets 4-bit,bf16] [--prompt 512] [--json FILE]

As `engine_decode.py`, with a prompt of 512 tokens and one token of answer. Ours is the whole engine with its usual
settings, which computes the prompt in steps of 256 tokens.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from _peers import arguments, circumstances, keep, ratios, shown, spread, turns
from _side_by_side import asked, sets


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--sets", default="4-bit,bf16")
    parser.add_argument("--prompt", type=int, default=512)
    given = parser.parse_args()
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "prompt_tokens": given.prompt, "sets": {}}
    with tempfile.TemporaryDirectory() as place:
        for name, arms in sets(given.sets.split(","), given, Path(place)):
            with asked(arms, given.threads) as processes:
                found: dict[str, list[float]] = {arm: [] for arm in processes}
                for turn, arm in turns(list(processes), given.rounds + 1):
                    seconds = processes[arm].times(given.prompt, 1)["first"]
                    if turn:  # the first round only warms up
                        found[arm].append(given.prompt / seconds)
            ours = next(iter(found))
            over = {f"{ours} / {arm}": ratios(found[ours], found[arm]) for arm in found if not arm.startswith("ours")}
            rates = {arm: spread(values) for arm, values in found.items()}
            report["sets"][name] = {"prompt_tokens_per_s": rates, "ours_over": over, "runs": found}
            print(f"\n{name:26} {'prompt tokens/s, median (range)':>34}")
            for arm, values in rates.items():
                print(f"{arm:26} {shown(values):>34}")
            for pair, values in over.items():
                print(f"  {pair:40} {shown(values, '.2f')}")
    keep(given.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

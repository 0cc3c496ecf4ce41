"""Decoding with busy neighbours on the cores against decoding alone, ours and llama.cpp.

    python benchmarks/engine_neighbours.py [--llama-python PYTHON] [--neighbours 2] [--json FILE]

A process decodes one token after another with every core; in half of the runs other processes compute without pause.
Threads that spin at barriers while a neighbour holds their core make such a decode many times slower. Arms take turns,
each in a process of its own; what counts is each arm's share of its own idle speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from _peers import ENVIRONMENT, arguments, circumstances, gguf, keep, ratios, shown, spread, turns

NEIGHBOUR = "x = 1.0\nwhile True: x = x * 1.0000001 % 3.0"
LLAMA = """
import json, sys, time
from llama_cpp import Llama
threads, prompt, tokens, repeats = map(int, sys.argv[2:])
llama = Llama(sys.argv[1], n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
speeds = []
for turn in range(repeats + 1):
    llama.reset()
    llama.eval([1000 + i for i in range(prompt)])
    token, count, began = 1000, tokens if turn else 2, time.perf_counter()
    for _ in range(count):
        llama.eval([token])
        token = llama.sample(temp=0.0)
    if turn:
        speeds.append(count / (time.perf_counter() - began))
print(json.dumps({"decode_tokens_per_s": sorted(speeds)[len(speeds) // 2]}))
"""
PROMPT, TOKENS, REPEATS = 16, 64, 3


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--neighbours", type=int, default=2)
    given = parser.parse_args()
    file, threads = str(gguf(given.model)), str(given.threads)
    sizes = [str(PROMPT), str(TOKENS), str(REPEATS)]
    flags = [f"--{name}={size}" for name, size in zip(("input-tokens", "output-tokens", "repeats"), sizes)]
    programs = {"ours": [sys.executable, "-m", "shoestring", "bench", "latency", file, "--threads", threads, "--json"]}
    programs["ours"] += flags
    if given.llama_python:
        programs["llama.cpp"] = [given.llama_python, "-c", LLAMA, file, threads, *sizes]
    arms = [f"{name}, {state}" for name in programs for state in ("idle", "busy")]
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for _, arm in turns(arms, given.rounds):
        name, _, state = arm.partition(", ")
        with neighbours(given.neighbours if state == "busy" else 0):
            found[arm].append(speed(programs[name]))
    kept = {name: ratios(found[f"{name}, busy"], found[f"{name}, idle"]) for name in programs}
    report: dict[str, Any] = {
        "circumstances": circumstances(given.threads) | {"neighbours": given.neighbours},
        "decode_tokens_per_s": {arm: spread(runs) for arm, runs in found.items()},
        "share_of_idle_speed": kept,
        "runs": found,
    }
    print(f"{'':12} {'alone, tokens/s':>24} {'with neighbours':>24} {'share kept':>20}")
    for name in programs:
        idle, busy = (shown(spread(found[f"{name}, {state}"])) for state in ("idle", "busy"))
        print(f"{name:12} {idle:>24} {busy:>24} {shown(kept[name], '.2f'):>20}")
    print(f"{given.neighbours} neighbours, {threads} threads on {report['circumstances']['cores']} cores")
    keep(given.json, report)
    return 0


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that compute without pause."""
    started = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def speed(words: list[str]) -> float:
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:4])} failed: {done.stderr[-1500:]}")
    return float(json.loads(done.stdout)["decode_tokens_per_s"])


if __name__ == "__main__":
    sys.exit(main())

"""Time to the first token of a cold process: `shoestring generate` against a line of llama-cpp-python.

    python benchmarks/engine_start.py [--llama-python PYTHON] [--rounds 7] [--json FILE]

A new process each time, from its start to the first byte of its answer, taking turns. Both have run once before: the
model's file is in the page cache, and Python's byte code is written.
"""

from __future__ import annotations

import subprocess
import sys
import time

from _peers import ENVIRONMENT, arguments, circumstances, gguf, keep, ratios, shown, spread, turns

PROMPT = "Name the planets."
LLAMA = """
import sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), verbose=False)
messages = [{"role": "user", "content": sys.argv[3]}]
for chunk in llama.create_chat_completion(messages, max_tokens=8, temperature=0, stream=True):
    print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
"""


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=7)
    given = parser.parse_args()
    file, threads = str(gguf(given.model)), str(given.threads)
    arms = {"ours": [sys.executable, "-m", "shoestring", "generate", "-m", file, "-p", PROMPT, "--max-tokens", "8"]}
    arms["ours"] += ["--threads", threads]
    if given.llama_python:
        arms["llama-cpp-python"] = [given.llama_python, "-c", LLAMA, file, threads, PROMPT]
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for words in arms.values():
        first_byte(words)  # files into the page cache, byte code written
    for _, arm in turns(list(arms), given.rounds):
        found[arm].append(first_byte(arms[arm]))
    report = {
        "circumstances": circumstances(given.threads),
        "first_token_seconds": {arm: spread(times) for arm, times in found.items()},
        "runs": found,
    }
    for arm, times in found.items():
        print(f"{arm:18} {shown(spread(times), '.2f')} s to the first token")
    if "llama-cpp-python" in found:
        report["ours_over_llama"] = ratios(found["ours"], found["llama-cpp-python"])
        print(f"ours / llama-cpp-python {shown(report['ours_over_llama'], '.2f')}, {threads} threads")
    keep(given.json, report)
    return 0


def first_byte(words: list[str]) -> float:
    """Seconds from the start of a process to the first byte that it writes."""
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT) as child:
        assert child.stdout
        byte = child.stdout.read(1)
        taken = time.perf_counter() - began
        child.stdout.read()
    if child.returncode or not byte:
        raise RuntimeError(f"{' '.join(words[:4])} ended with {child.returncode}")
    return taken


if __name__ == "__main__":
    sys.exit(main())

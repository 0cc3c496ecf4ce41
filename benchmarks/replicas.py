"""Two replicas under Ray Serve against one process with all cores, and against two servers that are asked in turns.

    python benchmarks/replicas.py [--topics 8] [--turns 6] [--streams 4] [--rounds 3] [--json FILE]

Requests come in random order, and those about one topic begin with the same long text. Each arm is started anew, the
order swapped from round to round, and answers the same requests with the same lengths of answers. The client is that
of `shoestring bench serve`.

    one             `shoestring serve` with a thread on every core
    two replicas    `shoestring serve --replicas 2`, which share the cores
    in turns        two `shoestring serve` that share the cores; every second request goes to the second: what is left
                    of two processes without Ray, and without a router

Found is the share of the prompts' tokens that the engine that was asked had in its cache. `one` shows what there is to
be found, `in turns` what is found without a router.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from _peers import arguments, circumstances, free_port, keep, ratios, served, shown, spread, turns
from shoestring.jobs.bench import ServeRequest, bench_serve

ONE, TWO, TURNS = "one", "two replicas", "in turns"
WORDS = ("river", "bank", "ferry", "stone", "winter", "market", "letter", "harbour", "mountain", "lamp", "copper")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--topics", type=int, default=8, help="long beginnings")
    parser.add_argument("--turns", type=int, default=6, help="requests about each")
    parser.add_argument("--words", type=int, default=300, help="length of a beginning")
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--streams", type=int, default=4, help="requests under way at once")
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (ONE, TWO, TURNS)}
    for turn, arm in turns(tuple(found), given.rounds):
        measured = run(arm, given, requests(given, seed=turn))
        found[arm].append(measured)
        print(
            f"round {turn + 1}  {arm:14} {measured['tokens_per_s']:8.1f} tokens/s  {measured['found']:6.1%} found",
            file=sys.stderr,
        )
    report = summary(found, given)
    print(table(report))
    keep(given.json, report)
    return 0


def requests(given: Any, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=given.words)) for _ in range(given.topics)]
    made = [
        {
            "messages": [
                {"role": "system", "content": text},
                {"role": "user", "content": f"Question {turn}: what is it?"},
            ]
        }
        for text in texts
        for turn in range(given.turns)
    ]
    draw.shuffle(made)
    return [body | {"max_tokens": given.tokens} for body in made]


def run(arm: str, given: Any, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Throughput in tokens of prompts and answers a second, share of prompts found in caches, bytes of memory."""
    servers = 2 if arm == TURNS else 1
    share = given.threads if arm == ONE else max(1, given.threads // 2)
    more = ["--replicas", "2"] if arm == TWO else []
    with ExitStack() as stack:
        ports, pids = [free_port() for _ in range(servers)], []
        for port in ports:
            words = [sys.executable, "-m", "shoestring", "serve", given.model, "--port", str(port)]
            pids.append(stack.enter_context(served([*words, "--threads", str(share), *more], port)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        asked = [ask(port, given, bodies[at::servers], servers, folder) for at, port in enumerate(ports)]
        with ThreadPoolExecutor(servers) as beside:
            answered = list(beside.map(bench_serve, asked))
        hits, looked_up = (
            sum(counted(port, name) for port in ports) for name in ("prefix_cache_hits", "prefix_cache_queries")
        )
        memory = sum(resident(pid) for pid in pids)
    prompt, output = (sum(one["tokens"][kind] for one in answered) for kind in ("prompt", "output"))
    seconds = max(one["seconds"] for one in answered)
    return {
        "tokens_per_s": (prompt + output) / seconds,
        "output_tokens_per_s": output / seconds,
        "first_token_p50_s": sum(one["first_token"]["p50"] for one in answered) / servers,
        "found": hits / looked_up,
        "resident_bytes": memory,
        "errors": sum(sum(one["requests"]["errors"].values()) for one in answered),
    }


def ask(port: int, given: Any, bodies: Sequence[dict[str, Any]], servers: int, folder: Path) -> ServeRequest:
    file = folder / f"{port}.jsonl"
    file.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return ServeRequest(
        url=f"http://127.0.0.1:{port}",
        prompts=str(file),
        concurrency=max(1, given.streams // servers),
        requests=len(bodies),
        warmup=0,
        body={"temperature": 0, "ignore_eos": True},
    )


def counted(port: int, name: str) -> float:
    """A counter, over all replicas."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return sum(float(value) for value in re.findall(rf"^shoestring:{name}_total{{.*}} (\S+)$", text, re.M))


def resident(pid: int) -> int:
    """Bytes in RAM of a process and all below it; what they share is counted once in each."""
    top = psutil.Process(pid)
    return sum(int(process.memory_info().rss) for process in (top, *top.children(recursive=True)))


def summary(found: dict[str, list[dict[str, Any]]], given: Any) -> dict[str, Any]:
    speeds = {arm: [run["tokens_per_s"] for run in runs] for arm, runs in found.items()}
    figures = ("tokens_per_s", "output_tokens_per_s", "first_token_p50_s", "found", "resident_bytes")
    return {
        "asked": {name: getattr(given, name) for name in ("topics", "turns", "words", "tokens", "streams")},
        "circumstances": circumstances(given.threads),
        "arms": {
            arm: {name: spread([run[name] for run in runs]) for name in figures}
            | {"over_one": ratios(speeds[arm], speeds[ONE]), "errors": sum(run["errors"] for run in runs)}
            for arm, runs in found.items()
        },
        "runs": found,
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"{'':14} {'tokens/s':24} {'over one':20} {'found':22} {'first token s':20} GB"]
    for arm, figures in report["arms"].items():
        memory = figures["resident_bytes"]["median"] / 1e9
        lines.append(
            f"{arm:14} {shown(figures['tokens_per_s']):24} {shown(figures['over_one'], '.2f'):20} "
            f"{shown(figures['found'], '.1%'):22} {shown(figures['first_token_p50_s'], '.2f'):20} {memory:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

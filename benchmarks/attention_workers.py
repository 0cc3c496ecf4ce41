"""Attention and its keys in worker processes beside one process: time, bytes, memory, and tokens per modelled dollar.

    python benchmarks/attention_workers.py [--answers 8] [--context 512,1500] [--workers 1] [--rounds 3] [--json FILE]

Every arm has the same cores: one for the model, one for each worker; the single process gets one core, and all of them
in an arm of its own. A round's figure is the median step in which all answers decode. Model and workers share one
memory bus here, so absolute throughput need not rise; what devices of two kinds would bring per dollar is the planner's
part, from their published figures: the best pair of kinds beside the best number of devices of one kind.

With --network the same runs between two network namespaces (Linux, root, `ip` and `tc`): a worker behind a veth pair
with limited rate and delay.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil

from _peers import arguments, circumstances, keep, ratios, shown, spread, turns
from shoestring.core import catalog
from shoestring.engine.engine import Engine
from shoestring.engine.request import Request, Sampling

METHOD = catalog.module("attention_offloading")
SPACE, OURS, THEIRS, PORT = "shoestring-attention", "10.213.7.1", "10.213.7.2", 7413
LINKS = {"10 Gbit/s, 0.1 ms": ("10gbit", "0.05ms"), "1 Gbit/s, 0.5 ms": ("1gbit", "0.25ms")}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--context", default="512,1500")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--network", action="store_true")
    given = parser.parse_args()
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "contexts": {}, "plans": planned()}
    for context in map(int, given.context.split(",")):
        arms = network_arms() if given.network else local_arms(given.workers)
        if not arms:
            return 0
        report["contexts"][context] = found = compared(arms, context, given)
        printed(context, found)
    print(f"\n{'tokens per modelled dollar':28}{'context':>8}{'devices apart':>20}", end="")
    print("".join(f"{f'{name} alone':>14}" for name in ("h100", "h20")) + f"{'apart / h100':>14}{'GB/s sent':>11}")
    for plan in report["plans"]:
        alone = "".join(f"{plan['alone'].get(name, 0):>14,.0f}" for name in ("h100", "h20"))
        apart = f"{plan['per_dollar']:,.0f} ({plan['devices']})"
        print(f"{plan['model']:28}{plan['context']:>8,}{apart:>20}{alone}{plan['gain']:>14.2f}{plan['sent']:>11.1f}")
    keep(given.json, report)
    return 0


def local_arms(workers: int) -> dict[str, tuple[Any, ...]]:
    plug = f"attention_offloading,workers={workers}"
    return {
        "one process, one core": (nullcontext, (), 1),
        "one process, all cores": (nullcontext, (), len(os.sched_getaffinity(0))),
        "workers": (nullcontext, (plug,), 1),
        "workers, early q": (nullcontext, (f"{plug},early=true",), 1),
        "workers, two batches": (nullcontext, (f"{plug},batches=2",), 1),
        "workers, two batches, early q": (nullcontext, (f"{plug},batches=2,early=true",), 1),
    }


def network_arms() -> dict[str, tuple[Any, ...]]:
    """A worker behind each of `LINKS`; none, with the reason said, where namespaces are not to be had."""
    missing = [word for word in ("ip", "tc") if not shutil.which(word)]
    if missing or os.geteuid():
        print(f"no network namespaces: {' and '.join(missing) + ' missing' if missing else 'that needs root'}")
        return {}
    links = {"as fast as it is": ("", "")} | LINKS
    for name, link in list(links.items()):
        try:
            with across(*link):
                pass
        except subprocess.CalledProcessError as error:
            print(f"{name} is not to be had: {' '.join(error.cmd)}: {error.stderr.strip()}")
            del links[name]
    if not links:
        return {}
    plug = f"attention_offloading,workers=tcp://{THEIRS}:{PORT}"
    arms: dict[str, tuple[Any, ...]] = {"one process, one core": (nullcontext, (), 1)}
    for name, link in links.items():
        for word, more in (("", ""), (", two batches", ",batches=2")):
            arms[name + word] = ((lambda link=link: across(*link)), (plug + more,), 1)
    return arms


@contextmanager
def across(rate: str, delay: str) -> Iterator[None]:
    """A worker in another network namespace, behind a veth pair with this rate and delay each way, or as it is."""
    tidy = [["ip", "netns", "del", SPACE], ["ip", "link", "del", "shoestring0"]]
    inside = ["ip", "netns", "exec", SPACE]
    for command in tidy:
        subprocess.run(command, capture_output=True)
    try:
        for line in (
            f"ip netns add {SPACE}",
            f"ip link add shoestring0 type veth peer name shoestring1 netns {SPACE}",
            f"ip addr add {OURS}/24 dev shoestring0", "ip link set shoestring0 up",
            f"ip -n {SPACE} addr add {THEIRS}/24 dev shoestring1", f"ip -n {SPACE} link set shoestring1 up",
            *((
                f"tc qdisc add dev shoestring0 root netem delay {delay} rate {rate}",
                f"ip netns exec {SPACE} tc qdisc add dev shoestring1 root netem delay {delay} rate {rate}",
            ) if rate else ()),
        ):  # fmt: skip
            subprocess.run(line.split(), check=True, capture_output=True, text=True)
        role = ["serve", "--role", "attention", "--host", THEIRS, "--port", str(PORT), "--no-auth"]
        words = [*inside, sys.executable, "-m", "shoestring", *role]
        core = max(os.sched_getaffinity(0))
        with subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, {core})
        ) as process:
            assert process.stderr
            process.stderr.readline()
            try:
                yield
            finally:
                process.kill()
    finally:
        for command in tidy:
            subprocess.run(command, capture_output=True)


def compared(arms: dict[str, tuple[Any, ...]], context: int, given: Any) -> dict[str, Any]:
    steps: dict[str, list[float]] = {name: [] for name in arms}
    kept: dict[str, dict[str, float]] = {}
    for _, arm in turns(list(arms), given.rounds):
        around, plugs, threads = arms[arm]
        with around(), Engine(
            given.model, cache_dtype="fp32", threads=threads, plugs=plugs, max_sequences=given.answers,
            context=2 * context, memory=8 << 30, prefix_cache=False,
        ) as engine:  # fmt: skip
            before = psutil.Process().memory_info().rss
            steps[arm].append(statistics.median(decoded(engine, context, given)))
            kept[arm] = {
                "megabytes_gained": (psutil.Process().memory_info().rss - before) / 1e6,
                "bytes_per_token": engine.counts().plugged.get("attention_payload_bytes", 0) / passed(engine),
                "formula": METHOD.bytes_per_step(engine.facts, 1) if plugs else 0,
            }
    first = next(iter(steps))
    return {
        "milliseconds": {arm: spread([1e3 * s for s in each]) for arm, each in steps.items()},
        "over_one_process": {arm: ratios(steps[first], each) for arm, each in steps.items()},
        "kept": kept,
        "runs": steps,
    }


def decoded(engine: Engine, context: int, given: Any) -> list[float]:
    """Seconds of `given.tokens` steps in which all answers decode: none ends before the last prompt is through."""
    for i in range(given.answers):
        prompt = [100 + (i * 31 + j * 7) % 40_000 for j in range(context)]
        engine.submit(Request(prompt, Sampling(max_tokens=context, ignore_eos=True)))
    found: list[float] = []
    while len(found) < given.tokens:
        began = time.perf_counter()
        if sum(len(delta.tokens) for delta in engine.step()) == given.answers:
            found.append(time.perf_counter() - began)
    return found


def passed(engine: Engine) -> int:
    """Tokens that went through the layers: every one but each answer's newest."""
    counts = engine.counts()
    return counts.prompt_tokens + counts.generation_tokens - counts.running


def planned() -> list[dict[str, Any]]:
    """Tokens per dollar on H100 and H20, by the method's planner."""
    models = {"70B, 80 layers": (70e9, 80, 8192, 1024), "7B, every query its own key": (6.7e9, 32, 4096, 4096),
              "1B, 16 layers": (1e9, 16, 2048, 512)}  # fmt: skip
    plans = []
    for name, sizes in models.items():
        for context in (128, 2048, 8192, 32768):
            made = METHOD.plan(sizes, context=context)
            alone: dict[str, float] = {}
            for point in made.points:  # the best first
                if not point.b:
                    alone.setdefault(point.compute, point.per_dollar)
            plans.append(
                {
                    "model": name, "context": context, "gain": made.gain, "per_dollar": made.best.per_dollar,
                    "devices": f"{made.best.a} + {made.best.b}", "alone": alone, "sent": made.best.link / 1e9,
                }
            )  # fmt: skip
    return plans


def printed(context: int, found: dict[str, Any]) -> None:
    print(f"\ncontext {context:,}{'ms a step, median (range)':>46}{'speed':>8}{'MB gained':>11}{'B/token sent':>14}")
    for arm, values in found["milliseconds"].items():
        kept = found["kept"][arm]
        sent = f"{kept['bytes_per_token']:,.0f}" if kept["formula"] else ""
        speed = found["over_one_process"][arm]["median"]
        print(f"{arm:38}{shown(values):>20}{speed:>8.2f}{kept['megabytes_gained']:>11.0f}{sent:>14}")


if __name__ == "__main__":
    sys.exit(main())

"""Training beside answers: co-serving against time-slicing and against two processes, under one stream of requests.

    python benchmarks/coserving.py [--model smollm2] [--rate 0.5] [--seconds 60] [--tpot 100] [--rounds 3] [--json FILE]

    peak        training alone: what co-serving is held against
    alone       answers alone
    co-serving  training fills what each step leaves, in the same process on the same weights
    temporal    training while no answer is under way
    spatial     answers in one process, our training in another, each with half of the threads
    peft        answers in one process, a plain loop of peft and transformers (float32) in another, likewise

Requests arrive at random moments (Poisson), the same ones in every arm of a round; each arm is a process of its own,
and the arms take turns, so that a slow minute of the machine falls on all. Reported are medians over rounds of

    training    tokens a second that went forward and backward, and their share of the peak
    pauses      between two tokens of an answer: median and 99th percentile, and the share within the objective
    first       99th percentile of the time to the first token
    memory      high-water mark of the process, or of both together

Goals: co-serving keeps 80 % of the peak under a light load with the 99th percentile within the objective, in at most
0.65 of the memory of two processes: of answers and peft, what one would run otherwise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ARMS = ("peak", "alone", "co-serving", "temporal", "spatial", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rate", type=float, default=0.5, help="requests a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm", type=float, default=15.0, help="seconds before, in which times are learned")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=24)
    parser.add_argument("--ttft", type=float, default=1000.0)
    parser.add_argument("--tpot", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--rematerialise", default="cheap")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(child(args.child[0], int(args.child[1]), args)))
        return
    arms = args.arms.split(",")
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(args.rounds):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            results[arm].append(in_child(arm, turn))
            print(f"round {turn + 1} {arm}: {results[arm][-1]}", file=sys.stderr)
    print(table(results, args))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {key: value for key, value in vars(args).items() if key not in ("json", "child")}
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def in_child(arm: str, turn: int) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--child", arm, str(turn)]
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # where neighbours hold the cores, spinning would time them
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(lines[0].removeprefix("RESULT ")))


def child(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    from shoestring.claims import _coserving as world
    from shoestring.core import probes
    from shoestring.engine.engine import Engine
    from shoestring.engine.tuning import Objectives

    objectives = Objectives(args.ttft / 1000, args.tpot / 1000)
    options = {"rematerialise": args.rematerialise}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arm == "peak":
            with Engine(args.model, threads=args.threads, context=1024) as engine:
                work = world.trainer(engine, folder, objectives, seed, options)
                peak_speed(engine, work, args.warm)
                found = peak_speed(engine, work, args.seconds)
                work.close()
            return {"training": found, "memory": probes.high_water()}
        load = world.Load(args.rate, args.seconds, args.prompt, args.answer, seed)
        half = max(1, args.threads // 2)
        if arm == "peft":
            line, end = multiprocessing.get_context("spawn").Pipe()
            other = multiprocessing.get_context("spawn").Process(
                target=plain_loop, args=(end, args.model, folder, seed, half), daemon=True
            )
            other.start()
            assert line.recv() == "ready"
            world.serve(args.model, "alone", world.Load(args.rate, 1, seed=seed), objectives, folder, threads=half)
            line.send("asked")
            before, began = line.recv()[0], time.perf_counter()
            outcome = world.serve(args.model, "alone", load, objectives, folder, threads=half, warm=0.1)
            line.send("asked")
            after, held = line.recv()
            outcome.trained, outcome.seconds = after - before, time.perf_counter() - began
            outcome.memory += held
            other.kill()
        else:
            threads = half if arm == "spatial" else args.threads
            outcome = world.serve(
                args.model, arm, load, objectives, folder, threads=threads, warm=args.warm, options=options
            )
    return {
        "training": outcome.speed,
        "half": median(outcome.gaps) if outcome.gaps else 0.0,
        "p99": outcome.at(99),
        "within": outcome.within(objectives.each_token),
        "first_p99": quantiles(outcome.firsts, n=100, method="inclusive")[98] if len(outcome.firsts) > 1 else 0.0,
        "answers": len(outcome.firsts),
        "memory": outcome.memory,
    }


def peak_speed(engine: Any, work: Any, seconds: float) -> float:
    """Trained tokens a second when nobody asks anything."""
    from shoestring.engine.hooks import Spare

    begun, end = work.stats()["training_tokens"], time.perf_counter() + seconds
    began = time.perf_counter()
    while time.perf_counter() < end:
        work.work(Spare(engine.scheduler.max_tokens))
    return float(work.stats()["training_tokens"] - begun) / (time.perf_counter() - began)


def plain_loop(line: Any, model: str, folder: Path, seed: int, threads: int) -> None:
    """What a user of peft would write: one example at a time, an optimizer's step after eight."""
    import torch
    from peft import LoraConfig, get_peft_model

    from shoestring import data, models
    from shoestring.claims._coserving import rows
    from shoestring.core import probes

    torch.set_num_threads(threads)
    loaded = models.load(model, dtype="float32")
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped: Any = get_peft_model(loaded.model, LoraConfig(r=8, lora_alpha=16, target_modules=projections)).train()
    corpus = data.read(rows(folder / "plain.jsonl", 256, seed))
    encoded = data.encode(corpus, loaded.tokenizer, 1024, on_long="truncate").rows
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=5e-4)
    tokens, number = 0, 0
    line.send("ready")
    while True:
        row = encoded[number % len(encoded)]
        given = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        wrapped(**given).loss.backward()
        tokens, number = tokens + len(row["input_ids"]), number + 1
        if number % 8 == 0:
            optimizer.step()
            optimizer.zero_grad()
        if line.poll():
            line.recv()
            line.send((tokens, probes.high_water() or 0))


def table(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    middle = lambda arm, key: median(row[key] for row in results[arm])
    peak = middle("peak", "training") if "peak" in results else None
    two = next((middle(arm, "memory") for arm in ("peft", "spatial") if arm in results), None)
    lines = [
        f"{args.model}, {args.threads} threads, {args.rate} requests/s of {args.prompt} + {args.answer} tokens, "
        f"objective {args.tpot:g} ms",
        f"{'':12}{'training':>10}{'of peak':>9}{'pause':>9}{'p99':>9}{'within':>8}{'first p99':>11}{'memory':>9}"
        f"{'of two':>8}",
    ]
    for arm in results:
        speed, memory = middle(arm, "training"), middle(arm, "memory")
        row = f"{arm:12}{speed:8.1f}/s" + (f"{speed / peak:9.0%}" if peak else f"{'':9}")
        if arm == "peak":
            row += f"{'':37}"
        else:
            row += f"{1000 * middle(arm, 'half'):6.0f} ms{1000 * middle(arm, 'p99'):6.0f} ms"
            row += f"{middle(arm, 'within'):8.1%}{1000 * middle(arm, 'first_p99'):8.0f} ms"
        row += f"{memory / 1e6:6.0f} MB" + (f"{memory / two:8.2f}" if two else "")
        lines.append(row)
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Sixteen streams of mixed lengths at once: `shoestring serve` against other servers, and against its own engine.

    python benchmarks/engine_serve.py [--llama-server FILE] [--llama-python PYTHON] [--transformers] [--json FILE]

Each arm serves the same prompts with the same lengths of answers (no token ends an answer where the server can be told
so), in a process of its own, one after the other, the order swapped from round to round. The client is that of
`shoestring bench serve`; its share of the cores falls on every server alike.

    ours                `shoestring serve` on the GGUF file
    engine alone        the same work on `Engine` in a process without a server or client
    ... a core free     both again with one thread less, so that HTTP and client compute beside the model and not in
                        its stead: what is lost between these two is what streaming through HTTP costs
    llama.cpp           its own server (`llama-server`) with as many slots as there are streams
    llama-cpp-python    `python -m llama_cpp.server`: it has no slots, one request is answered after another
    transformers        `transformers serve` on the same weights in bfloat16
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from _peers import ENVIRONMENT, arguments, circumstances, free_port, gguf, keep, ratios, served, shown, spread, turns
from shoestring.jobs.bench import ServeRequest, bench_serve, mix
from shoestring.models import resolve

DELAYS = ("first_token", "per_token", "request")
OURS, ALONE = "ours", "engine alone"
FREE = ", a core free"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input-tokens", default="32:512")
    parser.add_argument("--output-tokens", default="32:128")
    parser.add_argument("--llama-server", help="llama.cpp's own server: measured beside, when given")
    parser.add_argument("--transformers", action="store_true", help="measure `transformers serve` beside")
    parser.add_argument("--engine", metavar="FILE", help="internal: run the engine alone")
    given = parser.parse_args()
    if given.engine:
        print(json.dumps(alone(given)))
        return 0
    file = gguf(given.model)
    arms = [OURS, ALONE] + ([OURS + FREE, ALONE + FREE] if given.threads > 1 else [])
    # Its threads spin where they wait for each other, so that with a neighbour fewer of them may be faster.
    arms += ["llama.cpp", "llama.cpp" + FREE] if given.llama_server else []
    arms += ["llama-cpp-python"] if given.llama_python else []
    arms += ["transformers"] if given.transformers else []
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn, arm in turns(arms, given.rounds):
        threads = given.threads - arm.endswith(FREE)
        name = arm.removesuffix(FREE)
        measured = in_child(given, file, threads) if name == ALONE else against(name, given, file, threads)
        found[arm].append(measured)
        speed = measured["throughput"]["output_tokens_per_s"]
        print(f"round {turn + 1}  {arm:26} {speed:8.1f} output tokens/s", file=sys.stderr)
    report = summary(found, given)
    print(table(report))
    keep(given.json, report)
    return 0


def workload(given: Any, url: str = "", body: dict[str, Any] | None = None, model: str | None = None) -> ServeRequest:
    return ServeRequest(
        url=url or "http://127.0.0.1",
        model=model,
        input_tokens=given.input_tokens,
        output_tokens=given.output_tokens,
        concurrency=given.streams,
        requests=given.requests,
        warmup=2,
        body={"temperature": 0, **(body or {})},
    )


def against(arm: str, given: Any, file: Path, count: int) -> dict[str, Any]:
    port, threads, slots = free_port(), str(count), str(given.streams)
    plain = ["--host", "127.0.0.1", "--port", str(port)]
    body: dict[str, Any] = {"ignore_eos": True}
    ready, model = "/v1/models", None
    if arm == OURS:
        words = [sys.executable, "-m", "shoestring", "serve", str(file), *plain, "--threads", threads]
        words += ["--max-num-seqs", slots]
    elif arm == "llama.cpp":
        context = str(1024 * given.streams)  # its slots share the context evenly
        words = [given.llama_server, "-m", str(file), *plain, "-t", threads, "-np", slots, "-c", context, "--no-webui"]
        ready = "/health"
    elif arm == "llama-cpp-python":
        words = [given.llama_python, "-m", "llama_cpp.server", "--model", str(file), *plain, "--n_threads", threads]
        words += ["--n_threads_batch", threads, "--interrupt_requests", "false", "--logits_all", "false"]
        body = {"logit_bias": {"0": -100, "2": -100}}  # the end tokens of the default model
    else:
        program = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
        words = [program, "serve", str(resolve(given.model)), *plain, "--dtype", "bfloat16"]
        body = {}
        ready = "/health"
        model = str(resolve(given.model))  # it lists nothing without a network
    with served(words, port, ready) as pid:
        before = cpu_of(pid)
        found = bench_serve(workload(given, f"http://127.0.0.1:{port}", body, model))
        return found | {"cpu_seconds": cpu_of(pid) - before}


def cpu_of(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def in_child(given: Any, file: Path, threads: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--engine", str(file), "--threads", str(threads)]
    for name in ("streams", "requests", "input_tokens", "output_tokens"):
        words += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout))


def alone(given: Any) -> dict[str, Any]:
    """The mix on the engine itself: as many streams at once, a new one as soon as another has ended."""
    import time

    from shoestring.engine.engine import Engine
    from shoestring.engine.request import Request, Sampling

    engine = Engine(given.engine, threads=given.threads, max_sequences=given.streams)
    request = workload(given)
    work = [
        Request(engine.prompt_ids(body["messages"]), Sampling(max_tokens=body["max_tokens"], ignore_eos=True))
        for body in mix(request)
    ]
    for body in mix(ServeRequest(**{**vars(request), "seed": -1, "requests": 2})):
        engine.generate([engine.prompt_ids(body["messages"])], Sampling(max_tokens=body["max_tokens"], ignore_eos=True))
    before, left, busy, began = engine.counts(), iter(work), 0, time.perf_counter()
    cpu = time.process_time()
    while True:
        while busy < given.streams and (item := next(left, None)) is not None:
            engine.submit(item)
            busy += 1
        if not busy:
            break
        busy -= sum(delta.finish_reason is not None for delta in engine.step())
    seconds, after = time.perf_counter() - began, engine.counts()
    output = after.generation_tokens - before.generation_tokens
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "tokens": {"prompt": sum(len(item.prompt) for item in work), "output": output},
        "throughput": {"requests_per_s": len(work) / seconds, "output_tokens_per_s": output / seconds},
        "steps": after.steps - before.steps,
    }


def summary(found: dict[str, list[dict[str, Any]]], given: Any) -> dict[str, Any]:
    speeds = {arm: [run["throughput"]["output_tokens_per_s"] for run in runs] for arm, runs in found.items()}
    arms: dict[str, Any] = {}
    for arm, runs in found.items():
        arms[arm] = {"output_tokens_per_s": spread(speeds[arm])}
        each = [run["cpu_seconds"] / run["tokens"]["output"] for run in runs]
        arms[arm]["cpu_seconds_per_output_token"] = spread(each)
        if not arm.startswith(ALONE):
            arms[arm] |= {f"{name}_p95_s": spread([run[name]["p95"] for run in runs]) for name in DELAYS}
        if not arm.startswith((OURS, ALONE)):
            arms[arm]["ours_over_it"] = ratios(speeds[OURS], speeds[arm])
    lost = {
        "all cores" if end == "" else "a core free": spread(
            [1 - a / b for a, b in zip(speeds[OURS + end], speeds[ALONE + end])]
        )
        for end in ("", FREE)
        if OURS + end in speeds
    }
    asked = {name: getattr(given, name) for name in ("streams", "requests", "input_tokens", "output_tokens")}
    return {
        "asked": asked,
        "circumstances": circumstances(given.threads),
        "arms": arms,
        "share_lost_to_http_and_client": lost,
        "runs": found,
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{'':26} {'output tokens/s':>24} {'ours / it':>20} {'p95 first token':>16} {'per token':>10} {'request':>9}"
    ]
    for arm, row in report["arms"].items():
        ratio = shown(row["ours_over_it"], ".2f") if "ours_over_it" in row else ""
        p95 = [f"{row[f'{name}_p95_s']['median']:.3f} s" if f"{name}_p95_s" in row else "" for name in DELAYS]
        speed = shown(row["output_tokens_per_s"])
        cpu = f"{row['cpu_seconds_per_output_token']['median'] * 1e3:.2f} ms"
        lines.append(f"{arm:26} {speed:>24} {ratio:>20} {p95[0]:>16} {p95[1]:>10} {p95[2]:>9} {cpu:>12}")
    around = report["circumstances"]
    for when, lost in report["share_lost_to_http_and_client"].items():
        lines.append(f"lost to HTTP and client, {when}: {shown(lost, '.1%')}")
    lines.append(f"{around['threads']} threads on {around['cores']} cores, load average {around['load_average']:.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

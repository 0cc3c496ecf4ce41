"""PaCA against `peft`'s LoRA at the same rank: what is kept for the backward pass, peak memory, speed of training.

    python benchmarks/paca.py [--sets default,llama,layers] [--dtypes bfloat16,float32] [--json FILE]

    default   the default model, 512 tokens: a whole training step, its loss included
    llama     a Llama of two blocks, width 2048
    layers    eight linear layers, 1024 wide, one after another, 2048 tokens

Each arm is a process of its own that holds its model and makes one step (forward, backward, AdamW) when it is its turn,
so that a slow minute of the machine falls on all. The weights stand in the dtype given, as `from_pretrained` loads
them, adapters in peft's own choice (float32), and nothing runs under autocast; with "autocast" the weights are bfloat16
and a step runs under it, as with `Trainer(bf16=True)`. Reported are

    kept     bytes that the forward pass keeps for the backward pass, parameters not counted
    peak     the process's high-water mark during a step above what it held before, weights included in that; measured
             in a process of its own, which gives freed memory back at once
    tokens/s of the fastest step, and the median over turns of LoRA's time / PaCA's: by the clock, and in CPU time,
             which other work on the machine moves less
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any

SETS = {"default": 512, "llama": 512, "layers": 2048}
ARMS = ("lora", "paca")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--dtypes", default="bfloat16,autocast,float32")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("SET", "DTYPE", "ARM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args)
        return
    rows = [compare(name, dtype, args) for name in args.sets.split(",") for dtype in args.dtypes.split(",")]
    print(table(rows))
    if args.json:
        about = {"rank": args.rank, "turns": args.turns, "threads": args.threads, "model": args.model}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def compare(name: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both arms on one model: memory one after the other, speed turn by turn."""
    kept, peak = {}, {}
    for arm in ARMS:
        one = Child(name, dtype, arm, args, giving_back=True)
        kept[arm], peak[arm] = one.ask("kept"), one.ask("peak")
        one.end()
    children = {arm: Child(name, dtype, arm, args) for arm in ARMS}
    try:
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        cpu: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for turn in range(args.turns):
            for arm in ARMS if turn % 2 == 0 else reversed(ARMS):
                for times, taken in zip((seconds, cpu), children[arm].ask("step")):
                    times[arm].append(taken)
    finally:
        for one in children.values():
            one.end()
    tokens = SETS[name]
    return {
        "set": name,
        "dtype": dtype,
        "tokens": tokens,
        "kept": kept,
        "kept_ratio": round(kept["paca"] / kept["lora"], 3),
        "peak": peak,
        "peak_ratio": round(peak["paca"] / peak["lora"], 3),
        "tokens_per_s": {arm: round(tokens / min(times), 1) for arm, times in seconds.items()},
        "speed_of_fastest": round(min(seconds["lora"]) / min(seconds["paca"]), 3),
        "speed_median": round(median(a / b for a, b in zip(seconds["lora"], seconds["paca"])), 3),
        "speed_median_cpu": round(median(a / b for a, b in zip(cpu["lora"], cpu["paca"])), 3),
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


class Child:
    """A process that holds one arm's model and does what it is asked; `giving_back`: freed memory is the system's."""

    def __init__(self, name: str, dtype: str, arm: str, args: argparse.Namespace, giving_back: bool = False) -> None:
        command = [sys.executable, __file__, "--child", name, dtype, arm]
        for option in ("model", "rank", "threads"):
            command += [f"--{option}", str(getattr(args, option))]
        # What malloc holds back of freed tensors depends on the order of sizes and can exceed what is compared.
        own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if giving_back else {}
        environment = {**os.environ, **own}
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.process = subprocess.Popen(command, **pipes)
        self.ask("step")  # the first allocates the optimizer's state and warms the caches

    def ask(self, what: str) -> Any:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended")  # type: ignore[arg-type]
        return json.loads(line)

    def end(self) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def child(name: str, dtype: str, arm: str, args: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from shoestring.methods.adapters.paca import PacaConfig

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    numbers = torch.float32 if dtype == "float32" else torch.bfloat16
    model, loss = task(name, numbers, args)
    targets = [str(i) for i in range(8)] if name == "layers" else "all-linear"
    made: Any = LoraConfig if arm == "lora" else PacaConfig
    model = get_peft_model(model, made(r=args.rank, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for p in model.parameters():
        p.sum()  # weights are mapped from their file: what was never read is not yet in memory
    gc.collect()
    floor = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else nullcontext():
            return loss(model)

    def step() -> tuple[float, float]:
        began, worked = time.perf_counter(), time.process_time()
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began, time.process_time() - worked

    def kept() -> int:
        storages: dict[int, Any] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
        return sum(storage.nbytes() for storage in storages.values())

    answers = {"step": step, "kept": kept, "peak": lambda: memory("VmHWM") - floor}
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def task(name: str, dtype: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """A model, and what makes its loss."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from shoestring.models import resolve

    tokens = SETS[name]
    if name == "layers":
        x = torch.randn(1, tokens, 1024, dtype=dtype)
        stack = nn.Sequential(*[nn.Linear(1024, 1024, bias=False, dtype=dtype) for _ in range(8)])
        return stack, lambda model: model(x.requires_grad_()).float().square().mean()
    if name == "default":
        made = AutoModelForCausalLM.from_pretrained(resolve(args.model), dtype=dtype)
    else:
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=16,
            num_key_value_heads=4, vocab_size=4096,
        )  # fmt: skip
        made = LlamaForCausalLM(config).to(dtype)
    ids = torch.randint(3, made.config.vocab_size, (1, tokens))
    return made, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss


def memory(field: str) -> int:
    """A line of this process's status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found.group(1)) * 1024


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'set':9}{'dtype':10}{'':6}{'kept MB':>9}{'peak MB':>9}{'tokens/s':>10}"]
    for row in rows:
        for arm in ARMS:
            figures = row["kept"][arm] / 1e6, row["peak"][arm] / 1e6, row["tokens_per_s"][arm]
            lines.append(f"{row['set']:9}{row['dtype']:10}{arm:6}{figures[0]:9.1f}{figures[1]:9.1f}{figures[2]:10.1f}")
        ratios = row["kept_ratio"], row["peak_ratio"], row["speed_of_fastest"]
        lines.append(f"{'':19}{'paca/lora':6}".ljust(25) + f"{ratios[0]:9.2f}{ratios[1]:9.2f}{ratios[2]:9.2f}x")
        lines[-1] += f"  (median of turns {row['speed_median']:.2f}x, CPU {row['speed_median_cpu']:.2f}x)"
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""LoRA fine-tuning: plain `peft` + transformers' `Trainer` against `shoestring.training.train`.

    python benchmarks/lora_training.py [--model smollm2] [--steps 8] [--rounds 3] [--json FILE]

Every arm trains the same LoRA (rank 8, all linear layers) from the same seed on the same batches of the Python
documentation, in a process of its own; the arms take turns, so that a slow minute of the machine falls on all.

    plain bf16   from_pretrained(dtype=bfloat16), get_peft_model, Trainer(bf16=True): what a user of peft would write
    plain fp32   the same with float32 and bf16=False
    ours         the same batches through `train`
    ours grouped `train` with rows of like length in a batch, its default; other batches, so no equal loss is expected

Tokens a second count real tokens, not padding, over all steps but the first; tokens a CPU second are the same in time
that the processors worked for the process, which other work on the machine moves less. Peak memory is the process's
high-water mark (VmHWM), imports and weights included; "above" is what of it training added. Threads wait without
spinning in every arm: where neighbours hold the cores, spinning would time them instead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ARMS = ("plain bf16", "plain fp32", "ours", "ours grouped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(run_arm(args.child, args)))
        return
    arms = args.arms.split(",")
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(args.rounds):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            results[arm].append(in_child(arm, args))
            print(f"round {turn + 1} {arm}: {results[arm][-1]}", file=sys.stderr)
    report = summary(results, args)
    print(table(report))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1))


def in_child(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", arm]
    for name in ("model", "steps", "batch", "max_length", "seed", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = re.search(r"^RESULT (.*)$", done.stdout, re.M)
    if not found:
        raise SystemExit(f"{arm} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(found.group(1))


def run_arm(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from shoestring.data import encode, read, split
    from shoestring.models import resolve
    from shoestring.training.batches import Batches

    torch.set_num_threads(args.threads)
    path = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = encode(split(read("python-docs"))[0], tokenizer, args.max_length, on_long="drop").rows
    # Every arm sees the rows in the order in which `train` would batch them without grouping.
    order = Batches([len(row["input_ids"]) for row in rows], args.batch, seed=args.seed, by_length=False)
    used = [number for batch in list(order)[: args.steps] for number in batch]
    torch.manual_seed(args.seed)
    dtype = torch.float32 if arm == "plain fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    marks: list[tuple[float, float, int]] = []
    losses: list[float] = []
    seen = [0]

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time(), seen[0]))

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    memory_before = high_water()
    with tempfile.TemporaryDirectory() as folder:
        if arm.startswith("plain"):
            trainer = plain(model, tokenizer, [rows[number] for number in used], arm, args, folder, seen)
            trainer.add_callback(Watch())
            trainer.train()
        else:
            ours(model, tokenizer, rows, arm, args, folder, seen, Watch())
    (start, cpu_start, before), (end, cpu_end, after) = marks[0], marks[-1]
    return {
        "tokens_per_second": round((after - before) / (end - start), 1),
        "tokens_per_cpu_second": round((after - before) / (cpu_end - cpu_start), 1),
        "peak_memory": high_water(),
        "above": high_water() - memory_before,
        "peak_memory_before_training": memory_before,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "tokens": after,
    }


def plain(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], arm: str, args: Any, folder: str, seen: list[int]
) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    pad = DataCollatorForSeq2Seq(tokenizer)

    def collate(items: list[dict[str, Any]]) -> Any:
        seen[0] += sum(len(item["input_ids"]) for item in items)
        return pad(items)

    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        bf16=arm == "plain bf16",
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    return Trainer(model, arguments, data_collator=collate, train_dataset=rows)


def ours(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    arm: str,
    args: Any,
    folder: str,
    seen: list[int],
    watch: Any,
) -> None:
    from shoestring.training import TrainOptions, train

    class Counted(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            row = super().__getitem__(index)
            seen[0] += len(row["input_ids"])
            return row

    options = TrainOptions(
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=2e-4,
        logging_steps=1,
        save_steps=0,
        seed=args.seed,
        group_by_length=arm == "ours grouped",
    )
    train(model, Counted(rows), [], options, folder, tokenizer=tokenizer, callbacks=[watch])


def high_water() -> int:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024  # type: ignore[union-attr]


def summary(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    arms = {arm: {name: median(run[name] for run in runs) for name in runs[0]} for arm, runs in results.items()}
    ratios = {}
    for arm in (arm for arm in results if arm.startswith("ours")):
        for peer in (peer for peer in results if peer.startswith("plain")):
            pairs = list(zip(results[arm], results[peer]))
            ratios[f"{arm} / {peer}"] = {
                name: {
                    "median": round(median(a[name] / b[name] for a, b in pairs), 3),
                    "range": [round(f(a[name] / b[name] for a, b in pairs), 3) for f in (min, max)],
                }
                for name in ("tokens_per_second", "tokens_per_cpu_second", "peak_memory", "above", "last_loss")
            }
    setup = {
        name: getattr(args, name) for name in ("model", "steps", "batch", "max_length", "rounds", "seed", "threads")
    }
    return {"setup": setup | {"cpus": len(os.sched_getaffinity(0))}, "arms": arms, "ratios": ratios, "runs": results}


def table(report: dict[str, Any]) -> str:
    lines = [f"{'':28}{'tokens/s':>10}{'/CPU s':>10}{'peak MB':>10}{'above MB':>10}{'first loss':>12}{'last loss':>12}"]
    for arm, run in report["arms"].items():
        lines.append(
            f"{arm:28}{run['tokens_per_second']:10.0f}{run['tokens_per_cpu_second']:10.0f}"
            f"{run['peak_memory'] / 1e6:10.0f}{run['above'] / 1e6:10.0f}"
            f"{run['first_loss']:12.4f}{run['last_loss']:12.4f}"
        )
    for name, ratio in report["ratios"].items():
        names = ("tokens_per_second", "tokens_per_cpu_second", "peak_memory", "above")
        shown = "".join(f"{ratio[key]['median']:9.2f}x" for key in names)
        lines.append(f"{name:28}{shown}{'':12}{ratio['last_loss']['median']:11.4f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

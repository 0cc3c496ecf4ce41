"""What LoRA adapters cost at serve time: eight of them mixed in one batch, beside the merged model.

    python benchmarks/engine_adapters.py [--sets 4-bit,bf16] [--rank 16] [--rows 8] [--rounds 9] [--json FILE]

One engine holds the default model and the adapters; batches of `rows` answers take turns in it: without adapters, every
answer with one of its own on q and v, every answer with one of its own on all seven projections, and all answers with
the same one. A merged model has the shapes, formats and bytes of its base, so the base stands for it. A round's figure
is its median step; ratios are of the arms of one round.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from _peers import arguments, circumstances, gguf, keep, ratios, shown, spread, turns
from shoestring.engine.engine import Engine
from shoestring.engine.request import Request, Sampling
from shoestring.models import resolve
from shoestring.models.llama_like import PROJECTIONS, LlamaLike, describe
from shoestring.models.tensors import open_source

TARGETS = {"q,v": ("q", "v"), "all seven": PROJECTIONS}


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=9)
    parser.add_argument("--sets", default="4-bit,bf16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8, help="answers of a batch, and adapters")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "rank": given.rank, "rows": given.rows}
    report["sets"] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in given.sets.split(","):
            model = gguf(given.model) if name == "4-bit" else resolve(gguf(given.model))
            report["sets"][name] = found = compared(model, Path(place) / name, given)
            print(f"\n{name:24} {'tokens/s, median (range)':>30}")
            for arm, values in found["tokens_per_s"].items():
                print(f"{arm:24} {shown(values):>30}")
            for arm, values in found["over_merged"].items():
                print(f"  {arm + ' / merged':40} {shown(values, '.2f')}")
    keep(given.json, report)
    return 0


def compared(model: Path, place: Path, given: Any) -> dict[str, Any]:
    """Tokens per second of every arm, and each over the merged model, by rounds."""
    shape = describe(open_source(model))
    with Engine(
        model, runner="native", threads=given.threads, context=512, max_sequences=given.rows, prefix_cache=False
    ) as engine:
        arms: dict[str, Sequence[str]] = {"merged": [""] * given.rows}
        for name, roles in TARGETS.items():
            adapters = [f"{name} {number}" for number in range(given.rows)]
            for number, adapter in enumerate(adapters):
                engine.add_adapter(adapter, write_adapter(place / adapter, shape, roles, given.rank, number))
            arms[f"{name}, mixed"] = adapters
            arms[f"{name}, one"] = adapters[:1] * given.rows
        speeds: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn, arm in turns(list(arms), given.rounds + 1):
            seconds = step_seconds(engine, arms[arm], given.prompt, given.tokens)
            if turn:  # the first round only warms up
                speeds[arm].append(given.rows / seconds)
    return {
        "tokens_per_s": {arm: spread(values) for arm, values in speeds.items()},
        "over_merged": {arm: ratios(speeds[arm], speeds["merged"]) for arm in list(arms)[1:]},
        "runs": speeds,
    }


def step_seconds(engine: Engine, adapters: Sequence[str], prompt: int, tokens: int) -> float:
    """Median time of a step that computes one token of every answer."""
    for number, adapter in enumerate(adapters):
        ids = [1000 + 100 * number + i for i in range(prompt)]
        engine.submit(Request(ids, Sampling(max_tokens=tokens + 2, ignore_eos=True), adapter=adapter))
    taken = []
    while not engine.idle:
        produced, began = engine.counts().generation_tokens, time.perf_counter()
        engine.step()
        if engine.counts().generation_tokens - produced == len(adapters):
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def write_adapter(folder: Path, shape: LlamaLike, roles: Sequence[str], rank: int, seed: int) -> Path:
    """A folder as peft writes it, with random weights."""
    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(shape.layers):
        for role in roles:
            rows, cols = shape.shape_of(role)
            part = "mlp" if role in ("gate", "up", "down") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{part}.{role}_proj"
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, cols), np.float32) * np.float32(cols**-0.5)
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((rows, rank), np.float32) * np.float32(0.01)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [f"{role}_proj" for role in roles]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    sys.exit(main())

"""Decoding a mixture of experts with few of its experts in memory: seconds a token and memory, paired.

Every way decodes the same tokens in a fresh process, round by round in turn. `on demand` reads an expert when a token
meets it and keeps only as many as a token needs; `cached` keeps more; `guessing` reads ahead too, and stops where that
does not pay, which costs it a few passes to find out; `always` does not stop; `resident` has all.

    python benchmarks/experts.py [--model FOLDER] [--rounds 5] [--delay-ms 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "on demand": {"slots": "k", "prefetch": "none", "policy": "lru"},
    "cached 25%": {"slots": 0.25, "prefetch": "none"},
    "guessing 25%": {"slots": 0.25, "prefetch": "router"},
    "always 25%": {"slots": 0.25, "prefetch": "router", "always": True},
    "cached 50%": {"slots": 0.5, "prefetch": "none"},
    "guessing 50%": {"slots": 0.5, "prefetch": "router"},
    "always 50%": {"slots": 0.5, "prefetch": "router", "always": True},
    "resident": {"slots": 1.0, "prefetch": "none"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of a mixture; the laboratory's own by default")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay-ms", type=float, default=2.0, help="that reading an expert takes at least")
    parser.add_argument("--json", default="")
    parser.add_argument("--arm", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(_arm(Path(given.model), json.loads(given.arm), given.tokens, given.delay_ms)))
        return
    model = given.model or str(_laboratory())
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for name in WAYS:  # what the file of experts costs is paid once, here
        _fresh(model, name, 2, given.delay_ms)
        break
    for number in range(given.rounds):
        for name in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(_fresh(model, name, given.tokens, given.delay_ms))
    rows: list[dict[str, Any]] = []
    for name, rounds in found.items():
        share = name.partition(" ")[2]
        rows.append(
            {
                "way": name, **{key: statistics.median(r[key] for r in rounds) for key in rounds[0]},
                "over on demand": _over(rounds, found["on demand"]),
                "over cached": _over(rounds, found.get(f"cached {share}", rounds)),
            }
        )  # fmt: skip
    print(
        f"{'way':<14}{'tokens/s':>10}{'on demand x':>13}{'cached x':>10}{'hit rate':>10}{'stall s':>9}"
        f"{'experts MB':>12}{'resident MB':>13}"
    )
    for row in rows:
        print(
            f"{row['way']:<14}{row['tokens_per_s']:>10.1f}{row['over on demand']:>13.2f}{row['over cached']:>10.2f}"
            f"{row['hit_rate']:>10.3f}{row['stall']:>9.2f}{row['expert_bytes'] / 1e6:>12.1f}"
            f"{row['resident_bytes'] / 1e6:>13.1f}"
        )
    same = {tuple(r["answer"] for r in rounds) for rounds in found.values()}
    print("all answers are the same" if len({a for rounds in same for a in rounds}) == 1 else "ANSWERS DIFFER")
    if given.json:
        Path(given.json).write_text(json.dumps({"model": Path(model).name, "rows": rows, "rounds": found}, indent=2))


def _over(rounds: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    """How many times the tokens per second of others of the same round."""
    return statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(rounds, others))


def _laboratory() -> Path:
    from shoestring.lab import mixture

    return mixture.mixture(mixture.WIDE)


def _fresh(model: str, name: str, tokens: int, delay: float) -> dict[str, float]:
    command = [
        sys.executable, __file__, "--model", model, "--tokens", str(tokens), "--delay-ms", str(delay),
        "--arm", json.dumps(WAYS[name]),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _arm(folder: Path, options: dict[str, Any], tokens: int, delay: float) -> dict[str, float]:
    import time
    import zlib

    import torch

    from shoestring.core import catalog
    from shoestring.models.load import load_tokenizer

    torch.set_num_threads(1)
    offloading = catalog.module("expert_offloading")
    chosen = json.loads((folder / "config.json").read_text())["num_experts_per_tok"]
    slots = chosen if options["slots"] == "k" else options["slots"]
    slow = 0.0 if slots == 1.0 else delay
    loaded = offloading.load(
        offloading.ExpertOffloadingConfig(**{**options, "slots": slots, "delay_ms": slow}), folder, dtype="float32"
    )
    model: Any = loaded.model
    owner = offloading.offloader(model)
    text = "The module provides functions to read files, and to write what was read to another place. "
    ids = load_tokenizer(folder)(text, return_tensors="pt")["input_ids"]
    answer = []
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        before, begin = owner.stats(), time.perf_counter()
        for _ in range(tokens):
            token = out.logits[:, -1:].argmax(-1)
            answer.append(int(token))
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        seconds = time.perf_counter() - begin
    after = owner.stats()
    hits, misses = (after[f"expert_{w}"] - before[f"expert_{w}"] for w in ("hits", "misses"))
    said = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm"))
    owner.close()
    return {
        "tokens_per_s": tokens / seconds,
        "hit_rate": hits / max(1, hits + misses),
        "stall": after["expert_stall_seconds"] - before["expert_stall_seconds"],
        "expert_bytes": after["expert_bytes_resident"],
        "resident_bytes": int(said["VmRSS"].split()[0]) * 1024,
        "answer": zlib.crc32(json.dumps(answer).encode()),
    }


if __name__ == "__main__":
    main()

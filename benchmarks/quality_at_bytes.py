"""Quality at equal bytes: formats chosen layer by layer beside llama.cpp's K-quants of the same file size.

    python benchmarks/quality_at_bytes.py --llama-python PYTHON [--kinds Q4_K_M,Q3_K_M] [--examples 24] [--json FILE]

The model goes to llama.cpp as a bfloat16 GGUF file, is quantized there to each kind, and `shoestring compress --size`
gets the bytes of that file as its limit: tokenizer and configuration count on both sides. Perplexity is over all tokens
of the same held-out texts. Ours is calibrated on other texts of that set and llama.cpp's on none, which favours ours;
the default model's widths are no multiples of 256, so many of its K-quant tensors fall back to larger types, which
does too. Time is that of quantizing, one thread each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from _peers import ENVIRONMENT, arguments, circumstances, keep
from shoestring import data
from shoestring.core import catalog
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.jobs._doors import open_model
from shoestring.jobs.evaluate import heldout
from shoestring.models import load, resolve, shape_of
from shoestring.models.gguf_writing import write_gguf
from shoestring.models.load import quiet
from shoestring.planner.plan import room_for_weights

LLAMA = r"""
import ctypes, json, sys, time
import numpy as np, llama_cpp
source, out, kind, rows = sys.argv[1], sys.argv[2], sys.argv[3], json.load(open(sys.argv[4]))
seconds = 0.0
if kind != "BF16":
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind), 1
    began = time.process_time()
    assert llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)) == 0
    seconds = time.process_time() - began
model = llama_cpp.Llama(out if kind != "BF16" else source, n_ctx=1024, logits_all=True, n_threads=1, verbose=False)
total, count = 0.0, 0
for ids in rows:
    model.reset()
    model.eval(ids)
    scores = np.asarray(model.scores[: len(ids) - 1], np.float64)
    top = scores.max(1, keepdims=True)
    logs = scores - top - np.log(np.exp(scores - top).sum(1, keepdims=True))
    total -= logs[np.arange(len(ids) - 1), ids[1:]].sum()
    count += len(ids) - 1
print(json.dumps({"loss": total / count, "seconds": seconds}))
"""


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(model="smollm2", threads=1)
    parser.add_argument("--kinds", default="Q4_K_M,Q3_K_M,Q2_K")
    parser.add_argument("--examples", type=int, default=24)
    given = parser.parse_args()
    if not given.llama_python:
        print(
            "this compares with llama.cpp: name a Python that has llama-cpp-python by --llama-python", file=sys.stderr
        )
        return 2
    torch.set_num_threads(given.threads)
    source = resolve(given.model)
    whole = load(str(source))
    train, _, test = data.split(data.read("python-docs"), seed=0)
    stride = max(1, len(test) // given.examples)
    rows = data.encode(test.part(test.examples[::stride][: given.examples]), whole.tokenizer, 256, on_long="truncate")
    ids = [list(row["input_ids"]) for row in rows.rows]
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "kinds": {}}
    with tempfile.TemporaryDirectory() as base:
        place = Path(base)
        (place / "rows.json").write_text(json.dumps(ids))
        plain = write_gguf(source, place / "bf16.gguf")
        report["bf16"] = {"ours": loss(whole.model, ids), "llama.cpp": peer(given, plain, plain, "BF16", place)["loss"]}
        print(f"{'kind':8} {'MB':>7} {'llama.cpp':>10} {'ours':>8} {'ratio':>6}   loss, nat a token")
        for kind in given.kinds.split(","):
            file = place / f"{kind}.gguf"
            theirs = peer(given, plain, file, kind, place)
            size, began = file.stat().st_size, time.process_time()
            folder = place / f"ours-{kind}"
            chooser = next(iter(catalog.that_define("within")))
            limit = room_for_weights(size, shape_of(source))
            step = Step("compress", chooser.name, catalog.module(chooser.name).within(limit))
            work = Work(Ledger(), place, train)
            with quiet():
                catalog.contract(chooser.room).apply(catalog.module(chooser.name), step, source, folder, work)
            seconds = time.process_time() - began
            own = sum(f.stat().st_size for f in folder.iterdir())
            found = {"bytes": size, "own_bytes": own, "llama.cpp": theirs, "ours": loss(open_model(folder).model, ids)}
            ratio = float(torch.tensor(found["ours"] - theirs["loss"]).exp())
            report["kinds"][kind] = {**found, "own_seconds": seconds, "perplexity_ratio": ratio}
            print(f"{kind:8} {size / 1e6:7.1f} {theirs['loss']:10.4f} {found['ours']:8.4f} {ratio:6.3f}", flush=True)
    keep(given.json, report)
    return 0


def loss(model: Any, rows: list[list[int]]) -> float:
    """Mean over all tokens but each text's first."""
    return float(heldout(model, [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]).loss.value)


def peer(given: Any, source: Path, out: Path, kind: str, place: Path) -> dict[str, float]:
    """llama.cpp's loss in `kind`, and its seconds of quantizing."""
    words = [given.llama_python, "-c", LLAMA, str(source), str(out), kind, str(place / "rows.json")]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(f"llama.cpp could not do {kind}: {done.stderr[-1500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())

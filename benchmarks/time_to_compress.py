"""Time to compress a model: ours beside llama.cpp's quantize and, where it is installed, torchao.

    python benchmarks/time_to_compress.py [--llama-python PYTHON] [--torchao-python PYTHON] [--model smollm2]
        [--methods int4,ptqtp,mixed] [--kinds Q4_0,Q4_K_M] [--rounds 3] [--threads 1] [--json FILE]

Everybody starts from the same bfloat16 numbers (llama.cpp from a GGUF file of them, written before) and ends with files
on the disk. A round is one process each, in turns; what is timed begins when libraries are imported and ends when the
last file is written, reading the model included. Memory is the peak of the process, and that above its libraries. Ours
is calibrated, where a method is, on the built-in texts; llama.cpp's kinds and torchao's are not.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _peers import ENVIRONMENT, arguments, circumstances, keep, ratios, shown, spread, turns
from shoestring.core import catalog
from shoestring.core.errors import nearest
from shoestring.models import resolve
from shoestring.models.gguf_writing import write_gguf

# What each process runs: `work` reads the model `source` and writes `out`; `kind` says how, by `threads` threads.
MEASURE = r"""
import json, re, sys, time
source, out, kind, threads = *sys.argv[1:4], int(sys.argv[4])
{imports}
def peak():
    # Not getrusage: that counts what the process was before it became this program.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
def work():
    {work}
before, wall, processor = peak(), time.perf_counter(), time.process_time()
work()
found = {{"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}}
print(json.dumps({{**found, "memory": peak(), "memory_above_libraries": peak() - before}}))
"""
OURS = (
    """
from pathlib import Path
import torch
torch.set_num_threads(threads)
from shoestring import data
from shoestring.core import catalog
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
module = catalog.module(kind)
room = catalog.contract(catalog.get(kind).room)
""",
    """
    train = data.split(data.read("python-docs"), seed=0)[0] if hasattr(module, "compress") else None
    work = Work(Ledger(), Path(out).parent, train)
    room.apply(module, Step("compress", kind, dict(module.settings()[0])), Path(source), Path(out), work)
""",
)
LLAMA = (
    """
import ctypes, llama_cpp
""",
    """
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind), threads
    assert llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)) == 0
""",
)
TORCHAO = (
    """
import torch
torch.set_num_threads(threads)
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM
""",
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True)
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=getattr(torch, kind), granularity=PerGroup(64)))
    torch.save(model.state_dict(), out)
""",
)


@dataclass(frozen=True)
class Arm:
    """Who compresses, in which Python, from what, and how."""

    name: str
    python: str
    code: tuple[str, str]
    source: Path
    kind: str


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(model="smollm2", threads=1)
    parser.add_argument("--methods", default="int4,ptqtp,mixed")
    parser.add_argument("--kinds", default="Q4_0,Q4_K_M", help="of llama.cpp")
    parser.add_argument("--torchao-python", help="a Python that has torchao and transformers; default: this, if it has")
    given = parser.parse_args()
    for name in given.methods.split(","):
        if name not in catalog.methods():
            parser.error(f"{name} is no method; {nearest(name, catalog.methods())}")
    source = resolve(given.model)
    report: dict[str, Any] = {"circumstances": circumstances(given.threads)}
    with tempfile.TemporaryDirectory() as base:
        place = Path(base)
        arms = {arm.name: arm for arm in everybody(given, source, place)}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for turn, name in turns(list(arms), given.rounds):
            out = place / f"{turn}-{name.replace(' ', '-')}"
            runs[name].append(measured(arms[name], out, given.threads))
            print(f"{name:24} {runs[name][-1]['seconds']:8.2f} s", file=sys.stderr, flush=True)
    columns: dict[str, Callable[[Any], str]] = {
        "seconds": lambda v: shown(v, ".2f"),
        "processor_seconds": lambda v: shown(v, ".2f"),
        "memory": lambda v: f"{v['median'] / 1e6:.0f} MB",
        "memory_above_libraries": lambda v: f"{v['median'] / 1e6:.0f} MB",
        "bytes": lambda v: f"{v['median'] / 1e6:.1f} MB",
    }
    figures = {name: {c: spread([run[c] for run in of]) for c in columns} for name, of in runs.items()}
    mine, others = ([n for n in arms if n.startswith("ours") is own] for own in (True, False))
    over = {
        f"{a} / {b}": ratios([r["seconds"] for r in runs[a]], [r["seconds"] for r in runs[b]])
        for a in mine
        for b in others
    }
    report |= {"figures": figures, "seconds_ours_over": over, "runs": runs}
    report["circumstances"]["load_average_after"] = circumstances(given.threads)["load_average"]
    keep(given.json, report)
    print(f"{'':24} " + " ".join(f"{c.replace('_', ' '):>22}" for c in columns))
    for name, figure in figures.items():
        print(f"{name:24} " + " ".join(f"{show(figure[c]):>22}" for c, show in columns.items()))
    for pair, ratio in over.items():
        print(f"{pair:48} {shown(ratio, '.2f')} of the seconds")
    return 0


def everybody(given: Any, source: Path, place: Path) -> list[Arm]:
    """Ours by each method, llama.cpp by each kind where its Python is named, torchao where there is one."""
    arms = [Arm(f"ours, {name}", sys.executable, OURS, source, name) for name in given.methods.split(",")]
    if given.llama_python:
        plain = write_gguf(source, place / "bf16.gguf")
        arms += [Arm(f"llama.cpp, {kind}", given.llama_python, LLAMA, plain, kind) for kind in given.kinds.split(",")]
    python = given.torchao_python or (sys.executable if importlib.util.find_spec("torchao") else None)
    if python:
        arms.append(Arm("torchao, int4", python, TORCHAO, source, "int4"))
    return arms


def measured(arm: Arm, out: Path, threads: int) -> dict[str, float]:
    """One run in a process of its own, with the bytes of what it wrote.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    imports, work = arm.code
    code = MEASURE.format(imports=imports, work=work.strip())
    words = [arm.python, "-c", code, str(arm.source), str(out), arm.kind, str(threads)]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{arm.name} failed: {done.stderr[-1500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    files = [out] if out.is_file() else [file for file in out.iterdir() if file.is_file()]
    return {**found, "bytes": sum(file.stat().st_size for file in files)}


if __name__ == "__main__":
    sys.exit(main())

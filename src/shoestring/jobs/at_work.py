"""A model at work: memory and speed of a process of its own that does nothing but load it and generate."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shoestring.core import probes
from shoestring.core.errors import DoesNotFit, QualityGate, ShoestringError, UsageError
from shoestring.jobs._doors import open_doors, open_model

_WARM_UP_TOKENS = 4
_ENOUGH_SECONDS = 8.0
_ERRORS = {kind.__name__: kind for kind in (ShoestringError, UsageError, DoesNotFit, QualityGate)}


def at_work(
    folder: str | Path,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Load the model in a fresh process, generate greedily with the key-value cache, and report what that took.

    The prompt is one row of fixed random tokens, and no end token stops the answer, so every model does the same work.

    Args:
        folder: anything `models.resolve` accepts.
        repeats: timed generations, after one short one that is not timed; fewer once they have taken 8 seconds.
        threads: for arithmetic; None leaves one core to the neighbours. Threads meet many times a token, so one that
            has to wait for its core stops all: with every core in use a small model can become ten times slower.
        trust_remote_code: run Python code that the folder brings.

    Returns:
        `peak_memory` of the process's whole life, `floor_memory` of the interpreter with every library imported and
        nothing of the model read, `storage` of the model's files (an adapter's base included), all in bytes;
        `load_seconds`; `first_token_seconds` (median); `prefill_tokens_per_s` and `decode_tokens_per_s`, each
        {median, min, max}; `latency` in seconds per token after the first (median); `threads`, `dtype`,
        `prompt_tokens`, `new_tokens`, `repeats`. A masked model has no decode figures: they are None.

    Raises:
        UsageError: impossible arguments, or a folder that cannot be loaded.
        ShoestringError: the process died, with its last words.
    """
    if min(prompt_tokens, repeats, threads or 1) < 1 or new_tokens < 2:
        raise UsageError(
            "at_work needs prompt_tokens, repeats and threads above 0 and new_tokens above 1",
            f"received {prompt_tokens}, {repeats}, {threads} and {new_tokens}",
        )
    command = [sys.executable, "-m", "shoestring.jobs.at_work", str(folder), "--json", "--dtype", dtype]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens), "--repeats", str(repeats)]
    command += ["--trust-remote-code"] * trust_remote_code
    # Threads that spin at a barrier while neighbours hold the cores slow a decode step ten times and more.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    threads = threads or max(1, _cores() - 1)
    command += ["--threads", str(threads)]
    environment["OMP_NUM_THREADS"] = str(threads)
    # The child must find this very package, however the parent came by it.
    places = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise ShoestringError(
            f"The process that loads {folder} died", *_last_words(done.returncode, done.stderr)
        ) from None
    if "error" in answer:
        error = answer["error"]
        raise _ERRORS.get(error["kind"], ShoestringError)(error["what"], error["why"], error["remedy"])
    return dict(answer)


def storage(folder: Path) -> int:
    """Bytes of the files of a model folder; of an adapter folder, those of the base it names too."""
    from shoestring.models import resolve
    from shoestring.models.folder import ADAPTER_CONFIG, read_json

    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        total += storage(resolve(read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"]))
    return total


def _cores() -> int:
    """Cores this process may use; two threads of one core count once."""
    import psutil

    return min(
        psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1024
    )


def _last_words(code: int, stderr: str) -> tuple[str, str]:
    if code < 0:
        name = signal.Signals(-code).name
        remedy = "It was probably short of memory: give it more, or a smaller model" if name == "SIGKILL" else ""
        return f"it was ended by {name}", remedy
    lines = [line for line in stderr.splitlines() if line.strip()]
    return (lines[-1].strip() if lines else f"it ended with code {code} and said nothing"), ""


def _measure(
    folder: str,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    threads: int | None,
    dtype: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """What `at_work` returns, measured in this very process."""
    import torch

    from shoestring.models import resolve

    if threads:
        torch.set_num_threads(threads)
    path = resolve(folder)
    open_doors(path)
    _import_what_it_needs(path)
    floor = probes.resident()
    started = time.perf_counter()
    loaded = open_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    load_seconds = time.perf_counter() - started
    model = loaded.model
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = None
    writes = loaded.kind != "masked"
    _generate(model, prompt, _WARM_UP_TOKENS, writes)
    first: list[float] = []
    rest: list[float] = []
    timed = time.perf_counter()
    while len(first) < repeats and (not first or time.perf_counter() - timed < _ENOUGH_SECONDS):
        stamps = _generate(model, prompt, new_tokens, writes)
        first.append(stamps[1] - stamps[0])
        rest.append((stamps[-1] - stamps[1]) / (new_tokens - 1))
    return {
        "peak_memory": probes.high_water() or _peak_elsewhere(),
        "floor_memory": floor,
        "storage": storage(path),
        "load_seconds": load_seconds,
        "first_token_seconds": statistics.median(first),
        "prefill_tokens_per_s": _rates(prompt_tokens / s for s in first),
        "decode_tokens_per_s": _rates(1 / s for s in rest) if writes else None,
        "latency": statistics.median(rest) if writes else None,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": len(first),
    }


def _import_what_it_needs(path: Path) -> None:
    """Import the model's own code, which transformers does late, so that the floor holds no surprise."""
    from transformers import AutoConfig, AutoTokenizer, GenerationMixin  # noqa: F401

    from shoestring.models import resolve
    from shoestring.models.folder import ADAPTER_CONFIG, read_json
    from shoestring.models.load import auto_class, kind_of

    if (path / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            auto_class(kind_of(config.to_dict()))._model_mapping[type(config)]
        except (ValueError, KeyError, OSError):
            return  # `load` says what is wrong with it
    elif (path / ADAPTER_CONFIG).is_file():
        import peft  # noqa: F401

        _import_what_it_needs(resolve(read_json(path / ADAPTER_CONFIG)["base_model_name_or_path"]))


class _Stamps:
    """A streamer that notes when each token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(model: Any, prompt: Any, new_tokens: int, writes: bool) -> list[float]:
    """Times: start, first token, second token ... A model that does not write has a start and an end."""
    import torch

    started = time.perf_counter()
    with torch.inference_mode():
        if not writes:
            model(prompt)
            return [started, time.perf_counter()]
        stamps = _Stamps()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            streamer=stamps,
            pad_token_id=0,
        )
    return [started, *stamps.times[1:]]


def _rates(values: Any) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _peak_elsewhere() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shoestring.jobs.at_work", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    # Libraries may print; what the parent reads must be the answer alone.
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        answer = _measure(**given)
    except ShoestringError as error:
        if not as_json:
            print(error, file=sys.stderr)
            return error.exit_code
        kind = type(error).__name__
        answer = {"error": {"kind": kind, "what": error.what, "why": error.why, "remedy": error.remedy}}
    with answer_to:
        answer_to.write(json.dumps(answer, indent=None if as_json else 2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

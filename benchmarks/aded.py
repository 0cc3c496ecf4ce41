"""Decoding with ADED's drafts beside plain decoding, and beside llama.cpp's prompt look-up.

    python benchmarks/aded.py [--formats 4-bit,bf16] [--prompts 4] [--tokens 128] [--rounds 3] [--llama-python PYTHON]
                              [--json FILE]

One answer at a time on the default model. Tasks: code (write a function), chat (explain something), summarise (shorten
documentation), rewrite (give back code with a change), drawn (chat at temperature 1.2, which hardly repeats itself).
The drafter begins each task of each round with an empty table, so that all prompts are new to it. Every model is
loaded once, by a process of its own; arms take turns prompt by prompt. A figure is tokens over seconds, from an
answer's first token on, of all prompts of a task; a ratio is of one round.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

from _models import requantized
from _peers import ENVIRONMENT, arguments, circumstances, gguf, keep, ratios, shown, spread, turns
from shoestring.data.builtin import python_docs
from shoestring.engine.tokenizer import Tokenizer
from shoestring.models.load import resolve

_ARM = Path(__file__).with_name("_drafting.py")


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--formats", default="4-bit,bf16")
    parser.add_argument("--tasks", default="code,chat,summarise,rewrite,drawn")
    parser.add_argument("--prompts", type=int, default=12, help="of each task")
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "formats": {}}
    asked = tasks(tokenizer(given.model), given.prompts)
    with tempfile.TemporaryDirectory() as place:
        for name in given.formats.split(","):
            file = gguf(given.model)
            dtype = "auto" if name == "4-bit" else "bf16"
            arms = {kind: [sys.executable, kind, str(file), dtype] for kind in ("plain", "aded")}
            if given.llama_python:
                same = file
                if name != "4-bit":
                    same = requantized(given.llama_python, file, Path(place) / "bf16.gguf", given.threads)
                arms |= {kind: [given.llama_python, kind, str(same), dtype] for kind in ("llama", "llama-lookup")}
            with processes(arms, given.threads) as ready:
                report["formats"][name] = found = {}
                for task in given.tasks.split(","):
                    found[task] = compared(ready, asked[task.replace("drawn", "chat")], task == "drawn", given)
                    printed(name, task, found[task])
    report["circumstances"]["load_average_after"] = circumstances(given.threads)["load_average"]
    keep(given.json, report)
    return 0


def tokenizer(model: str) -> Tokenizer:
    from shoestring.engine.tokenizer import from_folder

    found = from_folder(resolve(gguf(model)))
    assert found
    return found


def tasks(tokens: Tokenizer, count: int) -> dict[str, list[list[int]]]:
    """Prompts of each task, of Python's own documentation and sources."""
    import bisect
    import heapq
    import shlex
    import textwrap

    def asked(text: str) -> list[int]:
        return tokens.chat([{"role": "user", "content": text}])

    examples = [e for e in python_docs() if len(e.messages[1]["content"]) > 300][:: 997 // max(count, 1)][:count]
    titles = [e.messages[0]["content"].split("`")[1] for e in examples]
    long = [e.messages[1]["content"] for e in examples]
    sources: list[ModuleType] = [textwrap, heapq, bisect, shlex]
    return {
        "code": [asked(f"Write a Python function with tests for this: {text.splitlines()[0]}") for text in long],
        "chat": [asked(f"What is `{title}` in Python good for? Explain it to a beginner.") for title in titles],
        "summarise": [asked(f"Summarise this text in a few sentences:\n\n{text}") for text in long],
        "rewrite": [
            asked(f"Give back this code with type hints added:\n\n```python\n{code[at : at + 1500]}\n```")
            for at, code in zip(range(2000, 2000 + 700 * count, 700), cycle(map(inspect.getsource, sources)))
        ],
    }


class Process:
    """A process of `_drafting.py` that has its model loaded."""

    def __init__(self, words: list[str], threads: int) -> None:
        python, kind, model, dtype = words
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.process = subprocess.Popen([python, str(_ARM), kind, model, str(threads), dtype], **pipes)
        self._read()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended")  # type: ignore[str-bytes-safe]
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextmanager
def processes(arms: dict[str, list[str]], threads: int) -> Iterator[dict[str, Process]]:
    with ExitStack() as stack:
        found = {}
        for name, words in arms.items():
            found[name] = Process(words, threads)
            stack.callback(found[name].end)
        yield found


def compared(ready: dict[str, Process], prompts: list[list[int]], drawn: bool, given: Any) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {name: [] for name in ready}
    said: dict[str, float] = {}
    for _ in range(given.rounds):
        tokens, seconds = dict.fromkeys(ready, 0), dict.fromkeys(ready, 0.0)
        for turn, name in turns(list(ready), len(prompts)):
            command = dict(ids=prompts[turn], tokens=given.tokens, temperature=1.2 if drawn else 0.0, fresh=turn == 0)
            found = ready[name].ask(**command)
            tokens[name] += found["tokens"]
            seconds[name] += found["seconds"]
            if name == "aded":
                said = found["said"]
        for name in ready:
            speeds[name].append(tokens[name] / seconds[name])
    pairs = [("aded", "plain"), ("llama-lookup", "llama"), ("aded", "llama-lookup")]
    return {
        "tokens_per_s": {name: spread(values) for name, values in speeds.items()},
        "over": {f"{a} / {b}": ratios(speeds[a], speeds[b]) for a, b in pairs if a in speeds and b in speeds},
        "said": said,
        "runs": speeds,
    }


def printed(form: str, task: str, found: dict[str, Any]) -> None:
    speeds = "  ".join(f"{name} {values['median']:.0f}" for name, values in found["tokens_per_s"].items())
    over = "  ".join(f"{pair} {shown(values, '.2f')}" for pair, values in found["over"].items())
    said = found["said"]
    print(
        f"{form:6} {task:10} tokens/s: {speeds}\n{'':18}{over}\n{'':18}"
        f"{said['draft_tokens_per_pass']:.2f} tokens and {said['draft_nodes_per_pass']:.2f} guesses a pass, "
        f"{said['draft_ms_per_pass']:.3f} ms of drafting",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

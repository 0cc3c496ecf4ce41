"""Decoding with ADED's drafts beside plain decoding, and beside llama.cpp's prompt look-up.

    python benchmarks/aded.py [--formats 4-bit,bf16] [--prompts 12] [--tokens 128] [--rounds 3] [--corpus 30]
                              [--llama-python PYTHON] [--json FILE]

One answer at a time on the default model. Tasks: code (write a function), chat (explain something), summarise (shorten
documentation), rewrite (give back code with a change), drawn (chat at temperature 1.2, which hardly repeats itself).
`aded` begins each task of each round with an empty table, so that all prompts are new to it; `aded-corpus`, as in the
paper, with one counted in the same weights' answers to other prompts, `--corpus` of each task. Every model is loaded
once, by a process of its own; arms take turns prompt by prompt. A figure is tokens over seconds, from an answer's first
token on, of all prompts of a task; a ratio is of one round.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
    parser.add_argument("--corpus", type=int, default=30, help="prompts of each task that the corpus answers; 0: none")
    given = parser.parse_args()
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "formats": {}}
    tokens = tokenizer(given.model)
    asked, others = tasks(tokens, given.prompts, given.corpus)
    with tempfile.TemporaryDirectory() as place:
        for name in given.formats.split(","):
            file = gguf(given.model)
            dtype = "auto" if name == "4-bit" else "bf16"
            plugs = {"plain": "plain", "aded": "aded"}
            if given.corpus:
                corpus = Path(place) / f"{name}.jsonl"
                answered(corpus, file, dtype, others, given)
                plugs["aded-corpus"] = f"aded,corpus={corpus}"
            arms = {kind: [sys.executable, plug, str(file), dtype] for kind, plug in plugs.items()}
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


def tasks(tokens: Tokenizer, count: int, others: int) -> tuple[dict[str, list[list[int]]], dict[str, list[list[int]]]]:
    """Prompts of each task, of Python's own documentation and sources: `count` to measure, and `others`."""
    import argparse
    import csv
    import heapq
    import shlex
    import textwrap

    def asked(text: str) -> list[int]:
        return tokens.chat([{"role": "user", "content": text}])

    known = [e for e in python_docs() if len(e.messages[1]["content"]) > 300]
    chosen = known[:: 997 // max(count, 1)][:count]
    rest = [e for e in known if e not in chosen][:: 911 // max(others, 1)][:others]
    # The corpus must not know the code that is asked for.
    own, other = _pieces((textwrap, heapq, csv, shlex), count), _pieces((argparse, inspect), others)
    found = []
    for examples, parts in ((chosen, own), (rest, other)):
        titles = [e.messages[0]["content"].split("`")[1] for e in examples]
        long = [e.messages[1]["content"] for e in examples]
        found.append({
            "code": [asked(f"Write a Python function with tests for this: {text.splitlines()[0]}") for text in long],
            "chat": [asked(f"What is `{title}` in Python good for? Explain it to a beginner.") for title in titles],
            "summarise": [asked(f"Summarise this text in a few sentences:\n\n{text}") for text in long],
            "rewrite": [
                asked(f"Give back this code with type hints added:\n\n```python\n{part}\n```") for part in parts
            ],
        })  # fmt: skip
    return found[0], found[1]


def _pieces(sources: Sequence[ModuleType], count: int) -> list[str]:
    """So many stretches of the modules' code, by turns, which do not overlap while the code lasts."""
    texts = cycle(map(inspect.getsource, sources))
    starts = (2000 + 1600 * (i // len(sources)) for i in range(count))
    return [code[at % (len(code) - 1500) :][:1500] for at, code in zip(starts, texts)]


def answered(corpus: Path, model: Path, dtype: str, asked: dict[str, list[list[int]]], given: Any) -> None:
    """Write a model's own answers to so many prompts, as a server's log would have them."""
    from shoestring.engine.engine import Engine
    from shoestring.engine.request import Sampling

    with Engine(str(model), runner="native", dtype=dtype, threads=given.threads, max_sequences=12) as engine:
        prompts = [prompt for some in asked.values() for prompt in some]
        answers = engine.generate(prompts, Sampling(max_tokens=given.tokens))
        rows = [json.dumps({"text": found.text}) + "\n" for (found,) in answers if found.text.strip()]
    corpus.write_text("".join(rows), encoding="utf-8")


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
    said: dict[str, dict[str, float]] = {}
    for _ in range(given.rounds):
        tokens, seconds = dict.fromkeys(ready, 0), dict.fromkeys(ready, 0.0)
        for turn, name in turns(list(ready), len(prompts)):
            command = dict(ids=prompts[turn], tokens=given.tokens, temperature=1.2 if drawn else 0.0, fresh=turn == 0)
            found = ready[name].ask(**command)
            tokens[name] += found["tokens"]
            seconds[name] += found["seconds"]
            if found["said"]:
                said[name] = found["said"]
        for name in ready:
            speeds[name].append(tokens[name] / seconds[name])
    pairs = [("aded", "plain"), ("aded-corpus", "plain"), ("llama-lookup", "llama"), ("aded", "llama-lookup")]
    return {
        "tokens_per_s": {name: spread(values) for name, values in speeds.items()},
        "over": {f"{a} / {b}": ratios(speeds[a], speeds[b]) for a, b in pairs if a in speeds and b in speeds},
        "said": said,
        "runs": speeds,
    }


def printed(form: str, task: str, found: dict[str, Any]) -> None:
    speeds = "  ".join(f"{name} {values['median']:.0f}" for name, values in found["tokens_per_s"].items())
    over = "  ".join(f"{pair} {shown(values, '.2f')}" for pair, values in found["over"].items())
    print(f"{form:6} {task:10} tokens/s: {speeds}\n{'':18}{over}")
    for name, said in found["said"].items():
        print(
            f"{'':18}{name}: {said['draft_tokens_per_pass']:.2f} tokens and {said['draft_nodes_per_pass']:.2f} guesses "
            f"a pass, {said['draft_ms_per_pass']:.3f} ms of drafting",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())

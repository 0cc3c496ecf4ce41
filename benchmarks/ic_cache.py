"""A small model alone, a large one alone, and what stands between them: examples, reuse of answers, chance.

    python benchmarks/ic_cache.py [--requests 200] [--seeds 0,1] [--labels 0.1] [--fresh] [--json FILE]

Questions over countries, currencies and languages with one right JSON answer each, popularity by Zipf (`pycountry`);
with --fresh no question comes twice. Small: SmolLM2-135M-Instruct. Large: Gemma 3 270M behind a fixed header of
answered questions. All arms answer the same stream, one request after another, greedy; equal prompts are computed
once, and the first third of the requests is not counted. Arms:
    small, large      one of them alone
    ic-cache          the router decides; a checker sees the share `--labels` of the answers
    ic-cache, judged  the same, and the checker sees all of them
    random            examples as the last, but chance decides, with the same share for the large model
    nearest-answer    the stored answer of a request with a cosine of at least 0.9, else the large model
Quality is the share of right answers, and of those of the right form; cost is tokens times price, the large model's
1 and the small one's 0.2; a wrong hit is a wrong answer that came from elsewhere than the large model, where that would
have been right.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from shoestring.claims._country_questions import FORM, RIGHT, Question, asked, checker, grade, header
from shoestring.claims._large_model import Answers
from shoestring.core import catalog
from shoestring.methods.serving._cache import tokens_of

PRICE = {"small": 0.2, "large": 1.0, "stored": 0.0}
NEAR = 0.9


@dataclass(frozen=True)
class Row:
    """One answered request: who answered, its grade, tokens of prompt and answer, seconds."""

    who: str
    grade: float
    tokens: int
    seconds: float


class Both:
    """The two models, each prompt computed once and timed then."""

    def __init__(self, models: Answers) -> None:
        self.models = models
        self._tokens = tokens_of
        self._header = sum(self._tokens(q.text) + self._tokens(q.answer) for q in header())
        self._known: dict[str, tuple[str, float]] = {}

    def small(self, text: str, turns: Sequence[dict[str, str]] = ()) -> tuple[str, int, float]:
        answer, seconds = self._once(json.dumps([text, list(turns)]), lambda: self.models.small([text], [turns]))
        return answer, sum(map(self._tokens, [text, answer, *(t["content"] for t in turns)])), seconds

    def large(self, text: str) -> tuple[str, int, float]:
        answer, seconds = self._once(text, lambda: self.models.large([text]))
        return answer, self._header + self._tokens(text) + self._tokens(answer), seconds

    def _once(self, key: str, compute: Callable[[], list[str]]) -> tuple[str, float]:
        if key not in self._known:
            began = time.perf_counter()
            self._known[key] = (compute()[0], time.perf_counter() - began)
        return self._known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--labels", type=float, default=0.1)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    method = catalog.module("ic_cache")
    rows: list[dict[str, Any]] = []
    with Answers() as models:
        both = Both(models)
        both.small("hello"), both.large("hello")  # opens them
        for seed in map(int, given.seeds.split(",")):
            stream = asked(given.requests, seed)
            if given.fresh:
                stream = list(dict.fromkeys(asked(5000, seed)))[: given.requests]
            alone = {q.text: grade(q, both.large(q.text)[0]) for q in stream}
            arms: dict[str, list[Row]] = {
                "small": [_row("small", q, both.small(q.text)) for q in stream],
                "large": [_row("large", q, both.large(q.text)) for q in stream],
                "ic-cache": _between(both, method, stream, seed, given.labels),
                "ic-cache, judged": (judged := _between(both, method, stream, seed, 1.0)),
                "random": _between(both, method, stream, seed, 1.0, mean(r.who == "large" for r in judged)),
                "nearest-answer": _reused(both, stream),
            }
            for name, found in arms.items():
                warm = len(stream) // 3
                rows.append({"seed": seed, "arm": name, **_figures(stream[warm:], found[warm:], alone)})
    names = [name for name in rows[0] if name not in ("seed", "arm")]
    print(f"{'arm':18}" + "".join(f"{name:>12}" for name in names))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        same = [row for row in rows if row["arm"] == arm]
        print(f"{arm:18}" + "".join(f"{mean(row[name] for row in same):12.3f}" for name in names))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"requests": given.requests, "labels": given.labels, "fresh": given.fresh}
        given.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def _between(
    both: Both, method: Any, stream: list[Question], seed: int, labels: float, at_random: float | None = None
) -> list[Row]:
    """The stream through a cache that begins empty."""
    config = replace(method.example(), judge_share=labels, seed=seed)
    two = [method.Model("small", PRICE["small"], 1024), method.Model("large", 1.0, 1024)]
    cache = method.Cache(config, two, both.models.embed, "benchmark", checker=checker)
    draw, found = random.Random(seed), []
    for question in stream:
        without: tuple[str, ...] = ()
        if at_random is not None and cache.pool.examples:
            without = ("small",) if draw.random() < at_random else ("large",)
        decision = cache.decide(method.Asked("a/", question.text, 40, 40), without)
        name = decision.model.name
        made = both.small(question.text, decision.turns) if name == "small" else both.large(question.text)
        cache.finish(decision, made[0], True)
        found.append(_row(name, question, made))
    cache.close()
    return found


def _reused(both: Both, stream: list[Question]) -> list[Row]:
    """A cache of answers by meaning: what such a cache is usually, and what this one is not."""
    stored: list[tuple[Any, str]] = []
    found = []
    for question in stream:
        vector = both.models.embed(question.text)
        near = max(((float(vector @ other), answer) for other, answer in stored), default=(0.0, ""))
        if near[0] >= NEAR:
            found.append(_row("stored", question, (near[1], 0, 0.0)))
        else:
            made = both.large(question.text)
            stored.append((vector, made[0]))
            found.append(_row("large", question, made))
    return found


def _row(who: str, question: Question, made: tuple[str, int, float]) -> Row:
    return Row(who, grade(question, made[0]), *made[1:])


def _figures(stream: list[Question], found: list[Row], alone: dict[str, float]) -> dict[str, float]:
    hits = [(row, alone[question.text]) for question, row in zip(stream, found) if row.who != "large"]
    return {
        "right": mean(row.grade == RIGHT for row in found),
        "form": mean(row.grade >= FORM for row in found),
        "large calls": mean(row.who == "large" for row in found),
        "cost": mean(row.tokens * PRICE[row.who] for row in found),
        "seconds": mean(row.seconds for row in found),
        "wrong hits": sum(row.grade < RIGHT and other == RIGHT for row, other in hits) / max(1, len(hits)),
    }


if __name__ == "__main__":
    main()

"""The main job: make a model fit a budget, and show the bill.

Resolve the request, measure the model as it is, plan, adapt it to the data, then try candidates in the planner's order
until one meets every limit and keeps the quality asked for. Candidates are chosen on the validation split; what the
report shows is the test split.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from shoestring import data as datasets
from shoestring import models
from shoestring.core.budget import Budget, Miss
from shoestring.core.errors import DoesNotFit, QualityGate, ShoestringError, UsageError
from shoestring.core.files import atomic_folder, write_text
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.jobs import report
from shoestring.jobs._doors import import_lines, open_doors, open_model
from shoestring.jobs.at_work import at_work
from shoestring.jobs.evaluate import Quality, compare, heldout, perplexity_ratio, predicts_next
from shoestring.jobs.generate import generate
from shoestring.jobs.pipeline import execute
from shoestring.jobs.runs import Run, finished, open_run
from shoestring.kernels import ops
from shoestring.models.cache import origin
from shoestring.models.flops import count_flops
from shoestring.planner import cost
from shoestring.planner.machine import Machine, machine
from shoestring.planner.plan import Candidate, plan, refuse_hopeless, relax

DONE, OVER_BUDGET, BELOW_QUALITY = "done", "over budget", "below quality"
# Seconds for merging and writing, beside what measuring takes; candidates built at most.
_MARGIN = 12.0
_TRIES = 3


@dataclass(frozen=True)
class FitRequest:
    """What `fit` is asked for. Defaults are the demonstration.

    Attributes:
        budget: limits as text, see `core.budget`.
        keep: share of the original's quality to keep: perplexity of the original / perplexity of the result.
        adapt: the method to train on the data first, "auto", or "none".
        compress: the method to compress with, "auto" for what the budget asks for, or "none".
        training: settings of the training loop by their transformers names, with `max_length` and `on_long`.
        eval_examples: held-out examples to measure quality on, at most.
    """

    model: str = "smollm2"
    data: str = "python-docs"
    budget: str = "storage=90MB,memory=800MB,time=6m"
    keep: float = 0.97
    adapt: str = "auto"
    compress: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    eval_examples: int = 96
    skip_bad: int = 0
    seed: int = 0
    trust_remote_code: bool = False


def fit(
    request: FitRequest,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fit the model; returns the result that the report shows, also in `run/result.json`.

    Raises:
        UsageError: bad input, found before any work.
        DoesNotFit: no candidate meets the budget; the closest stands in the run folder.
        QualityGate: what fits keeps less than `keep`; the best stands in the run folder.
    """
    started = time.monotonic()
    limits = Budget.parse(request.budget)
    if not 0 < request.keep <= 1:
        raise UsageError(f"keep is {request.keep}", "it is a share of the quality", "Use a number above 0, at most 1")
    if limits.get("network"):
        raise UsageError(
            "fit does not measure network traffic", "a limit on it would mean nothing", "Leave network out"
        )
    result = finished(out, "fit", asdict(request)) if resume else None
    if result:
        say(f"the run in {out} has finished; nothing is left to do")
        return _verdict(result)
    say(f"reading {request.model} and {request.data}")
    source = models.resolve(request.model)
    open_doors(source)
    predicts_next(source)
    shape = models.shape_of(source, trust_remote_code=request.trust_remote_code)
    corpus = datasets.read(request.data, skip_bad=request.skip_bad)
    candidates, host = plans(request, shape, limits)
    refuse_hopeless(candidates, limits)
    with open_run(out, "fit", asdict(request), resume=resume, label=Path(request.model).name) as run:
        # The ledger ends before the result is written: its figures of the whole belong into it.
        with Ledger() as ledger:
            job = _Fit(request, limits, run, ledger, source, candidates, host, say, started, resume)
            found = job.work(corpus)
        result = job.finish(found)
    return _verdict(result)


def _verdict(result: dict[str, Any]) -> dict[str, Any]:
    """The result, or the error that its status is."""
    error: ShoestringError
    if result["status"] == OVER_BUDGET:
        missed = [Miss(**miss) for miss in result["missed"]]
        error = DoesNotFit(
            f"nothing tried meets {result['request']['budget']}: {', '.join(map(str, missed))}",
            f"the closest is kept in {result['model']}",
            f"Relax the budget to {relax(missed)}, or bring a smaller model",
        )
    elif result["status"] == BELOW_QUALITY:
        kept = result["quality_kept"]
        error = QualityGate(
            f"the best that fits keeps {kept['value']:.1%} of the quality, and --keep asks for {kept['keep']:.1%}",
            f"it is kept in {result['model']}",
            "Relax the budget, lower --keep, or give more time",
        )
    else:
        return result
    error.result = result
    raise error


def plans(request: FitRequest, shape: Any, limits: Budget) -> tuple[list[Candidate], Machine]:
    """Candidates and the machine they are predicted for."""
    host = machine()
    candidates = plan(
        shape,
        limits,
        host.floor,
        adapt=None if request.adapt == "none" else request.adapt,
        compress=None if request.compress == "auto" else request.compress,
        options=request.options,
    )
    return candidates, host


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now


@dataclass
class _Tried:
    candidate: Candidate
    folder: Path
    work: dict[str, Any]
    loss: float
    flops_per_token: float
    kept: float
    misses: tuple[Miss, ...]

    @property
    def worst(self) -> float:
        return max((m.value / m.limit for m in self.misses), default=0.0)


@dataclass
class _Fit:
    """One run of `fit`: the request with everything resolved, and the stages in order."""

    request: FitRequest
    limits: Budget
    run: Run
    ledger: Ledger
    source: Path
    candidates: list[Candidate]
    host: Machine
    say: Callable[[str], None]
    started: float
    resume: bool
    missed: list[Miss] = field(default_factory=list)
    ending: float = 0.0

    def work(self, corpus: Any) -> dict[str, Any]:
        request, say = self.request, self.say
        self.run.write("plan.json", [c.to_json() for c in self.candidates])
        train, valid, test = datasets.parts_of(corpus, request.seed)
        loaded = open_model(str(self.source), trust_remote_code=request.trust_remote_code)
        tokenizer, context = loaded.tokenizer, models.shape_of(loaded.model).context or 2048
        limit = min(request.training.get("max_length") or context, context)
        on_long = request.training.get("on_long", "error")
        choose = datasets.encode(
            _some(valid, max(1, request.eval_examples // 3)), tokenizer, limit, on_long=on_long
        ).rows
        show = datasets.encode(_some(test, request.eval_examples), tokenizer, limit, on_long=on_long).rows
        say("measuring the model as it is")
        clock = _Clock()
        with self.ledger.stage("before", settle=True):
            before_work = self._at_work(self.source)
            clock.lap("work")
            before, before_choice = heldout(loaded.model, show), heldout(loaded.model, choose)
            clock.lap("heldout")
            samples = [{"prompt": p, "reference": r, "before": _answer(loaded, p)} for p, r in _prompts(test)]
            clock.lap("samples")
        log: list[Any] = []
        whole, whole_choice, adapted = loaded, before_choice, None
        if self.candidates[0].steps and self.candidates[0].steps[0].verb == "train":
            model, log = self._adapt(train, valid, clock)
            choice = heldout(model.model, choose)
            adapted = heldout(model.model, show)
            if choice.loss.value < before_choice.loss.value:
                whole, whole_choice = model, choice
            else:
                say("training made the model no better on held-out data; going on with the original")
                self.candidates = [
                    replace(c, steps=tuple(s for s in c.steps if s.verb == "compress")) for c in self.candidates
                ]
        tried = self._try(before_choice, whole_choice, choose, train)
        good = [t for t in tried if not t.misses]
        best = max(good, key=lambda t: t.kept) if good else min(tried, key=lambda t: (t.worst, -t.kept))
        self.missed = list(best.misses)
        say(f"measuring {best.candidate.name} on the test split")
        with self.ledger.stage("after", settle=True):
            final = open_model(best.folder, trust_remote_code=request.trust_remote_code)
            comparison = compare(final.model, whole.model, show)
            for sample in samples:
                sample["after"] = _answer(final, sample["prompt"])
        return {
            "best": best, "tried": tried, "before_work": before_work, "before": before, "adapted": adapted,
            "comparison": comparison, "samples": samples, "log": log,
            "ratio": perplexity_ratio(comparison.model, before),
            "reference": "the original model" if whole is loaded else "the trained model before compression",
        }  # fmt: skip

    def _adapt(self, train: Any, valid: Any, clock: _Clock) -> tuple[Any, list[Any]]:
        """Train and merge what every candidate begins with, in the time the budget leaves for it."""
        training = {"max_seconds": self._time_for_training(clock), **self.request.training}
        if training["max_seconds"] is None:
            del training["max_seconds"]
        first = self.candidates[0].steps
        shared = first[: next(i for i, s in enumerate(first) if s.verb == "merge") + 1]
        allowed = training.get("max_seconds")
        self.say(f"training {shared[0].method}" + (f" for at most {allowed:.0f} s" if allowed else ""))
        work = self._work(train, _some(valid, max(1, self.request.eval_examples // 3)), training)
        folder, facts = execute(shared, self.source, work)
        return open_model(folder, trust_remote_code=self.request.trust_remote_code), facts[0].get("log", [])

    def _at_work(self, folder: Path) -> dict[str, Any]:
        return at_work(
            folder,
            prompt_tokens=cost.PROMPT_TOKENS,
            new_tokens=cost.NEW_TOKENS,
            trust_remote_code=self.request.trust_remote_code,
        )

    def _try(self, original: Quality, whole: Quality, rows: list[Any], train: Any) -> list[_Tried]:
        """Build candidates in order until one fits and keeps enough; `train` is for those that look at data.

        One that is good enough beside the original, yet loses more than was to be kept by being compressed, is not the
        last word: others are tried too, as long as time allows.
        """
        tried: list[_Tried] = []
        slowest = 0.0
        for candidate in [c for c in self.candidates if c.fits][:_TRIES] or self.candidates[:1]:
            left = self._time_left()
            if tried and left is not None and left < slowest + self.ending:
                self.say("no time is left for another candidate")
                break
            clock = time.monotonic()
            self.say(f"building {candidate.name}")
            with self.ledger.stage("build"):
                folder, _ = execute(candidate.steps, self.source, self._work(train, None, {}))
            with self.ledger.stage("measure", settle=True):
                work = self._at_work(folder)
                model = open_model(folder, trust_remote_code=self.request.trust_remote_code).model
                quality = heldout(model, rows)
                flops = _flops_per_token(model)
                self.ledger.record("flops_per_token", flops, "FLOP", "counted", "torch's counter", "model")
                del model
            figures = {"storage": work["storage"], "memory": work["peak_memory"], "latency": work["latency"]}
            kept, lost = (1 / perplexity_ratio(quality, other).value for other in (original, whole))
            misses = tuple(self.limits.misses(figures))
            tried.append(_Tried(candidate, folder, work, quality.loss.value, flops, kept, misses))
            slowest = max(slowest, time.monotonic() - clock)
            enough = kept >= self.request.keep
            why = ", ".join(map(str, misses)) or f"{kept:.1%} of the original's quality, {lost:.1%} of the uncompressed"
            self.say(f"{candidate.name}: {why}")
            if not misses and enough and lost >= self.request.keep:
                break
        return tried

    def finish(self, got: dict[str, Any]) -> dict[str, Any]:
        """Put the model in its place, and write result, ledger and report."""
        best: _Tried = got["best"]
        spent = self._spent()
        self.missed += self.limits.misses({name: _value(entry) for name, entry in spent.items()})
        ratio = got["ratio"]
        kept = {
            "value": 1 / ratio.value,
            "interval": [1 / ratio.interval[1], 1 / ratio.interval[0]] if ratio.interval else None,
            "reference": "the original model",
            "keep": self.request.keep,
        }
        status = OVER_BUDGET if self.missed else BELOW_QUALITY if kept["value"] < self.request.keep else DONE
        result = self._result(got, best, spent, kept, status)
        result["model"], result["missed"] = str(self.run.model), [asdict(miss) for miss in self.missed]
        self._place(best.folder, result)
        self.run.write("result.json", result)
        self.ledger.save(self.run.inside / "ledger.json")
        report.write(result, self.run.folder)
        shutil.rmtree(self.run.work, ignore_errors=True)
        self.run.note(status=status)
        return result

    def _result(
        self, got: dict[str, Any], best: _Tried, spent: dict[str, Any], kept: dict[str, Any], status: str
    ) -> dict[str, Any]:
        request, comparison = self.request, got["comparison"]
        return {
            "name": self.run.folder.name,
            "created": self.ledger.started,
            "status": status,
            "request": {
                "model": request.model, "data": request.data, "budget": request.budget, "keep": request.keep,
                "command": self.run.manifest()["command"],
            },
            "before": {**_at_work(got["before_work"]), **_quality(got["before"])},
            "adapted": _quality(got["adapted"]) if got["adapted"] else None,
            "after": {**_at_work(best.work), **_quality(comparison.model)},
            "limits": dict(self.limits.limits),
            "quality_kept": kept,
            "compared_with": got["reference"],
            "comparison": {
                "perplexity_ratio": _figure(comparison.perplexity_ratio),
                "kl": _figure(comparison.kl),
                "changed_top": _figure(comparison.changed),
            },
            "candidates": [self._row(c, best, got["tried"]) for c in self.candidates],
            "prediction_error": cost.errors(best.candidate.predicted, _measured(best)),
            "spent": spent,
            "stages": self.ledger.to_json(),
            "loss_curve": got["log"],
            "samples": got["samples"],
            "environment": {
                **dict(self.ledger.fingerprint), "kernels": ops.backend(), "dtype": got["before_work"]["dtype"],
            },
            "commands": [
                f"shoestring run {self.run.inside / 'config.resolved.yaml'}",
                f"shoestring chat {self.run.model}",
                f"shoestring eval {self.run.model} --against {request.model}",
            ],
            "python": _snippet(self.run.model, best.folder),
            "notes": _notes(self.source, got),
        }  # fmt: skip

    def _row(self, candidate: Candidate, best: _Tried, tried: list[_Tried]) -> dict[str, Any]:
        row = {
            "name": candidate.name,
            "pipeline": [s.to_json() for s in candidate.steps],
            "predicted": candidate.predicted.to_json(),
        }
        found = next((t for t in tried if t.candidate is candidate), None)
        if found is None:
            why = (
                "predicted to miss " + ", ".join(m.resource for m in candidate.misses)
                if candidate.misses
                else "not needed"
            )
            return {**row, "measured": None, "verdict": f"not tried: {why}"}
        missed = "misses " + ", ".join(m.resource for m in found.misses) if found.misses else ""
        verdict = "; ".join(filter(None, ("chosen" if found is best else "", missed))) or "keeps less"
        measured = {
            "storage": found.work["storage"],
            "memory": found.work["peak_memory"],
            "decode_tokens_per_s": _median(found.work["decode_tokens_per_s"]),
            "loss": found.loss,
            "flops_per_token": found.flops_per_token,
        }
        return {**row, "measured": measured, "verdict": verdict, "quality_kept": found.kept}

    def _place(self, folder: Path, result: dict[str, Any]) -> None:
        """The chosen folder becomes OUT/model, with its card, in one rename."""
        if not folder.is_relative_to(self.run.work):
            # Nothing was done to the model: it is the user's own folder, or the cache's.
            with atomic_folder(self.run.work / "copy", overwrite=True) as temp:
                shutil.copytree(folder, temp, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
            folder = self.run.work / "copy"
        write_text(folder / "README.md", _card(self.request, result))
        if self.run.model.exists():
            shutil.rmtree(self.run.model)
        folder.replace(self.run.model)

    def _work(self, train: Any, valid: Any, training: Mapping[str, Any]) -> Work:
        return Work(
            self.ledger, self.run.work, train, valid, training,
            resume=self.resume, seed=self.request.seed, trust_remote_code=self.request.trust_remote_code,
        )  # fmt: skip

    def _time_left(self) -> float | None:
        limit = self.limits.get("time")
        return None if limit is None else limit - (time.monotonic() - self.started)

    def _time_for_training(self, clock: _Clock) -> float | None:
        """What is left when merging, one candidate and the last comparison have had theirs.

        They are measured on the way here: a packed model may read a text at half the speed of the original.
        """
        left = self._time_left()
        heldout, work = clock.laps["heldout"], clock.laps["work"]
        self.ending = 3 * heldout + clock.laps["samples"] + _MARGIN
        if left is None:
            return None
        allowed = left - self.ending - (2 * heldout + work + 2 * _MARGIN)
        if allowed < 10:
            raise DoesNotFit(
                f"time={self.limits.get('time'):.0f}s leaves {max(0.0, allowed):.0f} s for training",
                f"measuring this model takes {heldout + work:.0f} s at a time here",
                "Raise the time, lower --eval-examples, or use --adapt none",
            )
        return allowed

    def _spent(self) -> dict[str, Any]:
        def entry(metric: str) -> dict[str, Any]:
            found = self.ledger.figure("", metric)
            if found is None or found.value is None:
                return {"value": None, "status": "not available", "interval": None, "unit": found.unit if found else ""}
            return {"value": found.value, "unit": found.unit, "interval": found.interval, "status": found.status}

        return {
            "time": time.monotonic() - self.started,
            "cpu": _value(entry("cpu_time")),
            "energy": entry("energy"),
            "money": entry("money"),
            "carbon": entry("carbon"),
            "train.memory": entry("peak_memory"),
        }


def _some(corpus: Any, count: int) -> Any:
    """`count` examples spread evenly over the corpus."""
    step = max(1, math.ceil(len(corpus) / count))
    return corpus.part(corpus.examples[::step][:count])


def _prompts(corpus: Any) -> list[tuple[str, str]]:
    """Three questions of the split with their reference answers."""
    found = []
    for example in _some(corpus, 3).examples:
        if example.messages:
            answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
            found.append((example.messages[0]["content"], answers[0] if answers else ""))
        else:
            text = example.text or ""
            found.append((text[:200], text[200:600]))
    return found


def _answer(loaded: models.Loaded, prompt: str) -> str:
    return "".join(generate(loaded, prompt, max_new_tokens=80)) if loaded.kind == "causal" else ""


def _quality(quality: Quality) -> dict[str, Any]:
    return {"loss": _figure(quality.loss), "perplexity": _figure(quality.perplexity), "tokens": quality.tokens}


def _figure(figure: Any) -> dict[str, Any]:
    return {
        "value": figure.value,
        "unit": figure.unit,
        "interval": figure.interval,
        "n": figure.n,
        "status": figure.status,
    }


def _at_work(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "storage": found["storage"],
        "memory": found["peak_memory"],
        "decode_tokens_per_s": _median(found["decode_tokens_per_s"]),
        "prefill_tokens_per_s": _median(found["prefill_tokens_per_s"]),
        "latency": found["latency"],
        "load_seconds": found["load_seconds"],
        "threads": found["threads"],
    }


def _measured(tried: _Tried) -> dict[str, float | None]:
    return {
        "storage": tried.work["storage"],
        "memory": tried.work["peak_memory"],
        "flops_per_token": tried.flops_per_token,
    }


def _flops_per_token(model: Any) -> float:
    """Matrix FLOPs of one forward pass over the tokens that the prediction is for, divided by their number."""
    tokens = cost.PROMPT_TOKENS + cost.NEW_TOKENS
    ids = torch.arange(tokens)[None] % model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        return count_flops(lambda: model(input_ids=ids))[0] / tokens


def _median(figure: Mapping[str, float] | None) -> float | None:
    return figure["median"] if figure else None


def _value(entry: Any) -> Any:
    return entry.get("value") if isinstance(entry, Mapping) else entry


def _snippet(model: Path, folder: Path) -> str:
    return (
        import_lines(folder if folder.is_dir() else model)
        + "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        + f'model = AutoModelForCausalLM.from_pretrained("{model}")\n'
        + f'tokenizer = AutoTokenizer.from_pretrained("{model}")\n'
    )


def _card(request: FitRequest, result: dict[str, Any]) -> str:
    steps = next(c["name"] for c in result["candidates"] if "chosen" in c["verdict"])
    notes = "".join(f"- {note}\n" for note in result["notes"])
    return (
        f"# {result['name']}\n\nMade from `{request.model}` on `{request.data}` by: {steps}.\n\n"
        f"{report.markdown(result)}\n## Use\n\n```python\n{result['python']}```\n\n"
        + (f"## Notes\n\n{notes}" if notes else "")
    )


def _notes(source: Path, got: Mapping[str, Any]) -> list[str]:
    notes = []
    kept = 1 / got["comparison"].perplexity_ratio.value
    if got["adapted"] and kept < 1:
        notes.append(
            f"Being compressed took {1 - kept:.0%} of the quality that training had reached; the quality kept is "
            "measured against the original model."
        )
    came_from = origin(source)
    bits = re.search(r"[._-]I?Q(\d)", came_from)
    if bits:
        notes.append(
            f"The original was read from {came_from}: its numbers were rounded to {bits[1]} bits once already, so a "
            "format on the same grid would look better than it is."
        )
    return notes

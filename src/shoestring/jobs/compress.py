"""Compress a model with one method, and show its quality bill against the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoestring import data as datasets
from shoestring import models
from shoestring.core import catalog
from shoestring.core.errors import QualityGate, UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Step, Work
from shoestring.jobs._doors import open_doors, open_model
from shoestring.jobs.at_work import storage
from shoestring.jobs.evaluate import compare
from shoestring.jobs.pipeline import check, execute
from shoestring.jobs.runs import finished, open_run


@dataclass(frozen=True)
class CompressRequest:
    """What `compress` is asked for. `data` is what quality is measured on; `keep` the least share of it to accept."""

    model: str = "smollm2"
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = "python-docs"
    keep: float = 0.95
    eval_examples: int = 96
    seed: int = 0
    trust_remote_code: bool = False


def compress(
    request: CompressRequest,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compress; returns folder, bytes before and after, bits per weight, and the comparison with the original.

    Raises:
        UsageError: bad input, found before any work.
        QualityGate: the result keeps less than `keep`; it stays in the run folder under `run/work`, not as `model`.
    """
    if not 0 < request.keep <= 1:
        raise UsageError(f"keep is {request.keep}", "it is a share of the quality", "Use a number above 0, at most 1")
    done = finished(out, "compress", asdict(request)) if resume else None
    if done:
        say(f"the run in {out} has finished; nothing is left to do")
        return done
    step = Step("compress", request.method, dict(request.options))
    check(step)
    module = catalog.module(request.method)
    source = models.resolve(request.model)
    open_doors(source)
    shape = models.shape_of(source, trust_remote_code=request.trust_remote_code)
    settings = dict(request.options) or dict(module.settings()[0])
    step = Step("compress", request.method, settings)
    promised = module.price(shape, settings).shape
    corpus = datasets.read(request.data)
    with (
        open_run(
            out, "compress", asdict(request), resume=resume, label=f"{Path(request.model).name}-{request.method}"
        ) as run,
        Ledger() as ledger,
    ):
        say(f"compressing with {step}")
        work = Work(ledger, run.work, resume=resume, seed=request.seed, trust_remote_code=request.trust_remote_code)
        folder, _ = execute([step], source, work)
        say("comparing with the original")
        with ledger.stage("compare", settle=True):
            original = open_model(str(source), trust_remote_code=request.trust_remote_code)
            test = datasets.split(corpus, seed=0)[2]
            stride = max(1, len(test) // max(1, request.eval_examples))
            context = models.shape_of(source).context or 2048
            rows = datasets.encode(
                test.part(test.examples[::stride][: request.eval_examples]),
                original.tokenizer,
                context,
                on_long="truncate",
            ).rows
            found = compare(open_model(folder).model, original.model, rows)
        kept = 1 / found.perplexity_ratio.value
        weights = sum(w.stored for w in promised.weights if not w.tied)
        result = {
            "model": str(run.model), "method": request.method, "options": settings,
            "storage_before": storage(source), "storage": storage(folder),
            "bits_per_weight": 8 * weights / shape.parameters,
            "quality_kept": kept,
            **{name: asdict(getattr(found, name)) for name in ("perplexity_ratio", "kl", "changed")},
        }  # fmt: skip
        run.write("result.json", result)
        if kept < request.keep:
            raise QualityGate(
                f"{step} keeps {kept:.1%} of the quality, and --keep asks for {request.keep:.1%}",
                f"the result stays in {folder} for inspection",
                "Lower --keep, or use options with more bits",
            )
        if not run.model.exists():
            folder.replace(run.model)
    ledger.save(run.inside / "ledger.json")
    return result

"""Compress a model with one method or a stack of them, and show its quality bill against the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoestring import data as datasets
from shoestring import models
from shoestring.core import catalog, text
from shoestring.core.errors import DoesNotFit, QualityGate, UsageError
from shoestring.core.files import write_text
from shoestring.core.ledger import Ledger
from shoestring.core.shape import Shape
from shoestring.core.step import Step, Work
from shoestring.jobs._doors import import_lines, open_doors, open_model
from shoestring.jobs.at_work import storage
from shoestring.jobs.evaluate import compare, predicts_next
from shoestring.jobs.pipeline import execute, stack
from shoestring.jobs.runs import finished, open_run
from shoestring.models.folder import check_folder, read_json
from shoestring.models.load import load_tokenizer
from shoestring.planner.plan import by_verb, priced, room_for_weights


@dataclass(frozen=True)
class CompressRequest:
    """What `compress` is asked for. `data` is what quality is measured on; `keep` the least share of it to accept.

    Attributes:
        method: The method to use, or several in their order, with commas; `shoestring methods` lists them.
        size: The largest folder to make, such as 60MB; formats are then chosen layer by layer, after other methods.
        bits: In place of a size: the most bits for each weight of the model, on average, all included.
        data: What methods calibrate and train on; on another part of it quality is measured.
    """

    model: str = "smollm2"
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = "python-docs"
    size: str | None = None
    bits: float | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
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
        DoesNotFit: no choice of formats is as small as `size` or `bits` asks for.
        QualityGate: the result keeps less than `keep`; it stays in the run folder under `run/work`, not as `model`.
    """
    if not 0 < request.keep <= 1:
        raise UsageError(f"keep is {request.keep}", "it is a share of the quality", "Use a number above 0, at most 1")
    if request.eval_examples < 1:
        raise UsageError(
            f"eval_examples is {request.eval_examples}", "quality is measured on them", "Use 1 or more (--limit)"
        )
    done = finished(out, "compress", asdict(request)) if resume else None
    if done:
        say(f"the run in {out} has finished; nothing is left to do")
        return done
    methods = [name for name in request.method.replace(" ", "").split(",") if name]
    limited = request.size is not None or request.bits is not None
    if methods:
        stack(methods, request.options)  # refuses before the model is looked for
    elif not limited:
        known = ", ".join(m.name for m in by_verb("compress"))
        raise UsageError(
            "no method is given",
            remedy=f"Add --method, one of {known}; or --size or --bits, which choose formats layer by layer",
        )
    source = models.resolve(request.model)
    _refuse_packed(source)
    predicts_next(source)
    open_doors(source)
    shape = models.shape_of(source, trust_remote_code=request.trust_remote_code)
    limit = _limit(request, shape) if limited else None
    steps = _refuse_early(stack(methods, request.options, limit), shape)
    train, valid, test = datasets.parts_of(datasets.read(request.data), seed=0, choosing=False)
    rows = _encoded(test, source, shape, request)
    label = f"{Path(request.model).name}-{'+'.join(step.method for step in steps if step.method)}"
    with (
        open_run(out, "compress", asdict(request), resume=resume, label=label) as run,
        Ledger() as ledger,
    ):
        work = Work(
            ledger, run.work, train, valid, request.training,
            resume=resume, seed=request.seed, trust_remote_code=request.trust_remote_code,
        )  # fmt: skip
        say(f"compressing with {' → '.join(map(str, steps))}")
        folder, facts = execute(steps, source, work)
        say("comparing with the original")
        with ledger.stage("compare", settle=True):
            given = {"trust_remote_code": request.trust_remote_code, "tokenizer": False}
            original = open_model(str(source), **given)
            found = compare(open_model(folder, **given).model, original.model, rows)
        kept = 1 / found.perplexity_ratio.value
        result = {
            "model": str(run.model), "method": ",".join(step.method for step in steps if step.method),
            "options": dict(steps[0].options) if len(steps) == 1 else {str(s.method): dict(s.options) for s in steps},
            "storage_before": storage(source), "storage": storage(folder),
            "bits_per_weight": 8 * _weight_bytes(folder, request.trust_remote_code) / shape.parameters,
            "quality_kept": kept,
            **{name: asdict(getattr(found, name)) for name in ("perplexity_ratio", "kl", "changed")},
            "facts": facts,
        }  # fmt: skip
        run.write("result.json", result)
        if kept < request.keep:
            raise QualityGate(
                f"{' → '.join(map(str, steps))} keeps {kept:.1%} of the quality, and --keep asks for "
                f"{request.keep:.1%}",
                f"the result stays in {folder} for inspection",
                "Lower --keep, or use options with more bits",
            )
        if not run.model.exists():
            write_text(folder / "README.md", _card(request, steps, result, folder))
            result["storage"] = storage(folder)
            run.write("result.json", result)
            folder.replace(run.model)
    ledger.save(run.inside / "ledger.json")
    return result


def bill(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the compression cost in quality, as rows of a table: figures with their 95% intervals."""

    def shown(name: str, form: str) -> str:
        figure = result[name]
        low, high = figure["interval"] or (None, None)
        return f"{figure['value']:{form}}" + (f" [{low:{form}}, {high:{form}}]" if low is not None else "")

    return [
        ("folder", f"{text.show(result['storage_before'], 'B')} -> {text.show(result['storage'], 'B')}"),
        ("bits per weight of the original", f"{result['bits_per_weight']:.2f}"),
        ("perplexity / the original's", shown("perplexity_ratio", ".3f")),
        ("KL divergence of next tokens, nat", shown("kl", ".4f")),
        ("share of likeliest tokens that changed", shown("changed", ".1%")),
    ]


def _limit(request: CompressRequest, shape: Shape) -> int:
    """The most bytes of all tensors by which the result stays within `size` or `bits`."""
    if request.size is not None and request.bits is not None:
        raise UsageError("both --size and --bits are given", remedy="Give one of them")
    if request.size is None:
        bits = float(request.bits or 0)
        if not 0 < bits <= 32:
            raise UsageError(f"--bits {request.bits} is not possible", remedy="Use a number such as 3.2")
        return int(bits * shape.parameters / 8)
    limit = room_for_weights(int(text.quantity(request.size, text.BYTES, "size")), shape)
    if limit <= 0:
        raise DoesNotFit(
            f"nothing is as small as {request.size}",
            f"tokenizer and configuration alone take {text.show(shape.other_files, 'B')}",
            "Relax the limit",
        )
    return limit


def _refuse_packed(source: Path) -> None:
    """Raises UsageError for a model folder whose weights are codes already."""
    config = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    packed = config.get("quantization_config")
    if packed:
        method = str(packed.get("quant_method", "a method it does not name") if isinstance(packed, dict) else packed)
        ours = method.startswith("shoestring")
        raise UsageError(
            f"{source} is packed already, with {method.removeprefix('shoestring_')}",
            "what compresses needs weights, and finds codes",
            "Give the model that it was made from" + (", or unpack it with `shoestring export`" if ours else ""),
        )


def _refuse_early(steps: list[Step], shape: Shape) -> list[Step]:
    """Ask every method whether it takes its options and fits the model, before any of them works."""
    for step in steps:
        if not step.method:
            continue
        method = catalog.get(step.method)
        catalog.contract(method.room).config(catalog.module(step.method), dict(step.options))
        if step.verb == "compress":
            shape = priced(method, shape, dict(step.options))
    return steps


def _encoded(test: datasets.Corpus, source: Path, shape: Shape, request: CompressRequest) -> list[dict[str, list[int]]]:
    """What the result will be compared on. Raises UsageError where the tokenizer is none, or another model's."""
    tokenizer = load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    if tokenizer is None:
        raise UsageError(
            f"{source} holds no tokenizer",
            "quality is measured on text",
            "Copy the tokenizer of its base model into the folder",
        )
    stride = max(1, len(test) // request.eval_examples)
    some = test.part(test.examples[::stride][: request.eval_examples])
    rows = datasets.encode(some, tokenizer, shape.context or 2048, on_long="truncate").rows
    largest = max(token for row in rows for token in row["input_ids"])
    if largest >= shape.vocab:
        raise UsageError(
            f"The tokenizer in {source} makes the token {largest}, and the model knows {shape.vocab}",
            remedy="Use the tokenizer that belongs to the model",
        )
    return rows


def _weight_bytes(folder: Path, trust_remote_code: bool) -> int:
    return sum(tensor.size for tensor in check_folder(folder, trust_remote_code=trust_remote_code).tensors.values())


def _card(request: CompressRequest, steps: list[Step], result: Mapping[str, Any], folder: Path) -> str:
    rows = "".join(f"| {name} | {value} |\n" for name, value in bill(result))
    trust = ", trust_remote_code=True" if request.trust_remote_code else ""
    return (
        f"# {Path(request.model).name}, compressed\n\nMade from `{request.model}` by: "
        f"{' → '.join(str(step) for step in steps)}.\n\n| | |\n|---|---|\n{rows}\n## Use\n\n```python\n"
        f"{import_lines(folder)}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})\n```\n'
    )

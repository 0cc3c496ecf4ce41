"""Quality of a model on held-out text, its distance from another model, and what it costs at work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.shape import context_of
from shoestring.jobs._doors import open_model
from shoestring.jobs.at_work import at_work
from shoestring.models.folder import read_json
from shoestring.models.load import kind_of

if TYPE_CHECKING:
    import torch

    from shoestring.data import Corpus, Encoded

BATCH_TOKENS = 1024
WINDOW, STRIDE = 1024, 512
_PIECE = 64  # positions whose float32 logits exist at one time
_RESAMPLES = 1000

Row = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Figure:
    """A measured mean with its bootstrap 95% interval over `n` examples; no interval when there is but one."""

    value: float
    unit: str
    interval: tuple[float, float] | None
    n: int
    status: str = "measured"

    def to_json(self) -> dict[str, Any]:
        bounds = list(self.interval) if self.interval else None
        return {"value": self.value, "unit": self.unit, "status": self.status, "interval": bounds, "n": self.n}


@dataclass(frozen=True)
class Quality:
    """Held-out quality of one model. `loss` is in nats per labelled token; `per_example` its (sum, tokens) by row."""

    loss: Figure
    perplexity: Figure
    tokens: int
    per_example: np.ndarray

    def to_json(self) -> dict[str, Any]:
        return {"loss": self.loss.to_json(), "perplexity": self.perplexity.to_json(), "tokens": self.tokens}


@dataclass(frozen=True)
class Comparison:
    """How far a model is from a reference on the same labelled tokens.

    Attributes:
        perplexity_ratio: model / reference; 1 is equal, above 1 is worse.
        kl: mean KL(reference || model) of the next-token distributions, in nats.
        changed: share of positions where the likeliest next token is another one; 1 minus it is the label loyalty.
        probability_loyalty: mean of 1 - sqrt(JS) with the base-2 Jensen-Shannon divergence; 1 is equal.
        model, reference: the quality of each, measured in the same pass.
    """

    perplexity_ratio: Figure
    kl: Figure
    changed: Figure
    probability_loyalty: Figure
    model: Quality
    reference: Quality

    def to_json(self) -> dict[str, Any]:
        names = ("perplexity_ratio", "kl", "changed", "probability_loyalty")
        return {name: getattr(self, name).to_json() for name in names} | {"tokens": self.model.tokens}


def heldout(model: Any, rows: Sequence[Row] | Encoded, *, batch_tokens: int = BATCH_TOKENS, seed: int = 0) -> Quality:
    """Loss and perplexity of a causal model over encoded rows, counting the labelled tokens.

    Every token weighs the same. Rows of similar length share a batch; padding and batch mates do not enter the loss,
    but in bfloat16 the size of a batch moves it by rounding, about 1e-3 relative (1e-6 in float32).

    Args:
        rows: `input_ids` and `labels` (-100 where nothing counts), as `data.encode` returns them; those with a
            `context` are given to the model one by one, because it reads that first.
        batch_tokens: positions in one batch, padding included; a longer row makes a batch of its own.

    Raises:
        UsageError: nothing is labelled, or a model that does not predict the next token.
    """
    sums = np.zeros((len(_rows(rows)), 2))
    if any("context" in row for row in _rows(rows)):
        for number, row in enumerate(_rows(rows)):
            _add(sums, *_after_reading(model, number, row))
        return _quality(sums, seed)
    for index, ids, labels in _batches(_rows(rows), batch_tokens):
        for owners, targets, logits in _labelled(model, ids, labels):
            scores = logits.float().log_softmax(-1)
            _add(sums, index[owners], -scores.gather(1, targets[:, None]))
    return _quality(sums, seed)


def compare(
    model: Any, reference: Any, rows: Sequence[Row] | Encoded, *, batch_tokens: int = BATCH_TOKENS, seed: int = 0
) -> Comparison:
    """Hold two causal models of one vocabulary against each other, token by token.

    Both models' logits exist for 64 positions at a time. Arguments as for `heldout`.

    Raises:
        UsageError: as `heldout`; or the vocabularies differ.
    """
    import torch

    sums = np.zeros((len(_rows(rows)), 6))  # model, reference, KL, changed, loyalty, tokens
    for index, ids, labels in _batches(_rows(rows), batch_tokens):
        pairs = zip(_labelled(model, ids, labels), _labelled(reference, ids, labels), strict=True)
        for (owners, targets, ours), (_, _, theirs) in pairs:
            if ours.shape != theirs.shape:
                raise UsageError(
                    f"The models cannot be compared: their vocabularies have "
                    f"{ours.shape[-1]} and {theirs.shape[-1]} entries",
                    remedy="Compare models that share a tokenizer",
                )
            p, q = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
            own, other = (-x.gather(1, targets[:, None])[:, 0] for x in (q, p))
            kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
            changed = (p.argmax(-1) != q.argmax(-1)).float()
            middle = torch.logaddexp(p, q) - math.log(2)
            js = ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / (2 * math.log(2))
            _add(sums, index[owners], torch.stack([own, other, kl, changed, 1 - js.clamp(0, 1).sqrt()], 1))
    return Comparison(
        perplexity_ratio=_figure(sums, lambda s: np.exp((s[:, 0] - s[:, 1]) / s[:, 5]), "ratio", seed),
        kl=_figure(sums, lambda s: s[:, 2] / s[:, 5], "nat", seed),
        changed=_figure(sums, lambda s: s[:, 3] / s[:, 5], "share", seed),
        probability_loyalty=_figure(sums, lambda s: s[:, 4] / s[:, 5], "share", seed),
        model=_quality(sums[:, [0, 5]], seed),
        reference=_quality(sums[:, [1, 5]], seed),
    )


def perplexity_ratio(model: Quality, reference: Quality, *, seed: int = 0) -> Figure:
    """Perplexity of `model` / `reference` on the same rows, paired example by example."""
    sums = np.concatenate([model.per_example[:, :1], reference.per_example], 1)
    return _figure(sums, lambda s: np.exp((s[:, 0] - s[:, 1]) / s[:, 2]), "ratio", seed)


def windows(text: str, tokenizer: Any, *, length: int = WINDOW, stride: int = STRIDE) -> list[dict[str, list[int]]]:
    """Rows that cover a text with overlapping windows of `length` tokens.

    Each token but the first counts once: a window counts its last `stride` tokens, the others are context (the first
    window counts all).
    """
    if not 0 < stride <= length:
        raise UsageError(
            f"stride={stride} does not fit windows of {length} tokens", remedy="Use 1 to the window's length"
        )
    ids = tokenizer(text, verbose=False).input_ids
    rows, counted = [], 1
    for end in range(min(length, len(ids)), len(ids) + stride, stride):
        end = min(end, len(ids))
        start = max(0, end - length)
        if end > counted:
            rows.append({"input_ids": ids[start:end], "labels": [-100] * (counted - start) + ids[counted:end]})
        counted = end
    return rows


def evaluate(
    ref: str | Path,
    *,
    data: str | Path | None = None,
    against: str | Path | None = None,
    tasks: Sequence[str] = (),
    task_folder: str | Path | None = None,
    limit: int | None = None,
    split: str = "test",
    loss_on: str = "answer",
    work: bool = True,
    dtype: str = "auto",
    threads: int | None = None,
    offline: bool | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Everything `shoestring eval` prints, as JSON: figures at work, quality, and the distance from another model.

    Args:
        data: what `data.read` accepts; the built-in set when None. A plain text file is read as one text, in windows
            of 1024 tokens (fewer if the model's context is shorter) that move by half their length.
        against: a second model; both are measured and compared token by token.
        tasks: names of lm-eval tasks; `task_folder` holds more of them.
        limit: examples, drawn evenly from the whole; the same number limits each task.
        split: "test" (the tenth that `fit` and `train` never see), "validation", "train" or "all"; a plain text file
            is always read whole.
        work: measure memory and speed too, in a process of its own.
        trust_remote_code: run Python code that the models' folders bring.

    Returns:
        {"model", "data", "work", "quality", "against": {"model", "work", "quality", "comparison"}, "tasks"}; what was
        not asked for is absent. Every figure is {value, unit, status, interval, n}.

    Raises:
        UsageError: bad data or arguments, or models that do not share a tokenizer.
        ShoestringError: a task that cannot run.
    """
    refs = [ref] if against is None else [ref, against]
    given: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    works = [_work(at_work(r, threads=threads, **given)) for r in refs] if work else []
    loaded = open_model(ref, offline=offline, **given)
    _must_write(loaded)
    corpus, part = _part(data, split)
    rows = _encoded(corpus, loaded, loss_on)
    rows = rows if limit is None else _evenly(rows, limit)
    result: dict[str, Any] = {
        "model": str(ref),
        "data": {
            "source": corpus.source,
            "split": part,
            "rows": len(rows),
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "loss_on": "all" if corpus.format == "text" else loss_on,
        },
    }
    if works:
        result["work"] = works[0]
    if against is None:
        result["quality"] = heldout(loaded.model, rows).to_json()
    else:
        other = open_model(against, offline=offline, **given)
        _must_write(other)
        if loaded.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise UsageError(
                f"{ref} and {against} cannot be compared: their tokenizers differ", remedy="Evaluate each on its own"
            )
        found = compare(loaded.model, other.model, rows)
        del other
        result["quality"] = found.model.to_json()
        result["against"] = {"model": str(against), "quality": found.reference.to_json(), "comparison": found.to_json()}
        if works:
            result["against"]["work"] = works[1]
    if tasks:
        result["tasks"] = _tasks(loaded, list(tasks), limit, task_folder)
    return result


def _rows(rows: Sequence[Row] | Encoded) -> Sequence[Row]:
    found: Any = getattr(rows, "rows", rows)
    if any("position_ids" in row for row in found):
        raise UsageError(
            "Packed rows cannot be scored", "their examples would see each other", "Encode with pack=False"
        )
    return list(found)


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Row numbers (rows,), ids and labels (rows, longest), padded on the right; the longest rows first."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    while order:
        longest = len(rows[order[0]]["input_ids"])
        size = max(1, batch_tokens // longest)
        index, order = order[:size], order[size:]
        # Under a causal mask nothing sees the padding behind it, so no attention mask is needed, and none is faster.
        ids = torch.zeros(len(index), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for line, number in enumerate(index):
            row = rows[number]
            ids[line, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            labels[line, : len(row["labels"])] = torch.tensor(row["labels"])
        yield np.array(index), ids, labels


def _after_reading(model: Any, number: int, row: Row) -> tuple[np.ndarray, torch.Tensor]:
    """Row number and loss (labels, 1) of each labelled token of a row whose context the model reads first."""
    import torch

    from shoestring.data import Collator

    batch = Collator(0)([dict(row)])
    targets = batch.pop("labels")[0, 1:]
    with torch.no_grad():  # reading may take gradients, which inference mode forbids
        logits = model(**batch).logits[0, :-1]
    kept = targets != -100
    losses = -logits[kept].float().log_softmax(-1).gather(1, targets[kept][:, None])
    return np.full(len(losses), number), losses


def _labelled(
    model: Any, ids: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """In pieces of 64: line of the batch, target token, and logits (64, vocabulary) that predict it."""
    import torch

    from shoestring.training.loss import last_hidden_and_head

    with torch.inference_mode():
        lines, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        if not len(lines):
            return
        targets = labels[lines, columns + 1]
        hidden, head, output = last_hidden_and_head(model, {"input_ids": ids, "use_cache": False})
        # Soft prompts stand in front of the text.
        rows = hidden[lines, columns + hidden.shape[1] - ids.shape[1]]
        if not torch.equal(head(hidden[:, -1:]).float(), output.logits[:, -1:].float()):
            rows, head = _final_logits(model, ids, lines, columns), torch.nn.Identity()
    for piece in range(0, len(rows), _PIECE):
        cut = slice(piece, piece + _PIECE)
        with torch.inference_mode():
            logits = head(rows[None, cut])[0]
        # Outside of the block: two of these generators side by side would leave the mode switched on for everybody.
        yield lines[cut].numpy(), targets[cut], logits


def _final_logits(model: Any, ids: torch.Tensor, lines: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Logits at the given places of a model that caps or scales what its head returns: its own forward must do it."""
    from shoestring.training.loss import find_head

    def keep(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        return (hidden[lines, columns + hidden.shape[1] - ids.shape[1]][None], *args[1:])

    head = find_head(model)
    assert head is not None
    hook = head.register_forward_pre_hook(keep)
    try:
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        hook.remove()


def _add(sums: np.ndarray, index: np.ndarray, values: torch.Tensor) -> None:
    """Add values (positions, k) to the first k columns of their rows, and 1 to the last."""
    columns = values.double().numpy()
    np.add.at(sums, index, np.concatenate([columns, np.ones((len(index), 1))], 1))


def _quality(sums: np.ndarray, seed: int) -> Quality:
    loss = _figure(sums, lambda s: s[:, 0] / s[:, 1], "nat", seed)
    perplexity = _figure(sums, lambda s: np.exp(s[:, 0] / s[:, 1]), "ratio", seed)
    return Quality(loss, perplexity, int(sums[:, 1].sum()), sums)


def _figure(sums: np.ndarray, formula: Any, unit: str, seed: int) -> Figure:
    """`formula` over column sums, and its 95% interval when whole examples are drawn again with replacement."""
    sums = sums[sums[:, -1] > 0]
    if not len(sums):
        raise UsageError("The data has no labelled token", remedy="Give examples with an answer, or loss_on all")
    value, n = float(formula(sums.sum(0, keepdims=True))[0]), len(sums)
    if not math.isfinite(value):
        raise ShoestringError(
            "The model's probabilities are not numbers", f"the {unit} figure is {value}", "Its weights are damaged"
        )
    if n < 2:
        return Figure(value, unit, None, n)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    low, high = np.percentile(formula(draws @ sums), [2.5, 97.5])
    return Figure(value, unit, (float(low), float(high)), n)


def _evenly(rows: Sequence[Any], limit: int) -> list[Any]:
    if limit < 1:
        raise UsageError(f"limit={limit} leaves no examples", remedy="Give a limit of 1 or more")
    return [rows[int(k * len(rows) / limit)] for k in range(limit)] if limit < len(rows) else list(rows)


def predicts_next(folder: Path) -> None:
    """Raises UsageError unless the model in a folder says the next token, by which quality is measured."""
    if (folder / "config.json").is_file():
        _must_be_causal(kind_of(read_json(folder / "config.json")), str(folder))


def _must_be_causal(kind: str, ref: str) -> None:
    if kind != "causal":
        raise UsageError(
            f"{ref} is a {kind} model", "held-out loss is that of the next token", "Give a causal language model"
        )


def _must_write(loaded: Any) -> None:
    _must_be_causal(loaded.kind, loaded.ref)
    if loaded.tokenizer is None:
        raise UsageError(
            f"{loaded.path} holds no tokenizer", remedy="Copy the tokenizer of its base model into the folder"
        )


def _part(data: str | Path | None, name: str) -> tuple[Corpus, str]:
    from shoestring.data import read, split

    parts = ("train", "validation", "test")
    if name not in (*parts, "all"):
        raise UsageError(f"unknown split {name}", remedy="Use test, validation, train or all")
    corpus = read(data or "python-docs")
    if name == "all" or corpus.format == "text" and _is_text_file(corpus):
        return corpus, "all"
    part = split(corpus)[parts.index(name)]
    if not len(part):
        raise UsageError(f"{corpus.source} is too small for a {name} part", remedy="Use split all")
    return part, name


def _is_text_file(corpus: Corpus) -> bool:
    return corpus.source.lower().removesuffix(".gz").endswith((".txt", ".md"))


def _encoded(corpus: Corpus, loaded: Any, loss_on: str) -> list[dict[str, list[int]]]:
    from shoestring.data import encode

    context = context_of(loaded.model.config) or WINDOW
    if corpus.format != "text":
        return encode(corpus, loaded.tokenizer, context, loss_on=loss_on, on_long="truncate").rows
    texts = [example.text or "" for example in corpus.examples]
    if _is_text_file(corpus):
        texts = ["\n\n".join(texts)]  # what was one text is scored as one
    length = min(WINDOW, context)
    return [row for text in texts for row in windows(text, loaded.tokenizer, length=length, stride=max(1, length // 2))]


def _work(found: Mapping[str, Any]) -> dict[str, Any]:
    """at_work's answer as figures."""
    units = {
        "storage": "B", "peak_memory": "B", "floor_memory": "B", "load_seconds": "s", "first_token_seconds": "s",
        "prefill_tokens_per_s": "token/s", "decode_tokens_per_s": "token/s", "latency": "s",
    }  # fmt: skip
    figures: dict[str, Any] = {name: found[name] for name in ("threads", "dtype", "prompt_tokens", "new_tokens")}
    for name, unit in units.items():
        value, bounds = found[name], None
        if isinstance(value, Mapping):
            value, bounds = value["median"], [value["min"], value["max"]]
        runs = 1 if name in ("storage", "peak_memory", "floor_memory", "load_seconds") else found["repeats"]
        figures[name] = {
            "value": value,
            "unit": unit,
            "status": "counted" if name == "storage" else "measured",
            "interval": bounds,
            "n": runs,
        }
    return figures


def _tasks(loaded: Any, names: list[str], limit: int | None, folder: str | Path | None) -> dict[str, Any]:
    """lm-eval's own `results`, by task.

    Raises:
        UsageError: lm-eval is not installed, or a task it does not know.
        ShoestringError: the task's data is not here.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("tasks need lm-eval", str(error), "Run `pip install 'shoestring[eval]'`") from None
    manager = TaskManager(include_path=str(folder) if folder else None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(f"lm-eval knows no task {', '.join(unknown)}", remedy="`lm-eval ls tasks` lists them")
    try:
        harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1, device="cpu")
        found = simple_evaluate(model=harness, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=200)
    except Exception as error:  # a data set that is not here fails in as many ways as there are sources
        why = (str(error).strip() or "no reason given").splitlines()[0][:300]
        raise ShoestringError(
            f"The task {', '.join(names)} cannot run",
            f"{type(error).__name__}: {why}",
            "Its data must be in the Hugging Face cache when there is no network",
        ) from error
    return dict(found["results"])

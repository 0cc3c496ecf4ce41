"""One job of fine-tuning: its examples, the optimizer between passes, checkpoints, and going on from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import atomic_folder
from shoestring.data.corpus import Corpus
from shoestring.data.corpus import Example as Read
from shoestring.data.formats import read
from shoestring.engine.request import RequestError
from shoestring.engine.tokenizer import Tokenizer
from shoestring.engine.tuning import Told
from shoestring.methods.serving._frozen import Frozen, Rooms
from shoestring.methods.serving._windows import (
    IGNORED,
    Example,
    LowRank,
    Pass,
    Shape,
    Totals,
    Unit,
    Windows,
)

PREFIX = "checkpoint-"
_STATE, _MOMENTS = "state.json", "moments.safetensors"
_CLIP = 1.0  # longest gradient of a step
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # torch's defaults


@dataclass(frozen=True)
class Moments:
    """What AdamW (arXiv 1711.05101) keeps of a parameter; its steps are those of `torch.optim.AdamW`, bit for bit.

    Making one of torch's loads torch's compiler: 70 MB, where a server has few to spare, and a second and a half.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, parameter: Tensor) -> Moments:
        return cls(torch.zeros_like(parameter), torch.zeros_like(parameter))

    @torch.no_grad()
    def update(self, parameter: Tensor, step: int, rate: float, decay: float) -> None:
        """Step number `step`, from 1, along the parameter's gradient; without one nothing changes."""
        if parameter.grad is None:
            return
        parameter.mul_(1 - rate * decay)
        self.exp_avg.lerp_(parameter.grad, 1 - _BETAS[0])
        self.exp_avg_sq.mul_(_BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - _BETAS[1])
        first, second = (1 - beta**step for beta in _BETAS)
        root = (self.exp_avg_sq.sqrt() / second**0.5).add_(_EPSILON)
        parameter.addcdiv_(self.exp_avg, root, value=-rate / first)


# ---- examples ----


def encoded(data: Path, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """The examples of a file through the model's chat template; answers are learned, plain texts as a whole.

    Raises:
        UsageError: no file of examples, one that the template refuses, or one of more than `max_length` tokens; file
            and line are named.
    """
    corpus = read(data)
    found: list[Example] = []
    for row in corpus.examples:
        try:
            made = _of_text(row, tokenizer) if row.text is not None else _of_chat(row, tokenizer)
        except RequestError as error:
            raise UsageError(f"{_where(corpus, row)}: {error}") from None
        for one in made:
            if len(one.ids) > max_length:
                raise UsageError(
                    f"{_where(corpus, row)}: the example has {len(one.ids)} tokens",
                    f"{max_length} are what the memory for training is made for",
                    "Shorten it, or raise max_length",
                )
        found += [one for one in made if one.targets]
    if not found:
        raise UsageError(f"{Path(corpus.source).name} has nothing to learn", remedy="Give answers to learn from")
    return found


def _where(corpus: Corpus, row: Read) -> str:
    return f"{Path(corpus.source).name}:{row.line}" if row.line else Path(corpus.source).name


def _of_text(row: Read, tokenizer: Tokenizer) -> list[Example]:
    ids = (*tokenizer.encode(row.text or ""), *tokenizer.eos[:1])
    return [Example(ids, ids)]


def _of_chat(row: Read, tokenizer: Tokenizer) -> list[Example]:
    """One example; or one for each answer, where the template writes earlier turns otherwise when later ones follow."""
    whole = tokenizer.chat(row.messages, row.tools, add_generation_prompt=False)
    labels = [IGNORED] * len(whole)
    apart: list[Example] = []
    for index in row.learned():
        before = tokenizer.chat(row.messages[:index], row.tools)
        through = tokenizer.chat(row.messages[: index + 1], row.tools, add_generation_prompt=False)
        end = _end(through, len(before), tokenizer.eos)
        if through[: len(before)] != before:
            answer = tokenizer.encode(str(row.messages[index]["content"]), whole=False)
            through = [*before, *answer, *tokenizer.eos[:1]]
            end = len(through)
        if whole[:end] == through[:end]:
            labels[len(before) : end] = whole[len(before) : end]
        else:
            ids = tuple(through[:end])
            apart.append(Example(ids, (*[IGNORED] * len(before), *ids[len(before) :])))
    return [Example(tuple(whole), tuple(labels)), *apart]


def _end(ids: Sequence[int], begin: int, eos: Sequence[int]) -> int:
    """Behind the token that ends the answer; what a template writes after it is never generated."""
    ends = [i for i in range(begin, len(ids)) if ids[i] in eos]
    return ends[-1] + 1 if ends else len(ids)


# ---- the job ----


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a job computes; a checkpoint of another plan is not gone on from."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rate: float
    warmup: float
    decay: float
    batch_size: int
    epochs: int
    max_length: int
    seed: int
    examples: int

    @property
    def a_round(self) -> int:
        """Steps of one epoch."""
        return -(-self.examples // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.a_round


class Training:
    """A job under way.

    Args:
        base: what the adapter's configuration names.
        folder: for checkpoints; the newest of the same plan is gone on from.
        fullest: most tokens of a window.
        tell: called from this thread and from the one that writes checkpoints.
        how: `rematerialise`, `most` and `prune` of `Pass`.

    Raises:
        UsageError: the folder has checkpoints of another plan. ShoestringError: they cannot be read.
    """

    def __init__(
        self,
        plan: Plan,
        frozen: Frozen,
        examples: Sequence[Example],
        validation: Sequence[Example],
        *,
        job: str,
        base: str,
        folder: Path,
        every: int,
        keep: int,
        fullest: int,
        window: Windows,
        tell: Callable[[Told], None] = lambda told: None,
        how: dict[str, Any] | None = None,
    ) -> None:
        self.plan, self.frozen, self.examples, self.validation = plan, frozen, examples, validation
        self.job, self.base, self.folder, self.every, self.keep = job, base, folder, every, keep
        self.fullest, self.window, self.tell, self.how = fullest, window, tell, how or {}
        self.low_rank = LowRank(Shape(plan.rank, plan.alpha, plan.dropout, plan.targets), frozen.model, plan.seed)
        layers = range(frozen.model.layers)
        # Of each layer, so that a step is as many pieces of work as there are.
        self.moments = [[Moments.of(half) for half in self.low_rank.of(layer)] for layer in layers]
        self.rooms = Rooms()
        self.step, self.tokens, self.did = 0, 0, 0
        self._writer = ThreadPoolExecutor(1, "shoestring-checkpoint")
        self._written: Future[None] = Future()  # the newest checkpoint, and so all before it
        self._written.set_result(None)
        self._saved = 0  # its step
        self._go_on()

    def units(self) -> Generator[Unit]:
        """All the work that is left. When it ends the last checkpoint is being written; it is told when it is there."""
        plan, going_on = self.plan, self.step
        self.tell(Told(self.job, "started", self.step, plan.steps, self.tokens))
        while self.step < plan.steps:
            batch = self._batch()
            totals = Totals()
            yield from self._passes(batch, totals, sum(example.targets for example in batch))
            yield from self._update()
            self.step += 1
            self.tokens += totals.tokens
            figures = _figures(totals, "train_loss", "train_mean_token_accuracy")
            self.tell(Told(self.job, "step", self.step, plan.steps, self.tokens, figures=figures))
            epoch = self.step % plan.a_round == 0
            if epoch and self.validation:
                seen = Totals()
                yield from self._passes(self.validation, seen, 0)
                figures |= _figures(seen, "full_valid_loss", "full_valid_mean_token_accuracy")
            if epoch or self.step % self.every == 0:
                self._checkpoint(figures, last=self.step == plan.steps)
        if going_on == plan.steps:  # it was finished before, and only the word of it was lost
            folder = self.folder / f"{PREFIX}{plan.steps}"
            self.tell(Told(self.job, "finished", plan.steps, plan.steps, self.tokens, folder))
        self.frozen.forget()
        self.rooms.forget()

    def save(self) -> None:
        """A checkpoint of the steps that no checkpoint has yet."""
        if self.step > self._saved:
            self._checkpoint({}, last=False)

    @property
    def epochs(self) -> int:
        return self.plan.epochs

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        return not self._written.done()

    def close(self, wait: bool = True) -> None:
        """Write nothing more than what was begun; `wait` for that."""
        self._writer.shutdown(wait=wait)

    # ---- a step ----

    def _batch(self) -> list[Example]:
        epoch, at = divmod(self.step, self.plan.a_round)
        draw = torch.Generator().manual_seed(self.plan.seed + epoch)
        order = torch.randperm(len(self.examples), generator=draw).tolist()
        return [self.examples[i] for i in order[at * self.plan.batch_size : (at + 1) * self.plan.batch_size]]

    def _passes(self, examples: Sequence[Example], totals: Totals, targets: int) -> Iterator[Unit]:
        """Forward, loss and, with `targets`, backward; as many examples end to end as make a window of full size.

        More at a time would hold more activations, and train no faster.
        """
        for number, some in enumerate(_packs(examples, self.fullest)):
            one = Pass(
                self.frozen, self.low_rank, some, targets=targets, window=self.window, train=targets > 0,
                rooms=self.rooms, seed=self.plan.seed * 1_000_003 + self.step * 1_009 + number, **self.how,
            )  # fmt: skip
            units = one.units()
            for unit in units:
                self.did = one.did
                yield unit
            self.did = one.did
            for name in ("loss", "right", "targets", "tokens"):
                setattr(totals, name, getattr(totals, name) + getattr(one.totals, name))

    def _update(self) -> Iterator[Unit]:
        yield Unit("update")
        rate, plan = self.plan.rate, self.plan
        rising = max(1, round(plan.warmup * plan.steps))
        rate *= min(1.0, (self.step + 1) / rising, (plan.steps - self.step) / max(1, plan.steps - rising))
        gradients = [p.grad for p in self.low_rank.parameters() if p.grad is not None]
        length = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))) if gradients else 0.0
        for layer, moments in enumerate(self.moments):
            for parameter, its in zip(self.low_rank.of(layer), moments):
                if parameter.grad is not None and length > _CLIP:
                    parameter.grad.mul_(_CLIP / length)
                its.update(parameter, self.step + 1, rate, plan.decay)
                parameter.grad = None
            self.did = 1
            yield Unit("update")

    # ---- checkpoints ----

    def _checkpoint(self, figures: dict[str, float], last: bool) -> None:
        """Take a copy now; a thread writes it, flushes it and tells."""
        weights = {name: tensor.clone() for name, tensor in self.low_rank.state().items()}
        moments = {name: tensor.clone() for name, tensor in self._moments().items()}
        state = {"plan": asdict(self.plan), "step": self.step, "tokens": self.tokens, "figures": figures}
        self._saved = self.step
        self._written = self._writer.submit(self._write, weights, moments, state, last)

    def _write(self, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any], last: bool) -> None:
        step = state["step"]
        about = (step, self.plan.steps, state["tokens"])
        path = self.folder / f"{PREFIX}{step}"
        try:
            with atomic_folder(path, overwrite=True) as aside:
                self.low_rank.save(aside, self.base, weights)
                save_file(moments, aside / _MOMENTS)
                (aside / _STATE).write_text(json.dumps(state))
            for old in checkpoints(self.folder)[self.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, ShoestringError) as error:
            self.tell(Told(self.job, "failed", *about, message=f"A checkpoint could not be written: {error}"))
            return
        self.tell(Told(self.job, "checkpoint", *about, path, state["figures"]))
        if last:
            self.tell(Told(self.job, "finished", *about, path, state["figures"]))

    def _go_on(self) -> None:
        for path in checkpoints(self.folder):
            if not ((path / _STATE).is_file() and (path / _MOMENTS).is_file()):
                raise ShoestringError(
                    f"{path.name} has no state of the optimizer", "going on without it is another training",
                    "Remove the checkpoints to start again",
                )  # fmt: skip
            state = json.loads((path / _STATE).read_text())
            if state["plan"] != json.loads(json.dumps(asdict(self.plan))):
                raise UsageError(f"{path.name} is of a job with other settings", remedy="Choose another folder")
            self.low_rank.read(path)
            moments = load_file(path / _MOMENTS)
            self.step = self._saved = state["step"]
            self.tokens = state["tokens"]
            for name, tensor in self._moments().items():
                tensor.copy_(moments[name])
            return

    def _moments(self) -> dict[str, Tensor]:
        every = enumerate(its for moments in self.moments for its in moments)
        return {f"{number}.{field.name}": getattr(its, field.name) for number, its in every for field in fields(its)}


def checkpoints(folder: Path) -> list[Path]:
    """Newest first. Each is whole: it got its name when it was on the disk."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)


def _packs(examples: Sequence[Example], most: int) -> Iterator[list[Example]]:
    pack: list[Example] = []
    size = 0
    for example in examples:
        if pack and size + len(example.ids) > most:
            yield pack
            pack, size = [], 0
        pack.append(example)
        size += len(example.ids)
    if pack:
        yield pack


def _figures(totals: Totals, loss: str, accuracy: str) -> dict[str, float]:
    return {loss: totals.loss / max(1, totals.targets), accuracy: totals.right / max(1, totals.targets)}

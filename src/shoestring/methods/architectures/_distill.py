"""Distillation: a student learns from what its frozen teacher says of the same tokens, and holds inside.

The loss of a batch is a mean over its tokens of

    L1 = a L_int + b L_soft + c L_hard

L_int: squared distance of hidden states after certain layers, divided by the teacher's mean square. L_soft: T^2 times
the Kullback-Leibler divergence of the student's distribution of the next token from the teacher's, both at temperature
T. L_hard: cross-entropy of a token that is drawn from what the teacher says; its likeliest token would make the student
surer than the teacher is. No label is needed, so every token of a text teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shoestring.methods.architectures._shared import Rows
from shoestring.training import TrainOptions, TrainResult, train
from shoestring.training.loss import IGNORED, last_hidden_and_head

ROWS = 512  # tokens whose distributions exist at a time


@dataclass(frozen=True)
class Terms:
    """Weights of the three terms, and how soft the distributions are compared.

    Attributes:
        inside, soft, hard: a, b and c.
        top: what is kept of the teacher's distributions, asked for once before the training: this many of the
            likeliest tokens and what is left for all others together. None asks the teacher anew each time, for all.
    """

    inside: float = 1.0
    soft: float = 1.0
    hard: float = 1.0
    temperature: float = 2.0
    top: int | None = None


@dataclass(frozen=True)
class Said:
    """What a teacher says of some tokens: log-probabilities at the temperature [tokens, kept].

    Attributes:
        ids: which tokens of the vocabulary they are of, None for all in order.
        drawn: [tokens] one token of each distribution, drawn at temperature 1.
    """

    log_p: Tensor
    ids: Tensor | None
    drawn: Tensor


def said(logits: Tensor, terms: Terms) -> Said:
    """The part of a teacher's `logits` [tokens, vocabulary] that is kept."""
    log_p, drawn = F.log_softmax(logits.float() / terms.temperature, -1), draw(logits)
    if terms.top is None or terms.top >= log_p.shape[-1]:
        return Said(log_p, None, drawn)
    kept, ids = log_p.topk(terms.top, -1)
    return Said(kept, ids, drawn)


def draw(logits: Tensor) -> Tensor:
    """A token for each row of `logits` [tokens, vocabulary]."""
    return torch.multinomial(logits.float().softmax(-1), 1)[:, 0]


def soft_loss(logits: Tensor, teacher: Said, temperature: float) -> Tensor:
    """T^2 KL(teacher, student) for each token of `logits` [tokens, vocabulary]; what was not kept counts as one."""
    log_q = F.log_softmax(logits.float() / temperature, -1)
    if teacher.ids is None:
        return temperature**2 * (teacher.log_p.exp() * (teacher.log_p - log_q)).sum(-1)
    log_q = log_q.gather(-1, teacher.ids)
    p, q = teacher.log_p.exp(), log_q.exp()
    rest_p, rest_q = ((1 - x.sum(-1)).clamp(min=1e-7) for x in (p, q))
    rest = rest_p * (rest_p.log() - rest_q.log())
    return temperature**2 * ((p * (teacher.log_p - log_q)).sum(-1) + rest)


def inside_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor) -> Tensor:
    """Mean over the layers of |student - teacher|^2 / |teacher|^2 over the tokens that are `real`."""
    each = []
    for own, wanted in zip(student, teacher, strict=True):
        own, wanted = own[real].float(), wanted[real].float()
        each.append((own - wanted).square().mean() / wanted.square().mean())
    return torch.stack(each).mean()


@dataclass(frozen=True)
class Lesson:
    """What came of a batch: the loss and its terms, each a mean over the batch's tokens; `logits` of its last ones."""

    loss: Tensor
    inside: Tensor
    soft: Tensor
    hard: Tensor
    logits: Tensor


class Pupil(nn.Module):
    """A student with its teacher: a pass through it is a pass through both, and gives a `Lesson`.

    Args:
        layers: those after which hidden states are compared.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int], terms: Terms) -> None:
        super().__init__()
        self.student, self.config = student, student.config
        self.layers, self.terms = tuple(layers), terms
        # In a list the teacher is no part of the module: not counted, not trained, not saved, and not out of eval mode.
        self._teacher = [teacher]
        self._kept: dict[bytes, Said] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Lesson:
        compares = bool(self.layers) and self.terms.inside > 0
        named = {"input_ids": input_ids, "attention_mask": attention_mask, **more, "use_cache": False}
        if compares:
            named["output_hidden_states"] = True
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        known = self._known(input_ids, real)
        with torch.no_grad():
            taught, teachers_head, theirs = self._teach(named, known is None, compares)
        hidden, head, own = last_hidden_and_head(self.student, named)
        soft, hard, count = hidden.new_zeros(()), hidden.new_zeros(()), int(real.sum())
        for start in range(0, count, ROWS):
            part = slice(start, start + ROWS)
            answer = _part(known, part) if known is not None else None
            given = (hidden[real][part], head, answer, None if answer else taught[real][part], teachers_head)
            # Several parts: their distributions are made again when gradients are wanted, so that one exists at a time.
            again = count > ROWS and torch.is_grad_enabled()
            sums = checkpoint(self._compare, *given, use_reentrant=False) if again else self._compare(*given)
            soft, hard = soft + sums[0] / count, hard + sums[1] / count
        inside = hidden.new_zeros(())
        if compares:
            inside = inside_loss([own.hidden_states[i + 1] for i in self.layers], theirs, real)
        terms = self.terms
        loss = terms.inside * inside + terms.soft * soft + terms.hard * hard
        return Lesson(loss, inside, soft, hard, own.logits)

    def _teach(self, named: dict[str, Any], speaks: bool, compares: bool) -> tuple[Any, Any, list[Tensor]]:
        """What the teacher's head would read, and the head, if it is to speak; hidden states, if they are compared."""
        teacher = self._teacher[0]
        if speaks:
            taught, head, out = last_hidden_and_head(teacher, named)
        elif compares:
            taught, head, out = None, None, teacher.base_model(**named)
        else:
            return None, None, []
        return taught, head, [out.hidden_states[i + 1] for i in self.layers] if compares else []

    def _compare(
        self, hidden: Tensor, head: nn.Module, answer: Said | None, taught: Tensor | None, teachers_head: Any
    ) -> tuple[Tensor, Tensor]:
        """L_soft and L_hard, each summed over the tokens of `hidden` [tokens, width]."""
        if answer is None:
            with torch.no_grad():
                answer = said(teachers_head(taught), self.terms)
        logits = head(hidden)
        soft = soft_loss(logits, answer, self.terms.temperature).sum()
        return soft, F.cross_entropy(logits.float(), answer.drawn, reduction="sum")

    def _known(self, ids: Tensor, real: Tensor) -> Said | None:
        """What the teacher said before of every row of the batch, None unless it is known of all."""
        found = [self._kept.get(_key(row[mask])) for row, mask in zip(ids, real)]
        parts = [answer for answer in found if answer is not None]
        if not parts or len(parts) < len(found):
            return None
        kept = None if parts[0].ids is None else torch.cat([part.ids for part in parts if part.ids is not None])
        return Said(torch.cat([part.log_p for part in parts]), kept, torch.cat([part.drawn for part in parts]))

    @torch.no_grad()
    def ask(self, rows: Rows) -> None:
        """Ask the teacher once about every row, and keep as much of what it says as `terms.top` allows."""
        for row in rows:
            ids = torch.as_tensor(row["input_ids"], device=self._teacher[0].device)[None]
            logits = self._teacher[0](input_ids=ids, use_cache=False).logits[0]
            self._kept[_key(ids[0])] = said(logits, self.terms)


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: Sequence[int],
    terms: Terms,
    rows: Rows,
    options: TrainOptions,
    folder: Path,
    *,
    ledger: Any = None,
    resume: bool = False,
) -> TrainResult:
    """Train `student` in place on what `teacher` says of `rows`; arguments and errors are those of `training.train`."""
    was_training = teacher.training
    pupil = Pupil(student, teacher.eval(), layers, terms)
    try:
        if terms.top is not None:
            pupil.ask(rows)
        return train(pupil, rows, [], options, folder, ledger=ledger, resume=resume, loss_func=_loss)
    finally:
        teacher.train(was_training)


def _loss(lesson: Lesson, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    if num_items_in_batch is None:
        return lesson.loss
    # A batch counts in a step of several as its labels do, although every token teaches.
    return lesson.loss * (labels[..., 1:] != IGNORED).sum() / num_items_in_batch


def _part(answer: Said, part: slice) -> Said:
    return Said(answer.log_p[part], None if answer.ids is None else answer.ids[part], answer.drawn[part])


def _key(ids: Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()

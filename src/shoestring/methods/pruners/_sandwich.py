"""Training the subnets of a supernet together: at every step the largest, the smallest and some between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shoestring.methods.pruners._supernet import Subnet, Supernet
from shoestring.training.loss import IGNORED, chunked_cross_entropy, last_hidden_and_head

MOST_WEIGHT = 10.0  # what balancing may multiply a loss by: one near 0 would drown all others
_CHUNK = 256  # positions whose logits exist at a time


class Pass(NamedTuple):
    """What the whole model made of a batch: what its head would read, (batch, length, hidden), and the head."""

    batch: dict[str, Any]
    hidden: Tensor
    head: nn.Module


class Sandwich(nn.Module):
    """A supernet as something to train: its forward pass is the whole model's, its `loss` runs the other subnets.

    Args:
        between: random subnets of each step, beside the whole model and the smallest.
        weight: of the distillation in a subnet's loss; cross-entropy gets the rest.
    """

    def __init__(self, supernet: Supernet, between: int = 2, weight: float = 1.0) -> None:
        super().__init__()
        self.supernet, self.between, self.weight = supernet, between, weight
        self.whole = contextlib.ExitStack()

    @property
    def config(self) -> Any:
        return self.supernet.model.config

    def get_base_model(self) -> nn.Module:
        return self.supernet.model

    def get_output_embeddings(self) -> nn.Module:
        return self.supernet.model.get_output_embeddings()

    def draw(self) -> Iterator[Subnet]:
        """The subnets of one step that are not the whole model."""
        plan = self.supernet.plan
        widths = torch.randperm(len(plan.ratios))  # of one step all different, as far as there are as many
        for number in range(self.between):
            removed = 1 + int(torch.randint(len(plan.keeps) - 1, ())) if len(plan.keeps) > 1 else 0
            yield Subnet(plan.keeps[removed], int(widths[number % len(widths)]))
        yield Subnet(plan.keeps[-1], len(plan.ratios) - 1)

    def forward(self, **batch: Any) -> Pass:
        # The whole model stays active until the next pass, because its backward pass may run its layers again.
        self.whole.close()
        self.whole.enter_context(self.supernet.active(next(self.supernet.plan.subnets())))
        hidden, head, _ = last_hidden_and_head(self.supernet.model, batch)
        return Pass(batch, hidden, head)

    def loss(self, whole: Pass, labels: Tensor, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        """The whole model's cross-entropy; in training the gradients of the other subnets have been added by then.

        Each subnet learns from the whole model's present predictions, and counts as much as the whole model does.
        """
        items = num_items_in_batch
        first = chunked_cross_entropy(whole.hidden, whole.head, labels, items)
        if not self.training:
            return first
        teacher = whole.hidden.detach()
        for subnet in self.draw():
            with self.supernet.active(subnet):
                hidden, head, _ = last_hidden_and_head(self.supernet.model, whole.batch)
                found = self._subnet_loss(hidden, teacher, head, labels, items)
                with torch.autocast(hidden.device.type, enabled=False):
                    balanced(found, first).backward()
        return first

    def _subnet_loss(self, hidden: Tensor, teacher: Tensor, head: nn.Module, labels: Tensor, items: Any) -> Tensor:
        loss = self.weight * distillation(hidden, teacher, head, labels, items) if self.weight else 0.0
        if self.weight < 1:
            loss = loss + (1 - self.weight) * chunked_cross_entropy(hidden, head, labels, items)
        return loss  # type: ignore[return-value]

    def __enter__(self) -> Sandwich:
        return self

    def __exit__(self, *_: object) -> None:
        self.whole.close()


def balanced(loss: Tensor, reference: Tensor) -> Tensor:
    """`loss` with its gradient, at the size of `reference`: loss * reference / loss, the quotient being a constant."""
    ratio = reference.detach() / loss.detach().clamp(min=torch.finfo(loss.dtype).tiny)
    return loss * ratio.clamp(max=MOST_WEIGHT)  # (eq. 8)


def distillation(
    hidden: Tensor, teacher: Tensor, head: nn.Module, labels: Tensor, num_items: Tensor | float | None = None
) -> Tensor:
    """Cross-entropy of the next-token distributions against those of a teacher, where a label is learned.

    Args:
        hidden, teacher: (batch, length, width), what the head reads in each.
        labels: (batch, length); -100 costs nothing.
        num_items: divides the sum; None means the number of learned labels.
    """
    learned = labels[:, 1:] != IGNORED
    ours, theirs = hidden[:, :-1][learned], teacher[:, :-1][learned]
    total: Tensor = _SoftLoss.apply(ours, theirs, head)  # type: ignore[no-untyped-call]
    return total / (max(1, len(ours)) if num_items is None else num_items)


class _SoftLoss(torch.autograd.Function):
    """Summed -sum p log q of a frozen head; the gradient is made in the forward pass, so that logits never pile up."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, head: nn.Module) -> Tensor:
        total = torch.zeros((), device=ours.device)
        gradients = [ours[:0]]
        for own, other in zip(ours.detach().split(_CHUNK), theirs.split(_CHUNK)):
            wanted = head(other).float().softmax(-1)
            with torch.enable_grad():
                own.requires_grad_()
                loss = -(wanted * head(own).float().log_softmax(-1)).sum()  # (eq. 7)
                gradients += torch.autograd.grad(loss, own)
            total += loss.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        return ctx.saved_tensors[0] * outer[0], None, None

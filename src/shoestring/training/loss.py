"""Next-token loss without the logits: the largest tensor of a training step is never made whole.

The logits of a step have tokens x vocabulary entries, and autograd keeps several copies. Here the rows that carry a
label are cut into chunks; each chunk's logits, loss and gradient are computed and dropped before the next chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_BYTES = 64 * 2**20


def chunked_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    *,
    shift: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Cross-entropy of `head(hidden)` against `labels`, equal to the loss over whole logits.

    Args:
        hidden: (batch, length, width), what the model hands to its head.
        head: maps width to vocabulary. A plain `nn.Linear` takes a fused path that computes gradients in the forward
            pass; any other module is run chunk by chunk and recomputed in the backward pass.
        labels: (batch, length); positions labelled -100 cost nothing.
        num_items: divides the summed loss; None means the number of labelled positions.
        shift: position t predicts label t + 1, as in causal language models.
        chunk_bytes: how large one chunk of float32 logits may be.

    Returns:
        A float32 scalar; 0 when no position is labelled.
    """
    rows, targets = _labelled_rows(hidden, labels, shift)
    if num_items is None:
        num_items = max(1, targets.numel())
    elif isinstance(num_items, Tensor):
        num_items = num_items.to(rows.device).clamp(min=1)
    if targets.numel() == 0:
        return rows.float().sum()
    return _summed_loss(rows, head, targets, chunk_bytes) / num_items


def last_hidden_and_head(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, nn.Module, Any]:
    """Run `model` on `batch` and stop short of the logits.

    The model's own forward runs, adapters and wrappers included, with its head seeing one position only.

    Returns:
        hidden (batch, length, width) as the head would have got it; the head; the model's output, whose logits are
        those of the last position.

    Raises:
        LookupError: the model has no head, or its forward never calls it.
    """
    head = find_head(model)
    if head is None:
        raise LookupError(f"{type(model).__name__} has no output head")
    seen: list[Tensor] = []

    def keep_one(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        # A view of one row counts as contiguous whatever its strides, which send the product down a slow path.
        return (args[0][:, -1:].clone(memory_format=torch.contiguous_format), *args[1:])

    hook = head.register_forward_pre_hook(keep_one)
    try:
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].dim() != 3:
        raise LookupError(f"{type(model).__name__} calls its head {len(seen)} times instead of once")
    return seen[0], head, output


def find_head(model: nn.Module) -> nn.Module | None:
    """The module that maps hidden states to logits, or None when the model has none."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if getter else None
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """What the modules of `model` add to the loss of the batch they saw last; None when none has anything to add.

    A module joins by a method `auxiliary_loss() -> Tensor | None`: the term of its last forward pass, a scalar that
    carries its coefficient and is a mean over the batch, as the loss is; None after a pass that is not to be
    trained on. Whoever defines it also adds it to `output.loss` where the model is called with labels, as models of
    transformers with experts do: that serves a plain `Trainer`. Training asks for it only where it computes the loss
    itself, from a call without labels, so nothing counts twice.
    """
    # A peft model hands unknown names on to what it wraps, so only what a class itself defines counts.
    asked = (m.auxiliary_loss() for m in model.modules() if hasattr(type(m), "auxiliary_loss"))  # type: ignore[operator]
    terms = [term for term in asked if term is not None]
    return torch.stack([term.float() for term in terms]).sum() if terms else None


def with_auxiliary(loss: Tensor, model: nn.Module, labels: Tensor, num_items: Any = None) -> Tensor:
    """`loss` of a training pass with the auxiliary one, which counts as the batch does among `num_items` labels."""
    extra = auxiliary_loss(model) if model.training else None
    if extra is None:
        return loss
    return loss + (extra if num_items is None else extra * (labels[..., 1:] != IGNORED).sum() / num_items)


class NextTokenLoss:
    """The loss of a transformers model: chunked where that equals the model's own loss, else the model's own.

    The first batch decides: the model's own logits and loss on a few tokens are compared with what this module would
    compute, `auxiliary_loss` included. Models that cap, scale or cut their logits, add other losses or do not predict
    the next token differ, and keep their own loss; `reason` then says why.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self.reason: str | None = None
        self._checked = False

    def check(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Decide, once, whether the chunked loss may be used; draws no random numbers from the global generator."""
        if not self._checked:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                self.reason = why_own_loss(model, batch)
            self._checked = True

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], num_items: Any = None, own_shifts: bool = True
    ) -> Tensor:
        """The loss of `batch`, summed over its labels and divided by `num_items` (None: by their number).

        Args:
            own_shifts: whether the model's own loss leaves the first label out.
        """
        self.check(model, batch)
        if self.reason is None:
            hidden, head, _ = last_hidden_and_head(model, batch)
            labels = _pad_left(batch["labels"], hidden.shape[1])
            loss = chunked_cross_entropy(hidden, head, labels, num_items, chunk_bytes=self.chunk_bytes)
            return with_auxiliary(loss, model, labels, num_items)
        labels = batch["labels"][..., 1:] if own_shifts else batch["labels"]
        count = (labels != IGNORED).sum()
        output = model(**batch)
        if count == 0:
            return output.logits.float().sum() * 0.0
        # Models take `num_items_in_batch` without all of them using it; a mean can be weighted from outside.
        return output.loss if num_items is None else output.loss * (count / num_items)


def why_own_loss(model: nn.Module, batch: Mapping[str, Any], tokens: int = 64) -> str | None:
    """None when the chunked loss equals the loss of `model` on `tokens` tokens of `batch`, else the reason."""
    head = find_head(model)
    if head is None:
        return "the model has no output head"
    few = _slice(batch, tokens)
    labels = few["input_ids"].clone()
    if "attention_mask" in few:
        labels[few["attention_mask"] == 0] = IGNORED
    labels[:, ::3] = IGNORED
    fed: list[Tensor] = []

    def amplify(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Large logits show a cap or another curve after the head that small ones would hide.
        hook.remove()
        peak = module(args[0]).float().abs().max().clamp(min=1e-6)
        fed.append((args[0].float() * (50.0 / peak)).to(args[0].dtype))
        return (fed[-1], *args[1:])

    hook = head.register_forward_pre_hook(amplify)
    was_training = head.training
    head.eval()
    try:
        output = model(**{**few, "labels": labels})
        if len(fed) != 1 or fed[0].dim() != 3:
            return "the model's forward does not call its head once on all positions"
        ours = head(fed[0]).float()
    except Exception as error:  # whatever the model refuses here, its own loss will report in full
        return f"the model could not be compared on a few tokens ({type(error).__name__}: {error})"
    finally:
        hook.remove()
        head.train(was_training)
    if getattr(output, "aux_loss", None) is not None and auxiliary_loss(model) is None:
        return "the model adds an auxiliary loss"
    if getattr(output, "loss", None) is None or getattr(output, "logits", None) is None:
        return "the model returns no loss or no logits"
    theirs = output.logits.float()
    if theirs.shape != ours.shape:
        return f"the model's logits have shape {tuple(theirs.shape)}, its head gives {tuple(ours.shape)}"
    coarse = torch.finfo(output.logits.dtype).eps > 1e-4 or torch.finfo(fed[0].dtype).eps > 1e-4
    if not torch.allclose(theirs, ours, rtol=0.0, atol=1.0 if coarse else 0.01):
        return "the model changes the logits after its head"
    shifted = F.cross_entropy(theirs[:, :-1].flatten(0, 1), _pad_left(labels, ours.shape[1])[:, 1:].flatten())
    extra = auxiliary_loss(model)
    possible = [shifted] if extra is None else [shifted + extra, shifted]
    if not any(torch.allclose(output.loss.float(), loss, rtol=2e-4, atol=1e-5) for loss in possible):
        return f"the model's own loss is {float(output.loss):.5g}, plain next-token loss is {float(possible[0]):.5g}"
    return None


def _summed_loss(rows: Tensor, head: nn.Module, targets: Tensor, chunk_bytes: int) -> Tensor:
    if _plain(head):
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        chunk = max(16, chunk_bytes // (4 * head.out_features))
        return _FusedLoss.apply(rows, head.weight, head.bias, targets, chunk, dtype, torch.is_grad_enabled())
    width = getattr(head, "out_features", None) or head(rows[None, :1]).shape[-1]
    chunk = max(16, chunk_bytes // (4 * width))
    total = rows.new_zeros((), dtype=torch.float32)
    for piece, wanted in zip(rows.split(chunk), targets.split(chunk)):
        if torch.is_grad_enabled():
            total = total + checkpoint(_loss_through, head, piece, wanted, use_reentrant=False)
        else:
            total = total + _loss_through(head, piece, wanted)
    return total


def _plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the head does nothing but multiply: no other class, no hooks, no forward put in place of its own."""
    taken = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return type(head) is nn.Linear and not taken


def _loss_through(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(rows[None])[0].float(), targets, reduction="sum")


class _FusedLoss(torch.autograd.Function):
    """Summed cross-entropy of a linear head; the gradients are made in the forward pass, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        dtype: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        wants_rows, wants_weight, wants_bias = (with_grad and needed for needed in ctx.needs_input_grad[:3])
        weight_c, rows_c = weight.detach().to(dtype), rows.detach().to(dtype)
        bias_c = None if bias is None else bias.detach().to(dtype)
        grad_rows = torch.empty_like(rows) if wants_rows else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        total = rows.new_zeros((), dtype=torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, rows.shape[0], chunk):
                part, wanted = rows_c[start : start + chunk], targets[start : start + chunk]
                scores = F.log_softmax(F.linear(part, weight_c, bias_c), dim=-1, dtype=torch.float32)
                total -= scores.gather(1, wanted[:, None]).sum()
                if grad_rows is None and grad_weight is None and grad_bias is None:
                    continue
                scores.exp_()
                scores.scatter_add_(1, wanted[:, None], scores.new_full((len(wanted), 1), -1.0))
                if grad_bias is not None:
                    grad_bias += scores.sum(0)
                scores = scores.to(dtype)
                if grad_rows is not None:
                    grad_rows[start : start + chunk] = scores @ weight_c
                if grad_weight is not None:
                    grad_weight += scores.t() @ part
        saved = [grad_rows, grad_weight, grad_bias]
        ctx.dtypes = [rows.dtype, weight.dtype, None if bias is None else bias.dtype]
        ctx.save_for_backward(*saved)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = (
            None if grad is None else (grad * grads[0]).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return (*made, None, None, None, None)


def _labelled_rows(hidden: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """hidden (rows, width) and labels (rows,) of the positions that carry a label."""
    if shift:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    index = (labels != IGNORED).flatten().nonzero()[:, 0]
    return hidden.flatten(0, 1).index_select(0, index), labels.flatten().index_select(0, index)


def _pad_left(labels: Tensor, length: int) -> Tensor:
    # Soft prompts put positions in front of the text, which carry no label.
    return F.pad(labels, (length - labels.shape[1], 0), value=IGNORED)


def _slice(batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    shape = batch["input_ids"].shape
    few = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape == shape:
            few[name] = value[:1, :tokens]
        elif isinstance(value, Tensor) and value.dim() and value.shape[0] == shape[0]:
            few[name] = value[:1]
        else:
            few[name] = value
    return few

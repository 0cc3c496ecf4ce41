"""What text shows of a model's matrices, in little memory: gradients at what they give, and inner products of inputs.

Weights that are stored in 16 bits stay so, and are float32 one block at a time where the machine computes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoestring.models.anatomy import GATE_UP, expert_reads, inspect
from shoestring.models.load import fast_bfloat16
from shoestring.models.packed import tied_head
from shoestring.models.packed_layers import routed, scale_of
from shoestring.training.lean import give_back_holes

FEW = 16  # tokens that are too few to make up for errors by
TOGETHER = 1 << 20  # weights of a matrix that are float32 at one time
PIECE = 64  # tokens whose float32 logits, or gradients at them, exist at one time


@dataclass(frozen=True)
class Place:
    """What gets a format: a linear layer or a token table, or of a layer's experts the matrices of one kind.

    Attributes:
        module: it, or all of the experts.
        part: `GATE_UP` or `DOWN` of experts.
    """

    module: Any
    part: str = ""

    def matrices(self) -> Tensor:
        """Its weights, [matrices, rows, columns]: one matrix, or one for each expert."""
        if self.part:
            return self.module.get_parameter(self.part).detach()  # type: ignore[no-any-return]
        weight: Tensor = self.module.weight.detach()
        return (weight.T.contiguous() if isinstance(self.module, Conv1D) else weight)[None]


@dataclass
class Seen:
    """What text showed of the matrices of a place, y = W x, with g the gradients of the log-likelihood at y.

    Attributes:
        rows: float32 [matrices, rows], the sum of g^2 over tokens.
        tokens: for each window float32 [tokens], |g|^2; of experts [tokens, chosen].
        columns: float32 [matrices, columns], the diagonal of F.
        form: F, float32 [columns, columns]; None inside blocks, where it is made when the block's turn has come.
        routes: for each window the experts [tokens, chosen] that a token met.
    """

    rows: Tensor
    tokens: list[Tensor]
    columns: Tensor
    form: Tensor | None
    routes: list[Tensor]


def look(model: PreTrainedModel, modules: Mapping[str, Place], ids: Tensor) -> dict[str, Seen]:
    """Step 1, for each place. In memory are the activations of one window in one block, and its logits."""
    blocks = inspect(model).blocks
    inside = [block.name for block in blocks]
    found: dict[str, Seen] = {}
    for name, place in modules.items():
        matrices, rows, columns = place.matrices().shape
        alone = not any(name.startswith(f"{block}.") for block in inside)
        form = torch.zeros(columns, columns) if alone else None
        found[name] = Seen(torch.zeros(matrices, rows), [], torch.zeros(matrices, columns), form, [])

    def watch(name: str, module: nn.Module) -> Any:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            if output.requires_grad:
                output.register_hook(lambda g: note(found[name], module, x, g))

        return module.register_forward_hook(forward)

    def note(seen: Seen, module: nn.Module, x: Tensor, g: Tensor) -> None:
        g = g.detach().reshape(-1, g.shape[-1])
        if isinstance(module, nn.Embedding):
            g = g.float().square() * torch.as_tensor(scale_of(module)).float().square()
            seen.rows[0].index_add_(0, x.flatten(), g.sum(1))
            seen.columns[0] += g.sum(0)
            assert seen.form is not None
            seen.form.diagonal().add_(g.sum(0))
            return
        for read, gradients in zip(x.reshape(-1, x.shape[-1]).split(PIECE), g.split(PIECE)):
            weights = add(seen, 0, read, gradients)
            seen.tokens.append(weights)
            if seen.form is not None:
                some = read.float()
                seen.form += (some * weights[:, None]).T @ some

    def add(seen: Seen, matrix: int, x: Tensor, g: Tensor) -> Tensor:
        squares = g.float().square()
        weights = squares.sum(1)
        seen.rows[matrix] += squares.sum(0)
        seen.columns[matrix] += (x.float().square() * weights[:, None]).sum(0)
        return weights

    def watched(experts: Any, seen: Mapping[str, Seen]) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, index: Tensor, shares: Tensor) -> Tensor:
            weights = {part: torch.zeros(index.shape) for part in seen}
            if torch.is_grad_enabled():
                for part, of_part in seen.items():
                    of_part.tokens.append(weights[part])
                    of_part.routes.append(index)

            def product(part: str, x: Tensor, expert: int) -> Tensor:
                def note(g: Tensor) -> None:
                    weights[part][index == expert] = add(seen[part], expert, x.detach(), g)

                y = x @ experts.get_parameter(part)[expert].T
                if part in seen and y.requires_grad:
                    y.register_hook(note)
                return y

            return routed(experts, len(experts.get_parameter(GATE_UP)), product, hidden, index, shares)

        return forward

    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    # Hidden states need gradients though no weight does.
    handles = [table.register_forward_hook(lambda *given: given[2].requires_grad_())]
    handles += [watch(name, place.module) for name, place in modules.items() if not place.part]
    shared = next((n for n, place in modules.items() if place.module is table), None)
    mixtures = list(mixtures_of(modules))
    if shared is not None and tied_head(model) and head is not None:
        handles.append(watch(shared, head))  # where the table's errors meet the hidden states too
    asked = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        for experts, names in mixtures:
            experts.forward = watched(experts, {part: found[name] for part, name in names.items()})
        with _computing(model, head), _run_again([block.module for block in blocks]):
            for window in ids.split(1):
                logits = model(input_ids=window, use_cache=False).logits
                logits.backward(_gradients(logits.detach()))
                del logits
                give_back_holes()
    finally:
        for experts, _ in mixtures:
            vars(experts).pop("forward", None)
        for handle in handles:
            handle.remove()
        for p in asked:
            p.requires_grad_(True)
    return found


def _gradients(logits: Tensor) -> Tensor:
    """Those of the negative log-likelihood, at logits [..., vocabulary], of tokens that are drawn from them."""
    made = torch.empty_like(logits)
    for part, out in zip(logits.flatten(0, -2).split(PIECE), made.flatten(0, -2).split(PIECE)):
        shares = part.float().softmax(-1)
        drawn = torch.multinomial(shares, 1)
        out.copy_(shares.scatter_add_(1, drawn, -torch.ones(drawn.shape)))
    return made


@contextmanager
def _run_again(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """These blocks keep no more than their inputs for the pass backwards, and run again when its turn comes to them."""

    def forward(block: nn.Module, own: Callable[..., Any], *args: Any, **named: Any) -> Any:
        hidden, *rest = args or (named.pop("hidden_states"),)
        return _Again.apply(hidden, block, lambda states: own(states, *rest, **named))

    for block in blocks:
        block.forward = partial(forward, block, block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, block: nn.Module, run: Callable[[Tensor], Any]) -> Any:
        ctx.block, ctx.run = block, run
        ctx.save_for_backward(hidden)
        with _widened(block.parameters()):
            return run(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), _widened(ctx.block.parameters()):
            out = ctx.run(hidden)
            (out[0] if isinstance(out, tuple) else out).backward(gradient)
        return hidden.grad, None, None


def _narrow(dtype: torch.dtype) -> bool:
    """Whether weights of a type are stored in 16 bits of which this machine computes no products."""
    return dtype == torch.float16 or dtype == torch.bfloat16 and not fast_bfloat16()


@contextmanager
def _widened(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These are float32 for now where they are too narrow to compute with."""
    kept = [(parameter, parameter.data) for parameter in parameters if _narrow(parameter.dtype)]
    for parameter, data in kept:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def _computing(model: PreTrainedModel, head: Any = None) -> Iterator[None]:
    """What stands outside of the blocks computes in float32 where it is too narrow; a table and a head as they are."""
    table: Any = model.get_input_embeddings()
    parts = [table, head, *(block.module for block in inspect(model).blocks)]
    large = {id(p) for part in parts if part is not None for p in part.parameters()}
    handles = []
    if _narrow(table.weight.dtype):
        handles.append(table.register_forward_hook(lambda *given: given[2].float()))
    own = isinstance(head, nn.Linear) and _narrow(head.weight.dtype)
    if own:
        head.forward = lambda x: _Wide.apply(x, head.weight) + (0 if head.bias is None else head.bias.float())
    try:
        with _widened(p for p in model.parameters() if id(p) not in large):
            yield
    finally:
        for handle in handles:
            handle.remove()
        if own:
            del head.forward


class _Wide(torch.autograd.Function):
    """x @ weight.T of a weight whose rows are made float32 some at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.parts = weight.detach().split(max(1, TOGETHER // weight.shape[1]))
        return torch.cat([x @ some.float().T for some in ctx.parts], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradients = gradient.split([len(some) for some in ctx.parts], -1)
        return sum(g @ some.float() for g, some in zip(gradients, ctx.parts)), None


def block_forms(
    model: PreTrainedModel, modules: Mapping[str, Place], ids: Tensor, seen: Mapping[str, Seen]
) -> Iterator[dict[str, Iterable[Tensor | None]]]:
    """Block by block F of its places, with the inputs that the blocks before, as they are by then, give."""
    anatomy = inspect(model)
    hidden, calls = _calls(model, [block.module for block in anatomy.blocks], ids)
    for block, given in zip(anatomy.blocks, zip(*calls)):
        inside = {name: place for name, place in modules.items() if name.startswith(f"{block.name}.")}
        yield _forms(block.module, inside, hidden, given, seen)
        give_back_holes()
        hidden = [_run(block.module, h, more) for h, more in zip(hidden, given)]


class _Enough(Exception):
    """The last block was reached."""


def _calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """For each window what the first block gets, and what each block gets beside hidden states: blocks may differ in
    it, by their rotations or masks."""
    hidden: list[Tensor] = []
    calls: list[list[dict[str, Any]]] = []
    run, gives_more = blocks[0].forward, False

    def pass_on(place: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal gives_more
        states, *rest = args or (kwargs.pop("hidden_states"),)
        if place == 0:
            if not hidden:
                with _widened(blocks[0].parameters()):
                    gives_more = isinstance(run(states, *rest, **kwargs), tuple)
            hidden.append(states)
            calls.append([])
        calls[-1].append({"args": rest, "kwargs": kwargs})
        if place == len(blocks) - 1:
            raise _Enough
        return (states,) if gives_more else states

    for place, block in enumerate(blocks):
        block.forward = partial(pass_on, place)  # type: ignore[method-assign]
    try:
        for window in ids.split(4):
            with suppress(_Enough), torch.no_grad(), _computing(model):
                model(input_ids=window, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return hidden, calls


def _run(block: nn.Module, hidden: Tensor, more: Mapping[str, Any]) -> Tensor:
    with torch.no_grad(), _widened(block.parameters()):
        out = block(hidden, *more["args"], **more["kwargs"])
    return out[0] if isinstance(out, tuple) else out


def _forms(
    block: nn.Module,
    inside: Mapping[str, Place],
    hidden: Sequence[Tensor],
    given: Sequence[Mapping[str, Any]],
    seen: Mapping[str, Seen],
) -> dict[str, Iterable[Tensor | None]]:
    """F of each matrix of a block's places; of experts when their turn comes, and None of those that met few tokens."""
    found: dict[str, Tensor] = {}
    total = sum(states.shape[:-1].numel() for states in hidden)

    def watch(name: str) -> Any:
        left = torch.cat([torch.zeros(0), *seen[name].tokens])
        if len(left) != total:  # an expert, which may meet other tokens now: all count alike
            left = (left.sum() / max(1, len(left))).expand(total)

        def forward(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal left
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            weights, left = left[: len(x), None], left[len(x) :]
            found[name] = found.get(name, 0) + (x * weights).T @ x

        return forward

    def note(caught: list[tuple[Tensor, Tensor]], own: Callable[..., Tensor], *given: Tensor) -> Tensor:
        caught.append(given[:2])  # type: ignore[arg-type]
        return own(*given)

    met: dict[str, list[tuple[Tensor, Tensor]]] = {}
    mixtures = list(mixtures_of(inside))
    handles = [p.module.register_forward_pre_hook(watch(name)) for name, p in inside.items() if not p.part]
    for experts, names in mixtures:
        caught: list[tuple[Tensor, Tensor]] = []
        met |= dict.fromkeys(names.values(), caught)
        experts.forward = partial(note, caught, experts.forward)
    try:
        for states, more in zip(hidden, given):
            _run(block, states, more)
    finally:
        for handle in handles:
            handle.remove()
        for experts, _ in mixtures:
            del experts.forward
    plain = {name: [form] for name, form in found.items()}
    return {**plain, **{name: _expert_forms(inside[name], seen[name], caught) for name, caught in met.items()}}


def _expert_forms(place: Place, seen: Seen, met: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor | None]:
    """F of one expert after the other; `met`: what all of them were given, [tokens, width], and who takes what."""
    hidden, routes = (torch.cat(tensors) for tensors in zip(*met))
    before, weights = torch.cat(seen.routes), torch.cat(seen.tokens)
    for expert in range(len(place.matrices())):
        tokens = (routes == expert).any(1).nonzero()[:, 0]
        if len(tokens) < FEW:
            yield None
            continue
        same = before == expert
        # Tokens that come only since the blocks before were rounded count as those do on average that came before.
        usual = weights[same].sum() / max(1, int(same.sum()))
        own = torch.where(same.any(1), (weights * same).sum(1), usual)[tokens, None]
        with torch.no_grad():
            x = expert_reads(place.module, expert, hidden[tokens])[place.part].float()
        yield (x * own).T @ x


def mixtures_of(modules: Mapping[str, Place]) -> Iterator[tuple[Any, dict[str, str]]]:
    """Experts among the places, and the names of their parts."""
    found: dict[int, tuple[Any, dict[str, str]]] = {}
    for name, place in modules.items():
        if place.part:
            found.setdefault(id(place.module), (place.module, {}))[1][place.part] = name
    yield from found.values()


def owner_of(name: str) -> str:
    return name.rpartition(".")[0]

"""Where a model is cut at its attention, found in a trace of one pass by minimum cuts (3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from shoestring.core.errors import UsageError

NAME = "shoestring_split"  # of the attention that is traced, in transformers' registries
_NAMESPACE = "shoestring_split"


@dataclass(frozen=True)
class Slice:
    """What the model computes between two attentions.

    Attributes:
        steps: operations in order, and "send q" and "send k, v" where those exist.
        context: tensors handed to the next slice beside q, k and v -> bytes of each token.
        early: operations between the two sends: what hides behind the attention to earlier tokens.
    """

    number: int
    steps: tuple[str, ...]
    context: dict[str, float]

    @property
    def early(self) -> int:
        if "send q" not in self.steps:
            return 0
        return self.steps.index("send k, v") - self.steps.index("send q") - 1


def split(model: Any, tokens: int = 4) -> list[Slice]:
    """n attentions give n + 1 slices.

    Args:
        model: of transformers, on the CPU; it is left as it was.
        tokens: of the pass that is traced.

    Raises:
        UsageError: no attention passes through transformers' attention interface.
    """
    graph = _traced(model, tokens)
    nodes = [node for node in graph.nodes if node.op not in ("get_attr", "output")]
    attentions = [node for node in nodes if node.target is torch.ops.shoestring_split.attend.default]
    if not attentions:
        raise UsageError(
            f"{type(model).__name__} cannot be split at its attention",
            "none of it passes through transformers' attention interface",
        )
    # What follows from weights and positions alone is known on every side of a cut.
    nodes = _after_tokens(nodes)
    slices, done = [], set[fx.Node]()
    for number, attention in enumerate(attentions):
        later = attentions[number + 1] if number + 1 < len(attentions) else None
        open_nodes = [n for n in nodes[: nodes.index(later) if later else None] if n not in done and n is not attention]
        before = _cut(open_nodes, attention, done)
        own = [node for node in open_nodes if node in before]
        done |= before | {attention}
        handed = [n for n in nodes if n in done and n is not attention and _readers(n, attention) - done]
        slices.append(Slice(number, _ordered(own, attention), {n.name: _bytes(n) / tokens for n in handed}))
    rest = tuple(node.name for node in nodes if node not in done)
    return [*slices, Slice(len(attentions), rest, {})]


# ---- the trace ----


@torch.library.custom_op(f"{_NAMESPACE}::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2).contiguous()


def _forward(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    return _attend(q, k, v), None


def _no_mask(**_: Any) -> None:
    return None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def _traceable(model: Any) -> Iterator[None]:
    before, training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def _traced(model: Any, tokens: int) -> fx.Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    ids, all_seen = torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens, dtype=torch.long)

    def once(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=all_seen, use_cache=False).logits
        return logits

    with _traceable(model), torch.no_grad():
        graph: fx.Graph = make_fx(once)(ids).graph
    return graph


# ---- the cut ----


def _cut(nodes: list[fx.Node], attention: fx.Node, done: set[fx.Node]) -> set[fx.Node]:
    """Those of `nodes` that are computed before the attention's answer is needed, so that the least is handed on."""
    import networkx

    graph, own = networkx.DiGraph(), set(nodes)
    for node in (*nodes, *done):
        readers = _readers(node, attention) & own
        if node in own or readers:
            graph.add_edge((node, "in"), (node, "out"), capacity=_bytes(node))  # handed on once, however many read it
        for reader in readers:
            graph.add_edge((node, "out"), (reader, "in"))
            graph.add_edge((reader, "in"), (node, "in"))  # who computes something has what it reads
        if (node in done and readers) or node in attention.all_input_nodes:
            graph.add_edge("begin", (node, "in"))
    for reader in attention.users:
        graph.add_edge((reader, "in"), "end")
    _, (before, _) = networkx.minimum_cut(graph, "begin", "end")
    return own & {thing[0] for thing in before if isinstance(thing, tuple) and thing[1] == "in"}


def _readers(node: fx.Node, attention: fx.Node) -> set[fx.Node]:
    return {reader for reader in node.users if reader is not attention and reader.op != "output"}


def _ordered(own: list[fx.Node], attention: fx.Node) -> tuple[str, ...]:
    """A topological order with q and what it needs first."""
    q, *others = attention.args
    assert isinstance(q, fx.Node)
    needed, open_ends = set[fx.Node](), [q]
    while open_ends:
        node = open_ends.pop()
        if node not in needed:
            needed.add(node)
            open_ends += node.all_input_nodes
    first = [node.name for node in own if node in needed]
    return (*first, "send q", *(node.name for node in own if node not in needed), "send k, v")


def _after_tokens(nodes: list[fx.Node]) -> list[fx.Node]:
    """Nodes that depend on the tokens."""
    found = {next(node for node in nodes if node.op == "placeholder"): None}
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found[node] = None
    return list(found)


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(v.numel() * v.element_size() for v in value) if isinstance(value, tuple | list) else 0

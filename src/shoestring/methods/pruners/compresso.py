"""Compresso: learn during LoRA training which heads and neurons a smaller model can do without, then cut them out.

How it works
    1. Every group of heads that shares keys and values, every neuron of every layer and, if asked for, every dimension
       of the residual stream has a gate with one parameter a. In training, u ~ U(1e-6, 1 - 1e-6) drawn anew for every
       batch, y = sigmoid((ln u - ln(1 - u) + a) / T), z = clamp(y (r - l) + l, 0, 1), with T = 2/3, l = -0.1, r = 1.1:
       mostly exactly 0 or exactly 1, and differentiable between.                                              (eq. 1)
    2. P(z > 0) = sigmoid(a - T ln(-l / r)) is how likely a part is there.                                     (eq. 2)
    3. A head's output before the output projection is multiplied by its group's z; a neuron's gate and up outputs both
       by its own; the embeddings and what attention and MLP add to the stream by those of the dimensions.
    4. Expected size: over layers, sum of P of the groups times the weights of one, likewise of the neurons, times the
       mean P of the dimensions; s = 1 - expected / all. It is exact and cheap because the sums factor.        (eq. 3)
    5. Loss: that of the language model + lambda_1 (s - s_t) + lambda_2 (s - s_t)^2. The lambdas start at 0 and are
       maximised; the target s_t rises from 0 to `sparsity` over the first `warmup` of the steps.              (eq. 4)
    6. AdamW for all: gates and lambdas at `gate_learning_rate`, unscheduled; a after every step held within ln 0.01 and
       ln 100. The base is frozen; a LoRA of `rank` on q and v adapts it meanwhile.
    7. Then, layer by layer and kind by kind, as many of the smallest gates close as the sum of 1 - P says; the others
       keep sigmoid(0.8 a / T) as a multiplier.                                                                (eq. 5)
    8. LoRA is merged, multipliers go into v, gate, up (and o, down, embeddings), closed parts are cut away, and the
       rest is trained once more as a LoRA: the last `healing` of the steps, at `healing_learning_rate`.
    9. With `prompt` every example says in a system message that the model is being pruned and asks it to work along.

Where it bends
    Single heads of a group cannot free its keys and values: groups are gated whole. After step 7 one number, near 0
    when training has converged, is added to all a, and another to those of the neurons, so that the budget is met to
    the neuron. A short run meets it too, but its gates are hardly told apart: raise `gate_learning_rate`, and do not
    expect to beat a cut by first-order importance. Layers end up unequal, which transformers knows after an import that
    the model card names. Dimensions of the stream are left alone by default: their gates cut embeddings as well, of
    which the budget knows nothing. A batch is one draw, so gradient accumulation averages over several. Plain texts,
    which have no answers, are learned whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shoestring import data, models, training
from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.core.step import Work
from shoestring.methods.pruners import _shared
from shoestring.methods.pruners._gates import Adam, Decision, Gates, gated
from shoestring.models import uneven
from shoestring.models.anatomy import inspect

METHOD = Method(
    paper=Paper(
        "Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large Language Models",
        "2023-10",
        arxiv="2310.05015",
        code="microsoft/Moonlit",
        licence="MIT",
    ),
    provides="CompressoOptions",
    saves=("parameters", "storage", "memory", "compute", "latency"),
    combines={
        "quantizers": "yes",
        "adapters": "yes",
        "pruners": "what one has cut out, another cannot weigh; give one of them the whole sparsity",
    },
)
NEEDS_DATA = True
TRAINING = {"learning_rate": 5e-5, "max_steps": 300, "per_device_train_batch_size": 1, "max_length": 256}
PROMPT = (
    "You are a language model that is being pruned to need less memory, energy and time. Parts of your network are "
    "switched off little by little while you are trained, so that you can adapt. Keep the quality of your answers as "
    "it was: work along by relying on the parts that matter most, and answer the following as well as ever."
)


@dataclass(frozen=True)
class CompressoOptions(_shared.PrunerOptions):
    """How much goes, and how it is learned.

    Args:
        hidden: gate the dimensions of the residual stream too.
        prompt: tell the model in every example that it is being pruned.
        warmup: share of the pruning steps over which the target rises.
        healing: share of all steps that come after the cut.
        gate_learning_rate: of gates and multipliers; for short runs higher.
        healing_learning_rate: of the LoRA after the cut.
        rank: of both LoRAs, whose alpha is as large.

    Raises:
        UsageError: values that are not possible.
    """

    hidden: bool = False
    prompt: bool = False
    warmup: float = 0.5
    healing: float = 3 / 11
    gate_learning_rate: float = 0.1
    healing_learning_rate: float = 4e-4
    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup", "healing"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} is not possible", "it is a share of the steps")
        for name in ("gate_learning_rate", "healing_learning_rate", "rank"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} {getattr(self, name)!r} is not possible", "it must be above 0")


def example() -> CompressoOptions:
    """The configuration that checks, documentation and the first-time user run."""
    return CompressoOptions(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, the gentlest first."""
    return tuple({"sparsity": share} for share in (0.1, 0.2, 0.3))


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """The blocks lose `sparsity` of their weights; which, is learned. LoRA and gates train on the whole model."""
    said = CompressoOptions(**{**settings()[0], **options})
    q_and_v = sum(said.rank * sum(weight.dims) for weight in shape.of("q", "v") if len(weight.dims) == 2)
    parts = sum(weight.dims[0] for weight in shape.of("up")) + shape.layers * shape.kv_heads
    parts += shape.hidden if said.hidden else 0
    return Price(_shared.thinned(shape, said.sparsity), trainable=q_and_v + parts + 2, train_flops=2.0)


def encode(
    corpus: Any, tokenizer: Any, max_length: int, *, options: CompressoOptions, on_long: str = "error"
) -> data.Encoded:
    """Rows of a corpus; with `prompt`, conversations begin with the message that tells of the pruning."""
    if options.prompt:
        corpus = corpus.part([_told(example) for example in corpus.examples])
    return data.encode(corpus, tokenizer, max_length, on_long=on_long)


def prune(
    loaded: models.Loaded, options: CompressoOptions, rows: _shared.Rows, valid: _shared.Rows, work: Work
) -> _shared.Pruned:
    """Learn what goes, cut it out, heal what is left."""
    model = loaded.model
    gates = Gates(uneven.sizes(model), options.sparsity, options.hidden, options.warmup)
    before, after = _shared.divide(work.training, options.healing)
    choose = training.TrainOptions(
        **{"seed": work.seed, "max_grad_norm": 1e9, **before,
           "optimizer": lambda groups: Adam(groups, gates, options.gate_learning_rate)}
    )  # fmt: skip
    learned = _learn(model, gates, options.rank, rows, valid, choose, loaded.tokenizer, work)
    expected = gates.expected_sparsity().item()
    decision = gates.on_budget()
    small = cut(model, decision)
    facts: dict[str, Any] = {
        "expected_sparsity": expected,
        "prices": gates.prices.tolist(),
        "groups": [size.groups for size in uneven.sizes(small).blocks],
        "neurons": [size.neurons for size in uneven.sizes(small).blocks],
        "log": learned.log,
    }
    if after:
        heal = training.TrainOptions(**{"seed": work.seed, **after, "learning_rate": options.healing_learning_rate})
        small, healed = _shared.heal(small, rows, valid, heal, options.rank, loaded.tokenizer, work)
        facts["healing"] = healed.log
    return _shared.Pruned(small, facts)


def cut(model: PreTrainedModel, decision: Decision) -> PreTrainedModel:
    """The smaller model that computes what `model` does with its outputs multiplied as decided.

    The multipliers are put into the weights of `model`, which is of no use afterwards.
    """
    fold(model, decision)
    keep = [
        uneven.Keep(groups.nonzero()[:, 0].tolist(), neurons.nonzero()[:, 0].tolist())
        for groups, neurons in zip(decision.groups, decision.neurons)
    ]
    stream = None if decision.dimensions is None else decision.dimensions.nonzero()[:, 0].tolist()
    return uneven.shrink(model, keep, hidden=stream)


@torch.no_grad()
def fold(model: PreTrainedModel, decision: Decision) -> None:
    """Put the multipliers into the weights before which or after which they act."""
    anatomy, sizes = inspect(model), uneven.sizes(model)
    for block, groups, neurons in zip(anatomy.blocks, decision.groups, decision.neurons):
        for role, name in block.projections.items():
            layer: Any = model.get_submodule(name)
            if role in ("v", "gate", "up"):
                _scale_rows(layer, groups.repeat_interleave(sizes.head_dim) if role == "v" else neurons)
            elif role in ("o", "down") and decision.dimensions is not None:
                _scale_rows(layer, decision.dimensions)
    if decision.dimensions is not None:
        table: Any = model.get_submodule(anatomy.embeddings)
        table.weight.mul_(decision.dimensions.to(table.weight))
        if anatomy.embeddings_tied:
            # The head has the same columns and was not multiplied: the norm before it takes the factor back.
            norm: Any = model.get_submodule(anatomy.final_norm)
            left = decision.dimensions.to(norm.weight)
            norm.weight.div_(torch.where(left > 0, left, 1.0))


def _learn(
    model: PreTrainedModel, gates: Gates, rank: int, rows: _shared.Rows, valid: _shared.Rows,
    options: training.TrainOptions, tokenizer: Any, work: Work,
) -> training.TrainResult:  # fmt: skip
    """Train gates and LoRA together; the LoRA ends merged into `model`, which is as it was in all else."""
    anatomy = inspect(model)
    wrapped = _shared.with_lora(model, rank)
    wrapped.add_module("gates", gates)
    with gated(model, anatomy, gates):
        result = training.train(
            wrapped, rows, valid, options, work.folder / "gates", tokenizer=tokenizer, ledger=work.ledger,
            resume=work.resume,
        )  # fmt: skip
    wrapped.merge_and_unload()
    model.requires_grad_(True)
    return result


def _scale_rows(layer: nn.Linear, by: torch.Tensor) -> None:
    layer.weight.mul_(by.to(layer.weight)[:, None])
    if layer.bias is not None:
        layer.bias.mul_(by.to(layer.bias))


def _told(example: Any) -> Any:
    """The example with the prompt in front: in a system message of its own, or before the one that is there."""
    if not example.messages:
        return example
    first, *others = example.messages
    if first["role"] != "system":
        first, others = {"role": "system", "content": ""}, example.messages
    told = {**first, "content": f"{PROMPT} {first['content']}".strip()}
    more = len(others) + 1 - len(example.messages)
    weights = None if example.weights is None else [0.0] * more + list(example.weights)
    return replace(example, messages=[told, *others], weights=weights)

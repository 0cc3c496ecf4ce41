"""Compresso beside one-shot structured pruning: the same size, the same LoRA steps, what is left of the quality."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shoestring.core.claim import Claim
from shoestring.core.step import Work
from shoestring.lab.arms import Arms

_HERE = (
    "layers 24 to 29 of SmolLM2-135M-Instruct, a fifth of the weights of their matrices gone, in KV groups and "
    "neurons; the layers below stay as they are and are computed once; Python documentation, 66 steps of one example "
    "of at most 64 tokens for every arm: 48 to choose and 18 to heal for Compresso, 66 to heal for the others, whose "
    "LoRA (r 8 on q and v) starts right after the cut; every LoRA at 4e-3, which for Compresso and for first-order was "
    "better than 4e-4 on 32 examples of seed 0, gates at 0.4; held-out perplexity of the smaller model's answers"
)
_PAPER = (
    "LLaMA-7B to 5.4B: over one-shot pruning at various sparsities up to +2.21 %, +11.43 %, +7.04 %, +4.81 % on "
    "commonsense, reading comprehension, MMLU, BBH"
)
CLAIMS = (
    Claim(
        "against-random",
        paper=_PAPER,
        here=_HERE,
        measure="perplexity",
        arm="compresso",
        against="random",
        expect="<= 0.95",
    ),
    Claim(
        "against-magnitude",
        paper=_PAPER,
        here=_HERE,
        measure="perplexity",
        arm="compresso",
        against="magnitude",
        expect="<= 0.95",
    ),
    Claim(
        "against-first-order",
        paper=_PAPER,
        here=_HERE + "; the sum of weight times gradient over 16 examples chooses",
        measure="perplexity",
        arm="compresso",
        against="first-order",
        expect="<= 1.0",
        cannot="7B parameters and scores of tasks; that the prompt helps, which a model of 135M hardly follows",
    ),
    Claim(
        "size",
        paper="LLaMA-7B to 5.4B parameters",
        here=_HERE,
        measure="block_weights",
        arm="compresso",
        against="original",
        expect="<= 0.801",
    ),
)
FIRST, SPARSITY, LENGTH, RANK, RATE = 24, 0.2, 64, 8, 4e-3
Rows = list[dict[str, Any]]
Scores = tuple[list[Tensor], list[Tensor]]  # of the groups and of the neurons of each block


def run(arms: Arms) -> None:
    from shoestring.jobs.evaluate import heldout
    from shoestring.methods.pruners import _shared, compresso
    from shoestring.models import Loaded, uneven
    from shoestring.training import TrainOptions

    steps = arms.size(3, 66)
    scores: dict[str, Callable[[Any, Rows], Scores]] = {
        "random": _random, "magnitude": _magnitude, "first-order": _first_order,
    }  # fmt: skip
    upper, rows, loaded = _upper(arms, {"train": steps, "test": arms.size(4, 48)})
    for arm in ("original", "compresso", *scores):
        model = copy.deepcopy(upper)
        settings: dict[str, Any] = {
            "max_steps": steps,
            "per_device_train_batch_size": 1,
            "save_steps": 0,
            "learning_rate": RATE,
        }
        work = Work(arms.ledger, arms.folder / arm, training=settings, seed=arms.seed)
        with arms.arm(arm) as stage:
            if arm == "compresso":
                options = compresso.CompressoOptions(SPARSITY, gate_learning_rate=0.4, healing_learning_rate=RATE)
                given = Loaded(model, loaded.tokenizer, loaded.path, loaded.ref, loaded.kind)
                small = compresso.prune(given, options, rows["train"], [], work).model
            elif arm == "original":
                small = model
            else:
                keep = _keep(model, scores[arm](model, rows["train"][:16]))
                small = uneven.shrink(model, keep)
                healing = TrainOptions(seed=arms.seed, **settings)
                small, _ = _shared.heal(small, rows["train"], [], healing, RANK, loaded.tokenizer, work)
            stage.record("block_weights", uneven.sizes(small).weights, "parameter", "counted")
            stage.record("perplexity", heldout(small, rows["test"]).perplexity.value, "perplexity", "measured")
        del model, small


class _Enough(Exception):
    """What lies above is not needed."""


def _upper(arms: Arms, sizes: Mapping[str, int]) -> tuple[Any, dict[str, Rows], Any]:
    """The layers from FIRST on as a model of their own, and rows whose ids name what enters the first of them.

    The stream below does not change while they are pruned: computed once, it stands in the token table.
    """
    from shoestring.models import inspect, surgery

    loaded = arms.load()
    model, anatomy = loaded.model, inspect(loaded.model)
    found, rows = [torch.zeros(1, model.config.hidden_size)], dict[str, Rows]()
    entering: list[Tensor] = []

    def keep(_: Any, given: tuple[Tensor, ...]) -> None:
        entering.append(given[0])
        raise _Enough

    hook = anatomy.blocks[FIRST].module.register_forward_pre_hook(keep)
    count = 1
    for part, encoded in arms.docs(loaded.tokenizer, sizes, max_length=LENGTH).items():
        rows[part] = []
        for row in encoded.rows:
            with torch.no_grad(), contextlib.suppress(_Enough):
                model(torch.tensor([row["input_ids"]]))
            length = len(row["input_ids"])
            found.append(entering.pop()[0])
            rows[part].append({**row, "input_ids": list(range(count, count + length))})
            count += length
    hook.remove()
    model.config.tie_word_embeddings = False
    head: Any = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    table = torch.nn.Embedding(len(head.weight), model.config.hidden_size, dtype=model.dtype)
    table.weight.data[:count] = torch.cat([some.to(model.dtype) for some in found])
    surgery.replace_module(model, anatomy.embeddings, table)
    surgery.drop_blocks(model, range(FIRST))
    return model, rows, loaded


def _keep(model: Any, scores: Scores) -> list[Any]:
    """What stays: of all groups the best, of each layer's neurons the best, as many as the budget has."""
    from shoestring.models import uneven

    sizes = uneven.sizes(model)
    groups, neurons = scores
    left = (1 - SPARSITY) * sizes.weights
    order = torch.cat(groups).argsort(descending=True)
    best = order[: round((1 - SPARSITY) * len(order))]
    stays = torch.zeros(len(order), dtype=torch.bool)
    stays[best] = True
    count = round((left - len(best) * sizes.group_cost) / sizes.neuron_cost)
    keep, at = [], 0
    for block, (own, others) in enumerate(zip(groups, neurons)):
        most = count // len(neurons) + (block < count % len(neurons))
        mine = stays[at : at + len(own)].nonzero()[:, 0].tolist()
        keep.append(uneven.Keep(mine, sorted(others.argsort(descending=True)[:most].tolist())))
        at += len(own)
    return keep


def _random(model: Any, rows: Rows) -> Scores:
    from shoestring.models import uneven

    blocks = uneven.sizes(model).blocks
    return [torch.rand(size.groups) for size in blocks], [torch.rand(size.neurons) for size in blocks]


def _magnitude(model: Any, rows: Rows) -> Scores:
    return _units(model, lambda weight: weight.detach().float() ** 2, lambda total: total)


def _first_order(model: Any, rows: Rows) -> Scores:
    """The change of the loss by the first term of its series when a part goes: |sum of weight times gradient|."""
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        model(ids, labels=labels).loss.backward()
    scores = _units(model, lambda weight: weight.detach().float() * _gradient(weight), torch.abs)
    model.zero_grad()
    return scores


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad.float()


def _units(model: Any, of: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor]) -> Scores:
    """Sums of a score of single weights over those that belong to a group of heads, and to a neuron."""
    from shoestring.models import inspect, uneven

    groups, neurons = [], []
    for block, size in zip(inspect(model).blocks, uneven.sizes(model).blocks):
        values = {role: of(model.get_submodule(name).weight) for role, name in block.projections.items()}
        parts = [values[role].reshape(size.groups, -1).sum(1) for role in ("q", "k", "v")]
        groups.append(finish(sum(parts, values["o"].T.reshape(size.groups, -1).sum(1))))
        neurons.append(finish(values["gate"].sum(1) + values["up"].sum(1) + values["down"].sum(0)))
    return groups, neurons

"""AmoebaLLM: train one model once, then cut smaller ones of any depth and width out of it, without further training.

How it works
    1. Which layers a shallower subnet keeps is found without training. best[n][m] is the best choice when the n last
       layers have been considered and m of them removed. Switching layer N - n off in best[n-1][m-1] makes a candidate;
       the loss of the whole model decides between it and best[n-1][m] (eq. 1). N M - M (M - 1) / 2 losses in all.
    2. Which groups of heads and neurons a narrower one keeps: the variance of each input of the layers that write to
       the residual stream, times ||W_:j||^2 (squared once more for attention), standardized within each layer, averaged
       over the heads that share keys and values (eq. 2). All layers together are sorted, a group of heads counting as
       many neurons as it has parameters, and kept until the width is reached (eq. 3). What is cut off is replaced by
       its mean: the bias W_removed E[x_removed] (eq. 4).
    3. Every step trains the whole model, two subnets of random depth and width, and the smallest one. Each linear layer
       has experts A_e, B_e; with the gates g of a subnet W' = W + alpha / r (sum g_e B_e)(sum g_e A_e) (eq. 5). The
       gates are the softmax over the best two of R(shape) + N(0, 1) softplus(R'(shape)) (eq. 6): one router for all
       layers, which sees only which layers are there and which width it is.
    4. The whole model learns from the labels, the others from its predictions at that moment:
       L_i = -sum p_0 log p_i (eq. 7). Each is brought to the same size: L_i <- L_i L_0 / L_i, the quotient being a
       constant (eq. 8).
    5. A subnet is cut out by dropping layers, slicing heads and neurons, writing the biases, and folding its mixture,
       which is one plain low-rank update, into the weights. That takes seconds, for as many shapes as wanted. With
       supernet=FOLDER among the options the supernet is kept there, and a later run that names the same folder and
       another depth or width trains nothing. What the step reports lists the held-out loss of every shape. In Python:

           catalog.module("amoeballm").extract("smollm2", "FOLDER", depth=24, width=0.75)

Where it bends
    The paper counts correct answers to 40 questions of MMLU to find the layers; here it is the loss of some text, which
    also tells small models apart. It keeps the base in 4 or 8 bit while it trains; here it stays as it is. The ratio of
    a group of heads to a neuron is computed and not the 512 / 3 of LLaMA-7B, and whole groups go, because keys and
    values are shared. Distillation looks at the positions that predict a label. The biases are those of the whole
    model's inputs; in a subnet with few layers the true means have drifted, which `recalibrate` mends. A depth between
    two numbers of layers is rounded. Only for Llama, Mistral, Qwen2 and Qwen3. It must train: without that, smaller
    models are far from the whole one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shoestring import models, training
from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape, Weight
from shoestring.core.step import Work
from shoestring.methods.pruners import _shared
from shoestring.methods.pruners._depth import LossWithout
from shoestring.methods.pruners._sandwich import Sandwich
from shoestring.methods.pruners._supernet import ABOUT, Plan, Supernet, make_plan, open_supernet

METHOD = Method(
    paper=Paper(
        "AmoebaLLM: Constructing Any-Shape Large Language Models for Efficient and Instant Deployment",
        "2024-11",
        arxiv="2411.10606",
        code="GATECH-EIC/AmoebaLLM",
    ),
    provides="AmoebaOptions",
    saves=("parameters", "latency", "memory", "storage", "compute"),
    combines={
        "adapters": "yes",
        "quantizers": "yes",
        "pruners": "its own depths and widths say how far a model is cut; another pruner would undo what they learned",
    },
)
NEEDS_DATA = True
TRAINING = {"learning_rate": 1e-3, "max_steps": 200, "per_device_train_batch_size": 4, "max_length": 256}


@dataclass(frozen=True)
class AmoebaOptions:
    """The shape to cut out, and the supernet to cut it from.

    Args:
        depth: share of the layers that the result has.
        width: share of the weights of its layers that it keeps, one of `widths`; an average over all layers.
        least_depth: share of the layers that the smallest subnet has.
        widths: of the subnets, falling from 1.
        last: layers at the end that always stay.
        search_tokens: tokens whose loss decides which layers go.
        watched_tokens: tokens over which the inputs of layers are watched.
        experts, top, rank, alpha: of the mixture of low-rank updates: how many, how many take part, and their size.
        between: random subnets in each step of training, beside the largest and the smallest.
        distillation: weight of the whole model's predictions in what the others learn; labels get the rest.
        supernet: folder that keeps what was found and trained. When it holds a supernet already, the shape is cut out
            of that and nothing is trained. Empty for one of the step's own, which is kept as well.
        recalibrate: take the means that stand for what is cut off anew, from the subnet itself.

    Raises:
        UsageError: values that make no supernet.
    """

    depth: float = 0.9
    width: float = 0.875
    least_depth: float = 0.625
    widths: tuple[float, ...] = (1.0, 0.875, 0.75, 0.625)
    last: int = 1
    search_tokens: int = 256
    watched_tokens: int = 8192
    experts: int = 5
    top: int = 2
    rank: int = 8
    alpha: float = 16.0
    between: int = 2
    distillation: float = 1.0
    supernet: str = ""
    recalibrate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        for name in ("depth", "width", "least_depth", "distillation"):
            value, least = getattr(self, name), 0 if name == "distillation" else 1e-9
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1:
                raise UsageError(f"{name} {value!r} is not possible", "it is a share, above 0 and at most 1")
        for name in ("last", "search_tokens", "watched_tokens", "experts", "top", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} {value!r} is not possible", "it is a whole number of at least 1")
        if self.widths[:1] != (1,) or list(self.widths) != sorted({*self.widths}, reverse=True) or self.widths[-1] <= 0:
            raise UsageError(f"widths {self.widths!r} are not possible", "they fall from 1", "Such as [1, 0.875, 0.75]")
        if self.width not in self.widths:
            raise UsageError(f"width {self.width!r} is none of the widths {self.widths!r}", remedy="Add it to widths")
        if self.top > self.experts or self.between < 0 or self.alpha <= 0:
            raise UsageError(
                f"top {self.top!r} of {self.experts!r} experts, between {self.between!r} and alpha {self.alpha!r} are "
                "not possible together",
                remedy="top is at most experts, between not below 0, alpha above 0",
            )

    @property
    def sparsity(self) -> float:
        """Share of the weights in the blocks' matrices that goes, if all layers were cut alike."""
        return 1 - self.depth * self.width


def example() -> AmoebaOptions:
    return AmoebaOptions(depth=1.0, width=0.75)


def settings() -> tuple[dict[str, Any], ...]:
    """The shapes worth trying, the gentlest first."""
    return ({"depth": 0.9, "width": 1.0}, {"depth": 0.9, "width": 0.875}, {"depth": 0.8, "width": 0.875})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """Layers of average width: which of them stays, and how wide, is not known before. Each has a bias for its heads
    and one for its neurons."""
    asked = AmoebaOptions(**{**settings()[0], **options})
    left = _layers(asked.depth, shape.layers)
    weights: list[Weight] = []
    trainable = 0
    for old, new in zip(shape.weights, _shared.thinned(shape, 1 - asked.width).weights):
        place = re.search(r"\.(\d+)\.", old.name)
        matrix = place is not None and len(old.dims) == 2
        if matrix:
            trainable += asked.experts * asked.rank * sum(old.dims)
        if place and int(place[1]) >= left:
            continue
        weights.append(new)
        if matrix and old.role in ("o", "down") and asked.width < 1:
            rows = old.dims[0]
            size = rows * old.resident // old.count
            weights.append(Weight(f"{old.name.removesuffix('weight')}bias", "bias", (rows,), size, size))
    after = replace(shape, weights=tuple(weights), layers=left)
    return Price(after, trainable=trainable, train_flops=2.0 * (2 + asked.between))


def prune(
    loaded: models.Loaded, options: AmoebaOptions, rows: _shared.Rows, valid: _shared.Rows, work: Work
) -> _shared.Pruned:
    """The shape that `options` ask for, cut out of the supernet that they name or that is trained for it."""
    folder = Path(options.supernet) if options.supernet else work.folder / "supernet"
    facts: dict[str, Any] = {"supernet": str(folder)}
    layers = len(models.inspect(loaded.model).blocks)
    if (folder / ABOUT).is_file():
        supernet = open_supernet(loaded.model, folder)
    else:
        supernet, facts["training"] = train_supernet(loaded, options, rows, work)
        supernet.save(folder)
        if valid:
            facts["shapes"] = compare_shapes(supernet, first_tokens(valid, options.search_tokens))
    subnet = supernet.plan.subnet(_layers(options.depth, layers), options.width)
    means = supernet.means(subnet, first_tokens(rows, options.watched_tokens)) if options.recalibrate else None
    facts |= {
        "depth": subnet.depth,
        "width": options.width,
        "removed_layers": [place for place, stays in enumerate(subnet.keep) if not stays],
        "weights_kept": supernet.weights_of(subnet) / supernet.size.weights,
    }
    return _shared.Pruned(supernet.extract(subnet, means), facts)


def train_supernet(
    loaded: models.Loaded,
    options: AmoebaOptions,
    rows: _shared.Rows,
    work: Work,
    plan: Plan | None = None,
) -> tuple[Supernet, dict[str, Any]]:
    """Plan and train the supernet around `loaded.model`, which becomes part of it; with what the training came to.

    Args:
        plan: what `plan_supernet` found, when that was done before.
        rows: `input_ids` and `labels`; the first of them, questions included, also say which layers and neurons stay.
        work: `training` has settings of the training loop, `folder` gets checkpoints.

    Raises:
        UsageError: a model that cannot be cut, or too small for what `options` ask.
    """
    plan = plan or plan_supernet(loaded.model, options, rows)
    supernet = Supernet(loaded.model, plan, options.experts, options.top, options.rank, options.alpha)
    with Sandwich(supernet, options.between, options.distillation) as sandwich:
        done = training.train(
            sandwich,
            rows,
            [],
            training.TrainOptions(**{"seed": work.seed, **work.training}),
            work.folder,
            tokenizer=loaded.tokenizer,
            ledger=work.ledger,
            resume=work.resume,
            loss_func=sandwich.loss,
        )
    return supernet.eval(), {"steps": done.steps, "tokens": done.tokens, "loss": done.loss}


def plan_supernet(model: PreTrainedModel, options: AmoebaOptions, rows: _shared.Rows) -> Plan:
    """Which layers, groups of heads and neurons each subnet keeps, found with the first of `rows`."""
    layers = len(models.inspect(model).blocks)
    least = _layers(min(options.least_depth, options.depth), layers)
    if least < options.last:
        raise UsageError(
            f"{least} layers cannot hold the {options.last} that always stay",
            f"{type(model).__name__} has {layers} in all",
            "Lower last, or raise depth and least_depth",
        )
    return make_plan(
        model,
        first_tokens(rows, options.search_tokens),
        first_tokens(rows, options.watched_tokens),
        least,
        options.widths,
        options.last,
    )


def compare_shapes(supernet: Supernet, rows: _shared.Rows) -> list[dict[str, Any]]:
    """Depth, width, share of the weights and loss on `rows` (nats a label) of every shape, to choose one by."""
    found = []
    for subnet in supernet.plan.subnets():
        with supernet.active(subnet):
            loss = LossWithout(supernet.model, rows).whole
        kept = supernet.weights_of(subnet) / supernet.size.weights
        width = supernet.plan.ratios[subnet.width]
        found.append({"depth": subnet.depth, "width": width, "weights_kept": kept, "loss": loss})
    return found


def extract(model: PreTrainedModel | str, supernet: Path | str, depth: int, width: float) -> PreTrainedModel:
    """The shape of `depth` layers at `width`, cut out of a supernet that was kept; nothing is trained.

    Args:
        model: the one the supernet was made from, which becomes part of it, or its name or folder.
        supernet: the folder that the option `supernet` named, or that the step reported.

    Raises:
        UsageError: no supernet there, one of another model, or a shape that it has not.
    """
    whole: Any = models.load(model).model if isinstance(model, str) else model
    opened = open_supernet(whole, supernet)
    return opened.extract(opened.plan.subnet(depth, width))


def first_tokens(rows: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Rows with the first `tokens` of `rows` together; each of them is a label, those of questions too."""
    found: list[dict[str, Any]] = []
    for row in rows:
        ids = list(row["input_ids"])[:tokens]
        tokens -= len(ids)
        if len(ids) > 1:
            found.append({"input_ids": ids, "labels": ids})
        if tokens < 2:
            break
    return found


def _layers(depth: float, layers: int) -> int:
    return max(1, round(depth * layers))

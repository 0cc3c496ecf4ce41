"""AmoebaLLM: what it takes out beside simple rules, and subnets that are trained together beside one trained alone."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from shoestring import data, models
from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.step import Work
from shoestring.data.corpus import Corpus, Example
from shoestring.jobs.evaluate import heldout
from shoestring.lab.arms import DATA, Arms
from shoestring.models import surgery

_PAPER = "state-of-the-art trade-offs of accuracy and efficiency for subnets that are derived instantly (no figure)"
_TEXT = "perplexity of 8 held-out texts of the Python documentation, at most 96 tokens each"
_MODEL = "SmolLM2-135M-Instruct (30 layers), bfloat16, "
_TRAINED = (
    _MODEL + "8 steps of one text of at most 96 tokens, AdamW; a supernet of 26 to 30 layers and widths 1, 15/16 and "
    "7/8, rank 8, 5 experts; "
)
CLAIMS = (
    Claim(
        "depth-last",
        paper=_PAPER,
        here=_MODEL + "26 layers left, untrained; layers found with 96 tokens; " + _TEXT,
        measure="perplexity",
        arm="search",
        against="last-layers",
        expect="< 1.0",
        cannot="layers found by the accuracy on MMLU, which is noise for so small a model",
    ),
    Claim(
        "depth-every-seventh",
        paper=_PAPER,
        here=_MODEL + "26 layers left, untrained; layers found with 96 tokens; " + _TEXT,
        measure="perplexity",
        arm="search",
        against="every-seventh",
        expect="< 1.0",
    ),
    Claim(
        "width",
        paper=_PAPER,
        here=_MODEL
        + "7/8 of the weights of the layers left, untrained; 1024 tokens watched; magnitude removes as many "
        "heads and neurons in each layer and adds no bias; " + _TEXT,
        measure="perplexity",
        arm="fluctuation",
        against="magnitude",
        expect="< 1.0",
    ),
    Claim(
        "trained",
        paper=_PAPER,
        here=_TRAINED + "26 layers at width 7/8, before and after; " + _TEXT,
        measure="perplexity",
        arm="subnet",
        against="untrained",
        expect="< 1.0",
    ),
    Claim(
        "six-shapes",
        paper="one fine-tuning, then subnets of any shape",
        here=_TRAINED
        + "30, 28 and 26 layers at widths 1 and 7/8; geometric mean of their perplexities of 2 texts before and after",
        measure="mean_perplexity",
        arm="subnet",
        against="untrained",
        expect="< 1.0",
    ),
    Claim(
        "alone",
        paper=_PAPER,
        here=_TRAINED + "26 layers at width 7/8 against the same shape trained alone with LoRA r 8 for as many steps; "
        "learning rates 5e-3 and 2e-3, neither searched; " + _TEXT,
        measure="perplexity",
        arm="subnet",
        against="alone",
        expect="<= 1.10",
        cannot="7B parameters, 10,000 steps and tables of tasks",
    ),
)
RATES = {"subnet": 5e-3, "alone": 2e-3}


def run(arms: Arms) -> None:
    amoeba = catalog.module("amoeballm")
    loaded = arms.load()
    steps = arms.size(1, 8)
    texts = _texts(arms, loaded.tokenizer, {"train": max(steps, arms.size(2, 12)), "test": arms.size(1, 8)})
    train, few = texts["train"], texts["test"]
    layers, least = arms.size(8, 30), arms.size(7, 26)
    if layers < 30:
        surgery.drop_blocks(loaded.model, range(layers, 30))
    options = amoeba.AmoebaOptions(
        depth=least / layers, least_depth=least / layers, width=0.875, widths=(1.0, 0.9375, 0.875),
        search_tokens=arms.size(12, 96), watched_tokens=arms.size(96, 1024),
    )  # fmt: skip
    with arms.arm("search"):
        plan = amoeba.plan_supernet(loaded.model, options, train)
    gone = {
        "search": [place for place, stays in enumerate(plan.keeps[-1]) if not stays],
        "last-layers": list(range(least, layers)),
        "every-seventh": list(range(6, layers, 7)),
    }
    for name, places in gone.items():
        with arms.arm(name) as stage:
            small = _without(loaded.model, places)
            stage.record("perplexity", _perplexity(small, few), "perplexity", "measured")
    make = amoeba.Supernet(copy.deepcopy(loaded.model), plan, 5, 2, 8, 16.0).eval()
    narrow = plan.subnet(layers, 0.875)
    for name in ("fluctuation", "magnitude"):
        with arms.arm(name) as stage:
            small = make.extract(narrow) if name == "fluctuation" else _by_magnitude(loaded.model, plan.widths[2])
            stage.record("perplexity", _perplexity(small, few), "perplexity", "measured")
    shape = plan.subnet(least, 0.875)
    with arms.arm("untrained") as stage:
        untrained = make.extract(shape)
        _record(stage, make, untrained, few, arms)
    with arms.arm("subnet") as stage:
        settings = {
            "learning_rate": RATES["subnet"],
            "max_steps": steps,
            "per_device_train_batch_size": 1,
            "save_steps": 0,
        }
        work = Work(None, arms.folder / "supernet", training=settings, seed=arms.seed)
        supernet, _ = amoeba.train_supernet(loaded, options, train[:steps], work, plan)
        _record(stage, supernet, supernet.extract(shape), few, arms)
    with arms.arm("alone") as stage:
        small = _tuned(untrained, train[:steps], steps, loaded.tokenizer, arms)
        stage.record("perplexity", _perplexity(small, few), "perplexity", "measured")


def _texts(arms: Arms, tokenizer: Any, sizes: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Rows of answers of some length, as plain text, for each part; the seed chooses which."""
    import torch

    parts = dict(zip(("train", "validation", "test"), data.split(data.read(DATA), seed=0)))
    order = torch.Generator().manual_seed(arms.seed)
    rows = {}
    for name, count in sizes.items():
        texts = [e.messages[-1]["content"] for e in parts[name].examples if len(e.messages[-1]["content"]) > 300]
        chosen = torch.randperm(len(texts), generator=order)[:count].tolist()
        corpus = Corpus([Example(text=texts[i]) for i in chosen], "text")
        rows[name] = list(data.encode(corpus, tokenizer, 96, on_long="truncate").rows)
    return rows


def _perplexity(model: Any, rows: Sequence[Any]) -> float:
    return heldout(model.eval(), rows).perplexity.value


def _record(stage: Any, supernet: Any, small: Any, rows: Sequence[Any], arms: Arms) -> None:
    stage.record("perplexity", _perplexity(small, rows), "perplexity", "measured")
    losses = []
    depths = sorted({subnet.depth for subnet in supernet.plan.subnets()})
    for depth, width in itertools.product(depths[:: arms.size(1, 2)], (1.0, 0.875)):
        with supernet.active(supernet.plan.subnet(depth, width)):
            losses.append(math.log(_perplexity(supernet.model, rows[: arms.size(1, 2)])))
    stage.record("mean_perplexity", math.exp(sum(losses) / len(losses)), "perplexity", "measured")


def _without(model: Any, places: Sequence[int]) -> Any:
    small = copy.deepcopy(model)
    surgery.drop_blocks(small, places)
    return small


def _by_magnitude(model: Any, width: Any) -> Any:
    """As many groups of heads and neurons in each layer as `width` has, those of the largest weights."""
    from shoestring.models import uneven

    keep = []
    for block, groups, neurons in zip(models.inspect(model).blocks, width.groups, width.neurons):
        weights = {role: model.get_submodule(name).weight.detach().float() for role, name in block.projections.items()}
        of_groups = sum(weights[role].view(len(groups), -1).square().sum(1) for role in ("q", "k", "v"))
        of_groups = of_groups + weights["o"].T.reshape(len(groups), -1).square().sum(1)
        of_neurons = sum(weights[role].square().sum(1) for role in ("gate", "up")) + weights["down"].square().sum(0)
        best = (norm.topk(int(stays.sum())).indices for norm, stays in ((of_groups, groups), (of_neurons, neurons)))
        heads, inner = (sorted(places.tolist()) for places in best)
        keep.append(uneven.Keep(heads, inner))
    return uneven.shrink(model, keep)


def _tuned(model: Any, rows: Sequence[Any], steps: int, tokenizer: Any, arms: Arms) -> Any:
    from shoestring.training import TrainOptions, train

    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    wrapped = catalog.contract("adapters").wrap(catalog.module("lora"), model, options)
    settings = TrainOptions(
        learning_rate=RATES["alone"], max_steps=steps, per_device_train_batch_size=1, save_steps=0, seed=arms.seed
    )
    train(wrapped, rows, [], settings, arms.folder / "alone", tokenizer=tokenizer)
    return wrapped

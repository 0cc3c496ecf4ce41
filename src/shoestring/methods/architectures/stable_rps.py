"""STABLE-RPS: all weights of a network are hashed into one small array, which trains stably at any compression.

How it works
    n is the number of weights in embeddings and linear layers; biases, norms and modules below `smallest` stay as they
    are. One trained array psi has m = floor(kept n) numbers, and m is written into the configuration.
    1. Weight j of the model, counted through all modules in their order, is W[j] = lambda g(j) psi[h(j)], with a scale
       lambda for each module and a sign g(j) from a hash. Weights that are tied are counted once.
    2. `fold` maps by random folds: the chunk j div m of m weights in a row is the array, turned by a hash of the chunk:
       h(j) = (H(j div m) + j mod m) mod m, H(x) = ((a x + b x^2 + c) mod P) mod m. Every slot then serves floor(n / m)
       or ceil(n / m) weights, weights closer than m share none within a chunk, and each matrix is a few slices. With
       m >= n there is one chunk, so the model is the original one, turned.
    3. `roast` is what it is compared with: blocks of 16 x 16 weights, or 8 of an embedding's row, each lie anywhere in
       psi, h = H(block) mod (m - block) onward. They overlap at random, and slots serve unequally many weights.
    4. A new model draws psi from U(-i, i), i = `spread`, and lambda = s sqrt(3) / i, s the family's own deviation.
    5. The gradient of psi[s] is the sum over its users of lambda g dL/dW. A step of W so becomes lambda^2 times as
       large, and i is a hidden learning rate. Before it reaches clipping and optimizer, it is divided by Gamma:
       v1  Gamma[s] = (sum of lambda)^2 / (count + 1e-3) + 1e-6, which makes it the mean over the users in terms of W;
       v2  sum of lambda; v3 mean of lambda; v4 sqrt(sum of lambda^2); v5 sum of lambda^2; none leaves it.
    6. No matrix is kept: forward and backward each gather what one layer needs, embeddings only the rows of their
       tokens, and the backward pass adds into one float32 array of m. Optimizers hold m numbers, the file holds psi.
    7. A trained model is converted by least squares, psi[s] = sum(lambda g W) / sum(lambda^2) over the users of s, with
       lambda from the deviation of each matrix. With the fold and kept >= 1 lambda is 1 and the result exact.

Where it bends
    Storage and training memory fall, multiplications and additions do not: each layer computes with its full matrix,
    and gathering it costs time besides. A trained model that is converted with kept < 1 is destroyed, since the map is
    not learned: it needs training, nearly as much as a new one; only kept >= 1 is exact. The sqrt(3) of step 4, which
    makes the deviation right, is not in the authors' simulation. m below n is raised until it has no divisor in common
    with a row's length, so that rows do not meet in step. Weight decay of psi acts on W with lambda^2; leave it off. A
    new model is built densely for a moment before its matrices are dropped; loading one is not. Llama-like families
    only, so no convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import PROJECTIONS, Shape, Weight
from shoestring.core.step import Work
from shoestring.methods.architectures import _shared
from shoestring.methods.architectures._array import NAME, Map, Place, Shared, SharedEmbedding, SharedLinear, size_of
from shoestring.models.derived import plain
from shoestring.models.load import quiet
from shoestring.models.surgery import replace_module
from shoestring.training import TrainOptions, train

METHOD = Method(
    paper=Paper("In defense of parameter sharing for model-compression", "2023-10", code="apd10/FakeRoast"),
    provides="StableRPSLlamaConfig",
    saves=("parameters", "storage", "memory", "network"),
    combines={
        "quantizers": "all layers read one array, which has no rows with scales of their own",
        "adapters": "they attach to layers that hold a weight, and here none does",
        "pruners": "a number of the array serves many layers, so no layer's part of it can be cut out",
        "architectures": "it is made from a plain model of its family",
    },
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NEUTRAL: dict[str, Any] = {"kept": 1.0}
TRAINING = {"learning_rate": 1e-3, "warmup_ratio": 0.1, "weight_decay": 0.0}
MAPPINGS = ("fold", "roast")
SCALERS = ("v1", "v2", "v3", "v4", "v5", "none")


@dataclass(frozen=True)
class StableRPSOptions:
    """What may be said about a conversion.

    Attributes:
        kept: c, the size of psi as a share of the weights it stands for.
        mapping: "fold", or "roast" for the baseline.
        scaler: what gradients are divided by: v1 to v5, or "none".
        spread: i, where psi begins.
        signs: weights have signs of their own.
        smallest: modules of fewer weights stay as they are.
        map_seed: chooses the map.
        heal: train afterwards, where there is text and kept < 1.
    """

    kept: float = 0.1
    mapping: str = "fold"
    scaler: str = "v1"
    spread: float = 0.05
    signs: bool = True
    smallest: int = 0
    map_seed: int = 0
    heal: bool = True

    def __post_init__(self) -> None:
        for name in ("kept", "spread"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UsageError(f"{name} is {value!r}", "it is above 0")
        for name, known in (("mapping", MAPPINGS), ("scaler", SCALERS)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {getattr(self, name)!r}", remedy=f"Known: {', '.join(known)}")
        for name in ("smallest", "map_seed"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UsageError(f"{name} is {value!r}", "it is a whole number of at least 0")


# --- the architecture -------------------------------------------------------------------------------------------------


class _Hashed:
    """Goes before a family's own model class: its embeddings and linear layers read one array."""

    _tied_weights_keys = None  # what is tied has one place in the array
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        places = places_of(model, config.smallest)
        unique = {place.offset: place for place in places.values()}
        if config.shared_size is None:
            config.shared_size = sum(place.size for place in unique.values())
        usual = config.initializer_range * math.sqrt(3) / config.spread  # step 4
        scales = dict(zip(unique, config.scales or [usual] * len(unique), strict=True))
        places = {name: replace(place, scale=scales[place.offset]) for name, place in places.items()}
        array = Map(config.shared_size, config.map_seed, config.mapping, config.signs)
        shared = Shared(model, array, tuple({p.offset: p for p in places.values()}.values()), config.scaler)
        for name, place in places.items():
            old = model.get_submodule(name)
            made = (
                SharedEmbedding(shared, place, old.padding_idx)
                if isinstance(old, nn.Embedding)
                else SharedLinear(shared, place, old.bias)
            )
            replace_module(model, name, made)
        model.register_parameter(NAME, nn.Parameter(torch.empty(array.m).uniform_(-config.spread, config.spread)))


def places_of(model: Any, smallest: int = 0) -> dict[str, Place]:
    """Full name of each embedding and linear layer -> its place; tied ones have the same."""
    found: dict[str, Place] = {}
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    offset, first = 0, ""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.numel() < smallest:
            continue
        if model.config.tie_word_embeddings and module in ends:
            if first:
                found[name] = found[first]
                continue
            first = name
        rows, columns = module.weight.shape
        found[name] = Place(name, offset, rows, columns, isinstance(module, nn.Embedding))
        offset += rows * columns
    return found


FIELDS: dict[str, tuple[Any, Any]] = {
    "shared_size": (int | None, None), "scales": (list[float] | None, None), "mapping": (str, "fold"),
    "scaler": (str, "v1"), "spread": (float, 0.05), "signs": (bool, True), "smallest": (int, 0), "map_seed": (int, 0),
}  # fmt: skip
MODELS = tuple(_shared.derive(family, __name__, "StableRPS", _Hashed, FIELDS) for family in FAMILIES)
globals().update({made.__name__: made for pair in MODELS for made in pair})


def example() -> StableRPSOptions:
    """The configuration that checks, documentation and the first-time user run."""
    return StableRPSOptions(kept=0.5)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, the gentlest first."""
    return ({"kept": 0.5}, {"kept": 0.25}, {"kept": 0.1})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """m numbers in place of n; every matrix is still multiplied with."""
    known = {name: value for name, value in options.items() if name in StableRPSOptions.__dataclass_fields__}
    chosen = StableRPSOptions(**{**settings()[0], **known})
    inside = [
        w
        for w in shape.weights
        if w.role in PROJECTIONS | {"embed", "head"} and len(w.dims) == 2 and w.count >= chosen.smallest
    ]
    counted = [w for w in inside if not w.tied]
    count = sum(w.count for w in counted)
    m = size_of(count, [w.dims[1] for w in counted], chosen.kept)
    each, held = (sum(getattr(w, kind) for w in counted) / max(1, count) for kind in ("stored", "resident"))
    array = Weight(NAME, "other", (m,), round(m * each), round(m * held))
    names = {w.name for w in inside}
    left = tuple(replace(w, stored=0, resident=0, tied=NAME) if w.name in names else w for w in shape.weights)
    made = replace(shape, weights=(array, *left))
    return Price(made, trainable=made.parameters if chosen.heal and chosen.kept < 1 else 0, train_flops=3.0)


# --- conversion -------------------------------------------------------------------------------------------------------


def convert(model: PreTrainedModel, options: StableRPSOptions, rows: _shared.Rows) -> _shared.Converted:
    """The same model on one array; exact with the fold and kept >= 1, else in need of training.

    Raises:
        UsageError: a model of another family, or an array too small for the blocks of `roast`.
    """
    family = _family(model)
    places = list({p.offset: p for p in places_of(model, options.smallest).values()}.values())
    count = sum(p.size for p in places)
    m = size_of(count, [p.columns for p in places], options.kept)
    exact = m >= count and options.mapping == "fold"
    parameters: dict[str, Tensor] = {f"{p.name}.weight": model.get_parameter(f"{p.name}.weight") for p in places}
    if not exact:
        deviations = [float(weight.detach().float().std(correction=0)) for weight in parameters.values()]
        places = [replace(p, scale=max(s, 1e-6) * 3**0.5 / options.spread) for p, s in zip(places, deviations)]
    holder = nn.Module()  # of the array to be
    holder.register_parameter(NAME, nn.Parameter(torch.empty(m, device=model.device)))
    array = Map(m, options.map_seed, options.mapping, options.signs)
    shared = Shared(holder, array, tuple(places), options.scaler)
    total, norm = torch.zeros(m, device=shared.psi.device), shared.users(2)
    for place in places:
        weight = parameters[f"{place.name}.weight"].detach().float()
        shared.scatter(total, place, shared.signed(weight.clone(), place))
    psi = (total / norm.where(norm > 0, 1.0)).to(model.dtype)  # step 7
    gone = {id(parameter) for parameter in parameters.values()}
    state = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in gone}
    state[NAME] = psi
    own = {k: v for k, v in asdict(options).items() if k not in ("kept", "heal")}
    own |= {"shared_size": m, "scales": [p.scale for p in places]}
    built = _shared.built(MODELS[FAMILIES.index(family)], model, state, **own)
    counts = shared.users(0)
    facts = {"shared": count, "array": m, "exact": exact, "load": [int(counts.min()), int(counts.max())]}
    return _shared.Converted(built, facts)


def heal(
    converted: _shared.Converted,
    base: PreTrainedModel,
    options: StableRPSOptions,
    rows: _shared.Rows,
    valid: _shared.Rows,
    work: Work,
) -> dict[str, Any]:
    """Train the array, norms and biases on the text; without it nothing below kept = 1 is of use."""
    if not options.heal or converted.facts["exact"]:
        return {"steps": 0}
    settings = TrainOptions(**{"seed": work.seed, **work.training})
    model = converted.model
    result = train(model, list(rows), list(valid), settings, work.folder, ledger=work.ledger, resume=work.resume)
    return {"steps": result.steps, "tokens": result.tokens}


@torch.no_grad()
def materialize(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model of its family with the same matrices."""
    family = model.config.model_type.removeprefix(f"{_shared.PREFIX}stable_rps_")
    config: Any = CONFIG_MAPPING[family]
    known = set(config().to_dict()) - {"model_type", "architectures"}
    state = {name: value.detach().clone() for name, value in model.named_parameters() if name != NAME}
    for name, module in model.named_modules():
        if isinstance(module, SharedLinear | SharedEmbedding) and module.place.name == name:
            state[f"{name}.weight"] = module.shared.matrix(module.place)
    said = {k: v for k, v in model.config.to_dict().items() if k in known}
    with quiet():
        built = plain(family).from_pretrained(None, config=config(**said), state_dict=state, dtype=model.dtype)
    built.generation_config = deepcopy(model.generation_config)
    return built.eval()  # type: ignore[no-any-return]


def _family(model: PreTrainedModel) -> str:
    why = "its matrices are not known to stand in linear layers and embeddings alone"
    return _shared.family_of(model, FAMILIES, "STABLE-RPS", why)

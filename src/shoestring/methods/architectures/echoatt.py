"""EchoAtt: neighbouring inner layers share one attention matrix, and distillation repairs what that damages.

How it works
    1. Attend. The model reads some texts; of each layer l the attention probabilities P_l [heads, T, T] are taken as
       one long vector, and S[i, j] is the cosine of those of layers i and j, averaged over the texts. Inner layers of
       a language model are much alike; the first and the last differ.
    2. The inner layers are cut into blocks of `block_size` consecutive layers, as many as fill `share` of them, placed
       where the mean cosine of a block's leader and its followers is largest in sum. First and last layer stay alone.
    3. Copy. The leader of a block, its first layer, computes P = softmax(Q K^T / sqrt(d) + mask). The others, its
       followers, take that P for the same tokens: out_l = concat_h(P_h V_l,h) W_O,l. They lose W_Q and W_K,
       d d + d d_kv parameters each, and with them the product Q K^T, rotation, softmax, and the keys in the cache.
       Everything else is copied.
    4. Adjust. First the student learns from the frozen model it was made of: L1 = a L_int + b L_soft + c L_hard, with
       hidden states after each block, softened distributions, and tokens drawn from the teacher's. Then it is trained
       on the true next tokens. The first stage takes `first_stage` of the steps.

Where it bends
    The paper names the loss terms and not their weights: here a = b = c = 1, T = 2, L_int relative to the teacher's
    mean square. Fused attention never shows P, so in transformers leaders compute it strip by strip, which on a CPU
    costs about what fused attention does; on a GPU it may cost more than sharing saves: measure there. The engine's
    kernels keep it as they go. P of one block is in memory at a time, heads T^2 / 2 numbers for a text read at once,
    heads T for each new token in the engine, and all blocks' while training. A model that was not trained to share
    loses quality with every block, and short training gives only some of it back. Gradient checkpointing and fused
    attention by name (flash, flex) are refused. Layers with different windows do not share a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.core.step import Work
from shoestring.methods.architectures import _attention, _shared
from shoestring.methods.architectures._distill import Terms, distill
from shoestring.models.anatomy import attention_of, inspect
from shoestring.training import TrainOptions, train

METHOD = Method(
    paper=Paper("EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models", "2024-09", "2409.14595"),
    provides="EchoAttLlamaConfig",
    saves=("parameters", "storage", "memory", "compute", "latency"),
    combines={
        "quantizers": "yes",
        "adapters": "yes",
        "pruners": "layers of unequal heads cannot share one matrix, and the map of layers knows of no lost ones",
        "architectures": "it is made from a plain model of its family",
    },
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NEUTRAL: dict[str, Any] = {"block_size": 1}
TRAINING = {"learning_rate": 2e-4, "warmup_ratio": 0.1, "per_device_train_batch_size": 4, "max_steps": 200}


@dataclass(frozen=True)
class EchoAttOptions:
    """What may be said about a conversion.

    Attributes:
        block_size: layers of a block; 1 shares nothing.
        share: of the inner layers, how much stands in blocks.
        texts, tokens: how many texts similarity is measured on, and where they are cut.
        heal: train after sharing; without it quality is what sharing leaves of it.
        first_stage: of the training, how much is the first stage.
        inside, soft, hard, temperature: weights of the first stage's loss, and how soft distributions are compared.
        top: ask the teacher once and keep this many of its likeliest tokens; None asks it at every step, for all.
    """

    block_size: int = 2
    share: float = 0.2
    texts: int = 16
    tokens: int = 256
    heal: bool = True
    first_stage: float = 0.7
    inside: float = 1.0
    soft: float = 1.0
    hard: float = 1.0
    temperature: float = 2.0
    top: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("texts", 1), ("tokens", 2), ("top", 1)):
            value = getattr(self, name)
            if not (value is None and name == "top") and (type(value) is not int or value < least):
                raise UsageError(f"{name} is {value!r}", f"it is a whole number of at least {least}")
        for name, most in (("share", 1.0), ("first_stage", 1.0), ("inside", None), ("soft", None), ("hard", None)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or value < 0 or (most is not None and value > most):
                raise UsageError(
                    f"{name} is {value!r}", "it is at least 0" + (f" and at most {most:g}" if most else "")
                )
        if not isinstance(self.temperature, int | float) or self.temperature <= 0:
            raise UsageError(f"temperature is {self.temperature!r}", "it is above 0")


class _Shares:
    """Goes before a family's own model class: some of its layers take the attention weights of others."""

    supports_gradient_checkpointing = False  # what a layer hands on would have to be computed again with it
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        _attention.share(self, config.share_map)  # type: ignore[arg-type]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if _shares(self.config.share_map) and requested_attention in _attention.PLAIN:
            return _attention.NAME
        return super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc, no-any-return]


def _check_map(config: Any) -> None:
    given, layers = config.share_map, config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [""] * layers
    followers = [(layer, leader) for layer, leader in enumerate(given) if leader != layer]
    if len(given) != layers or any(
        not 0 <= leader < layer or given[leader] != leader or kinds[leader] != kinds[layer]
        for layer, leader in followers
    ):
        raise ValueError(
            f"share_map {given} must name for each of the {layers} layers itself, or an earlier layer of its kind that "
            "has its own attention weights"
        )


def _shares(share_map: Sequence[int]) -> bool:
    return list(share_map) != list(range(len(share_map)))


def _share_nothing(config: Any) -> None:
    if config.share_map is None:
        config.share_map = list(range(config.num_hidden_layers))


MODELS = tuple(
    _shared.derive(
        family, __name__, "EchoAtt", _Shares, {"share_map": (list[int] | None, None)}, _share_nothing, _check_map
    )
    for family in FAMILIES
)
globals().update({made.__name__: made for pair in MODELS for made in pair})


def example() -> EchoAttOptions:
    """The configuration that checks, documentation and the first-time user run."""
    return EchoAttOptions(share=1.0)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, the gentlest first."""
    return (
        {"block_size": 2, "share": 0.2},
        {"block_size": 2, "share": 0.4},
        {"block_size": 2, "share": 0.8},
        {"block_size": 4, "share": 0.8},
    )


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """d d + d d_kv parameters less for each follower, and its keys less in the cache (step 3)."""
    chosen = EchoAttOptions(**{**settings()[0], **options})
    followers = count_blocks(shape.layers, chosen) * (chosen.block_size - 1)
    # Which layers follow is known after measuring; all are of one size, so any will do.
    owners = [w.name.rpartition(".")[0].rpartition(".")[0] for w in shape.of("q") if w.name.endswith(".weight")]
    without = tuple(f"{owner}." for owner in owners[len(owners) - followers :])
    stays = {w.name.rpartition(".")[0] for w in shape.of("v", "o")}
    left = tuple(w for w in shape.weights if not w.name.startswith(without) or w.name.rpartition(".")[0] in stays)
    made = replace(shape, weights=left, keyless=shape.keyless + followers)
    # Three passes of the student and one of the teacher.
    return Price(made, trainable=made.parameters if chosen.heal and followers else 0, train_flops=4.0)


def count_blocks(layers: int, options: EchoAttOptions) -> int:
    """How many blocks the inner ones of `layers` are cut into."""
    return int(options.share * (layers - 2) / options.block_size + 1e-9) if options.block_size > 1 else 0


def convert(model: PreTrainedModel, options: EchoAttOptions, rows: _shared.Rows) -> _shared.Converted:
    """Measure on `rows` which layers are alike, and let the followers among them take their leaders' weights.

    Raises:
        UsageError: a model of another family or with too few layers, or no text to measure on.
    """
    layers = len(inspect(model).blocks) if _family(model) else 0
    facts: dict[str, Any] = {}
    share_map = list(range(layers))
    if options.block_size > 1:
        count = count_blocks(layers, options)
        if count < 1:
            raise UsageError(
                f"EchoAtt finds no block of {options.block_size} layers to share in {type(model).__name__}",
                f"share={options.share:g} of its {max(0, layers - 2)} inner layers is less than that",
                "Raise share, lower block_size, or take a deeper model",
            )
        if not rows:
            raise UsageError(
                "EchoAtt measures on text which layers are alike, and there is none", remedy="Add --data FILE"
            )
        similarity = measure(model, rows, options.texts, options.tokens)
        kinds = getattr(model.config, "layer_types", None) or [""] * layers
        starts = place(similarity, count, options.block_size, kinds)
        share_map = map_of(layers, starts, options.block_size)
        facts["similarity"] = [[round(value, 5) for value in row] for row in similarity.tolist()]
        facts["blocks"] = [list(range(start, start + options.block_size)) for start in starts]
    return _shared.Converted(student(model, share_map), {"share_map": share_map, **facts})


@torch.no_grad()
def measure(model: PreTrainedModel, rows: _shared.Rows, texts: int, tokens: int) -> Tensor:
    """Cosine of the layers' attention probabilities, [layers, layers], mean over the first `texts` rows (step 1).

    Args:
        tokens: how many of a text are read; at least two are needed to say anything.
    """
    plain, found = model.config._attn_implementation, []
    model.set_attn_implementation("eager")  # the one that shows them
    try:
        for row in rows:
            ids = torch.as_tensor(row["input_ids"][:tokens], device=model.device)[None]
            if ids.shape[1] < 2:
                continue
            seen = model(ids, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
            flat = torch.stack([torch.nn.functional.normalize(p.flatten().float(), dim=0) for p in seen])
            found.append((flat @ flat.T).double())
            if len(found) == texts:
                break
    finally:
        model.set_attn_implementation(plain)
    if not found:
        raise UsageError("no text has two tokens", "one token attends to itself alone", "Give longer texts")
    return torch.stack(found).mean(0).cpu()


def place(similarity: Tensor, count: int, size: int, kinds: Sequence[str]) -> list[int]:
    """First layers of `count` separate blocks of `size` inner layers that are most alike (step 2).

    Alike is the mean cosine of a block's leader with its followers; the sum over the blocks is the largest there is.

    Raises:
        UsageError: layers of different kinds stand too close for so many blocks.
    """
    layers = len(similarity)
    # best[c]: sum and places of c blocks in the layers before the one that is looked at.
    best: list[list[tuple[float, list[int]] | None]] = [[(0.0, []), *[None] * count]]
    for end in range(1, layers):
        row = list(best[-1])
        start = end - size
        if start >= 1 and len(set(kinds[start:end])) == 1:
            alike = float(similarity[start, start + 1 : end].mean())
            for blocks, known in enumerate(best[start][:count], 1):
                taken = row[blocks]
                if known is not None and (taken is None or known[0] + alike > taken[0]):
                    row[blocks] = known[0] + alike, [*known[1], start]
        best.append(row)
    chosen = best[-1][count]
    if chosen is None:
        raise UsageError(
            f"{count} blocks of {size} layers cannot be placed",
            "layers that see unequally far do not share attention",
            "Lower share or block_size",
        )
    return chosen[1]


def map_of(layers: int, starts: Sequence[int], size: int) -> list[int]:
    """For each layer the one whose attention weights it takes, with blocks of `size` that begin at `starts`."""
    leaders = {layer: start for start in starts for layer in range(start, start + size)}
    return [leaders.get(layer, layer) for layer in range(layers)]


def student(model: PreTrainedModel, share_map: Sequence[int]) -> PreTrainedModel:
    """A copy of `model` whose layers take attention weights as `share_map` says (step 3); nothing is shared with it."""
    made = MODELS[FAMILIES.index(_family(model))]
    anatomy = inspect(model)
    followers = [block for block in anatomy.blocks if share_map[block.index] != block.index]
    lost = tuple(f"{attention_of(block)}." for block in followers)
    kept = tuple(f"{block.projections[role]}." for block in followers for role in ("v", "o"))
    state = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if not name.startswith(lost) or name.startswith(kept)
    }
    return _shared.built(made, model, state, share_map=list(share_map))


def heal(
    converted: _shared.Converted,
    base: PreTrainedModel,
    options: EchoAttOptions,
    rows: _shared.Rows,
    valid: _shared.Rows,
    work: Work,
) -> dict[str, Any]:
    """Both stages of training (step 4): on what `base` says of the rows, then on their own next tokens."""
    share_map = converted.facts["share_map"]
    if not options.heal or not _shares(share_map):
        return {}
    ends = sorted({leader: layer for layer, leader in enumerate(share_map) if layer != leader}.values())
    terms = Terms(options.inside, options.soft, options.hard, options.temperature, options.top)
    first, second = _budgets(dict(work.training), options.first_stage)
    facts: dict[str, Any] = {"compared_after": ends}
    if first:
        settings = TrainOptions(**{"seed": work.seed, **first})
        done = distill(
            converted.model, base, ends, terms, rows, settings, work.folder / "first-stage",
            ledger=work.ledger, resume=work.resume,
        )  # fmt: skip
        facts["first_stage"] = {"steps": done.steps, "tokens": done.tokens, "loss": done.loss}
    if second:
        settings = TrainOptions(**{"seed": work.seed, **second})
        done = train(
            converted.model, rows, valid, settings, work.folder / "second-stage",
            ledger=work.ledger, resume=work.resume,
        )  # fmt: skip
        facts["second_stage"] = {"steps": done.steps, "tokens": done.tokens, "loss": done.loss}
    return facts


def _budgets(training: dict[str, Any], share: float) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The settings of both stages, each with its part of steps, epochs and seconds; None for a stage without any."""
    steps = training.get("max_steps", -1)
    stages: list[dict[str, Any] | None] = []
    for part in (share, 1 - share):
        own = {**training, "num_train_epochs": training.get("num_train_epochs", 1.0) * part}
        if training.get("max_seconds"):
            own["max_seconds"] = training["max_seconds"] * part
        if steps > 0:
            first = round(steps * share)
            own["max_steps"] = first if not stages else steps - first
        stages.append(own if part > 0 and own.get("max_steps") != 0 else None)
    return stages[0], stages[1]


def _family(model: PreTrainedModel) -> str:
    why = "its layers are not known to compute queries, keys and values apart"
    return _shared.family_of(model, FAMILIES, "EchoAtt", why)

"""Mixed: give every layer its own format, the sensitive ones more bits, so that the whole stays within a limit.

How it works
    1. Some text runs through the model once, forwards and backwards, with next tokens drawn from the model itself: then
       the mean square of a gradient is its Fisher information. For a layer y = W x with gradients g of the
       log-likelihood at y, an error D of W does the harm of half of the mean over tokens of (g' D x)^2: the divergence
       of next-token distributions that it alone would cause, to second order (the paper measures that divergence by
       running the model once for each layer and format). With errors of rows that know nothing of each other this is
       half of the mean of sum_r a_r d_r' F d_r, where d_r is a row of D, F = sum |g|^2 x x' over tokens, and a_r the
       share of output r in the sum of |g|^2. So one matrix F tells of every format what it costs, and tokens count by
       how much they matter.
    2. Harms add up. The plan with the least sum within the limit is found exactly: a knapsack, solved by bytes (the
       paper's Pareto front, without its search). The errors that count are those after step 3, which in column i are
       rounding errors that cost 1 / U_ii^2; they are tried on some rows of each layer.
    3. Block by block, with the inputs that the blocks before now give, each layer is rounded column by column; the
       columns still to come make up for the error of those before (GPTQ, 2210.17323): with F in place of its X'X and U
       the upper Cholesky factor of the inverse, err = (w_i - q_i) / U_ii and W[:, i:] -= err U[i, i:]. A group's scale
       and offset are taken when its first column comes. A token table has no inputs: its F is the diagonal sum of g g',
       and that of a head that is tied to it is added.
    4. The experts of a layer get two formats, one for gate and up and one for down. Each expert has an F of its own, of
       the tokens that are routed to it; harms of experts add up as those of layers do. One that fewer than 16 tokens
       meet is rounded to the nearest.

Where it bends
    The paper makes its own calibration data; here it is text, which the user gives, and which favours its own domain.
    Plain integers (int4, int8) are rounded to the nearest, as everything is with rounding=nearest and in models that
    are not causal. Fewer than 3 bits cost small models dearly.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape, Weight
from shoestring.core.step import Work
from shoestring.core.text import show_bytes
from shoestring.kernels import formats, layout
from shoestring.kernels.formats import Format
from shoestring.kernels.reference import refuse_not_finite
from shoestring.methods.quantizers._fisher import TOGETHER, Place, Seen, block_forms, look, mixtures_of, owner_of
from shoestring.models import packed, shape_of, surgery
from shoestring.models.anatomy import DOWN, GATE_UP, gated_experts, inspect, stacked
from shoestring.models.packed import PARTS, PackedConfig, PackedExperts, linear_dims, packable, tied_head
from shoestring.training.lean import give_back_holes

METHOD = Method(
    paper=Paper(
        "ZeroQ: A Novel Zero Shot Quantization Framework", "2020-01", arxiv="2001.00281", code="amirgholami/ZeroQ"
    ),
    provides="MixedConfig",
    saves=("storage", "memory", "latency", "energy"),
    combines={
        "adapters": "yes",
        "pruners": "yes",
        "architectures": "it runs blocks one at a time, and these may take things from each other",
        "quantizers": "the weights are integers already",
    },
    expects={
        "check_bytes_are_as_promised": "which formats it takes follows from the weights; it promises a limit",
        "check_error_bound": "it rounds some weights further to make up for the errors of others",
        "check_listed_modules_are_left_alone": "layers left alone count, and then the limit is too small for the rest",
    },
)

AS_STORED = True
OFFERED = tuple(f"uniform{bits}/{group}" for bits in range(2, 7) for group in (32, 64, 128)) + ("int8/64",)
ROUNDING = ("compensated", "nearest")
WINDOW = 256  # tokens that are read together
SAMPLED = 128  # rows of a matrix whose errors stand for those of all
FEWEST = 8  # rows of each of a layer's experts
DAMPING = 0.01  # of the mean diagonal of H
RANGES = (1.0, 0.9, 0.8, 0.7)  # shares of a group's range that are tried
UNITS = 1 << 16  # parts of the limit that formats are chosen by


class MixedConfig(PackedConfig):
    """Formats by layer under a limit.

    Args:
        bits: the most bits for each weight of the model, all tensors included. One of `bits` and `bytes` is given.
        bytes: the most bytes of all tensors.
        offered: formats to choose from.
        rounding: "compensated" (step 3) or "nearest".
        calibration: tokens of text that harms are measured and rounding is fitted on.
        modules_to_not_convert: names, or parts of names, of modules to leave alone.
        packing: module -> format, a plan of one's own in place of steps 1 and 2.
    """

    method = "mixed"

    def __init__(
        self,
        bits: float | None = None,
        bytes: int | None = None,
        offered: Sequence[str] = OFFERED,
        rounding: str = "compensated",
        calibration: int = 4096,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(modules_to_not_convert, **kwargs)
        self.bits, self.bytes, self.offered = bits, bytes, list(offered)
        self.rounding, self.calibration = rounding, calibration
        if (bits is None) == (bytes is None) and not self.packing:
            raise UsageError("mixed formats need a limit", remedy="Give bits=3.5 or bytes=60000000, and not both")
        for name, value in (("bits", bits), ("bytes", bytes)):
            if value is not None and not value > 0:
                raise UsageError(f"{name}={value} is no limit", remedy="Use a number above 0")
        if rounding not in ROUNDING:
            raise UsageError(f"rounding={rounding!r} is not possible", remedy=f"Use one of {', '.join(ROUNDING)}")
        if not offered:
            raise UsageError("no formats are offered", remedy="Name some, such as uniform4/64")
        for spec in self.offered:
            if layout.parse(spec).says_its_size or layout.parse(spec).kind not in ("int", "uniform"):
                raise UsageError(f"{spec} has no plain rounding", remedy="Offer integers: int4, int8 or uniform2 to 6")

    def limit(self, parameters: int) -> int:
        """The most bytes of a model with so many parameters."""
        return int(self.bytes) if self.bytes is not None else int(float(self.bits or 0) * parameters / 8)


@dataclass(frozen=True)
class Choice:
    """A format for one module: its bytes, and the divergence it is expected to cause, in nat."""

    spec: str
    bytes: int
    harm: float


def example() -> MixedConfig:
    return MixedConfig(bits=4.5)


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most bits first."""
    return tuple({"bits": bits} for bits in (6.0, 5.0, 4.5, 4.0, 3.5))


def within(limit: int) -> dict[str, Any]:
    """Options that keep all tensors within `limit` bytes."""
    return {"bytes": limit}


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """At most the limit: every matrix is priced at its share of it.

    Raises:
        DoesNotFit: the smallest formats on offer are larger than the limit.
        UsageError: a model most of whose weights get no format, such as a mixture whose experts one tensor holds.
    """
    config = MixedConfig(**options)
    stacks = {w.name for pair in packed.expert_stacks(shape) if _both_alike(pair[0].name, config) for w in pair}
    matrices = [w for w in shape.weights if _matrix(w, config, stacks) and not w.tied]
    apart = [w for w in shape.weights if len(w.dims) > 2 and w.name not in stacks and not config.left_alone(w.name)]
    if sum(w.count for w in apart) > packed.MOST_LEFT * sum(w.count for w in matrices):
        raise packed.does_not_fit(f"A {shape.family} model", [w.name for w in apart])

    def sizes(weight: Weight) -> list[int]:
        *matrices, rows, columns = weight.dims
        return [math.prod(matrices) * layout.parse(spec).bytes(rows, columns) for spec in config.offered]

    smallest = sum(min(sizes(w)) for w in matrices)
    rest = sum(w.stored for w in shape.weights if not w.tied) - sum(w.stored for w in matrices)
    limit = config.limit(shape.parameters)
    if smallest + rest > limit:
        raise _too_small(limit, smallest + rest)
    left = limit - rest
    count = sum(w.count for w in matrices)

    def touch(weight: Weight) -> Weight:
        if not _matrix(weight, config, stacks):
            return weight
        size = min(max(sizes(weight)), left * weight.count // max(count, 1))
        return Weight(weight.name, weight.role, weight.dims, size, size, weight.tied, weight.used)

    return Price(shape.change(touch))


def compress(
    model: PreTrainedModel, config: MixedConfig, rows: Sequence[Mapping[str, Any]], work: Work
) -> PreTrainedModel:
    """The model with every matrix in the format that the limit affords; `rows` are encoded text.

    Raises:
        DoesNotFit: the smallest formats on offer are larger than the limit.
        UsageError: a weight that is not finite, or rows too short to learn from.
    """
    modules = dict(places(model, config))
    stacks = {f"{owner_of(name)}.{place.part}" for name, place in modules.items() if place.part}
    count = sum(place.matrices().numel() for place in modules.values())
    packed.refuse_unpacked(model, count, lambda name: name in stacks or config.left_alone(name))
    own = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
    parameters = sum(p.numel() for p in model.parameters())
    floats = own - sum(place.matrices().nbytes for place in modules.values())
    for name, place in modules.items():
        _refuse_not_finite(name, place.matrices())
    ids = windows(rows, config.calibration, min(WINDOW, shape_of(model).context or WINDOW))
    plan = config.packing
    seen = look(model, modules, ids) if not plan or _compensates(model, config) else {}
    if not plan:
        plan = allocate(harms(model, modules, config, ids, seen), config.limit(parameters) - floats)
    modules.clear()  # what is packed goes
    _pack(model, plan, config, ids, seen)
    packed.mark(model, config)
    return model


def windows(rows: Sequence[Mapping[str, Any]], tokens: int, longest: int) -> Tensor:
    """About so many tokens of the rows as ids [windows, length], one text running into the next."""
    ids: list[int] = []
    for row in rows:
        ids += row["input_ids"]
        if len(ids) >= tokens:
            break
    length = min(longest, len(ids))
    if length < 2:
        raise UsageError("There is no text to calibrate on", remedy="Give --data with some text")
    count = max(1, min(len(ids), tokens) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def harms(
    model: PreTrainedModel, modules: Mapping[str, Place], config: MixedConfig, ids: Tensor, seen: Mapping[str, Seen]
) -> dict[str, list[Choice]]:
    """What each format on offer would cost each place (step 2)."""
    specs = {spec: formats.parse(spec) for spec in config.offered}
    made: dict[str, list[Choice]] = {}

    def try_all(name: str, forms: Iterable[Tensor | None]) -> None:
        weights, found = modules[name].matrices(), seen[name]
        matrices, rows, columns = weights.shape
        found_harms = dict.fromkeys(specs, 0.0)
        points = (torch.arange(max(FEWEST, SAMPLED // matrices)) + 0.5) / max(FEWEST, SAMPLED // matrices)
        for weight, sums, diagonal, form in zip(weights, found.rows, found.columns, forms):
            nearest = diagonal if form is None else form.diagonal()
            compensated = nearest if form is None else _factor(form).diagonal().square().reciprocal()
            # Rows in proportion to what they matter: each stands for as much as another.
            total = sums.double().cumsum(0)
            some = weight[torch.searchsorted(total, points * total[-1]).clamp(max=rows - 1)].float()
            for spec, format in specs.items():
                cost = _cost(some, nearest if format.layout.kind == "int" else compensated, format)
                found_harms[spec] += cost / 2 / ids.numel()
        made[name] = [
            Choice(spec, matrices * format.layout.bytes(rows, columns), found_harms[spec])
            for spec, format in specs.items()
        ]

    if _compensates(model, config):
        for forms in block_forms(model, modules, ids, seen):
            for name, of_place in forms.items():
                try_all(name, of_place)
    for name in modules:
        if name not in made:
            try_all(name, [seen[name].form] if _compensates(model, config) else repeat(None))
    return made


def _cost(weight: Tensor, costs: Tensor, format: Format) -> float:
    """What rounding a row of `weight` costs on average, where an error's square costs so much in each column."""
    group = format.layout.group
    blocks, of_blocks = (F.pad(t, (0, -weight.shape[1] % group)).unflatten(-1, (-1, group)) for t in (weight, costs))
    cost = _grid(blocks.flatten(0, 1), of_blocks.repeat(len(weight), 1), format)[2]
    return float(cost.sum()) / len(weight)


def allocate(choices: dict[str, list[Choice]], limit: int) -> dict[str, str]:
    """Module -> format with the least harm in all within `limit` bytes (step 2).

    The best of all plans where bytes differ by multiples of the limit's 65536th part or more; else each module's bytes
    count as rounded up to that.

    Raises:
        DoesNotFit: the smallest choices are larger than the limit.
    """
    least = {name: min(c.bytes for c in some) for name, some in choices.items()}
    room = limit - sum(least.values())
    if room < 0:
        raise _too_small(limit, limit - room)
    unit = max(1, math.gcd(*(c.bytes - least[name] for name, some in choices.items() for c in some)), -(-room // UNITS))
    # best[u]: the least harm of the modules so far within u units; taken: the choice of the last of them there.
    best = torch.zeros(room // unit + 1, dtype=torch.float64)
    taken = torch.zeros(len(choices), len(best), dtype=torch.uint8)
    for places, (name, some) in zip(taken, choices.items()):
        found = torch.full_like(best, math.inf)
        for place, choice in enumerate(some):
            units = -(-(choice.bytes - least[name]) // unit)
            if units < len(best):
                with_it = best[: len(best) - units] + choice.harm
                better = with_it < found[units:]
                found[units:][better] = with_it[better]
                places[units:][better] = place
        best = found
    plan: dict[str, str] = {}
    at = len(best) - 1
    for name, places in zip(reversed(choices), taken.flip(0)):
        choice = choices[name][int(places[at])]
        plan[name] = choice.spec
        at -= -(-(choice.bytes - least[name]) // unit)
    return {name: plan[name] for name in choices}


def rounded(weight: Tensor, form: Tensor, format: Format) -> dict[str, Tensor]:
    """The tensors of a weight [rows, columns] rounded with compensation (step 3); `form` is F."""
    factor = _factor(form)
    made = [_rounded(some, factor, format) for some in weight.split(max(1, TOGETHER // weight.shape[1]))]
    return {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}


def _rounded(weight: Tensor, factor: Tensor, format: Format) -> dict[str, Tensor]:
    """Those of some rows, which know nothing of the others."""
    rest = weight.to(torch.float32, copy=True)
    rows, columns = rest.shape
    group, half, top = format.layout.group, 1 << format.layout.planes - 1, (1 << format.layout.planes) - 1
    costs = factor.diagonal().square().reciprocal()
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales, offsets = [], []
    for start in range(0, columns, group):
        end = min(columns, start + group)
        block, inner = rest[:, start:end].clone(), factor[start:end, start:end]
        scale, offset, _ = _grid(block, costs[start:end], format)
        steps = torch.where(scale == 0, 1, scale)
        errors = torch.empty_like(block)
        for j in range(end - start):
            column = block[:, j]
            code = ((column - offset[:, 0]) / steps[:, 0]).round().add(half).clamp(0, top)
            codes[:, start + j] = code.to(torch.uint8)
            error = (column - (scale[:, 0] * (code - half) + offset[:, 0])) / inner[j, j]
            block[:, j:] -= error[:, None] * inner[j, j:]
            errors[:, j] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
        scales.append(scale)
        offsets.append(offset)
    return format.encode(codes, torch.cat(scales, 1), torch.cat(offsets, 1))  # type: ignore[attr-defined, no-any-return]


def _factor(form: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse; of the identity where the matrix is not finite."""
    if not torch.isfinite(form).all():
        return torch.eye(len(form))
    share = DAMPING
    while True:
        damped = form.clone()
        damped.diagonal().add_((share * damped.diagonal().mean()).clamp(min=1e-30))
        lower, failed = torch.linalg.cholesky_ex(damped)
        upper, also = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and not also and torch.isfinite(upper).all():
            return upper
        share *= 10  # float32 does not tell the matrix from one without an inverse


def _grid(block: Tensor, weights: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, offset and cost of a group's rows, [rows, 1] each: of the ranges tried, the one whose errors cost least.

    A range that cuts off the ends has finer steps; an error's square costs `weights` [columns] in each column.
    """
    low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
    best: Tensor | None = None
    for share in RANGES if format.layout.planes < 8 else (1.0,):
        tensors = format.pack(block.clamp(low * share, high * share))  # what is cut off rounds to the ends
        numbers = tensors["scales"].float().view(len(block), -1)
        scale, offset = numbers[:, :1], numbers[:, 1:] if numbers.shape[1] > 1 else torch.zeros_like(numbers)
        errors = format.unpack(tensors, block.shape[1]) - block
        cost = (errors.square() * weights).sum(1, keepdim=True)
        if best is None:
            best, chosen = cost, (scale, offset)
        else:
            better = cost < best
            best = torch.where(better, cost, best)
            chosen = (torch.where(better, scale, chosen[0]), torch.where(better, offset, chosen[1]))
    assert best is not None
    return *chosen, best


def _compensates(model: PreTrainedModel, config: MixedConfig) -> bool:
    return config.rounding == "compensated" and inspect(model).kind == "causal"


def _pack(
    model: PreTrainedModel, plan: Mapping[str, str], config: MixedConfig, ids: Tensor, seen: Mapping[str, Seen]
) -> None:
    """Replace the planned modules by packed ones, block by block in running order, then what stands beside them."""

    found = {name: place for name, place in places(model, config) if name in plan}
    found |= {name: Place(model.get_submodule(name)) for name in plan if name not in found}
    for _, names in mixtures_of(found):
        if len(names) < len(PARTS):
            raise packed.one_of_two(owner_of(next(iter(names.values()))))
    done: dict[str, list[dict[str, Tensor]]] = {}

    def pack(name: str, forms: Iterable[Tensor | None]) -> None:
        place, format = found[name], formats.parse(plan[name])
        forms = repeat(None) if format.layout.kind == "int" else forms
        done[name] = [_fit(name, weight, format, form) for weight, form in zip(place.matrices(), forms)]
        pair = [f"{owner_of(name)}.{part}" for part in PARTS.values()] if place.part else [name]
        if not all(other in done for other in pair):
            return
        if place.part:
            experts = PackedExperts(place.module, *(formats.parse(plan[other]) for other in pair))
            for matrices, other in zip(experts.matrices().values(), pair):
                matrices.take(done[other])
            surgery.replace_module(model, owner_of(name), experts.train(place.module.training))
        else:
            _replace(model, name, format, done[name][0])
        for other in pair:  # of which nobody else knows any more
            done[other] = []
            del found[other]
        give_back_holes()

    whole = _compensates(model, config)
    if whole:
        for of_block in block_forms(model, found, ids, seen):
            for name, forms in of_block.items():
                pack(name, forms)
    for name in plan:
        if name not in done:
            pack(name, [seen[name].form] if whole else repeat(None))


def _fit(name: str, weight: Tensor, format: Format, hessian: Tensor | None) -> dict[str, Tensor]:
    try:
        return format.pack(weight) if hessian is None else rounded(weight, hessian, format)
    except UsageError as error:
        raise UsageError(f"{name} cannot be quantized: {error}") from None


def _refuse_not_finite(name: str, weight: Tensor) -> None:
    try:
        for some in weight.flatten(0, -2).split(max(1, TOGETHER // weight.shape[-1])):
            refuse_not_finite(some)
    except UsageError as error:
        raise UsageError(f"{name} cannot be quantized: {error}") from None


def _replace(model: PreTrainedModel, name: str, format: Format, tensors: dict[str, Tensor]) -> None:
    module: Any = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        packed.replace_embedding(model, name, format, tensors)
    else:
        columns = linear_dims(module)[1]
        made = packed.linear(format, tensors, columns, bias=module.bias, dtype=module.weight.dtype)
        surgery.replace_module(model, name, made.train(module.training))


def places(model: PreTrainedModel, config: MixedConfig) -> Iterator[tuple[str, Place]]:
    """Everything that gets a format, by name; a head that shares the table's weight is not a place of its own.

    Raises:
        UsageError: one of the two kinds of a layer's experts is to be left alone.
    """
    tied = tied_head(model)
    mixtures = {name for name, experts in stacked(model) if gated_experts(experts)}
    for name, module in model.named_modules():
        if name != tied and packable(model, name, module) and not config.left_alone(name):
            yield name, Place(module)
        elif name in mixtures and _both_alike(f"{name}.{GATE_UP}", config):
            yield from ((f"{name}.{word}", Place(module, part)) for part, word in PARTS.items())


def _both_alike(name: str, config: MixedConfig) -> bool:
    """Whether the experts one of whose tensors is called `name` get formats."""
    alone = [config.left_alone(f"{owner_of(name)}.{part}") for part in (GATE_UP, DOWN)]
    if any(alone) and not all(alone):
        raise packed.one_of_two(owner_of(name))
    return not any(alone)


def _matrix(weight: Weight, config: MixedConfig, stacks: Container[str]) -> bool:
    owner, _, tensor = weight.name.rpartition(".")
    untied_head = weight.role == "head" and not weight.tied
    fits = tensor == "weight" and len(weight.dims) == 2 and weight.role != "other"
    return weight.name in stacks or fits and not untied_head and not config.left_alone(owner)


def _too_small(limit: int, smallest: int) -> DoesNotFit:
    return DoesNotFit(
        f"no choice of formats is as small as {show_bytes(limit)}",
        f"the smallest on offer take {show_bytes(smallest)} of tensors",
        "Relax the limit, or prune the model first",
    )

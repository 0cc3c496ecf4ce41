"""Mixed: give every layer its own format, the sensitive ones more bits, so that the whole stays within a limit.

How it works
    1. Some text runs through the model once, forwards and backwards, with next tokens drawn from the model itself: then
       the mean square of a gradient is its Fisher information. For a layer y = W x with gradient g of the
       log-likelihood at y, and for every format on offer with its rounding error D, the harm is half of the mean over
       tokens of (g' D x)^2: the divergence of next-token distributions that this error alone would cause, to second
       order (the paper measures that divergence by running the model once for each layer and format).
    2. Harms add up. Layers start in their smallest format; the byte that buys the most is spent first, along each
       layer's lower convex hull of harm over bytes, until the limit: the Pareto front of the paper, without its search.
    3. Block by block, with the inputs that the blocks before now give, each layer is rounded column by column; the
       columns still to come make up for the error of those before (GPTQ, 2210.17323): with H = X'X and U the upper
       Cholesky factor of its inverse, err = (w_i - q_i) / U_ii and W[:, i:] -= err U[i, i:]. A group's scale and offset
       are taken when its first column comes.

Where it bends
    The paper makes its own calibration data; here it is text, which the user gives. The token table has no inputs to
    make up errors with and is rounded to the nearest, as everything is without step 3 (rounding=nearest) and in models
    that are not causal. Calibration text favours its own domain. Fewer than 3 bits cost small models dearly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoestring.core.errors import DoesNotFit, UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape, Weight
from shoestring.core.step import Work
from shoestring.core.text import show_bytes
from shoestring.kernels import formats, layout
from shoestring.kernels.formats import Format
from shoestring.kernels.reference import refuse_not_finite
from shoestring.models import packed, shape_of, surgery
from shoestring.models.anatomy import inspect
from shoestring.models.packed import PackedConfig, linear_dims, packable, tied_head

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

OFFERED = (
    "uniform2/32", "uniform2/64", "uniform3/32", "uniform3/64", "uniform3/128", "uniform4/32", "uniform4/64",
    "uniform4/128", "int8/64",
)  # fmt: skip
ROUNDING = ("compensated", "nearest")
WINDOW = 256  # tokens that are read together
MEASURED = 512  # tokens whose gradients are looked at
DAMPING = 0.01  # of the mean diagonal of H
RANGES = (1.0, 0.9, 0.8, 0.7)  # shares of a group's range that are tried


class MixedConfig(PackedConfig):
    """Formats by layer under a limit.

    Args:
        bits: the most bits for each weight of the model, all tensors included. One of `bits` and `bytes` is given.
        bytes: the most bytes of all tensors.
        offered: formats to choose from.
        rounding: "compensated" (step 3) or "nearest".
        calibration: tokens that rounding is fitted on.
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
                raise UsageError(f"{spec} has no plain rounding", remedy="Offer integers: int4, int8 or uniform2 to 4")

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
    """
    config = MixedConfig(**options)
    matrices = [w for w in shape.weights if _matrix(w, config) and not w.tied]
    smallest = sum(min(layout.parse(spec).bytes(*w.dims) for spec in config.offered) for w in matrices)
    rest = sum(w.stored for w in shape.weights if not w.tied) - sum(w.stored for w in matrices)
    limit = config.limit(shape.parameters)
    if smallest + rest > limit:
        raise _too_small(limit, smallest + rest)
    left = limit - rest
    count = sum(w.count for w in matrices)

    def touch(weight: Weight) -> Weight:
        if not _matrix(weight, config):
            return weight
        size = min(weight.stored, left * weight.count // max(count, 1))
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
    packed.refuse_unpacked(model, sum(_weight(module).numel() for module in modules.values()))
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    floats = own - sum(w.numel() * w.element_size() for w in map(_weight, modules.values()))
    for name, module in modules.items():
        _refuse_not_finite(name, _weight(module))
    longest = min(WINDOW, shape_of(model).context or WINDOW)
    plan = config.packing
    if not plan:
        choices = harms(model, modules, config, windows(rows, MEASURED, longest))
        plan = allocate(choices, config.limit(parameters) - floats)
    _pack(model, plan, config, windows(rows, config.calibration, longest))
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
    model: PreTrainedModel, modules: Mapping[str, nn.Module], config: MixedConfig, ids: Tensor
) -> dict[str, list[Choice]]:
    """What each format on offer would cost each module (steps 1 and 2)."""
    specs = {spec: formats.parse(spec) for spec in config.offered}
    found = {name: dict.fromkeys(specs, 0.0) for name in modules}
    table = model.get_input_embeddings()
    handles = []

    def watch(name: str, module: Any) -> None:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda g: note(name, module, x, g))

        handles.append(module.register_forward_hook(forward))

    def note(name: str, module: Any, x: Tensor, g: Tensor) -> None:
        weight = _weight(module)
        flat = g.detach().reshape(-1, g.shape[-1]).float()
        for spec, format in specs.items():
            error = format.unpack(format.pack(weight), weight.shape[1]) - weight.float()
            if isinstance(module, nn.Embedding):
                moved = error[x.flatten()]
            else:
                moved = x.reshape(-1, x.shape[-1]).float() @ error.T
            found[name][spec] += float((moved * flat).sum(1).square().sum()) / 2  # step 1

    for name, module in modules.items():
        watch(name, module)
    head = model.get_output_embeddings()
    shared = next((n for n, m in modules.items() if m is table), None)
    if shared is not None and tied_head(model) and head is not None:
        watch(shared, head)  # where the table's errors meet the hidden states too
    asked = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        # Hidden states need gradients though no weight does.
        table.weight.requires_grad_(True)  # type: ignore[union-attr]
        for window in ids.split(1):
            logits = model(input_ids=window, use_cache=False).logits.float()
            drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
            nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        table.weight.grad = None  # type: ignore[union-attr]
        table.weight.requires_grad_(False)  # type: ignore[union-attr]
        for p in asked:
            p.requires_grad_(True)
    tokens = ids.numel()
    made: dict[str, list[Choice]] = {}
    for key, module in modules.items():
        dims = _weight(module).shape
        made[key] = [Choice(s, specs[s].layout.bytes(*dims), harm / tokens) for s, harm in found[key].items()]
    return made


def allocate(choices: Mapping[str, Sequence[Choice]], limit: int) -> dict[str, str]:
    """Module -> format with the least harm in all within `limit` bytes, by the steepest steps first (step 2).

    Raises:
        DoesNotFit: the smallest choices are larger than the limit.
    """
    hulls = {name: _hull(some) for name, some in choices.items()}
    spent = sum(hull[0].bytes for hull in hulls.values())
    if spent > limit:
        raise _too_small(limit, spent)
    steps = [
        ((a.harm - b.harm) / (b.bytes - a.bytes), name, place + 1)
        for name, hull in hulls.items()
        for place, (a, b) in enumerate(zip(hull, hull[1:]))
    ]
    at = dict.fromkeys(hulls, 0)
    for _, name, place in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        cost = hulls[name][place].bytes - hulls[name][at[name]].bytes
        # A hull gets flatter, so its steps come in order; one that does not fit closes those behind it.
        if place == at[name] + 1 and spent + cost <= limit:
            at[name], spent = place, spent + cost
    return {name: hulls[name][place].spec for name, place in at.items()}


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of harm over bytes, smallest first."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.harm)):
        if hull and (choice.harm >= hull[-1].harm or choice.bytes == hull[-1].bytes):
            continue
        while len(hull) > 1 and _slope(hull[-2], choice) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (a.harm - b.harm) / (b.bytes - a.bytes)


def rounded(weight: Tensor, hessian: Tensor, format: Format) -> dict[str, Tensor]:
    """The tensors of a weight [rows, columns] rounded with compensation (step 3); `hessian` is X'X of its inputs."""
    rest = weight.float().clone()
    rows, columns = rest.shape
    group, half, top = format.layout.group, 1 << format.layout.planes - 1, (1 << format.layout.planes) - 1
    damped = hessian.clone()
    damped.diagonal().add_((DAMPING * damped.diagonal().mean()).clamp(min=1e-6))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales, offsets = [], []
    for start in range(0, columns, group):
        end = min(columns, start + group)
        block, inner = rest[:, start:end].clone(), factor[start:end, start:end]
        scale, offset = _grid(block, inner, format)
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


def _grid(block: Tensor, inner: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Scale and offset of a group's rows, [rows, 1] each: of the ranges tried, the one whose errors cost least.

    A range that cuts off the ends has finer steps; what an error costs is 1 / U_ii^2, as in the step that spreads it.
    """
    weights = inner.diagonal().square().reciprocal()
    low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
    best: Tensor | None = None
    for share in RANGES:
        tensors = format.pack(block.clamp(low * share, high * share))  # what is cut off rounds to the ends
        scale, offset = tensors["scales"].float().unbind(-1)
        errors = format.unpack(tensors, block.shape[1]) - block
        cost = (errors.square() * weights).sum(1, keepdim=True)
        if best is None:
            best, chosen = cost, (scale, offset)
        else:
            better = cost < best
            best = torch.where(better, cost, best)
            chosen = (torch.where(better, scale, chosen[0]), torch.where(better, offset, chosen[1]))
    return chosen


def _pack(model: PreTrainedModel, plan: Mapping[str, str], config: MixedConfig, ids: Tensor) -> None:
    """Replace the planned modules by packed ones, block by block in running order, then what stands beside them."""
    anatomy = inspect(model)
    if config.rounding == "compensated" and anatomy.kind == "causal":
        hidden, given = _first_inputs(model, anatomy.blocks[0].module, ids)
        for block in anatomy.blocks:
            inside = {name: model.get_submodule(name) for name in plan if name.startswith(f"{block.name}.")}
            hessians = _hessians(block.module, inside, hidden, given)
            for name, module in inside.items():
                format = formats.parse(plan[name])
                weight = _weight(module)
                exact = format.layout.kind == "int" or name not in hessians
                _replace(model, name, format, _fit(name, weight, format, None if exact else hessians[name]))
            hidden = [_run(block.module, h, more) for h, more in zip(hidden, given)]
    for name, spec in plan.items():
        module, format = model.get_submodule(name), formats.parse(spec)
        if not isinstance(module, packed.Packed):
            _replace(model, name, format, _fit(name, _weight(module), format, None))


def _fit(name: str, weight: Tensor, format: Format, hessian: Tensor | None) -> dict[str, Tensor]:
    try:
        return format.pack(weight) if hessian is None else rounded(weight, hessian, format)
    except UsageError as error:
        raise UsageError(f"{name} cannot be quantized: {error}") from None


def _refuse_not_finite(name: str, weight: Tensor) -> None:
    try:
        refuse_not_finite(weight)
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


class _Enough(Exception):
    """The first block was reached."""


def _first_inputs(model: PreTrainedModel, first: nn.Module, ids: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the first block gets for each window: hidden states, and everything beside them."""
    hidden: list[Tensor] = []
    given: list[dict[str, Any]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        hidden.append(states.detach())
        given.append({"args": args[1:], "kwargs": {k: v for k, v in kwargs.items() if k != "hidden_states"}})
        raise _Enough

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for window in ids.split(4):
            try:
                with torch.no_grad():
                    model(input_ids=window, use_cache=False)
            except _Enough:
                pass
    finally:
        handle.remove()
    return hidden, given


def _run(block: nn.Module, hidden: Tensor, more: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        out = block(hidden, *more["args"], **more["kwargs"])
    return out[0] if isinstance(out, tuple) else out


def _hessians(
    block: nn.Module, inside: Mapping[str, nn.Module], hidden: Sequence[Tensor], given: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """X'X of the inputs of each module, float32."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            found[name] = found.get(name, 0) + x.T @ x

        return forward

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in inside.items()]
    try:
        for states, more in zip(hidden, given):
            _run(block, states, more)
    finally:
        for handle in handles:
            handle.remove()
    return found


def places(model: PreTrainedModel, config: MixedConfig) -> Iterator[tuple[str, nn.Module]]:
    """Every module that gets a format, by name; a head that shares the table's weight is not one of its own."""
    tied = tied_head(model)
    for name, module in model.named_modules():
        if name != tied and packable(model, name, module) and not config.left_alone(name):
            yield name, module


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight.detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _matrix(weight: Weight, config: MixedConfig) -> bool:
    owner, _, tensor = weight.name.rpartition(".")
    untied_head = weight.role == "head" and not weight.tied
    fits = tensor == "weight" and len(weight.dims) == 2 and weight.role not in ("expert", "other")
    return fits and not untied_head and not config.left_alone(owner)


def _too_small(limit: int, smallest: int) -> DoesNotFit:
    return DoesNotFit(
        f"no choice of formats is as small as {show_bytes(limit)}",
        f"the smallest on offer take {show_bytes(smallest)} of tensors",
        "Relax the limit, or prune the model first",
    )

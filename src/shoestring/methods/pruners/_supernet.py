"""One model that holds many smaller ones: subnets with fewer layers and narrower ones are views of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoestring.core.errors import UsageError
from shoestring.core.files import atomic_folder
from shoestring.methods.pruners import _depth, _fluctuation, _mixture
from shoestring.models import uneven
from shoestring.models.anatomy import inspect
from shoestring.models.surgery import replace_module
from shoestring.training.fingerprint import weights_digest

ABOUT, TENSORS = "supernet.json", "supernet.safetensors"
_PARTS = ("groups", "neurons")
Row = dict[str, Any]


@dataclass(frozen=True)
class Subnet:
    """A shape: which layers it has, and the place of its width among the plan's ratios."""

    keep: _depth.Keep
    width: int

    @property
    def depth(self) -> int:
        return sum(self.keep)


@dataclass(frozen=True)
class Plan:
    """What a supernet keeps at every depth and width, found without training.

    Attributes:
        keeps: for each number of removed layers the layers that stay.
        ratios: shares of the weights of the blocks that the widths keep, 1 first.
        widths: what stays at each of them.
        moments: of the inputs of the layers that write to the residual stream, by the layer's name.
    """

    keeps: tuple[_depth.Keep, ...]
    ratios: tuple[float, ...]
    widths: tuple[_fluctuation.Width, ...]
    moments: Mapping[str, _fluctuation.Moments] = field(repr=False)

    def subnet(self, depth: int, ratio: float) -> Subnet:
        """The shape of `depth` layers at the width `ratio`.

        Raises:
            UsageError: a depth or a width that the supernet has not.
        """
        layers = len(self.keeps[0])
        if not layers - len(self.keeps) < depth <= layers:
            raise UsageError(
                f"a depth of {depth} layers is not in this supernet",
                f"it has {layers - len(self.keeps) + 1} to {layers}",
                "Name one of these, or train another supernet with a smaller least_depth",
            )
        near = min(range(len(self.ratios)), key=lambda place: abs(self.ratios[place] - ratio))
        if abs(self.ratios[near] - ratio) > 1e-6:
            raise UsageError(
                f"a width of {ratio:g} is not in this supernet",
                remedy=f"Name one of {', '.join(f'{r:g}' for r in self.ratios)}, or train another with these widths",
            )
        return Subnet(self.keeps[layers - depth], near)

    def subnets(self) -> Iterator[Subnet]:
        """Every shape, the whole model first."""
        return (Subnet(keep, width) for keep in self.keeps for width in range(len(self.ratios)))


@torch.no_grad()
def make_plan(
    model: PreTrainedModel, searched: Sequence[Row], seen: Sequence[Row], least: int, ratios: Sequence[float], last: int
) -> Plan:
    """Find what every subnet keeps.

    Args:
        searched: rows whose loss decides which layers go.
        seen: rows over whose tokens the inputs of layers are watched.
        least: layers of the smallest subnet.
        ratios: widths, 1 first, falling.
        last: layers at the end that always stay.
    """
    blocks, size = inspect(model).blocks, uneven.sizes(model)
    keeps = _depth.search(len(blocks), len(blocks) - least, _depth.LossWithout(model, searched), last)
    writers = [b.projections[role] for b in blocks for role in ("o", "down") if role in b.projections]
    device = next(model.parameters()).device
    batches = ({"input_ids": torch.as_tensor(row["input_ids"], device=device)[None]} for row in seen)
    moments = _fluctuation.watch(model, writers, batches)

    def score(block: Any, role: str, groups: int) -> Tensor:
        name = block.projections.get(role)
        if name is None:
            return torch.zeros(0, dtype=torch.float64)
        weight: Any = model.get_submodule(name).weight
        return _fluctuation.scores(weight, moments[name].variance, groups).cpu()

    widths = _fluctuation.choose(
        [score(block, "o", own.groups) for block, own in zip(blocks, size.blocks)],
        [score(block, "down", 0) for block in blocks],
        size.group_cost / size.neuron_cost,
        ratios,
    )
    return Plan(keeps, tuple(ratios), widths, moments)


class Supernet(nn.Module):
    """A frozen model with a mixture of low-rank updates on every linear layer, seen through one subnet at a time.

    Outside `active` it is the model as it came, without updates.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, experts: int, top: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = digest(model)
        self.plan, self.size = plan, uneven.sizes(model)
        self.masks, self.shifts = _views(model, plan, self.size)
        self.layers = _mixture.attach(model, experts, rank, alpha)
        self.model = model
        self.blocks = tuple(block.module for block in inspect(model).blocks)
        self.router = _mixture.ShapeRouter(len(plan.keeps[0]), len(plan.ratios), experts, top)
        self.router.to(next(model.parameters()).device)
        self.options = {"experts": experts, "top": top, "rank": rank, "alpha": alpha}

    @contextmanager
    def active(self, subnet: Subnet) -> Iterator[None]:
        """Within the block the model is this subnet. In training its gates are noisy, one draw for all layers."""
        gates = self.router(subnet.keep, subnet.width)
        before = {name: (layer.gates, layer.mask, layer.shift) for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.gates = gates
                layer.mask = self.masks[subnet.width].get(name)
                layer.shift = self.shifts[subnet.width].get(name)
            with _depth.skipping(self.blocks, subnet.keep):
                yield
        finally:
            for name, layer in self.layers.items():
                layer.gates, layer.mask, layer.shift = before[name]

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)

    @torch.no_grad()
    def extract(self, subnet: Subnet, means: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
        """The subnet as a model of its own: layers dropped, heads and neurons cut out, the mixture folded into its
        weights, biases for what is gone. The supernet stays as it is.

        Args:
            means: of the inputs of layers, by name, where those of the whole model are not to be taken.
        """
        gates = self._quiet_gates(subnet)
        plain = copy.deepcopy(self.model)
        shifts = dict(self.shifts[subnet.width])
        for name in self.layers:
            layer: Any = plain.get_submodule(name)
            weight = layer.base_layer.weight
            weight.copy_(weight.float() + layer.update(gates))
            replace_module(plain, name, layer.base_layer)
            if means is not None and name in shifts and name in means:
                gone = self.masks[subnet.width][name] == 0
                shifts[name] = _fluctuation.compensation(weight, means[name].to(weight.device), gone)
        width = self.plan.widths[subnet.width]
        keep = []
        for stays, block, groups, neurons in zip(subnet.keep, inspect(plain).blocks, width.groups, width.neurons):
            if not stays:
                keep.append(uneven.Keep((), ()))
                continue
            places = (part.nonzero().flatten().tolist() for part in (groups, neurons))
            biases = (shifts.get(block.projections.get(role, "")) for role in ("o", "down"))
            keep.append(uneven.Keep(*places, *biases))  # type: ignore[arg-type]
        return uneven.shrink(plain, keep)

    @torch.no_grad()
    def means(self, subnet: Subnet, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Means of what the inputs of layers are in the subnet, before any is hidden, by the layer's name."""
        present = {block.name for block, stays in zip(inspect(self.model).blocks, subnet.keep) if stays}
        names = [name for name in self.masks[subnet.width] if any(name.startswith(f"{block}.") for block in present)]
        device = next(self.model.parameters()).device
        batches = ({"input_ids": torch.as_tensor(row["input_ids"], device=device)[None]} for row in rows)
        with self.active(subnet):
            return {name: found.mean for name, found in _fluctuation.watch(self.model, names, batches).items()}

    def _quiet_gates(self, subnet: Subnet) -> Tensor:
        """The gates of a subnet without noise: always the same ones."""
        was_training = self.router.training
        gates: Tensor = self.router.eval()(subnet.keep, subnet.width)
        self.router.train(was_training)
        return gates

    def weights_of(self, subnet: Subnet) -> int:
        """Weights in the matrices of the blocks that the subnet keeps."""
        width = self.plan.widths[subnet.width]
        parts = zip(subnet.keep, width.groups, width.neurons)
        return sum(
            int(groups.sum()) * self.size.group_cost + int(neurons.sum()) * self.size.neuron_cost
            for stays, groups, neurons in parts
            if stays
        )

    def save(self, folder: Path | str) -> None:
        """Write what was found and trained to `folder`; the model itself is not part of it."""
        plan = self.plan
        tensors = {f"router.{name}": value for name, value in self.router.state_dict().items()}
        for name, layer in self.layers.items():
            tensors |= {f"A.{name}": layer.A.data, f"B.{name}": layer.B.data}
        for name, found in plan.moments.items():
            tensors |= {f"mean.{name}": found.mean, f"variance.{name}": found.variance}
        for place, width in enumerate(plan.widths):
            for block, (groups, neurons) in enumerate(zip(width.groups, width.neurons)):
                tensors |= {f"groups.{place}.{block}": groups, f"neurons.{place}.{block}": neurons}
        about = {"keeps": plan.keeps, "ratios": plan.ratios, **self.options, "base": self.base}
        with atomic_folder(folder, overwrite=True) as aside:
            save_file({name: value.contiguous() for name, value in tensors.items()}, aside / TENSORS)
            (aside / ABOUT).write_text(json.dumps(about), encoding="utf-8")


def open_supernet(model: PreTrainedModel, folder: Path | str) -> Supernet:
    """The supernet that `save` wrote to `folder`, around the model it was made from.

    Raises:
        UsageError: no whole supernet, or one that was made from another model.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        keeps = tuple(tuple(map(bool, keep)) for keep in about["keeps"])
        places = range(len(keeps[0]))
        widths = tuple(
            _fluctuation.Width(*(tuple(tensors[f"{part}.{i}.{place}"] for place in places) for part in _PARTS))
            for i in range(len(about["ratios"]))
        )
        names = [name.removeprefix("mean.") for name in tensors if name.startswith("mean.")]
        moments = {n: _fluctuation.Moments(tensors[f"mean.{n}"], tensors[f"variance.{n}"]) for n in names}
        plan = Plan(keeps, tuple(about["ratios"]), widths, moments)
        options = {name: about[name] for name in ("experts", "top", "rank", "alpha")}
        base = about["base"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"{folder} holds no whole supernet", str(error)[:200], "Name the folder of one") from None
    if len(inspect(model).blocks) != len(keeps[0]) or base != digest(model):
        raise UsageError(
            f"the supernet in {folder} was made from another model",
            "its updates and biases mean nothing to this one",
            "Give the model it was trained on",
        )
    made = Supernet(model, plan, **options)
    with torch.no_grad():
        made.router.load_state_dict({n: tensors[f"router.{n}"] for n in made.router.state_dict()})
        for name, layer in made.layers.items():
            layer.A.copy_(tensors[f"A.{name}"])
            layer.B.copy_(tensors[f"B.{name}"])
    return made.eval()


def _views(model: nn.Module, plan: Plan, size: uneven.Sizes) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """For each width the masks of inputs and the biases that stand for what they hide, by the layer's name."""
    masks: list[dict[str, Tensor]] = []
    shifts: list[dict[str, Tensor]] = []
    for width in plan.widths:
        mask, shift = {}, {}
        for block, groups, neurons in zip(inspect(model).blocks, width.groups, width.neurons):
            heads = groups.repeat_interleave(size.group_heads * size.head_dim)
            for role, stays in (("o", heads), ("down", neurons)):
                if role in block.projections and not stays.all():
                    name = block.projections[role]
                    weight: Any = model.get_submodule(name).weight
                    stays = stays.to(weight.device)
                    mask[name] = stays.float()
                    mean = plan.moments[name].mean.to(weight.device)
                    shift[name] = _fluctuation.compensation(weight.detach(), mean, ~stays)
        masks.append(mask)
        shifts.append(shift)
    return masks, shifts


def digest(model: nn.Module) -> str:
    """Hash of some values of every weight of a model, which is frozen by this."""
    return weights_digest(model.requires_grad_(False))

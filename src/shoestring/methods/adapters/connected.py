"""Connected: adapters behind whole blocks, joined by links that lead past each frozen block.

How it works
    1. Behind every frozen block F_l stands a bottleneck, D (r x d) and U (d x r), s = GELU or ReLU:
       h_l = A_l(u_l) = u_l + U_l s(D_l u_l + b_l) + c_l                                                        (eq. 1)
    2. Beside the block runs a link S_l, from the adapter before it to the adapter behind it; the first starts at the
       embeddings:
       u_l = F_l(h_{l-1}) + S_l(h_{l-1})                                                                        (eq. 2)
       So a path of nothing but trained modules joins the first adapter with the last: gradients need not pass through
       the product of all frozen Jacobians, and training is faster and steadier.
    3. S_l is a linear map without bias, a bottleneck, or one scale per feature; links="none" leaves the adapters
       scattered, which is the usual bottleneck adapter.
    4. U_l and S_l start at zero: training starts at the base model.
    5. Links learn at a tenth of the adapters' rate: S_l = link_rate * S'_l, and with S' zero at first and Adam, whose
       steps do not depend on a gradient's size, the factor is a learning rate.

Where it bends
    Not mergeable: an adapter is nonlinear. Linear links have d^2 numbers a block: 7% of a small model, and as much of a
    wide one; "bottleneck" and "scale" are smaller and help less. In a block that ends with its norm, the link's output
    is not normalised and magnitudes can drift with depth; norm=True puts a trained layer norm behind the sum (training
    then no longer starts at the base model). links_over="parts" leads one link past the attention and one past the MLP,
    each from what the part reads to what it adds; in a block that begins with its norm they start behind that norm.
    The paper's text leaves the wiring open; the linear link is what its readers report as best.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.methods.adapters._blocks import ACTIVATIONS, Beside, BlockTuner, Bottleneck, changed, stream, width_of
from shoestring.methods.adapters._shared import AdapterConfig, join, number, whole
from shoestring.models.anatomy import Block

METHOD = Method(
    paper=Paper(
        "Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval", "2022-08"
    ),
    provides="ConnectedConfig",
    saves=("parameters", "storage", "compute"),
    combines={"quantizers": "yes"},
    traits={
        "family": "additive",
        "acts_on": "activation",
        "merges": "no",
        "parameters": "layers (2 d r + r + d + link); link: 0, d, 2 d r + r + d or d^2",
    },
    expects={
        "check_merge": "the adapter is nonlinear, so that no weight of the base can hold it",
        "check_unmerge_restores_the_base": "the adapter is nonlinear and never merges",
    },
)
TRAINING = {"learning_rate": 1e-3}
LINKS = ("none", "scale", "bottleneck", "linear")
MUCH = 0.1  # share of a model that links may have before a word is said


@dataclass
class ConnectedConfig(AdapterConfig):
    """Bottleneck adapters behind blocks, with links past them.

    Args:
        r: inner width of the adapters, and of bottleneck links.
        links: none, scale, bottleneck or linear.
        links_over: "block" for one link past each whole block, "parts" for one past its attention and one past its MLP.
        link_rate: at what share of the adapters' learning rate the links learn.
        activation: gelu or relu.
        norm: a trained layer norm behind the sum of block and link.
        target_modules: names or endings of whole blocks; None is every block.

    Raises:
        ValueError: a value that cannot be.
    """

    TYPE = "connected"

    r: int = field(default=16, metadata={"help": "Inner width of the adapters"})
    links: str = field(default="linear", metadata={"help": "none, scale, bottleneck or linear"})
    links_over: str = field(default="block", metadata={"help": "block, or parts: attention and MLP"})
    link_rate: float = field(default=0.1, metadata={"help": "Learning rate of the links by that of the adapters"})
    activation: str = field(default="gelu", metadata={"help": "gelu or relu"})
    norm: bool = field(default=False, metadata={"help": "A layer norm behind the sum of block and link"})

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("r", self.r)
        number("link_rate", self.link_rate, 1e-4, 100)
        for name, known in (("links", LINKS), ("links_over", ("block", "parts")), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible; it is one of {', '.join(known)}")


class Scale(nn.Module):
    """One factor per feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)


class Map(nn.Module):
    """A linear map of the hidden states into themselves, without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.matrix.dtype), self.matrix).to(x.dtype)


class Norm(nn.LayerNorm):
    """A layer norm that computes in its own type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class ConnectedBlock(Beside):
    """The adapters and links of one block."""

    child = "connected"
    adapter_layer_names = ("adapter", "link", "attention_link", "mlp_link", "norm")
    other_param_names = ("link_rate",)

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.adapter, self.norm = nn.ModuleDict(), nn.ModuleDict()
        self.link, self.attention_link, self.mlp_link = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.link_rate: dict[str, float] = {}
        self.parts: dict[str, Part] = {}
        self.plain = self.takes_over(block, self.around)

    def around(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward under the active adapters; arguments and the form of the output are the block's own."""
        out = self.plain(*args, **kwargs)
        names = self.acting
        return changed(out, lambda u: self.adapted(stream(args, kwargs), u, names)) if names else out

    def adapted(self, x: Tensor, u: Tensor, names: list[str]) -> Tensor:
        """What enters the next block, for x that enters this one and u that the frozen block makes of it."""
        u = u + self.linked("link", x, names)  # eq. 2
        for name in names:
            if name in self.norm:
                u = self.norm[name](u)
            u = u + self.adapter[name](u)  # eq. 1
        return u

    def linked(self, container: str, x: Tensor, names: list[str]) -> Tensor | int:
        """The sum of the links in `container`; 0 where there is none."""
        links = getattr(self, container)
        return sum(self.link_rate[name] * links[name](x) for name in names if name in links)


class Part:
    """A link past the attention or the MLP alone: from what its first projection reads to what its last one gives.

    Both ends lie inside the block's own forward, so that checkpointing runs them again together.
    """

    def __init__(self, layer: ConnectedBlock, container: str, first: nn.Module, last: nn.Module) -> None:
        self.layer, self.container = layer, container
        self.read: Tensor | None = None
        self.plain_first = layer.takes_over(first, self.enter)
        self.plain_last = layer.takes_over(last, self.leave)

    def enter(self, x: Tensor) -> Tensor:
        self.read = x
        return self.plain_first(x)

    def leave(self, x: Tensor) -> Tensor:
        read, self.read = self.read, None
        assert read is not None
        return self.plain_last(x) + self.layer.linked(self.container, read, self.layer.acting)


class ConnectedModel(BlockTuner):
    prefix = "connected_"
    tuner_layer_cls = ConnectedBlock

    def attach(self, name: str, config: Any, block: Block) -> None:
        layer: Any = getattr(block.module, ConnectedBlock.child, None) or ConnectedBlock(block.module)
        width = width_of(self.model, block)
        layer.link_rate[name] = config.link_rate
        layer.put("adapter", name, Bottleneck(width, config.r, config.activation), block.module)
        if config.norm:
            layer.put("norm", name, Norm(width), block.module)
        if config.links == "none":
            return
        containers = ("link",) if config.links_over == "block" else ("attention_link", "mlp_link")
        for container in containers:
            if container != "link" and container not in layer.parts:
                layer.parts[container] = self._part(layer, container, block)
            made: nn.Module = {
                "scale": lambda: Scale(width),
                "bottleneck": lambda: Bottleneck(width, config.r, config.activation),
                "linear": lambda: Map(width),
            }[config.links]()
            layer.put(container, name, made, block.module)

    def _part(self, layer: ConnectedBlock, container: str, block: Block) -> Part:
        firsts, last = {
            "attention_link": (("q_a", "q", "qkv"), "o"),
            "mlp_link": (("gate", "gate_up", "up"), "down"),
        }[container]
        found = block.projections
        first = next((role for role in firsts if role in found), None)
        if first is None or last not in found:
            raise ValueError(
                f"{block.name} has no plain {container.removesuffix('_link')} to lead a link past; use "
                'links_over="block"'
            )
        return Part(layer, container, self.model.get_submodule(found[first]), self.model.get_submodule(found[last]))

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if config.links != "linear":
            return
        links = sum(p.numel() for name, p in model.named_parameters() if name.endswith(f"{adapter_name}.matrix"))
        share = links / max(1, sum(p.numel() for p in model.parameters()) - links)
        if share > MUCH:
            warnings.warn(
                f'the linear links have {links} numbers, {share:.0%} of the model; links="bottleneck" or "scale" have '
                "fewer",
                stacklevel=2,
            )


def register() -> None:
    join("connected", ConnectedConfig, ConnectedModel)


def example() -> ConnectedConfig:
    return ConnectedConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "links": "linear"}, {"r": 16, "links": "none"})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """2 d r + r + d parameters for each adapter, and as many, d or d^2 for each link."""
    asked = {**settings()[0], "links_over": "block", "norm": False, **options}
    width, inner = shape.hidden, int(asked["r"])
    adapter = 2 * width * inner + inner + width
    link = {"none": 0, "scale": width, "bottleneck": adapter, "linear": width * width}[asked["links"]]
    trained = adapter + link * (2 if asked["links_over"] == "parts" else 1) + 2 * width * bool(asked["norm"])
    return Price(shape, trainable=shape.layers * trained, train_flops=2.0)

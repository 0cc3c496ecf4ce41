"""Exit heads: gates between blocks that learn to say early what the whole model will say, so easy tokens end there.

How it works
    1. The model is frozen. Behind block e stands a gate: with h_e the hidden state there,
       x = h_e + U V h_e          V (r x d), U (d x r), U = 0 at the start                                       (eq. 1)
       p_e = softmax(head(norm_e(x)))      norm_e starts as the model's last norm, head is the model's own       (eq. 2)
    2. Training minimises over all positions  sum_e w_e KL(p || p_e),  p what the whole model says.              (eq. 3)
       The model runs once, without gradients; nothing flows into a tied embedding.
    3. A temperature t_e for each gate is fitted on the way and, once the gates are done, on the newest 2,048 rows, at
       one position in eight, which the gates are not trained at: it minimises the cross-entropy of
       softmax(logits_e / t_e) with the token that the whole model likes best.                                   (eq. 4)
    4. At work a token leaves at the first gate whose calibrated confidence max softmax(logits_e / t_e) reaches the
       threshold; the keys and values that it lacks above are computed if a later token needs them.

Where it bends
    Models made for exits are trained with them from the beginning; heads that are added afterwards are sure of few
    tokens of a small model. Answers change with any threshold below 1, which means never. An untrained gate is refused:
    it is sure and wrong; so is a model that scales or caps its logits after its head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape
from shoestring.engine.exits import ConfidentExit, drafts, read_exits
from shoestring.engine.hooks import Hooks
from shoestring.methods.adapters._blocks import SPREAD, Beside, width_of
from shoestring.methods.adapters._exits import (
    ExitConfig,
    ExitPlug,
    ExitTuner,
    Gate,
    final_norm,
    gates_of,
    kept_rows,
    wanted_rows,
    whole_pass,
)
from shoestring.methods.adapters._shared import join, whole
from shoestring.models.anatomy import Block

if TYPE_CHECKING:
    from shoestring.engine.open import Opened

METHOD = Method(
    paper=Paper(
        "CE-CoLLM: Efficient and Adaptive Large Language Models Through Cloud-Edge Collaboration",
        "2024-11",
        code="mlsysx/CE-CoLLM",
    ),
    provides="ExitHeadsConfig",
    saves=("compute", "latency"),
    combines={"quantizers": "the gates are trained on the model as it was and stand beside it, not in it"},
    traits={
        "family": "additive",
        "acts_on": "activation",
        "merges": "no",
        "parameters": "gates (2 r d + d + 1)",
        "plugs": "exit, drafter",
    },
    expects={
        "check_learns": "the loss is a divergence from the model itself, next to nothing for a tiny random one",
        "check_merge": "a gate is an answer of its own, no change of a weight",
        "check_unmerge_restores_the_base": "a gate is an answer of its own, no change of a weight",
        "check_two_adapters": "no gate changes what the model itself answers",
        "check_transformers_trainer": "no gate changes what the model itself answers",
    },
)
TRAINING = {"learning_rate": 3e-3}


@dataclass
class ExitHeadsConfig(ExitConfig):
    """Where gates stand and how large they are.

    Args:
        r: rank of a gate's change of the hidden state; 0 leaves the norm alone.

    Raises:
        ValueError: a value that cannot be.
    """

    TYPE = "exit_heads"

    r: int = field(default=256, metadata={"help": "Rank of a gate's change of the hidden state"})

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("r", self.r, 1)


@dataclass(frozen=True)
class ExitHeadsPlug(ExitPlug):
    """How trained heads are used in serving.

    Attributes:
        heads: the adapter's folder.
    """

    heads: str = ""

    def __post_init__(self) -> None:
        if not self.heads:
            raise UsageError("exit_heads needs heads=FOLDER", remedy="`shoestring train --method exit_heads` makes one")
        super().__post_init__()


PLUG = ExitHeadsPlug


class HeadGate(Gate):
    """A gate with a low-rank change of the state before its norm."""

    def __init__(self, wide: int, rank: int, norm: nn.Module) -> None:
        super().__init__(norm)
        self.down = nn.Parameter(torch.randn(rank, wide) * SPREAD)
        self.up = nn.Parameter(torch.zeros(wide, rank))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.down.dtype)
        return super().forward(x + x @ self.down.T @ self.up.T)  # eq. 1


class GatedBlock(Beside):
    """The gates behind one block; it remembers what came out of the block while a pass is watched."""

    child = "exit"
    adapter_layer_names = ("gate",)

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.gate = nn.ModuleDict()
        self.seen: list[Tensor] | None = None
        self.plain = self.takes_over(block, self.watched)

    def watched(self, *args: Any, **kwargs: Any) -> Any:
        out = self.plain(*args, **kwargs)
        if self.seen is not None:
            self.seen.append(out[0] if isinstance(out, tuple) else out)
        return out


class ExitHeadsModel(ExitTuner):
    prefix = "exit_"
    tuner_layer_cls = GatedBlock

    def attach(self, name: str, config: Any, block: Block) -> None:
        layer: Any = getattr(block.module, GatedBlock.child, None) or GatedBlock(block.module)
        layer.put("gate", name, HeadGate(width_of(self.model, block), config.r, final_norm(self.model)), block.module)

    def gates(self, name: str) -> dict[int, GatedBlock]:
        """Block, counted from 1, and what stands behind it."""
        config: Any = self.peft_config[name]
        by_place = {block.index + 1: block.module for block in self.blocks.values()}
        return {gate: getattr(by_place[gate], GatedBlock.child) for gate in config.gates}

    def loss(self, name: str, batch: dict[str, Any], labels: Tensor) -> Tensor:
        gates = self.gates(name)
        for layer in gates.values():
            layer.seen = []
        try:
            final, head = whole_pass(self.model, batch)
            seen = {gate: layer.seen[0] for gate, layer in gates.items() if layer.seen}
        finally:
            for layer in gates.values():
                layer.seen = None
        rows = wanted_rows(labels)
        states = [seen[gate][rows] for gate in gates]
        heads: list[Any] = [layer.gate[name] for layer in gates.values()]
        return self.taught(name, heads, states, final[rows], head, kept_rows(batch["input_ids"])[rows])[0]  # eq. 3, 4


def register() -> None:
    join("exit_heads", ExitHeadsConfig, ExitHeadsModel)


def example() -> ExitHeadsConfig:
    return ExitHeadsConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 256}, {"r": 64})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """2 r d for the change, d for the norm and one temperature a gate; the model itself runs forward only."""
    asked = {**settings()[0], **options}
    gates = asked.get("gates") or gates_of(shape.layers)
    return Price(shape, trainable=len(gates) * (2 * asked["r"] * shape.hidden + shape.hidden + 1), train_flops=1.0)


def plug(config: ExitHeadsPlug, opened: Opened) -> Hooks:
    """Tokens leave at the first gate that is sure enough, or are drafted below it.

    Raises:
        UsageError: gates of another model, or a folder without any.
    """
    heads = read_exits(Path(config.heads), opened.runner)
    if config.exact:
        return drafts(heads, config.length, config.sure)
    return Hooks(exit=ConfidentExit(heads, config.threshold))

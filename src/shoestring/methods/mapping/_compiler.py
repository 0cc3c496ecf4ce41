"""From operators to instructions: one template for each kind of operator and mode."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shoestring.core.errors import UsageError
from shoestring.methods.mapping import _isa as isa
from shoestring.methods.mapping._decode import Decode
from shoestring.methods.mapping._ir import Network, operators
from shoestring.methods.mapping._isa import Instruction
from shoestring.methods.mapping._memory import Memory, Placed
from shoestring.methods.mapping._prefill import Prefill
from shoestring.methods.mapping._targets import BLOCK, Target
from shoestring.methods.mapping._templates import OURS, UNIT, Matrices, Schedule

MOST = 4080  # positions: loops and distances between blocks have 8 bits


@dataclass
class Program:
    """A compiled step of the network.

    Attributes:
        mode: "decode": one token at `position`; "prefill": a prompt of at most `length` tokens.
        length: positions that it is for.
        layers: that it computes.
    """

    mode: str
    length: int
    layers: int
    network: Network
    target: Target
    schedule: Schedule
    instructions: list[Instruction]
    memory: Memory
    placed: dict[tuple[str, int], Placed] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of its instructions."""
        return isa.size(self.instructions)

    def words(self) -> list[int]:
        return [word for instruction in self.instructions for word in isa.encode(instruction)]


def compile_step(
    network: Network,
    target: Target,
    mode: str,
    length: int,
    matrices: Matrices,
    *,
    schedule: Schedule = OURS,
    layers: int | None = None,
    head: bool = True,
    capacity: int | None = None,
    memory: Memory | None = None,
) -> Program:
    """A program for one step.

    Args:
        length: decode: positions up to and with the new one, a multiple of 16. prefill: rows, any number.
        matrices: the matrix of a role and layer.
        layers: only so many of the model's.
        capacity: positions that the cache outside has room for.
        memory: the map that other programs of the model use, which is extended; they need the same capacity.

    Raises:
        UsageError: an operator without a template, a length beyond the context, or a buffer that is too small.
    """
    if mode not in UNIT:
        raise UsageError(f"unknown mode {mode}", remedy="Known: decode, prefill")
    capacity = capacity or -(-network.context // BLOCK) * BLOCK
    if not 0 < length <= min(capacity, MOST) or (mode == "decode" and length % BLOCK):
        raise UsageError(
            f"no program of {mode} can be made for {length} positions",
            f"the cache has {capacity}, an instruction counts {MOST} of them, and decode goes in steps of {BLOCK}",
            "Choose a shorter length",
        )
    layers = network.layers if layers is None else layers
    compiler = (Decode if mode == "decode" else Prefill)(
        network, target, length, matrices, schedule, capacity, memory or Memory()
    )  # fmt: skip
    for operator in operators(network, layers):
        if operator.layer < 0 and not head:
            continue
        template = getattr(compiler, operator.kind, None)
        if template is None:
            raise UsageError(f"the operator {operator.kind} has no template", remedy="Known: norm, linear, attention")
        compiler.builder.note = operator.role or operator.kind
        template(operator)
        if not schedule.on_chip:
            compiler.builder.emit("SYS", {})
    if schedule.on_chip:
        compiler.builder.emit("SYS", {})
    return Program(
        mode, length, layers, network, target, schedule, compiler.builder.instructions, compiler.memory, compiler.placed
    )


def buckets(mode: str, length: int, limit: int) -> int:
    """The length whose program serves `length`: decode in steps of 16, prefill in steps of 128."""
    step = {"decode": 16, "prefill": 128}[mode]
    return min(math.ceil(length / step) * step, limit)

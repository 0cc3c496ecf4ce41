"""From operators to instructions: one template for each kind of operator, in vector mode (decode) and matrix mode.

Vector mode: weights stand in buffer A, the vector in B; values stay in the global buffer from the first layer to the
last. Matrix mode: 128 rows of activations stand in A and strips of weights pass through B; values lie outside as
16 x 16 blocks of fp16, [rows / 16][columns / 16][16][16], so that every transfer is of whole bursts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from shoestring.core.errors import UsageError
from shoestring.methods.mapping import _isa as isa
from shoestring.methods.mapping._builder import Builder, Region, Ring
from shoestring.methods.mapping._ir import Network, Operator, operators
from shoestring.methods.mapping._isa import Instruction
from shoestring.methods.mapping._memory import STRIPS, Memory, Placed, chunks
from shoestring.methods.mapping._sparse import Packed, Planned
from shoestring.methods.mapping._targets import BLOCK, Target

Matrices = Callable[[str, int], Packed | Planned]
WIDE = STRIPS * BLOCK  # outputs of one instruction in vector mode
UNIT = {"decode": 64, "prefill": 512}  # bytes that an address of the global buffer counts
TILE = 8  # blocks of 16 rows that one instruction takes in matrix mode
MOST = 4080  # positions: loops and distances between blocks have 8 bits
AHEAD = 2  # heads whose scores are under way before the first one's values are summed
_OP = {name: number for number, name in enumerate(isa.OPERATIONS)}
_TO = {name: number for number, name in enumerate(isa.BUFFERS)}


@dataclass(frozen=True)
class Schedule:
    """How much the program does beside the sums.

    Attributes:
        on_chip: in decode, values stay in the global buffer between operators; else each operator loads its inputs and
            stores its outputs, with a barrier of the cores behind it.
        merged: one load fills all channels; else one load each.
        whole_cache: appending to the cache passes over all of it.
        all_rows: prefill computes logits for every row, not for the last ones alone.
        indices: sparse weights bring their indices along. Without them a program can be timed, not run.
    """

    on_chip: bool = True
    merged: bool = True
    whole_cache: bool = False
    all_rows: bool = False
    indices: bool = True


OURS = Schedule()
APART = Schedule(on_chip=False)
# As the authors' profile of the larger board does it.
PUBLISHED = Schedule(on_chip=False, merged=False, whole_cache=True, all_rows=True, indices=False)


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
    compiler = (_Vector if mode == "decode" else _Matrix)(
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


class _Common:
    """What both modes share: places outside, weights, scales, cache."""

    mode = ""

    def __init__(
        self, network: Network, target: Target, length: int, matrices: Matrices, schedule: Schedule, capacity: int,
        memory: Memory,
    ) -> None:  # fmt: skip
        self.network, self.target, self.length, self.schedule = network, target, length, schedule
        self.matrices, self.capacity = matrices, capacity
        self.builder, self.memory = Builder(note="start"), memory
        self.placed: dict[tuple[str, int], Placed] = {}
        self.unit = UNIT[self.mode]
        self.own = f"{self.mode}{length}."  # what the names of this program's values begin with
        vector = self.mode == "decode"
        self.rings = {
            "A": Ring(target.a_depth, target.together * (64 if vector else 256)),
            "B": Ring(target.b_depth, 16 if vector else 32),
            "index": Ring(target.b_depth, 128 if vector else 16),
            "N": Ring(target.b_depth, 8 if vector else 1),
            "scale": Ring(target.b_depth, 64),
        }
        n = network
        for name in ("cos", "sin"):
            self.memory.place(f"{self.mode}.{name}", capacity * n.head_dim * 2)
        for layer in range(n.layers):
            for what, size in (("k", n.dims("k")[0]), ("v", n.dims("k")[0]), ("k.scale", 4), ("v.scale", 2)):
                self.memory.place(f"cache.{layer}.{what}", capacity * size)

    # -- transfers

    def load(
        self,
        to: str,
        address: int,
        memory: int,
        length: int,
        loops: tuple[int, ...] = (),
        strides: tuple[int, ...] = (),
        *,
        form: int = isa.AS_STORED,
        channel: int = 0,
        indexed: bool = False,
        writes: Region,
        source: Region | None = None,
        channels: int = 1,
        across: bool = False,
        of: str = "weights",
    ) -> None:
        values = {
            "target": _TO[to], "address": address, "memory": memory, "length": length, "form": form,
            "channel": channel, "indexed": int(indexed),
        }  # fmt: skip
        for number, (loop, stride) in enumerate(zip(loops, strides), 1):
            values[f"loop_{number}"], values[f"stride_{number}"] = loop, stride
        reads = [] if source is None else [source]
        self.builder.emit("LD", values, reads, [writes], channels=channels, across=across, of=of)

    def outside(self, name: str) -> Region:
        """A whole region of the memory, as a hazard."""
        begin, size = self.memory.regions[name]
        return "memory", begin, begin + size

    def weights(self, operator: Operator) -> Placed:
        key = operator.role, operator.layer
        if key not in self.placed:
            matrix = self.matrices(*key)
            name = f"{operator.role}.{operator.layer}"
            self.placed[key] = Placed(matrix, self.target, self.memory, name, self.schedule.indices)
        return self.placed[key]

    def norm_weight(self, operator: Operator) -> int:
        return self.memory.place(f"norm.{operator.role}.{operator.layer}", self.network.hidden * 2)

    def scales(self, memory: int, outputs: int, source: Region | None = None) -> int:
        """Load scales of so many outputs, fp32; the row of the scale buffer."""
        at = self.rings["scale"].take(WIDE * 4 if self.mode == "decode" else outputs * 4)
        self.load(
            "scale", at, memory, outputs * 4, writes=("scale", at * 64, at * 64 + outputs * 4), source=source,
            of="cache" if source else "weights",
        )  # fmt: skip
        return at

    def _through(self, ring: str, size: int, memory: int, *, form: int = 0, across: bool = False) -> int:
        """Load `size` bytes of the buffer, fewer outside when they are expanded; the row where they begin."""
        at, width = self.rings[ring].take(size), self.rings[ring].width
        outside = size // 2 if form == isa.EXPANDED else size
        channels = 1 if across else self.target.together
        self.load(
            ring, at, memory, outside, form=form, writes=(ring, at * width, at * width + size), channels=channels,
            across=across,
        )  # fmt: skip
        return at

    def places(self, sizes: dict[str, int]) -> dict[str, int]:
        """Bytes of the global buffer for each name."""
        found, at = {}, 0
        for name, size in sizes.items():
            found[name] = at
            at += -(-size // self.unit) * self.unit
        limit = min(self.target.global_bytes, 4096 * self.unit)
        if at > limit:
            raise UsageError(
                f"the global buffer of {self.target.name} is too small: {at} bytes are needed and {limit} there",
                f"{self.mode} of {self.length} positions",
                "Choose a shorter length, or a target with a deeper buffer",
            )
        return found

    def misc(
        self, operation: str, a: int, out: int, elements: int, b: int = 0, mask: int = isa.NONE, b_bytes: int = 0,
        b_number: int | None = None,
    ) -> None:  # fmt: skip
        """One instruction of the special function unit; a, b and out are bytes of the global buffer."""
        unit, size = self.unit, elements * 2
        values = {
            "operation": _OP[operation], "mask": mask, "a_address": a // unit, "out_address": out // unit,
            "b_address": b // unit if b_number is None else b_number, "K": elements // BLOCK,
        }  # fmt: skip
        reads: list[Region] = [("global", a, a + size)]
        if b_bytes:
            reads.append(("global", b, b + b_bytes))
        self.builder.emit("MISC", values, reads, [("global", out, out + size)])

    def store(
        self, at: int, memory: int, length: int, region: str, *, rows: int = 1, blocks: bool = False,
        form: int = isa.PLAIN, indexed: bool = False, of: str = "activations", channels: int = 1,
    ) -> None:  # fmt: skip
        values = {
            "address": at // self.unit, "memory": memory, "length": length, "rows": rows, "blocks": int(blocks),
            "form": form, "indexed": int(indexed),
        }  # fmt: skip
        reads = [("global", at, at + length * rows)]
        self.builder.emit("ST", values, reads, [self.outside(region)], channels=channels, of=of)


class _Vector(_Common):
    """Templates of decode: one row."""

    mode = "decode"

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        n, wide = self.network, lambda size: (-(-size // WIDE) * WIDE + WIDE) * 2  # one instruction may write past it
        names = {
            "x": n.hidden, "h": n.hidden, "q": n.dims("q")[0], "k": n.dims("k")[0], "v": n.dims("k")[0],
            "c": n.dims("q")[0], "g": n.inner,
        }  # fmt: skip
        sizes = {name: wide(size) for name, size in names.items()}
        sizes |= {f"scores{i}": wide(self.length) for i in range(AHEAD + 1)}
        sizes |= {f"temporary{i}": WIDE * 2 for i in range(2)}
        sizes |= {f"weight{i}": n.hidden * 2 for i in range(2)}
        sizes |= {"cos": n.head_dim * 2, "sin": n.head_dim * 2, "turned": n.head_dim * 2}
        sizes |= {"v.scale": self.length * 2, "pass": 1 << 14 if self.schedule.whole_cache else 0}
        self.at = self.places(sizes)
        self.turn = 0
        for name, size in {**names, "logits": n.vocab}.items():
            self.memory.place(f"{self.own}{name}", size * 2)
        self.memory.place(f"{self.own}p", n.heads * self.capacity * 2)
        self.tables()
        if self.schedule.on_chip:
            self.fetch("x", n.hidden)

    def tables(self) -> None:
        for name in ("cos", "sin"):
            size = self.network.head_dim * 2
            self.load(
                "global", self.at[name] // self.unit, self.memory[f"{self.mode}.{name}"], size, indexed=True,
                writes=("global", self.at[name], self.at[name] + size), of="tables",
            )  # fmt: skip

    def fetch(self, name: str, elements: int) -> None:
        """Load a value from outside into its place."""
        at = self.at[name]
        self.load(
            "global", at // self.unit, self.memory[f"{self.own}{name}"], elements * 2,
            writes=("global", at, at + elements * 2), source=self.outside(f"{self.own}{name}"), of="activations",
        )  # fmt: skip

    def need(self, name: str, elements: int) -> None:
        if not self.schedule.on_chip:
            self.fetch(name, elements)

    def leave(self, name: str, elements: int) -> None:
        if not self.schedule.on_chip:
            self.store(self.at[name], self.memory[f"{self.own}{name}"], elements * 2, f"{self.own}{name}")

    def operand(self, name: str, first: int, elements: int, region: Region | None = None, memory: int = -1) -> int:
        """A vector rounded to INT8 in buffer B, from where it is; the row where it begins."""
        at = self.rings["B"].take(elements)
        begin = self.at[name] + first * 2
        source: Region = ("global", begin, begin + elements * 2)
        address = isa.ON_CHIP + begin
        if not self.schedule.on_chip:
            source = region or self.outside(f"{self.own}{name}")
            address = memory if memory >= 0 else self.memory[f"{self.own}{name}"] + first * 2
        self.load(
            "B", at, address, elements * 2, form=isa.ROUNDED, writes=("B", at * 16, at * 16 + elements), source=source,
            across=address < isa.ON_CHIP, of="activations",
        )  # fmt: skip
        return at

    def mv(
        self, k: int, a: int, a_size: int, b: int, out: int, scale: int | None, *, output: bool = True,
        sparse: tuple[int, int, int, int] | None = None, kept: float = 1.0,
    ) -> None:  # fmt: skip
        """k: blocks of inputs; a, b, scale: rows of their buffers; out: byte of the global one."""
        values = {"K": k, "output": int(output), "A_address": a, "B_address": b, "out_address": out // self.unit}
        reads: list[Region] = [("A", a * 512, a * 512 + a_size), ("B", b * 16, (b + k) * 16)]
        if scale is not None:
            values |= {"scaled": 1, "scale_address": scale}
            reads.append(("scale", scale * 64, scale * 64 + WIDE * 4))
        if sparse is not None:
            index, index_size, n, n_size = sparse
            values |= {"sparse": 1, "index_address": index, "N_address": n}
            reads += [("index", index * 128, index * 128 + index_size), ("N", n * 8, n * 8 + n_size)]
        writes: list[Region] = [("global", out, out + WIDE * 2)] if output else []
        self.builder.emit("MV", values, reads, writes, kept)

    def sets(self, placed: Placed, group: int, piece: int) -> tuple[int, int]:
        """Load the strips of a group: all at once, or a load for each channel."""
        sizes = placed.sets(group, piece)
        total, memory = sum(sizes), placed.address("weights", group, piece)
        form = isa.EXPANDED if placed.matrix.bits == 4 else isa.AS_STORED
        if self.schedule.merged:
            return self._through("A", total, memory, form=form), total
        at = self.rings["A"].take(total)
        row = at
        for size in sizes:
            outside = size * placed.matrix.bits // 8
            self.load(
                "A", row, memory, outside, form=form, writes=("A", row * 512, row * 512 + size),
                channels=self.target.together,
            )  # fmt: skip
            row, memory = row + size // 512, memory + outside
        return at, total

    # -- templates

    def norm(self, operator: Operator) -> None:
        size = self.network.hidden
        self.need("x", size)
        self.turn ^= 1
        weight = self.at[f"weight{self.turn}"]
        self.load(
            "global", weight // self.unit, self.norm_weight(operator), size * 2,
            writes=("global", weight, weight + size * 2),
        )  # fmt: skip
        self.misc("rmsnorm", self.at["x"], self.at["h"], size, weight, b_bytes=size * 2)
        self.leave("h", size)

    def linear(self, operator: Operator) -> None:
        placed = self.weights(operator)
        matrix = placed.matrix
        vector = -1
        if operator.then in ("add", "mul"):
            self.need(operator.other, matrix.rows)
        direct = operator.then in ("", "rope", "silu") and operator.target != "logits"
        heads = 0
        for group in placed.groups():
            outputs = len(placed.of(group)) * BLOCK
            scale = self.scales(placed.base["scales"] + group * WIDE * 4, outputs)
            self.turn ^= 1
            out = self.at[operator.target] + group * WIDE * 2 if direct else self.at[f"temporary{self.turn}"]
            for piece, (begin, end) in enumerate(placed.pieces):
                sparse = None
                if placed.sparse:
                    n_size = placed.n_bytes(piece) * len(placed.of(group))
                    index_size = sum(placed.index_bytes(s, piece) for s in placed.of(group))
                    n = self._through("N", n_size, placed.address("N", group, piece))
                    index = self._through("index", index_size, placed.address("index", group, piece))
                    sparse = index, index_size, n, n_size
                a, size = self.sets(placed, group, piece)
                kept = _share(placed, group, piece)
                if vector < 0:  # behind the first weights, which need not wait for it
                    vector = self.operand(operator.source, 0, matrix.columns)
                self.mv(end - begin, a, size, vector + begin, out, scale, output=piece == len(placed.pieces) - 1,
                        sparse=sparse, kept=kept)  # fmt: skip
            at = self.at[operator.target] + group * WIDE * 2 if operator.target != "logits" else out
            if operator.then == "silu":
                self.misc("silu", at, at, outputs)
            elif operator.then in ("add", "mul"):
                self.misc(operator.then, at, at, outputs, out, b_bytes=outputs * 2)
            elif operator.then == "rope":
                ready = (
                    (group + 1) * WIDE if group < len(placed.groups()) - 1 else matrix.rows
                ) // self.network.head_dim
                for head in range(heads, ready):
                    self.rope(self.at[operator.target] + head * self.network.head_dim * 2)
                heads = ready
            if operator.target == "logits":
                self.store(out, self.memory[f"{self.own}logits"] + group * WIDE * 2, outputs * 2, f"{self.own}logits")
        if operator.target != "logits":
            self.leave(operator.target, matrix.rows)

    def rope(self, at: int) -> None:
        """q = q * cos + (its halves exchanged) * sin, the sine's first half negated."""
        size, turned = self.network.head_dim, self.at["turned"]
        self.misc("mul", at, turned, size, self.at["sin"], isa.TURN_A, b_bytes=size * 2)
        self.misc("mul", at, at, size, self.at["cos"], b_bytes=size * 2)
        self.misc("add", at, at, size, turned, b_bytes=size * 2)

    def append(self, operator: Operator) -> None:
        size = self.network.dims("k")[0]
        for name, scales in (("k", isa.SCALES), ("v", isa.HALF_SCALES)):
            self.need(name, size)
            cache = f"cache.{operator.layer}.{name}"
            if self.schedule.whole_cache:
                for begin, end in chunks(self.length * size, 1 << 14):
                    at = self.at["pass"]
                    self.load(
                        "global", at // self.unit, self.memory[cache] + begin, end - begin,
                        writes=("global", at, at + end - begin), channels=self.target.together, of="cache",
                    )  # fmt: skip
            self.store(self.at[name], self.memory[cache], size * 2, cache, form=isa.VALUES, indexed=True, of="cache")
            self.store(self.at[name], self.memory[f"{cache}.scale"], size * 2, f"{cache}.scale", form=scales,
                       indexed=True, of="cache")  # fmt: skip

    def attention(self, operator: Operator) -> None:
        n, length, cache = self.network, self.length, f"cache.{operator.layer}."
        v_scale = self.at["v.scale"]
        self.load(
            "global", v_scale // self.unit, self.memory[f"{cache}v.scale"], length * 2,
            writes=("global", v_scale, v_scale + length * 2), source=self.outside(f"{cache}v.scale"), of="cache",
        )  # fmt: skip
        scale_rows = self.rings["scale"].take((length + WIDE) * 4)
        self.load(
            "scale", scale_rows, self.memory[f"{cache}k.scale"], length * 4,
            writes=("scale", scale_rows * 64, scale_rows * 64 + length * 4), source=self.outside(f"{cache}k.scale"),
            of="cache",
        )  # fmt: skip
        keys: dict[int, list[tuple[int, int]]] = {}
        values: dict[int, tuple[int, int]] = {}
        ahead = AHEAD if self.schedule.on_chip else n.heads
        for step in range(n.heads + ahead):
            if step < n.heads:
                head = step // n.group
                if head not in keys:
                    keys[head] = self.keys(f"{cache}k", head)
                self.scores(step, keys[head], scale_rows, f"scores{step % (AHEAD + 1)}")
            if step == n.heads - 1 and not self.schedule.on_chip:
                self.builder.emit("SYS", {})
            if (behind := step - ahead) >= 0:
                head = behind // n.group
                if head not in values:
                    values[head] = self.values(f"{cache}v", head)
                p = self.memory[f"{self.own}p"] + behind * self.capacity * 2
                b = self.operand(f"scores{behind % (AHEAD + 1)}", 0, length, self.outside(f"{self.own}p"), p)
                out = self.at["c"] + behind * n.head_dim * 2
                self.mv(length // BLOCK, *values[head], b, out, None)
        self.leave("c", n.dims("q")[0])

    def keys(self, name: str, head: int) -> list[tuple[int, int]]:
        """A head's keys in buffer A, 512 positions at a time: (row, bytes) of each."""
        return [self._positions(name, head, begin, end, isa.AS_STORED) for begin, end in chunks(self.length, WIDE)]

    def values(self, name: str, head: int) -> tuple[int, int]:
        return self._positions(name, head, 0, self.length, isa.TURNED)

    def _positions(self, name: str, head: int, begin: int, end: int, form: int) -> tuple[int, int]:
        size, pitch = self.network.head_dim, self.network.dims("k")[0]
        at = self.rings["A"].take((end - begin) * size)
        whole = self.schedule.merged or form == isa.TURNED
        for first, last in [(begin, end)] if whole else chunks(end, 64):
            if first < begin:
                continue
            row = at + (first - begin) * size // 512
            self.load(
                "A", row, self.memory[name] + first * pitch + head * size, size, (BLOCK, (last - first) // BLOCK),
                (pitch, BLOCK * pitch), form=form, source=self.outside(name),
                writes=("A", row * 512, row * 512 + (last - first) * size), channels=self.target.together, of="cache",
            )  # fmt: skip
        return at, (end - begin) * size

    def scores(self, head: int, keys: list[tuple[int, int]], scale: int, into: str) -> None:
        size, at = self.network.head_dim, self.at[into]
        b = self.operand("q", head * size, size)
        for number, (a, total) in enumerate(keys):
            self.mv(size // BLOCK, a, total, b, at + number * WIDE * 2, scale + number * STRIPS)
        self.misc("softmax", at, at, self.length, mask=isa.FIRST)
        self.misc("mul", at, at, self.length, self.at["v.scale"], b_bytes=self.length * 2)
        if not self.schedule.on_chip:
            self.store(at, self.memory[f"{self.own}p"] + head * self.capacity * 2, self.length * 2, f"{self.own}p")


class _Matrix(_Common):
    """Templates of prefill: tiles of 128 rows."""

    mode = "prefill"

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        n = self.network
        self.blocks = -(-self.length // BLOCK)  # of rows
        self.tiles = [(begin, end - begin) for begin, end in chunks(self.blocks, TILE)]
        self.head_blocks = n.head_dim // BLOCK
        columns = {
            "x": n.hidden, "h": n.hidden, "q": n.dims("q")[0], "k": n.dims("k")[0], "v": n.dims("k")[0],
            "c": n.dims("q")[0], "g": n.inner,
        }  # fmt: skip
        self.columns = {name: size // BLOCK for name, size in columns.items()} | {"logits": n.vocab // BLOCK}
        for name, size in columns.items():
            self.memory.place(f"{self.own}{name}", self.blocks * size * BLOCK * 2)
        rows = self.blocks if self.schedule.all_rows else 1
        self.memory.place(f"{self.own}last", n.hidden * BLOCK * 2)
        self.memory.place(f"{self.own}logits", rows * n.vocab * BLOCK * 2)
        widest = max(n.hidden, n.dims("k")[0]) * BLOCK * 2
        sizes = {f"row{i}": widest for i in range(2)}
        sizes |= {f"out{i}": 4 * TILE * 512 for i in range(2)} | {f"other{i}": 4 * TILE * 512 for i in range(2)}
        if self.head_blocks > 4:
            sizes |= {f"out{i}": self.head_blocks * TILE * 512 for i in range(2)}
        sizes |= {"weight": n.hidden * 2, "turned": self.head_blocks * 512, "v.scale": self.blocks * 32}
        sizes |= dict.fromkeys(("cos", "sin"), TILE * self.head_blocks * 512)
        self.at = self.places(sizes)
        left = min(self.target.global_bytes, 4096 * self.unit) - sum(-(-s // 512) * 512 for s in sizes.values())
        self.score_places = max(1, min(2, left // (TILE * self.blocks * 512)))
        self.at = self.places(sizes | {f"scores{i}": TILE * self.blocks * 512 for i in range(self.score_places)})
        self.turn = self.side = 0  # which half of buffer A, and which place for outputs, is next

    def block_row(self, name: str, block: int, column: int = 0) -> int:
        """Address of a block of a value outside."""
        return self.memory[f"{self.own}{name}"] + (block * self.columns[name] + column) * 512

    def rounded(self, name: str, block: int, column: int, count: int, channel: int, slot: int) -> None:
        """Sixteen rows of `count` blocks as INT8 in buffer A."""
        self.load(
            "A", slot, self.block_row(name, block, column), count * 512, form=isa.ROUNDED, channel=channel,
            writes=("A", slot, slot + count), source=self.outside(f"{self.own}{name}"),
            channels=self.target.together, of="activations",
        )  # fmt: skip

    def mm(
        self, k: int, a: int, b: int, b_size: int, out: int, pitch: int, scale: int | None, *, output: bool = True,
        sparse: tuple[int, int, int, int] | None = None, kept: float = 1.0,
    ) -> None:  # fmt: skip
        values = {
            "K": k, "output": int(output), "A_address": a, "B_address": b, "out_address": out // self.unit,
            "pitch": pitch,
        }  # fmt: skip
        reads: list[Region] = [("A", a, a + k), ("B", b * 32, b * 32 + b_size)]
        if scale is not None:
            values |= {"scaled": 1, "scale_address": scale}
            reads.append(("scale", scale * 64, scale * 64 + 64))
        if sparse is not None:
            index, index_size, n, n_size = sparse
            values |= {"sparse": 1, "index_address": index, "N_address": n}
            reads += [("index", index * 16, index * 16 + index_size), ("N", n, n + n_size)]
        writes: list[Region] = [("global", out, out + ((TILE - 1) * pitch + 1) * 512)] if output else []
        self.builder.emit("MM", values, reads, writes, kept)

    def a_slot(self, size: int) -> int:
        """K blocks of the next tile: halves of buffer A in turn where two fit."""
        if 2 * size > self.target.a_depth:
            if size > self.target.a_depth:
                raise UsageError(
                    f"{self.target.name} has a buffer A too small for two pieces of 128 rows",
                    remedy="Choose a narrower model",
                )
            return 0
        self.turn ^= 1
        return self.turn * (self.target.a_depth // 2)

    # -- templates

    def norm(self, operator: Operator) -> None:
        n, weight = self.network, self.at["weight"]
        self.load(
            "global", weight // self.unit, self.norm_weight(operator), n.hidden * 2,
            writes=("global", weight, weight + n.hidden * 2),
        )  # fmt: skip
        last = operator.layer < 0 and not self.schedule.all_rows
        size = n.hidden * BLOCK * 2
        for block in range(1 if last else self.blocks):
            at = self.at[f"row{block % 2}"]
            self.load(
                "global", at // self.unit, self.block_row("x", block), size, indexed=last,
                writes=("global", at, at + size), source=self.outside(f"{self.own}x"), of="activations",
            )  # fmt: skip
            self.misc("rmsnorm", at, at, n.hidden * BLOCK, weight, isa.IN_BLOCKS, n.hidden * 2)
            into = self.memory[f"{self.own}last"] if last else self.block_row("h", block)
            self.store(at, into, size, f"{self.own}last" if last else f"{self.own}h")

    def linear(self, operator: Operator) -> None:
        placed = self.weights(operator)
        last = operator.layer < 0 and not self.schedule.all_rows
        source = "last" if last else operator.source
        self.columns["last"] = self.columns["h"]
        wide = self.head_blocks if operator.then == "rope" else 4
        for first, count in [(0, 1)] if last else self.tiles:
            slot = self.a_slot(placed.blocks)
            for m in range(count):
                self.rounded(source, first + m, 0, placed.blocks, m, slot)
            if operator.then == "rope":
                self.tables(first, count)
            for begin, end in chunks(placed.strips, wide):
                self.group(operator, placed, slot, first, count, begin, end)

    def tables(self, first: int, count: int) -> None:
        for name in ("cos", "sin"):
            size, at = count * self.head_blocks * 512, self.at[name]
            self.load(
                "global", at // self.unit, self.memory[f"{self.mode}.{name}"] + first * self.head_blocks * 512, size,
                writes=("global", at, at + size), of="tables",
            )  # fmt: skip

    def group(
        self, operator: Operator, placed: Placed, slot: int, first: int, count: int, begin: int, end: int
    ) -> None:
        """Some strips of outputs: the sums, what follows them, and the way out."""
        width = end - begin
        self.side ^= 1
        out, other = self.at[f"out{self.side}"], self.at[f"other{self.side}"]
        scale = self.scales(placed.base["scales"] + begin * 64, width * BLOCK)
        for strip in range(begin, end):
            of_512 = strip // STRIPS
            for piece, (start, stop) in enumerate(placed.pieces):
                kept, sparse = placed.kept(strip, piece), None
                if placed.sparse:
                    n = self._through("N", stop - start, placed.address("N", of_512, piece, strip), across=True)
                    size = placed.index_bytes(strip, piece)
                    index = self._through("index", size, placed.address("index", of_512, piece, strip), across=True)
                    sparse = index, size, n, stop - start
                form = isa.EXPANDED if placed.matrix.bits == 4 else isa.AS_STORED
                b = self._through(
                    "B", BLOCK * kept, placed.address("weights", of_512, piece, strip), form=form, across=True
                )
                self.mm(
                    stop - start, slot + start, b, BLOCK * kept, out + (strip - begin) * 512, width,
                    scale + strip - begin, output=piece == len(placed.pieces) - 1, sparse=sparse,
                    kept=kept / (BLOCK * (stop - start)),
                )  # fmt: skip
        size, name = count * width * 512, operator.target
        if operator.then in ("add", "mul"):
            for m in range(count):
                at = other + m * width * 512
                self.load(
                    "global", at // self.unit, self.block_row(operator.other, first + m, begin), width * 512,
                    writes=("global", at, at + width * 512), source=self.outside(f"{self.own}{operator.other}"),
                    channels=self.target.together, of="activations",
                )  # fmt: skip
            self.misc(operator.then, other, out, size // 2, out, b_bytes=size)
        elif operator.then == "silu":
            self.misc("silu", out, out, size // 2)
        elif operator.then == "rope":
            part = width * 512
            for m in range(count):
                at, turned = out + m * part, self.at["turned"]
                self.misc("mul", at, turned, part // 2, self.at["sin"] + m * part, isa.TURN_A, part)
                self.misc("mul", at, at, part // 2, self.at["cos"] + m * part, b_bytes=part)
                self.misc("add", at, at, part // 2, turned, b_bytes=part)
        for m in range(count):
            self.store(
                out + m * width * 512, self.block_row(name, first + m, begin), width * 512, f"{self.own}{name}",
                channels=self.target.together,
            )  # fmt: skip

    def append(self, operator: Operator) -> None:
        size = self.network.dims("k")[0]
        for name, scales, width in (("k", isa.SCALES, 4), ("v", isa.HALF_SCALES, 2)):
            cache = f"cache.{operator.layer}.{name}"
            for block in range(self.blocks):
                at = self.at[f"row{block % 2}"]
                self.load(
                    "global", at // self.unit, self.block_row(name, block), size * BLOCK * 2,
                    writes=("global", at, at + size * BLOCK * 2), source=self.outside(f"{self.own}{name}"),
                    of="activations",
                )  # fmt: skip
                row = block * BLOCK
                self.store(at, self.memory[cache] + row * size, size * 2, cache, rows=BLOCK, blocks=True,
                           form=isa.VALUES, of="cache")  # fmt: skip
                self.store(at, self.memory[f"{cache}.scale"] + row * width, size * 2, f"{cache}.scale", rows=BLOCK,
                           blocks=True, form=scales, of="cache")  # fmt: skip

    def attention(self, operator: Operator) -> None:
        n, cache = self.network, f"cache.{operator.layer}."
        at, size = self.at["v.scale"], self.blocks * 32
        self.load(
            "global", at // self.unit, self.memory[f"{cache}v.scale"], size, writes=("global", at, at + size),
            source=self.outside(f"{cache}v.scale"), of="cache",
        )  # fmt: skip
        scale = self.scales(self.memory[f"{cache}k.scale"], self.blocks * BLOCK, self.outside(f"{cache}k.scale"))
        for first, count in self.tiles:
            seen = min(first + TILE, self.blocks)  # blocks behind the tile's last row are nobody's keys
            for head in range(n.heads):
                self.side ^= 1
                self.head(cache, head, first, count, seen, scale)

    def head(self, cache: str, head: int, first: int, count: int, seen: int, scale: int) -> None:
        n, parts = self.network, self.head_blocks
        pitch, size = n.dims("k")[0], n.head_dim
        scores = self.at[f"scores{head % self.score_places}"]
        slot = self.a_slot(max(parts, self.blocks))
        for m in range(count):
            self.rounded("q", first + m, head * parts, parts, m, slot)
        column = head // n.group * size
        for block in range(seen):
            b = self.rings["B"].take(BLOCK * size)
            self.load(
                "B", b, self.memory[f"{cache}k"] + block * BLOCK * pitch + column, size, (BLOCK,), (pitch,),
                writes=("B", b * 32, b * 32 + BLOCK * size), source=self.outside(f"{cache}k"), across=True, of="cache",
            )  # fmt: skip
            self.mm(parts, slot, b, BLOCK * size, scores + block * 512, seen, scale + block)
        row_bytes = seen * 512
        for m in range(count):
            at = scores + m * row_bytes
            elements = seen * BLOCK * BLOCK
            self.misc("softmax", at, at, elements, mask=isa.IN_BLOCKS, b_number=(first + m) * BLOCK)
            self.misc("mul", at, at, elements, self.at["v.scale"], isa.IN_BLOCKS, seen * 32)
        slot = self.a_slot(max(parts, self.blocks))
        for m in range(count):
            at = scores + m * row_bytes
            self.load(
                "A", slot, isa.ON_CHIP + at, row_bytes, form=isa.ROUNDED, channel=m,
                writes=("A", slot, slot + seen), source=("global", at, at + row_bytes), of="activations",
            )  # fmt: skip
        out = self.at[f"out{self.side}"]
        for part in range(parts):
            total = seen * BLOCK * BLOCK
            b = self.rings["B"].take(total)
            self.load(
                "B", b, self.memory[f"{cache}v"] + column + part * BLOCK, BLOCK, (BLOCK, seen), (pitch, BLOCK * pitch),
                form=isa.TURNED, writes=("B", b * 32, b * 32 + total), source=self.outside(f"{cache}v"), across=True,
                of="cache",
            )  # fmt: skip
            self.mm(seen, slot, b, total, out + part * 512, parts, None)
        for m in range(count):
            self.store(
                out + m * parts * 512, self.block_row("c", first + m, head * parts), parts * 512, f"{self.own}c",
                channels=self.target.together,
            )  # fmt: skip


def _share(placed: Placed, group: int, piece: int) -> float:
    """Products of a group's piece against a dense one; channels wait for the slowest of the strips they work on."""
    begin, end = placed.pieces[piece]
    whole = BLOCK * (end - begin)
    strips = placed.of(group)
    most = [max(placed.matrix.kept(s, begin, end) for s in strips[i : i + 4]) for i in range(0, len(strips), 4)]
    # Strips behind the last output are cycles too.
    idle = (STRIPS - len(strips)) // 4
    return (sum(most) + idle * whole) / (whole * (len(most) + idle))


def buckets(mode: str, length: int, limit: int) -> int:
    """The length whose program serves `length`: decode in steps of 16, prefill in steps of 128."""
    step = {"decode": 16, "prefill": 128}[mode]
    return min(math.ceil(length / step) * step, limit)

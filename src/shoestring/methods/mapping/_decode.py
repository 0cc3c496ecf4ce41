"""Templates of decode: one row, in vector mode.

Weights stand in buffer A, the vector in B; values stay in the global buffer from the first layer to the last.
"""

from __future__ import annotations

from shoestring.methods.mapping import _isa as isa
from shoestring.methods.mapping._builder import Region
from shoestring.methods.mapping._ir import Operator
from shoestring.methods.mapping._memory import STRIPS, Placed, chunks
from shoestring.methods.mapping._targets import BLOCK
from shoestring.methods.mapping._templates import WIDE, Templates

AHEAD = 2  # heads whose scores are under way before the first one's values are summed


class Decode(Templates):
    """A method for each kind of operator."""

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


def _share(placed: Placed, group: int, piece: int) -> float:
    """Products of a group's piece against a dense one; channels wait for the slowest of the strips they work on."""
    begin, end = placed.pieces[piece]
    whole = BLOCK * (end - begin)
    strips = placed.of(group)
    most = [max(placed.matrix.kept(s, begin, end) for s in strips[i : i + 4]) for i in range(0, len(strips), 4)]
    # Strips behind the last output are cycles too.
    idle = (STRIPS - len(strips)) // 4
    return (sum(most) + idle * whole) / (whole * (len(most) + idle))

"""Templates of prefill: tiles of 128 rows, in matrix mode.

Rows of activations stand in buffer A and strips of weights pass through B; values lie outside as 16 x 16 blocks of
fp16, [rows / 16][columns / 16][16][16], so that every transfer is of whole bursts.
"""

from __future__ import annotations

from shoestring.core.errors import UsageError
from shoestring.methods.mapping import _isa as isa
from shoestring.methods.mapping._builder import Region
from shoestring.methods.mapping._ir import Operator
from shoestring.methods.mapping._memory import STRIPS, Placed, chunks
from shoestring.methods.mapping._targets import BLOCK
from shoestring.methods.mapping._templates import Templates

TILE = 8  # blocks of 16 rows that one instruction takes


class Prefill(Templates):
    """A method for each kind of operator."""

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

"""What the templates of both modes share: places, transfers, weights, and how much a program does beside the sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoestring.core.errors import UsageError
from shoestring.methods.mapping import _isa as isa
from shoestring.methods.mapping._builder import Builder, Region, Ring
from shoestring.methods.mapping._ir import Network, Operator
from shoestring.methods.mapping._memory import STRIPS, Memory, Placed
from shoestring.methods.mapping._sparse import Packed, Planned
from shoestring.methods.mapping._targets import BLOCK, Target

Matrices = Callable[[str, int], Packed | Planned]
WIDE = STRIPS * BLOCK  # outputs of one instruction in vector mode
UNIT = {"decode": 64, "prefill": 512}  # bytes that an address of the global buffer counts
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


class Templates:
    """Places outside, weights, scales, cache, and the instructions that both modes make."""

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

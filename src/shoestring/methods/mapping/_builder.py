"""Instructions in program order, with the waits and releases that let the units run at their own pace.

Every instruction says which bytes of which buffer it reads and writes. One unit's instructions run in order, so it is
enough that an instruction waits for the latest one of each other unit that it follows; a pair of units that has been
synchronised so far is not synchronised again. The n-th wait of a unit on another takes that one's n-th release, and
both only ever go forward: the stream cannot deadlock, and no wait is there that a hazard did not ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoestring.core.errors import UsageError
from shoestring.methods.mapping._isa import Instruction

Region = tuple[str, int, int]  # space, first byte, byte behind the last
# Buffers that many small pieces pass through are looked at by pages of so many bytes.
_PAGES = {"scale": 512, "B": 1 << 14, "index": 1 << 12, "N": 256}


@dataclass
class Ring:
    """A buffer that pieces pass through: each takes the next rows, from the start again when the end is near."""

    rows: int
    width: int
    next: int = 0

    def take(self, size: int) -> int:
        """The first row of a place for so many bytes."""
        needed = -(-size // self.width)
        if needed > self.rows:
            raise UsageError(
                f"a piece of {size} bytes does not fit into a buffer of {self.rows * self.width}",
                remedy="Give the target deeper buffers",
            )
        if self.next + needed > self.rows:
            self.next = 0
        at, self.next = self.next, self.next + needed
        return at


@dataclass
class Builder:
    """Collects a program."""

    instructions: list[Instruction] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        self._spaces: dict[tuple[str, int], list[tuple[int, int, str, int, bool]]] = {}
        self._synced: dict[tuple[str, str], int] = {}
        self._last: dict[str, int] = {}
        self._barrier = -1

    def emit(
        self,
        unit: str,
        values: dict[str, int],
        reads: Sequence[Region] = (),
        writes: Sequence[Region] = (),
        kept: float = 1.0,
        channels: int = 1,
        across: bool = False,
        of: str = "",
    ) -> None:
        index = len(self.instructions)
        after = {"SYS": self._barrier} if self._barrier >= 0 else {}
        for regions, writing in ((reads, False), (writes, True)):
            for space, begin, end in regions:
                page = _PAGES.get(space, 1 << 40)
                for number in range(begin // page, (end - 1) // page + 1):
                    first, last = max(begin, number * page), min(end, (number + 1) * page)
                    self._follow((space, number), first, last, unit, index, writing, after)
        if unit == "SYS":
            after.update(self._last)
            self._barrier = index
        made = Instruction(unit, values, (), (), kept, channels, across, self.note, of)
        for other, latest in after.items():
            if other != unit and latest > self._synced.get((other, unit), -1):
                self._synced[other, unit] = latest
                self.instructions[latest].releases += (unit,)
                made.waits += (other,)
        self.instructions.append(made)
        self._last[unit] = index

    def _follow(
        self, space: tuple[str, int], begin: int, end: int, unit: str, index: int, writing: bool, after: dict[str, int]
    ) -> None:
        left = []
        for entry in self._spaces.get(space, ()):
            first, behind, owner, number, wrote = entry
            covered = begin <= first and behind <= end
            if first < end and begin < behind and (writing or wrote) and owner != unit:
                after[owner] = max(after.get(owner, -1), number)
            # A write stands for all it covers: who follows it follows them. A read stands for its own unit's.
            if not (covered and (writing or (owner == unit and not wrote))):
                left.append(entry)
        left.append((begin, end, unit, index, writing))
        self._spaces[space] = left

"""Instructions and their words: six units, fixed lengths, one wait and one release bit for every other unit.

A field takes the next free bits of its instruction from the top of word 0 on, so every bit belongs to one field or to
the reserve at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from shoestring.core.errors import ShoestringError, UsageError, nearest

UNITS = ("LD", "ST", "MM", "MV", "MISC", "SYS")
WORDS = {"LD": 7, "ST": 3, "MM": 4, "MV": 4, "MISC": 3, "SYS": 1}
OPCODES = {"LD": 1, "ST": 2, "MM": 3, "MV": 4, "MISC": 5, "SYS": 15}

BUFFERS = ("B", "index", "scale", "N", "A", "global")  # what `target` of LD counts
OPERATIONS = ("add", "mul", "softmax", "layernorm", "rmsnorm", "silu")
# What LD does on the way: the bytes as they are; 4-bit numbers made 8-bit ones; fp16 rows rounded to INT8 with a scale
# each; INT8 rows laid down as columns.
AS_STORED, EXPANDED, ROUNDED, TURNED = range(4)
# What ST writes of fp16 rows: themselves, their INT8 values, or the scale of each row as fp32 or fp16.
PLAIN, VALUES, SCALES, HALF_SCALES = range(4)
# `mask` of MISC. mul: a is read from its middle on; b is one row for the sixteen of a. softmax: only the first
# position + 1 elements count. Norms and softmax: sixteen rows that lie in blocks (softmax: row r counts b + r + 1).
NONE, TURN_A, FIRST, IN_BLOCKS = range(4)
ON_CHIP = 1 << 33  # addresses from here on are those of the global buffer

_COMMON = (("opcode", 4), ("wait", 5), ("release", 5))
_MATRIX = (
    ("K", 14), ("output", 1), ("scaled", 1), ("relu", 1), ("sparse", 1), ("scale_address", 12), ("index_address", 12),
    ("N_address", 12), ("A_address", 12), ("B_address", 12), ("out_address", 12), ("pitch", 8), ("reserved", 16),
)  # fmt: skip
FIELDS: dict[str, tuple[tuple[str, int], ...]] = {
    "LD": (
        *_COMMON, ("target", 3), ("channel", 3), ("address", 12), ("memory", 34), ("length", 23), ("loop_1", 8),
        ("loop_2", 8), ("loop_3", 8), ("stride_1", 34), ("stride_2", 34), ("stride_3", 34), ("form", 2), ("zero", 1),
        ("indexed", 1), ("reserved", 5),
    ),
    "ST": (
        *_COMMON, ("address", 12), ("rows", 5), ("blocks", 1), ("memory", 34), ("length", 23), ("form", 2),
        ("channel", 3), ("indexed", 1), ("reserved", 1),
    ),
    "MM": (*_COMMON, *_MATRIX),
    "MV": (*_COMMON, *_MATRIX),
    "MISC": (
        *_COMMON, ("a_address", 12), ("mask", 2), ("operation", 4), ("b_address", 12), ("out_address", 12), ("K", 14),
        ("reserved", 26),
    ),
    "SYS": (*_COMMON, ("reserved", 18)),
}  # fmt: skip
_LOOPS = ("loop_1", "loop_2", "loop_3")


@dataclass(slots=True)
class Instruction:
    """One instruction.

    Attributes:
        values: its fields by name without opcode, wait and release; what is absent is 0 (a loop: 1).
        waits, releases: other units.
        kept: of a sparse matrix instruction, the products it makes of those a dense one would; the words do not say
            it, because it is the weights that do.
        channels: that LD and ST use at once; `across`: a foreign one.
        note: the operator it belongs to; `of`: what LD and ST move: weights, cache, activations or tables.
    """

    unit: str
    values: dict[str, int]
    waits: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    kept: float = 1.0
    channels: int = 1
    across: bool = False
    note: str = ""
    of: str = ""

    def __getitem__(self, name: str) -> int:
        return self.values.get(name, 1 if name in _LOOPS else 0)

    def __str__(self) -> str:
        return f"{self.unit} {self.note or self.values}"


def places(unit: str) -> dict[str, list[tuple[int, int, int]]]:
    """Field -> its pieces (word, highest bit, lowest bit) from the field's top down."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    at = 0
    for name, width in FIELDS[unit]:
        pieces = []
        while width:
            word, used = divmod(at, 32)
            take = min(width, 32 - used)
            pieces.append((word, 31 - used, 32 - used - take))
            at, width = at + take, width - take
        found[name] = pieces
    if at != 32 * WORDS[unit]:
        raise ShoestringError(f"the fields of {unit} take {at} bits, and it has {32 * WORDS[unit]}")
    return found


_WIDTHS = {unit: dict(fields) for unit, fields in FIELDS.items()}


def _bits(unit: str, others: Iterable[str]) -> int:
    """One bit for every other unit, the first unit in the highest."""
    order = [u for u in UNITS if u != unit]
    value = 0
    for other in others:
        if other not in order:
            raise UsageError(f"{unit} can neither wait for nor release {other}", remedy=nearest(other, order))
        value |= 1 << (len(order) - 1 - order.index(other))
    return value


def _units(unit: str, value: int) -> tuple[str, ...]:
    order = [u for u in UNITS if u != unit]
    return tuple(u for i, u in enumerate(order) if value >> (len(order) - 1 - i) & 1)


def encode(instruction: Instruction) -> list[int]:
    """The words of an instruction.

    Raises:
        UsageError: a field it does not have, or a value that its bits cannot hold.
    """
    unit, widths = instruction.unit, _WIDTHS[instruction.unit]
    strange = set(instruction.values) - set(widths) | ({"opcode", "wait", "release"} & set(instruction.values))
    if strange:
        raise UsageError(f"{unit} has no field {', '.join(sorted(strange))}", remedy="Known: " + ", ".join(widths))
    whole = 0
    for name, width in FIELDS[unit]:
        value = (
            OPCODES[unit] if name == "opcode"
            else _bits(unit, instruction.waits) if name == "wait"
            else _bits(unit, instruction.releases) if name == "release"
            else instruction[name]
        )  # fmt: skip
        if not 0 <= value < 1 << width:
            raise UsageError(f"{name} of {unit} cannot be {value}", f"it has {width} bits", "Split the piece of work")
        whole = whole << width | value
    top = 32 * (WORDS[unit] - 1)
    return [whole >> (top - 32 * word) & 0xFFFFFFFF for word in range(WORDS[unit])]


def decode(words: Sequence[int]) -> Iterator[Instruction]:
    """The instructions of a stream of words.

    Raises:
        ShoestringError: an unknown opcode, or a stream that ends within an instruction.
    """
    names = {code: unit for unit, code in OPCODES.items()}
    at = 0
    while at < len(words):
        unit = names.get(words[at] >> 28, "")
        if not unit or at + WORDS[unit] > len(words):
            raise ShoestringError(f"word {at} begins no instruction", f"it is {words[at]:#010x}")
        whole = 0
        for word in words[at : at + WORDS[unit]]:
            whole = whole << 32 | word
        values: dict[str, int] = {}
        left = 32 * WORDS[unit]
        for name, width in FIELDS[unit]:
            left -= width
            values[name] = whole >> left & ((1 << width) - 1)
        waits, releases = _units(unit, values.pop("wait")), _units(unit, values.pop("release"))
        values.pop("opcode")
        yield Instruction(unit, values, waits, releases)
        at += WORDS[unit]


def size(instructions: Iterable[Instruction]) -> int:
    """Bytes of a stream."""
    return 4 * sum(WORDS[i.unit] for i in instructions)

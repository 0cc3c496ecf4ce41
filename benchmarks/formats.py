"""Decode speed of every weight format: one answer of our engine beside llama.cpp's nearest type, and beside the memory.

    python benchmarks/formats.py [--llama-python PYTHON] [--formats ternary,uniform3] [--shapes default,1B]
        [--group 64] [--rounds 5] [--json FILE]

Shapes: that of the default model, its token table in 8 bits, against the same model as llama.cpp quantizes it (it gives
layers whose width 256 does not divide, and the token table, types of more bits); and a Llama of 1.07 billion parameters
with every matrix in the one format, on both sides. Ours has random codes, and so has llama.cpp at 1B: speed does not
depend on them. Each pair is loaded once, by processes of their own, and asked in turns; a round's figure is its median
token. The memory's is one pass over as many bytes as our weights have, by as many threads, in every round.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from _models import BIG, big_gguf, packed, requantized, sizes_of
from _peers import arguments, circumstances, gguf, keep
from _side_by_side import Arm, asked
from engine_decode import compared, printed
from shoestring.core.errors import nearest
from shoestring.kernels.layout import parse
from shoestring.models import resolve

# Ours -> the type of llama.cpp that is nearest in bits.
NEAREST = {
    "ternary": "TQ2_0", "uniform2": "Q2_K", "uniform3": "Q3_K", "uniform4": "Q4_K", "tritplanes": "Q4_K",
    "int4": "Q4_0", "binary2": "Q2_K", "binary3": "Q3_K", "binary4": "Q4_K", "exponents": "BF16",
}  # fmt: skip
# What llama.cpp calls a whole file of such a type.
FILES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S"}


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--formats", default=",".join(NEAREST))
    parser.add_argument("--shapes", default="default,1B")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    names, shapes = given.formats.split(","), given.shapes.split(",")
    for word, known in [(name, NEAREST) for name in names] + [(shape, ("default", "1B")) for shape in shapes]:
        if word not in known:
            parser.error(f"{word} is not known; {nearest(word, known)}")
    report: dict[str, Any] = {"circumstances": circumstances(given.threads), "group": given.group, "shapes": {}}
    for shape in shapes:
        for name in names:
            with (
                tempfile.TemporaryDirectory() as place,
                asked(pair(shape, name, given, Path(place)), given.threads) as processes,
            ):
                found = compared(processes, given)
            report["shapes"].setdefault(shape, {})[name] = found
            printed(f"{shape}: {name}", found)
            keep(given.json, report)  # a run of all of them is long
    report["circumstances"]["load_average_after"] = circumstances(given.threads)["load_average"]
    keep(given.json, report)
    return 0


def pair(shape: str, name: str, given: Any, folder: Path) -> list[Arm]:
    """Our engine and, where there is one, llama.cpp, on models of one shape."""
    spec = f"{name}/{given.group}"
    parse(spec)
    file, kind = gguf(given.model), NEAREST[name]
    like = resolve(file)
    if shape == "1B":
        ours = packed(like, folder / "ours", spec, spec, BIG)
    else:
        ours = packed(like, folder / "ours", spec, "int8/64", sizes_of(like))
    arms = [Arm(f"ours, {name}", "ours", sys.executable, ours)]
    if given.llama_python:
        out = folder / "theirs.gguf"
        if shape == "1B":
            theirs = big_gguf(file, out, kind)
        else:
            theirs = requantized(given.llama_python, file, out, given.threads, FILES.get(kind, kind))
        arms.append(Arm(f"llama.cpp, {kind}", "llama", given.llama_python, theirs))
    return arms


if __name__ == "__main__":
    sys.exit(main())

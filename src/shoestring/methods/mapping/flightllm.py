"""FlightLLM: compiles a compressed model into instructions for a sparse accelerator and models their time and energy.

How it works
    1. Weights keep N of every 16 along K in each block of 16 x 16, N in {2, 4, 8, 16} free between blocks; a kept one
       has 4 bits of value and 4 of index, a block one byte of N. A mux in front of each multiplier picks the activation
       by the index, and a reduction node behind each two passes the sum on or starts anew, so the cycles of a block
       fall in proportion to N / 16 (1).
    2. Two INT8 activations share a multiplier: w (a0 + 2^18 a1). The low sum borrows from the high one when it is
       negative; eight products fill the field (2).
    3. Prefill works on 128 rows (128 x 16 x 2 products a cycle as M x K x N), decode on one (1 x 16 x 64): with
       T_mem = (MK + KN + MN) / BW and T_cmp = MKN / (pM pK pN), double buffers want T_mem < T_cmp in the one and the
       whole bandwidth in the other (3).
    4. In decode activations stay in the global buffer from the first layer to the last. Linear layers run on into
       rotation, SiLU, product or residual sum piece by piece, and scores into softmax; only weights and cache cross
       the memory outside (4).
    5. The network becomes instructions of six units (LD, ST, MM, MV, MISC, SYS) by a template for each kind of
       operator. Each carries one wait and one release bit per other unit; an instruction starts when every waited unit
       has released it. They are inserted where a hazard asks for them (5).
    6. A clock runs over the instructions: each unit takes its own in order, the one that can start first does so (6).
       LD: bytes / (channels x bandwidth x 0.7, or 0.35 from a foreign channel); MM, MV: products kept / products a
       cycle; special functions: 16 elements a cycle, twice for softmax and norms.
    7. A program is made for a bucket of lengths (decode 16, prefill 128) and runs at any length of it; where it stands
       is a register. Its instructions are shared by the cores, and one load fills all channels (7).

Where it bends
    Every time, byte per second and joule is modelled; nothing of it was measured on a board. One published constant is
    kept in sight: the authors' profile divides all durations by 3.2 for four cores. What is real are the integers: the
    words of the program, executed with the units in any order they allow, give what plain computation gives.
    The layout of the words is our own within the published lengths, and so is what crosses the buffers: rows are
    rounded to INT8 where they become operands, with a scale each, and the special function unit works in fp16.
    Only plain Llama-like models have templates; masks are causal, without the paper's blocks of attention left out.
    At 2 to 8 of 16 indices are as many bytes as 4-bit values: sparsity saves cycles, and bandwidth only below half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper
from shoestring.methods.mapping._compiler import MOST, buckets, compile_step
from shoestring.methods.mapping._ir import MATRICES, Network, described, network_of
from shoestring.methods.mapping._model import Accelerated, Reference, read
from shoestring.methods.mapping._numbers import Array
from shoestring.methods.mapping._sparse import Planned
from shoestring.methods.mapping._targets import BLOCK, TARGETS, Target, target
from shoestring.methods.mapping._templates import OURS, Matrices, Schedule
from shoestring.methods.mapping._timing import Modelled, modelled

METHOD = Method(
    paper=Paper(
        title="FlightLLM: Efficient Large Language Model Inference with a Complete Mapping Flow on FPGAs",
        date="2024-01",
        arxiv="2401.03868",
        code="FlightLLM/flightllm_test_demo",
        licence="none stated",
    ),
    provides="FlightLLMConfig",
    saves=("energy", "money", "latency", "storage"),
    combines={"pruners": "yes"},
    traits={"targets": "u280, vhk158"},
    default=True,
)

_MOST_SAMPLES = 9  # lengths of decode that are compiled; between them time is a straight line


@dataclass(frozen=True)
class FlightLLMConfig:
    """How the model is compressed and compiled.

    Attributes:
        bits: of a weight of the layers, 4 or 8; `head_bits`: of the head's.
        keep: share of the weights that the matrices named in `sparse` keep, from 0.125 to 1.
        sparse: roles of the matrices that are pruned; the published profile prunes q and k.
        on_chip: in decode, values stay in the buffers between operators.
        merged: one load fills all channels.
        watts: the accelerator's power; default: what the target says, which is assumed too.
    """

    bits: int = 4
    head_bits: int = 8
    keep: float = 0.7
    sparse: tuple[str, ...] = ("q", "k")
    on_chip: bool = True
    merged: bool = True
    watts: float = 0.0

    def __post_init__(self) -> None:
        for name, kind, word in (
            ("keep", int | float, "number"), ("watts", int | float, "number"),
            ("on_chip", bool, "truth value"), ("merged", bool, "truth value"),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UsageError(f"{name}={value!r} is no {word}")
        roles = self.sparse.split("+") if isinstance(self.sparse, str) else self.sparse
        strange = [roles] if not isinstance(roles, list | tuple) else [r for r in roles if r and r not in MATRICES]
        if strange:
            raise UsageError(
                f"no matrix is called {', '.join(map(str, strange))}", remedy=f"sparse: some of {', '.join(MATRICES)}"
            )
        object.__setattr__(self, "sparse", tuple(filter(None, roles)))
        for bits in (self.bits, self.head_bits):
            if bits not in (4, 8):
                raise UsageError(f"weights of {bits!r} bits", "the compact layout has two widths", "Choose 4 or 8")
        if not 0.125 <= self.keep <= 1:
            raise UsageError(f"keep={self.keep}", "a block keeps 2 to 16 of 16", "Choose 0.125 to 1")
        if self.watts < 0:
            raise UsageError(f"watts={self.watts}", remedy="Choose the accelerator's power in W")

    @property
    def schedule(self) -> Schedule:
        return Schedule(on_chip=self.on_chip, merged=self.merged)

    def matrices(self, network: Network) -> Matrices:
        """The matrices of a network of which only the sizes are known."""

        def planned(role: str, layer: int) -> Planned:
            keep = self.keep if role in self.sparse else 1.0
            return Planned(*network.dims(role), self.head_bits if role == "head" else self.bits, keep)

        return planned


def example() -> FlightLLMConfig:
    return FlightLLMConfig()


def targets() -> dict[str, str]:
    return {name: board.about for name, board in TARGETS.items()}


def network(source: Path) -> Network:
    """The network of a model folder or file.

    Raises:
        UsageError: an operator without a template, or a model that cannot be read.
    """
    from shoestring.models.tensors import open_source

    return network_of(described(open_source(source)))


def mapped(source: Path, config: FlightLLMConfig, name: str, prompt: int, tokens: int) -> dict[str, Any]:
    """What a prompt and so many tokens behind it take on the accelerator `name`; see the room's contract.

    Raises:
        UsageError: unknown accelerator, a model without templates, lengths beyond what a program can count.
    """
    board = target(name)
    if prompt < 1 or tokens < 1:
        raise UsageError(f"a prompt of {prompt} and {tokens} tokens", remedy="Say at least 1 of each")
    return estimated(network(source), config, board, prompt, tokens)


def estimated(of: Network, config: FlightLLMConfig, board: Target, prompt: int, tokens: int) -> dict[str, Any]:
    """`mapped` for a network that is known by its numbers alone."""
    limit = min(of.context, MOST) // BLOCK * BLOCK
    if prompt + tokens > limit:
        raise UsageError(
            f"{prompt} + {tokens} tokens are more than {limit}",
            f"the model's context is {of.context}, and an instruction counts {MOST} positions",
            "Choose fewer",
        )
    matrices, watts = config.matrices(of), config.watts or board.watts
    step = buckets("prefill", prompt, limit)
    prefill = modelled(of, board, "prefill", step, matrices, schedule=config.schedule)
    lengths = [buckets("decode", prompt + n + 1, limit) for n in range(tokens)]
    every = list(dict.fromkeys(lengths))
    sampled = [every[round(i * (len(every) - 1) / (_MOST_SAMPLES - 1))] for i in range(_MOST_SAMPLES)]
    some = {n: modelled(of, board, "decode", n, matrices, schedule=config.schedule)
            for n in dict.fromkeys(sampled if len(every) > _MOST_SAMPLES else every)}  # fmt: skip

    def summed(pick: Any) -> float:
        return float(np.interp(lengths, list(some), [pick(m) for m in some.values()]).sum())

    first = next(iter(some.values()))
    decode = Modelled(
        summed(lambda m: m.seconds),
        summed(lambda m: m.one_core),
        {u: summed(lambda m, u=u: m.busy[u] * m.seconds) / summed(lambda m: m.seconds) for u in first.busy},
        {o: summed(lambda m, o=o: m.operators[o]) for o in first.operators},
        {w: summed(lambda m, w=w: m.moved[w]) for w in first.moved},
        summed(lambda m: m.instructions) / tokens,
        summed(lambda m: m.stored) / tokens,
    )
    return {
        "about": board.about,
        "steps": [_plain("prefill", prompt, prefill, board, watts), _plain("decode", tokens, decode, board, watts)],
        "assumptions": [
            f"nothing was measured: a clock was run over the compiled instructions at {board.clock / 1e6:g} MHz",
            f"{board.cores} cores share the work; together they are {board.core_speed:g} times as fast as one: a "
            "calibration constant (the published profile divides by 3.2 where there are four and does not say why)",
            f"memory gives {board.same:g} of its bandwidth within a channel and {board.crossing:g} across channels",
            f"{watts:g} W all the time" + ("" if config.watts else ", assumed of the board"),
            f"the prompt runs the program of {step} tokens; decode runs one for every {BLOCK} positions",
            f"weights of {config.bits} bits, the head's of {config.head_bits}; "
            + (f"{', '.join(config.sparse)} keep {config.keep:g} of theirs" if config.keep < 1 and config.sparse
               else "none is pruned"),
        ],
    }  # fmt: skip


def _plain(step: str, count: int, m: Modelled, board: Target, watts: float) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": count,
        "seconds": m.seconds,
        "tokens_per_second": count / m.seconds,
        "cycles": round(m.seconds * board.clock),
        "joules": m.seconds * watts,
        "moved": {what: round(size) for what, size in m.moved.items()},
        "operators": m.operators,
        "busy": m.busy,
        "instructions": round(m.instructions),
        "stored": round(m.stored),
    }


def replayed(
    source: Path, config: FlightLLMConfig, name: str, prompt: Sequence[int], tokens: Sequence[int], layers: int,
    *, seed: int = 0,
) -> Iterator[tuple[Array, Array]]:  # fmt: skip
    """The logits of compiled words executed on integers, and of plain computation: after the prompt and each token.

    Args:
        layers: so many of the model's first layers.
        seed: of the order in which units that are ready take turns.
    """
    board = target(name)
    capacity = buckets("prefill", len(prompt) + len(tokens) + BLOCK, 1 << 16)
    keeps = dict.fromkeys(config.sparse, config.keep)
    weights = read(source, bits=config.bits, keeps=keeps, layers=layers, positions=capacity, head_bits=config.head_bits)
    ours = Accelerated(weights, board, layers, capacity, config.schedule, seed)
    plain = Reference(weights, layers)
    yield ours.prefill(np.array(prompt)), plain.prefill(np.array(prompt))
    for token in tokens:
        yield ours.decode(token), plain.decode(token)


@dataclass(frozen=True)
class Storage:
    """Bytes of the instructions that serve every length up to a limit.

    Attributes:
        every: a stream for each length, each core and each channel's loads.
        bucketed: a stream for each bucket instead.
        shared: and one for all cores.
        merged: and one load for all channels.
        waste: share of decode's time that rounding lengths up to their buckets takes.
    """

    every: int
    bucketed: int
    shared: int
    merged: int
    waste: float


def storage(of: Network, config: FlightLLMConfig, board: Target, limit: int, mode: str = "decode") -> Storage:
    """What length-adaptive compilation saves for the lengths 1 to `limit`. Streams are compiled, none is guessed.

    A length is served at the end of its block of 16, so lengths of one block have streams of one size.
    """
    matrices = config.matrices(of)
    sizes: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for merged, found in sizes.items():
        for length in range(BLOCK, limit + BLOCK, BLOCK):
            found[length] = _stored(of, board, mode, length, matrices, Schedule(merged=merged))
    ends = {merged: {buckets(mode, n, limit) for n in found} for merged, found in sizes.items()}
    alone = BLOCK * sum(sizes[False].values())
    waste = 0.0
    if mode == "decode":
        times = {n: modelled(of, board, mode, n, matrices, schedule=OURS).seconds for n in (BLOCK, limit)}
        slope = (times[limit] - times[BLOCK]) / max(1, limit - BLOCK)
        waste = slope * (BLOCK - 1) / 2 / ((times[limit] + times[BLOCK]) / 2)
    return Storage(
        board.cores * alone,
        board.cores * sum(sizes[False][n] for n in ends[False]),
        sum(sizes[False][n] for n in ends[False]),
        sum(sizes[True][n] for n in ends[True]),
        waste,
    )


def _stored(of: Network, board: Target, mode: str, length: int, matrices: Matrices, schedule: Schedule) -> int:
    """Bytes of a whole model's stream; its layers are alike."""

    def size(layers: int, head: bool) -> int:
        return compile_step(of, board, mode, length, matrices, schedule=schedule, layers=layers, head=head).size

    return size(0, True) + of.layers * (size(1, False) - size(0, False))

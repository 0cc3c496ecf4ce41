"""Accelerators as numbers: what the compiler must fit into and the timing model counts with.

A depth and a width are those of one core's buffer. `core_speed` is a calibration constant, not a physical one: the
published profile of the four-core board divides every duration by 3.2 and does not say why.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoestring.core.errors import UsageError, nearest

BLOCK = 16  # weights of a block along each side; one row of it is what a sparse mux looks at


@dataclass(frozen=True)
class Target:
    """One accelerator.

    Attributes:
        about: what it is, and where its numbers come from.
        clock: Hz.
        cores: regions of the die that work on one model together.
        core_speed: how many times faster than one core they are together; see above.
        bandwidth: of the memory outside, bytes/s; `channels` share it evenly.
        together: channels that a core reads at once for weights and activations.
        same, crossing: share of a channel's bandwidth that a transfer gets within its own and from a foreign channel.
        mm, mv: products a cycle in matrix and in vector mode, as (M, K, N).
        rows: outputs of one instruction in matrix and in vector mode, as (rows of activations, outputs).
        a_depth, b_depth, global_depth: rows of the buffers; those of indices, N bytes and scales are as deep as B.
        misc: elements a cycle of the special function unit.
        fill: cycles until the first sum of a matrix instruction has passed the chain.
        watts: power that the energy is modelled with; assumed, never measured here.
    """

    name: str
    about: str
    clock: float
    cores: int
    core_speed: float
    bandwidth: float
    channels: int
    watts: float
    together: int = 8
    same: float = 0.7
    crossing: float = 0.35
    mm: tuple[int, int, int] = (128, 16, 2)
    mv: tuple[int, int, int] = (1, 16, 64)
    mm_rows: tuple[int, int] = (128, 16)
    mv_rows: tuple[int, int] = (1, 512)
    a_depth: int = 4096
    b_depth: int = 4096
    global_depth: int = 512
    misc: int = 16
    fill: int = 4

    @property
    def channel(self) -> float:
        """Bytes/s of one channel."""
        return self.bandwidth / self.channels

    @property
    def mm_products(self) -> int:
        return self.mm[0] * self.mm[1] * self.mm[2]

    @property
    def mv_products(self) -> int:
        return self.mv[0] * self.mv[1] * self.mv[2]

    # Bytes of a core's buffers. A is 256 bytes wide per channel in matrix mode and 64 in vector mode.
    @property
    def a_vector(self) -> int:
        return self.a_depth * self.together * 64

    @property
    def b_matrix(self) -> int:
        return self.b_depth * 32

    @property
    def b_vector(self) -> int:
        return self.b_depth * 16

    @property
    def global_bytes(self) -> int:
        return self.global_depth * self.together * 256


_GIB = 1024.0**3
TARGETS = {
    "vhk158": Target(
        "vhk158",
        "Versal HBM board; values of the published profile (225 MHz, 4 cores, 819.2 GiB/s over 32 channels); the power "
        "is assumed",
        clock=225e6,
        cores=4,
        core_speed=3.2,
        bandwidth=819.2 * _GIB,
        channels=32,
        watts=155.0,
    ),
    "u280": Target(
        "u280",
        "Alveo U280: three regions of the die, 460 GB/s of HBM2 over 32 channels; buffers and engine as published for "
        "the larger board, the same speed per core (0.8 of its own) and the power are assumed",
        clock=225e6,
        cores=3,
        core_speed=2.4,
        bandwidth=460e9,
        channels=32,
        watts=45.0,
    ),
}


def target(name: str) -> Target:
    """The accelerator of that name.

    Raises:
        UsageError: nobody described one; the nearest names are suggested.
    """
    if name not in TARGETS:
        raise UsageError(f"no accelerator is called {name}", remedy=nearest(name, TARGETS))
    return TARGETS[name]

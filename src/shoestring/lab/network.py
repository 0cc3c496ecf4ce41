"""Another machine's worth of network on this one: a namespace behind a cable that delays, loses, and can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_TOOLS = ("ip", "tc")


def why_not() -> str:
    """Why namespaces cannot be had here; empty when they can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing (Linux, package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = ["ip", "netns", "add", "shoestring-probe"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", "shoestring-probe"], capture_output=True, check=False)
    return done.stderr.strip()


@dataclass(frozen=True)
class Elsewhere:
    """A namespace and the cable to it; `here` and `there` are the addresses of its two ends."""

    name: str
    here: str
    there: str

    @property
    def command(self) -> list[str]:
        """What to put before a command that shall run there."""
        return ["ip", "netns", "exec", self.name]

    def shape(self, *, delay: str, loss: str = "0%", rate: str = "") -> bool:
        """Delay, loss and rate each way, as `tc` writes them; False where the kernel has no netem to do it."""
        for before, end in (([], self._end(0)), (self.command, self._end(1))):
            said = ["delay", delay, "loss", loss, *(["rate", rate] if rate else [])]
            command = [*before, "tc", "qdisc", "replace", "dev", end, "root", "netem", *said]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return False
        return True

    def plain(self) -> None:
        """Take delay, loss and rate away."""
        for before, end in (([], self._end(0)), (self.command, self._end(1))):
            command = [*before, "tc", "qdisc", "del", "dev", end, "root"]
            subprocess.run(command, capture_output=True, check=False)

    def cut(self) -> None:
        _run(["ip", "link", "set", self._end(0), "down"])

    def mend(self) -> None:
        _run(["ip", "link", "set", self._end(0), "up"])

    def _end(self, side: int) -> str:
        return f"{self.name[:12]}{side}"


@contextmanager
def elsewhere(name: str = "shoestring", net: str = "10.213.9") -> Iterator[Elsewhere]:
    """A namespace of this name, gone afterwards with all its processes' network.

    Raises:
        subprocess.CalledProcessError: it cannot be made; ask `why_not` first.
    """
    made = Elsewhere(name, f"{net}.1", f"{net}.2")
    _tidy(made)
    try:
        for line in (
            f"ip netns add {name}",
            f"ip link add {made._end(0)} type veth peer name {made._end(1)} netns {name}",
            f"ip addr add {made.here}/24 dev {made._end(0)}",
            f"ip link set {made._end(0)} up",
            f"ip netns exec {name} ip addr add {made.there}/24 dev {made._end(1)}",
            f"ip netns exec {name} ip link set {made._end(1)} up",
            f"ip netns exec {name} ip link set lo up",
        ):
            _run(line.split())
        yield made
    finally:
        _tidy(made)


def _tidy(made: Elsewhere) -> None:
    for line in (f"ip link del {made._end(0)}", f"ip netns del {made.name}"):
        with suppress(OSError):
            subprocess.run(line.split(), capture_output=True, check=False)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)

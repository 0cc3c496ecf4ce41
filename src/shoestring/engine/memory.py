"""How much memory there is to be had."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    import psutil  # where the system does not say it in a file; it takes a while to import

    return int(psutil.virtual_memory().available)

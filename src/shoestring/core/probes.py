"""What the machine's own counters say. A counter that is missing or refused reads as None, never as zero."""

from __future__ import annotations

import os
import platform
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
PACKAGES = ("shoestring", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")

_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


# ---------------------------------------------------------------- energy counters


class Rapl:
    """The processor's energy counters as one running total of joules that does not wrap.

    Only packages and DRAM: the other domains (core, uncore) lie inside a package and would be counted twice.
    """

    def __init__(self, domains: Sequence[tuple[Path, int]]) -> None:
        """`domains`: each counter's file, and the value in microjoules at which it wraps."""
        self.domains = tuple(domains)
        self._lock = threading.Lock()
        self._last: list[int] | None = None
        self._total = 0

    @classmethod
    def find(cls, root: Path = POWERCAP) -> Rapl | None:
        """The readable counters below `root`, or None when there are none or reading them is not permitted."""
        domains, packages = [], 0
        for folder in sorted(root.glob("*")):
            file = folder / "energy_uj"
            try:
                name = (folder / "name").read_text().strip()
                if name.startswith("package") or name == "dram":
                    int(file.read_text())
                    domains.append((file, int((folder / "max_energy_range_uj").read_text())))
                    packages += name != "dram"
            except (OSError, ValueError):
                continue
        return cls(domains) if packages else None

    def joules(self) -> float | None:
        """Joules since the first call; None when a counter went away.

        A counter that went down wrapped once. Two wraps between calls cannot be told from one, so whoever measures for
        long calls this every few minutes at least (at 100 W a common counter wraps after 44 minutes).
        """
        with self._lock:
            try:
                now = [int(file.read_text()) for file, _ in self.domains]
            except (OSError, ValueError):
                return None
            if self._last is not None:
                self._total += sum(
                    b - a if b >= a else b - a + span
                    for a, b, (_, span) in zip(self._last, now, self.domains, strict=True)
                )
            self._last = now
            return self._total / 1e6


def gpu_joules() -> float | None:
    """Joules that every NVIDIA GPU of this machine has used since its driver was loaded; None without `pynvml`."""
    handles = _gpus()
    if not handles:
        return None
    import pynvml

    try:
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1e3
    except pynvml.NVMLError:
        return None


def gpu_uncounted() -> bool:
    """Whether this machine has an NVIDIA GPU whose energy nobody can read."""
    return not _gpus() and Path("/dev/nvidia0").exists()


@cache
def _gpus() -> tuple[Any, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return tuple(pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount()))
    except Exception:  # no package, no driver, no permission: each has its own error, and all mean no counter
        return ()


# ---------------------------------------------------------------- processor time


def machine_cpu() -> tuple[float, float] | None:
    """CPU seconds since boot that all cores together were busy, and that they could have been; None off Linux."""
    try:
        with open("/proc/stat", "rb") as file:
            ticks = [int(t) for t in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / _TICK, sum(ticks) / _TICK


def tree_cpu() -> float:
    """CPU seconds of this process, its waited children, and its living descendants."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + children.ru_utime + children.ru_stime
    return total + sum(filter(None, map(_cpu_of, descendants())))


def _cpu_of(pid: int) -> float | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return sum(int(t) for t in fields[11:15]) / _TICK


def has_children() -> bool:
    """Whether this process has a child, living or not yet waited for; costs a microsecond and reaps nothing."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    except ChildProcessError:
        return False
    except (AttributeError, OSError):
        return bool(_scan())


def newest_process() -> int | None:
    """The id given to the process or thread created last on this machine: unchanged means that nothing is new."""
    try:
        with open("/proc/loadavg", "rb") as file:
            return int(file.read().split()[-1])
    except (OSError, ValueError, IndexError):
        return None


_parents: dict[int, int] = {}


def descendants() -> list[int]:
    """Process ids below this one. Empty off Linux."""
    return _scan() if has_children() else []


def _scan() -> list[int]:
    try:
        alive = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    except OSError:
        return []
    # A process keeps its parent while it lives, so only newcomers are read: a scan then costs a tenth.
    for pid in list(_parents):
        if pid not in alive:
            _parents.pop(pid, None)
    for pid in alive:
        if pid not in _parents:
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    _parents[pid] = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
    parents = dict(_parents)
    tree, generation = [], {os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        tree += sorted(generation)
    return tree


# ---------------------------------------------------------------- memory and storage


def resident(pid: int | None = None) -> int | None:
    """Bytes of this process (or of another) in RAM now, shared pages included."""
    try:
        with open(f"/proc/{pid or 'self'}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return _psutil_resident(pid)


def _psutil_resident(pid: int | None) -> int | None:
    if os.path.isdir("/proc/self"):  # the counter is there: the process is not
        return None
    try:
        import psutil

        return int(psutil.Process(pid).memory_info().rss)
    except Exception:  # a missing package and a refused counter mean the same here
        return None


def high_water() -> int | None:
    """Bytes of this process in RAM at its highest since the mark was last reset."""
    try:
        with open("/proc/self/status", "rb") as file:
            text = file.read()
        return int(text[text.index(b"VmHWM:") + 6 :].split(None, 1)[0]) * 1024
    except (OSError, ValueError):
        return None


def reset_high_water() -> bool:
    """Lower the high-water mark to what is resident now; False where the system does not let us."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return True
    except OSError:
        return False


def memory_of(pid: int) -> tuple[int, int] | None:
    """Bytes of another process that are its own alone, and with its share of shared pages (USS, PSS)."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            fields = {line.split(b":")[0]: line.split()[1] for line in file.read().splitlines()[1:]}
    except OSError:
        return None
    if b"Pss" not in fields:  # a process that is ending has no memory any more
        return None
    return (int(fields[b"Private_Clean"]) + int(fields[b"Private_Dirty"])) * 1024, int(fields[b"Pss"]) * 1024


def storage_io() -> tuple[int, int] | None:
    """Bytes this process and its waited children caused to be read from, and written to, storage."""
    try:
        with open("/proc/self/io", "rb") as file:
            fields = dict(line.split(b": ") for line in file.read().splitlines())
        return int(fields[b"read_bytes"]), int(fields[b"write_bytes"])
    except (OSError, ValueError, KeyError):
        return None


def cgroup(root: Path = CGROUPS, own: Path = PROC / "self" / "cgroup") -> dict[str, float | None]:
    """Limits of the container this process is in, and its lifetime memory peak: `{"memory_limit": bytes,
    "memory_peak": bytes, "cpu_limit": cores}`; None where there is no limit or no counter.

    The limit that binds is the smallest on the way up to the root. The peak never resets by itself.
    """
    found: dict[str, float | None] = {"memory_limit": None, "memory_peak": None, "cpu_limit": None}
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return found
    limits: list[float] = []
    cores: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names, cpu = root, ("memory.max", "memory.peak"), True
        elif "memory" in controllers.split(","):
            base, names, cpu = root / "memory", ("memory.limit_in_bytes", "memory.max_usage_in_bytes"), False
        elif "cpu" in controllers.split(","):
            base, names, cpu = root / controllers, ("", ""), True
        else:
            continue
        here = base / path.strip("/")
        # Inside a container the path is the host's and does not exist; the files then stand at the mount itself.
        here = here if here.is_dir() else base
        if names[1] and found["memory_peak"] is None:
            found["memory_peak"] = _number(here / names[1])
        while True:
            if names[0]:
                limits += [n for n in [_number(here / names[0])] if n is not None and n < 2**60]
            if cpu:
                cores += [n for n in [_quota(here)] if n is not None]
            if here == base:
                break
            here = here.parent
    found["memory_limit"] = min(limits, default=None)
    found["cpu_limit"] = min(cores, default=None)
    return found


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # "max" is no number and no limit
        return None


def _quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    old, span = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return old / span if old and span and old > 0 else None


# ---------------------------------------------------------------- the machine itself


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ram() -> int:
    """Bytes of RAM of the machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * _PAGE
    except (ValueError, OSError, AttributeError):
        return 0


@cache
def processor() -> tuple[str, tuple[str, ...]]:
    """The processor's name and its instruction-set flags."""
    name, flags = platform.processor() or platform.machine(), ()
    try:
        lines = (PROC / "cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return name, flags
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", name), tuple(sorted((fields.get("flags") or fields.get("Features") or "").split()))


@cache
def fingerprint() -> Mapping[str, Any]:
    """The hardware and software a figure was taken on, as plain data.

    `machine` holds what changes a figure (processor, cores, RAM, limits), `software` the versions of what ran.
    """
    name, flags = processor()
    limits = cgroup()
    return {
        "machine": {
            "processor": name,
            "isa": [
                f for f in flags if f.startswith(("avx", "sse4", "fma", "amx", "f16c", "asimd", "sve", "i8mm", "bf16"))
            ],
            "architecture": platform.machine(),
            "cores": cores(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "ram": ram(),
            "memory_limit": limits["memory_limit"],
            "cpu_limit": limits["cpu_limit"],
            "virtual": "hypervisor" in flags,
        },
        "software": {
            "os": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

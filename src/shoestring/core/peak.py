"""Peak memory of a stretch of time, not of the process so far.

Linux keeps one high-water mark for a process and lets it be reset. Windows share that mark: whenever one opens or
closes, the mark is first folded into every window that is open, so an inner window's reset loses nothing of an outer
one. Child processes have no such mark for us, so a thread samples them, only while there are any.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from shoestring.core import probes

_IDLE_SECONDS = 0.05  # how often to ask whether a child has come: one system call
_SAMPLE_SECONDS = 0.04
_POLL_SECONDS = 5.0
_LONGEST_SECONDS = 0.2  # a sample is never later than this, whatever the samples before it cost
_SCAN_SECONDS = 0.1  # how often at most to go through the machine's processes for new descendants
_SHARE = 0.003  # of one core, that sampling may cost in the long run
_CREDIT = 0.004  # CPU seconds that it may run ahead of that: a new child is looked at closely


@dataclass(eq=False)
class Window:
    """One stretch of time. Bytes; None where the system has no counter.

    Attributes:
        floor: resident when the window opened.
        own: highest resident size of this process.
        tree, tree_high: the highest sum over this process and its descendants, shared pages counted once (private
            pages of children only) and at most (their proportional share too); None when no child was seen.
        poll: called every few seconds while the window is open: for counters that wrap.
        exact: whether `own` comes from a mark of the system; else it is the highest of samples.
    """

    floor: int | None
    own: int | None
    mark: int | None
    exact: bool
    poll: Callable[[], object] | None = None
    tree: int | None = None
    tree_high: int | None = None

    def fold(self, bytes_: int | None) -> None:
        if bytes_ is not None:
            self.own = max(self.own or 0, bytes_)


class _Watch:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open: list[Window] = []
        self.wake = threading.Event()
        self.thread: threading.Thread | None = None
        self.tree: list[int] = []
        self.scanned = 0.0
        self.newest: object = None
        self.sizes: dict[int, tuple[int, tuple[int, int]]] = {}

    def start(self, poll: Callable[[], object] | None) -> Window:
        with self.lock:
            self._fold()
            reset = probes.reset_high_water()
            floor = probes.resident()
            window = Window(floor, floor, None if reset else probes.high_water(), reset, poll)
            self.open.append(window)
            self._children()
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="shoestring-memory", daemon=True)
                self.thread.start()
            self.wake.set()
        return window

    def stop(self, window: Window) -> None:
        with self.lock:
            self._fold()
            self._children()
            self.open.remove(window)
            if not self.open:
                self.wake.clear()

    def _fold(self) -> None:
        if not self.open:
            return
        mark, now = probes.high_water(), probes.resident()
        for window in self.open:
            window.fold(now)
            if window.mark is None:
                window.fold(mark)
            elif mark is not None and mark > window.mark:
                # The mark cannot be reset, but it rose inside this window: then it is this window's peak.
                window.fold(mark)
                window.exact = True

    def _children(self) -> bool:
        if not probes.has_children():
            self.tree, self.scanned, self.newest = [], 0.0, None
            return False
        newest = probes.newest_process()
        if time.monotonic() - self.scanned > _SCAN_SECONDS and (newest is None or newest != self.newest):
            self.tree, self.scanned, self.newest = probes.descendants(), time.monotonic(), newest
            self.sizes = {pid: size for pid, size in self.sizes.items() if pid in self.tree}
        sizes = [size for size in map(self._size, self.tree) if size]
        own = probes.resident()
        if sizes and own is not None:
            low, high = own + sum(uss for uss, _ in sizes), own + sum(pss for _, pss in sizes)
            for window in self.open:
                window.tree = max(window.tree or 0, low)
                window.tree_high = max(window.tree_high or 0, high)
        return bool(sizes)

    def _size(self, pid: int) -> tuple[int, int] | None:
        """USS and PSS of a child. Walking its pages costs a millisecond for 200 MB, so only when its size moved."""
        resident = probes.resident(pid)
        if not resident:
            self.sizes.pop(pid, None)
            return None
        known = self.sizes.get(pid)
        if known and abs(resident - known[0]) < 0.02 * known[0]:
            return known[1]
        size = probes.memory_of(pid)
        if size:
            self.sizes[pid] = (resident, size)
        return size

    def _run(self) -> None:
        polled, credit, woke = time.monotonic(), _CREDIT, time.monotonic()
        while True:
            self.wake.wait()
            now = time.monotonic()
            credit, woke, started = min(_CREDIT, credit + (now - woke) * _SHARE), now, time.thread_time()
            with self.lock:
                busy = self._children()
                unmarked = [w for w in self.open if not w.exact]
                if unmarked:
                    size = probes.resident()
                    for window in unmarked:
                        window.fold(size)
                polls = {window.poll for window in self.open if window.poll}
            if time.monotonic() - polled > _POLL_SECONDS:
                polled = time.monotonic()
                for poll in polls:
                    poll()
            credit -= time.thread_time() - started
            time.sleep(
                max(_SAMPLE_SECONDS if busy or unmarked else _IDLE_SECONDS, min(_LONGEST_SECONDS, -credit / _SHARE))
            )


_watch = _Watch()


def _after_fork() -> None:
    global _watch
    _watch = _Watch()  # the copy has no sampling thread, and its memory is its parent's to charge


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def open_window(poll: Callable[[], object] | None = None) -> Window:
    """Start a window; `poll` is called every few seconds until it ends."""
    return _watch.start(poll)


def close_window(window: Window) -> None:
    """End a window; its figures then stand still."""
    if window in _watch.open:
        _watch.stop(window)

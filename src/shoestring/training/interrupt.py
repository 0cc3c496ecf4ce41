"""Ctrl+C and SIGTERM during training: finish the step, save a checkpoint, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from shoestring.core.errors import ShoestringError


class Interrupted(ShoestringError):
    """The user or the system asked to stop; a resumable checkpoint was written."""

    def __init__(self, signum: int, step: int, saved: bool = True) -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        what = f"Interrupted by {signal.Signals(signum).name} after step {step}"
        remedy = "Run again with resume to go on" if saved else ""
        super().__init__(what, "" if saved else "save_steps is 0, so no checkpoint was written", remedy)


class StopRequest:
    """Which signal has asked to stop; None while none has."""

    signum: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block the first SIGINT or SIGTERM is only noted; a second one acts as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def note(signum: int, _frame: FrameType | None) -> None:
        request.signum = signum
        for each, handler in before.items():
            signal.signal(each, handler)

    for signum in before:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

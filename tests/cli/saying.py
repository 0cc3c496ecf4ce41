"""What a command said, for the tests of the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Said:
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The error line, the only one there is."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Shoestring = Callable[..., Said]


def snapshot(folder: Path) -> set[str]:
    """Every path below a folder."""
    return {
        os.path.relpath(os.path.join(top, name), folder)
        for top, dirs, names in os.walk(folder)
        for name in dirs + names
    }

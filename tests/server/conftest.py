"""One running server for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Server, command, toy


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The toy model behind the defaults."""
    with toy() as running:
        yield running


@pytest.fixture(scope="session")
def real() -> Iterator[Server]:
    """The real command with the default model."""
    with command("smollm2") as process:
        yield Server(process.url, "smollm2")

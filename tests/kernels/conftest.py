from __future__ import annotations

import pytest
import torch

from shoestring.kernels import ops

LEVELS = ops.backend()["levels"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    ops.set_threads(None)
    ops.set_isa(LEVELS[0])


@pytest.fixture(params=LEVELS)
def level(request) -> str:
    assert ops.set_isa(request.param) == request.param
    return request.param


@pytest.fixture(params=[level for level in LEVELS if level != "reference"])
def isa(request) -> str:
    """A level of the native library, where there is nothing else to fall back on."""
    assert ops.set_isa(request.param) == request.param
    return request.param

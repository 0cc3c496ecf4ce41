from __future__ import annotations

from typing import Any

import pytest
import torch
from training_cases import make_rows


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return make_rows()

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads that wait for each other cost more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def train() -> Callable[..., list[float]]:
    """Trains a wrapped tiny model on random texts, always the same ones; the losses."""

    def steps_of(model: Any, steps: int, rate: float = 1e-2) -> list[float]:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
        losses = []
        for step in range(steps):
            ids = 3 + torch.randint(60, (4, 24), generator=torch.Generator().manual_seed(step))
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return steps_of

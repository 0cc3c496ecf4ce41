"""How long one token takes through more layers than a cache holds: what a format saves when weights must be fetched."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shoestring.kernels import matrix
from shoestring.lab.arms import Arms


def own_bfloat16(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a bfloat16 matrix [rows, columns] by the engine's own kernel."""
    rows, columns = weight.shape
    made = matrix.make("bf16", rows, columns, weight.detach().view(torch.uint16).numpy())
    return lambda x: torch.from_numpy(made.multiply(x.float().numpy(), torch.get_num_threads())).to(x.dtype)


def pass_seconds(arms: Arms, stacks: Mapping[str, Sequence[Callable[[Tensor], Tensor]]], x: Tensor) -> None:
    """Enter for each arm the median time of `x` [1, columns] through all layers of its stack, arms taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in stacks}
    with torch.inference_mode():
        for turn in range(arms.size(2, 12)):
            for name, layers in stacks.items():
                start = time.perf_counter()
                for layer in layers:
                    layer(x)
                if turn:  # the first is for laying out weights
                    taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        with arms.arm(name) as stage:
            stage.record("pass_seconds", statistics.median(seconds), "s", "measured")

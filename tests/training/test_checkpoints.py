from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch

from shoestring.core.errors import ShoestringError
from shoestring.training import checkpoints

FILES = ("weights.safetensors", "state.safetensors", "state.json", "trainer_state.json", "MANIFEST.json")


@pytest.fixture
def two(tmp_path):
    for step in (5, 10):
        checkpoints.write(
            tmp_path,
            step,
            {"w": torch.full((4,), float(step))},
            {"moment": torch.ones(3)},
            {"seed": 0},
            {"tokens": step},
            also=lambda aside: (aside / "trainer_state.json").write_text('{"global_step": 1}'),
        )
    return tmp_path


def damage(file, how):
    data = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "flipped":
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    else:
        file.write_bytes(data[: {"empty": 0, "half": len(data) // 2, "one byte short": len(data) - 1}[how]])


@pytest.mark.parametrize("how", ["empty", "half", "one byte short", "deleted", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_torn_checkpoint_is_skipped_and_the_file_named(two, caplog, name, how):
    damage(two / "checkpoint-10" / name, how)
    with caplog.at_level(logging.WARNING):
        found = checkpoints.newest_complete(two)
    assert found.step == 5 and found.weights()["w"][0] == 5
    assert name in caplog.text


def test_swapped_files_are_noticed(two):
    a, b = (two / "checkpoint-10" / name for name in FILES[:2])
    a_data, b_data = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_data), b.write_bytes(a_data)
    assert checkpoints.newest_complete(two).step == 5


def test_with_none_left_it_is_an_error(two):
    for step in (5, 10):
        (two / f"checkpoint-{step}" / "state.safetensors").unlink()
    with pytest.raises(ShoestringError, match="No complete checkpoint") as error:
        checkpoints.newest_complete(two)
    assert error.value.exit_code == 1
    assert checkpoints.newest_complete(two / "nothing here") is None


def test_a_write_that_fails_leaves_nothing(two):
    def fail(_aside):
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        checkpoints.write(two, 15, {}, {}, {}, {}, also=fail)
    assert [path.name for path in checkpoints.checkpoints(two)] == ["checkpoint-10", "checkpoint-5"]
    assert not list(two.glob(".*partial*"))


def test_the_oldest_go_first(two):
    checkpoints.prune(two, 1)
    assert [path.name for path in checkpoints.checkpoints(two)] == ["checkpoint-10"]


def test_any_state_comes_back_as_it_was():
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}}, "betas": (0.9, 0.999)},
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "flags": [None, True, 1e-308, 0.1, "text"],
    }
    tensors: dict[str, torch.Tensor] = {}
    back = checkpoints.unpack(checkpoints.pack(state, tensors), tensors)
    assert back["python"] == state["python"] and back["flags"] == state["flags"]
    assert back["optimizer"]["betas"] == (0.9, 0.999)
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    assert np.array_equal(back["numpy"][1], state["numpy"][1]) and back["numpy"][1].dtype == np.uint32


def test_what_is_not_plain_is_refused():
    with pytest.raises(ShoestringError, match="object"):
        checkpoints.pack(object(), {})

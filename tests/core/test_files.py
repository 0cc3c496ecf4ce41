"""Files and folders are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.core.files import atomic_file, atomic_folder, locked, write_text


def test_a_file_is_replaced_only_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.json"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_file(target) as temp:
        temp.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and os.listdir(target.parent) == ["a.json"]
    with atomic_file(target) as temp:
        temp.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and os.listdir(target.parent) == ["a.json"]


def test_a_folder_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), atomic_folder(target) as temp:
        (temp / "weights").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with atomic_folder(target) as temp:
        (temp / "weights").write_text("whole")
    assert (target / "weights").read_text() == "whole" and os.listdir(tmp_path) == ["model"]


def test_an_occupied_folder_is_refused_and_overwritten_on_request(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty"), atomic_folder(target):
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert os.listdir(target) == ["mine"]
    with atomic_folder(target, overwrite=True) as temp:
        (temp / "new").write_text("y")
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["model"]


def test_a_full_disk_under_numpy_is_said_so(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ShoestringError, match="no space is left"), atomic_file(tmp_path / "out") as temp:
            np.ones(65536, np.uint8).tofile(temp)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_so_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    with pytest.raises(ShoestringError, match="Free some space"), atomic_folder(tmp_path / "model") as temp:
        (temp / "weights").write_text("half")
        raise OSError(code, "full")
    with pytest.raises(ShoestringError, match="Free some space"), atomic_file(tmp_path / "file"):
        # What native writers raise: the number only in the text.
        raise RuntimeError(f"Error while serializing: I/O error: full (os error {code})")
    assert os.listdir(tmp_path) == []


def test_what_a_dead_process_left_is_swept_away(tmp_path: Path) -> None:
    script = (
        "import os, sys; from shoestring.core.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as temp: (temp / 'half').write_text('x'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")]).returncode == 9
    assert len(os.listdir(tmp_path)) == 1
    with atomic_folder(tmp_path / "model"):
        pass
    assert os.listdir(tmp_path) == ["model"]


def test_a_held_lock_is_refused_and_a_dead_holders_lock_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    script = (
        "import sys, time; from shoestring.core.files import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=str(holder.pid)), locked(lock, wait=False):
            pytest.fail("the block must not run")
    finally:
        holder.kill()
        holder.wait()
    with locked(lock, wait=False):
        assert lock.read_text().strip() == str(os.getpid())

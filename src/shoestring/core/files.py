"""Files and folders that are either whole or absent: written aside, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoestring.core.errors import ShoestringError, UsageError

_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it would be too large",
}
_OS_ERROR = re.compile(r"os error (\d+)")
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # numpy, which does not say why


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the block it is flushed and takes the place of `path`.

    If the block raises, nothing is left behind and an older `path` stays as it was.

    Raises:
        ShoestringError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    temp = Path()
    try:
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
            handle, name = tempfile.mkstemp(prefix=_partial(path), dir=path.parent)
            os.close(handle)
            temp = Path(name)
            temp.chmod(0o666 & ~_umask())
            yield temp
            _flush(temp)
            os.replace(temp, path)
            _flush(path.parent)
    finally:
        if temp.name:
            temp.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Replace the file at `path` by `text` in one step. Raises as `atomic_file`."""
    with atomic_file(path) as temp:
        temp.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `path` to fill; at the end of the block it is flushed and becomes `path`.

    If the block raises, nothing is left behind and an older `path` stays as it was.

    Raises:
        UsageError: `path` holds something already and `overwrite` is false.
        ShoestringError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    if not overwrite:
        refuse_occupied(path)
    temp = Path()
    try:
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
            temp = Path(tempfile.mkdtemp(prefix=_partial(path), dir=path.parent))
            temp.chmod(0o777 & ~_umask())
            yield temp
            for folder, _, names in os.walk(temp):
                for name in names:
                    _flush(Path(folder, name))
                _flush(Path(folder))
            _replace_folder(temp, path)
            _flush(path.parent)
    finally:
        if temp.name:
            shutil.rmtree(temp, ignore_errors=True)


def refuse_occupied(path: Path | str) -> None:
    """Raises UsageError unless `path` is absent or an empty folder."""
    path = Path(path)
    if path.is_symlink() or path.is_file():
        raise UsageError(f"{path} is a file", "a folder was to be written there", "Choose another output folder")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(
            f"The folder {path} is not empty",
            "what it holds would be mixed with the new result",
            "Choose another output folder, or ask for overwriting",
        )


@contextmanager
def locked(path: Path | str, wait: bool = True) -> Iterator[None]:
    """Hold the lock file at `path` for the block. The lock of a process that died is free by itself.

    Args:
        wait: wait for the holder; otherwise a held lock is an error.

    Raises:
        UsageError: another process holds the lock and `wait` is false; the message has its process id.
        ShoestringError: the lock file cannot be written.
    """
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            raise UsageError(
                f"{path.parent} is in use by process {owner}", remedy="Wait for it to end, or choose another folder"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # The file stays: removing it would let a waiter hold a lock on a name nobody else can see.
        os.close(handle)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns "disk full" and "may not write" into errors that say so, also those that native writers raise as text."""
    try:
        yield
    except ShoestringError:
        raise
    except Exception as error:
        match = _OS_ERROR.search(str(error))
        code = error.errno if isinstance(error, OSError) else int(match.group(1)) if match else None
        if code is None and _CUT_SHORT.search(str(error)):
            code = errno.ENOSPC
        if code in _FULL:
            raise ShoestringError(
                f"Writing {path} failed: {_FULL[code]}",
                "nothing was left behind",
                "Free some space, or choose another disk",
            ) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ShoestringError(
                f"Writing {path} failed: permission denied", remedy="Choose a folder you may write to"
            ) from error
        raise


def _partial(path: Path) -> str:
    return f".{path.name}.partial-{os.getpid()}-"


def _sweep(path: Path) -> None:
    """Remove what processes that died left of an earlier attempt to write `path`."""
    pattern = re.compile(re.escape(f".{path.name}.partial-") + r"(\d+)-.*")
    for entry in os.scandir(path.parent):
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match.group(1))):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _replace_folder(temp: Path, path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    if not path.exists() or not any(path.iterdir()):
        os.replace(temp, path)
        return
    old = Path(tempfile.mkdtemp(prefix=_partial(path), dir=path.parent))
    os.replace(path, old)
    try:
        os.replace(temp, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask

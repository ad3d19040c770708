"""Files that are whole or not there, and arrays on disk that leave nothing behind."""

import errno
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` to work in; nothing of it stays in the end."""
    # What a process left that was killed is removed by the next one on the same machine. It is a
    # folder, since safetensors puts files of its own beside what it writes.
    mine = f".{path.name}.{platform.node()}"
    for left in path.parent.glob(f"{glob.escape(mine)}.*.part"):
        if not _runs(int(left.name.split(".")[-3])):
            shutil.rmtree(left, ignore_errors=True)
    folder = path.with_name(f"{mine}.{os.getpid()}.{uuid4().hex[:8]}.part")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file to write; what is written takes the place of `path` once complete."""
    with beside(path) as folder:
        unfinished = folder / path.name
        yield unfinished
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        unfinished.replace(path)


def _runs(process: int) -> bool:
    """Say whether a process of this machine runs; where that can't be asked, it may."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def reserve(file: Any, size: int, what: str) -> None:
    """Take room on disk for a file that is to be mapped, or raise an OSError."""
    # writing to a map on a full disk ends the process
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif hasattr(os, "fstatvfs"):
            disk = os.fstatvfs(file.fileno())
            if disk.f_bavail * disk.f_frsize < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        text = f"{what} takes {size:,} bytes on disk, which gives: {error.strerror}"
        raise OSError(error.errno, text) from error


def on_disk(shape: tuple[int, ...], kind: np.dtype[Any], folder: Any = None) -> NDArray[Any]:
    """Make an array in a file without a name, which is gone with the array or the process."""
    size = max(1, int(np.prod(shape)) * kind.itemsize)
    with tempfile.TemporaryFile(dir=folder) as file:
        where = folder or tempfile.gettempdir()
        reserve(file, size, f"an array of shape {shape} beyond memory_budget, kept in {where},")
        return np.memmap(file, kind, "r+", shape=shape)

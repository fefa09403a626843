"""A lock between programs on this machine. Standard library only: the installer uses it too."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PRIVATE = ".download"  # folder inside a model's, for the downloads' books and the lock


def try_lock(file: IO[bytes]) -> bool:
    """False if another program holds the lock of this open file; the system takes it from a program that is killed."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # other errors: a file system that knows no locks, where waiting would never end
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[bool]:
    """Whether this program alone may write into a model's folder until the end of the block; raises OSError."""
    private = folder / PRIVATE
    private.mkdir(parents=True, exist_ok=True)
    with (private / "lock").open("ab") as file:
        yield try_lock(file)

"""Locks between programs, and whether another program still writes a file."""

from __future__ import annotations

import errno
import os
import signal
from typing import IO


def lock(file: IO[bytes]) -> bool:
    """False if another program holds the lock of this open file; the system takes it from a program that is killed."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # other errors: a file system that knows no locks
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def is_being_written(path: str) -> bool:
    """True if a program has the file open for writing, as far as the system tells.

    Windows refuses to rename a file that somebody has open. Linux grants a read lease only where nobody has the file
    open for writing; it tells nothing about other users' files. Elsewhere this is always False.
    """
    if os.name == "nt":
        try:
            os.rename(path, path)
        except PermissionError:
            return True
        return False
    return _lease_refused(path)


def _lease_refused(path: str) -> bool:
    import fcntl

    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        # who opens the file just now waits for us and lets us know, with SIGIO, which would end the program
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        os.close(file)
    return False


def can_tell_writers(closed_file: str) -> bool:
    """False where every file looks as if it were written: some network file systems refuse all leases."""
    return not is_being_written(closed_file)

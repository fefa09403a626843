"""Whether another program still writes a file."""

from __future__ import annotations

import errno
import os
import signal


def is_being_written(path: str) -> bool:
    """True if a program has the file open for writing, as far as the system tells.

    Windows opens a file for one who does not share writing only where nobody has it open for writing. Linux grants a
    read lease only there; it tells nothing about other users' files. Elsewhere this is always False.
    """
    return _is_shared_for_writing(path) if os.name == "nt" else _lease_refused(path)


def _is_shared_for_writing(path: str) -> bool:
    """Windows; true as well where somebody keeps others from reading the file."""
    import ctypes
    from ctypes import wintypes

    generic_read, share_read, share_delete, open_existing, sharing_violation = 0x80000000, 1, 4, 3, 32
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    create, dword = kernel32.CreateFileW, wintypes.DWORD
    create.argtypes = (wintypes.LPCWSTR, dword, dword, wintypes.LPVOID, dword, dword, wintypes.HANDLE)
    create.restype = wintypes.HANDLE
    handle = create(path, generic_read, share_read | share_delete, None, open_existing, 0, None)
    if handle == wintypes.HANDLE(-1).value:
        return ctypes.get_last_error() == sharing_violation  # type: ignore[attr-defined]
    kernel32.CloseHandle(wintypes.HANDLE(handle))
    return False


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

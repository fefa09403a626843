"""What tells one version of a request's files from another, in memory and in the name of a JOB."""

from __future__ import annotations

import hashlib
import os
import re
from typing import NamedTuple

_JOB = re.compile(r"([0-9a-f]{8}_){3}[0-9a-f]{4}")


class Stamp(NamedTuple):
    """When a file was changed, in nanoseconds, its size in bytes, and its inode.

    Where clocks are coarse (FAT: 2 s) the inode tells a file that was put in another's place.
    """

    changed: int
    size: int
    inode: int


class Inputs(NamedTuple):
    """The stamps of a request and of its history; None for a file that is not there."""

    request: Stamp | None
    history: Stamp | None


def stamp_of(path: str) -> Stamp | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return Stamp(found.st_mtime_ns, found.st_size, found.st_ino)


def marks(inputs: Inputs) -> str:
    """What a JOB for these files begins with: the mark of each, and one of both inodes. Short, as paths may be long."""
    return "_".join((*map(mark, inputs), _digest([stamp and stamp.inode for stamp in inputs]), ""))


def mark(stamp: Stamp | None) -> str:
    """Of a file that may have been moved, which changes its inode on some file systems (FAT on Windows)."""
    return _digest(stamp and [stamp.changed, stamp.size])


def is_job(folder: str) -> bool:
    return _JOB.fullmatch(folder) is not None


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=4).hexdigest()

"""The files of a spool: what may be seen in them at any moment, and what a killed program leaves behind.

In requests/ a client writes NAME.request and, before it or within the settle time, NAME.history. Both stay there while
the answer is made, so a program that is killed then has lost nothing. An answer that is ready goes through these
steps, each of which is there or not:

    1. .working/JOB/NAME.back is written (as "part", flushed to the disk, renamed). JOB holds the stamps of the files
       that were answered: time of change and size.
    2. If those files are still the same, NAME.history is moved to .working/JOB ...
    3. ... and NAME.request behind it. From here on the request is answered and not asked.
    4. NAME.back is moved to requests/, in place of an older one. From here on the answer is given.
    5. .working/JOB is removed.

What is in JOB says how far it came, whenever it was left:

    nothing or "part"          before 1 or in 5: remove JOB
    back                       after 1: go on if the files in requests/ have JOB's stamps, else remove JOB
    back, history              after 2: go on if NAME.request has JOB's stamp and no other history came, else remove JOB
    back, request (, history)  after 3: go on; but if NAME.request is there again, it was asked anew: remove JOB
    request and/or history     after 4: remove JOB

So ``conclude`` is both the second half of answering and the whole of recovery. A client that replaces or removes its
request before the answer was given has thereby taken it back. What it replaces between our look at the stamps and the
steps 2 and 3 is moved in place of JOB's files, has other stamps than JOB, and is moved back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from server.errors import BadRequest, StartupError
from server.spool.names import is_temporary
from server.spool.writers import can_tell_writers, is_being_written, lock

REQUEST, HISTORY, BACK, ERROR = ".request", ".history", ".back", ".error"
MAX_BYTES = 8 * 2**20  # of a file that is read, as of an HTTP body

log = logging.getLogger(__name__)


class Stamp(NamedTuple):
    """What tells one version of a file from another: when it was changed, in nanoseconds, and its size in bytes."""

    changed: int
    size: int


class Inputs(NamedTuple):
    """The stamps of a request and of its history; None for a file that is not there."""

    request: Stamp | None
    history: Stamp | None


class SpoolFolder:
    """The files of a folder that ``open_folder`` has prepared.

    Every method raises OSError where the system refuses; nothing is lost then.
    """

    def __init__(self, root: Path):
        self.requests = os.path.join(root, "requests")
        self._flags = os.path.join(root, "flags")
        self._working = os.path.join(self.requests, ".working")
        self._write("part", b"")  # shows that files can be written here, too
        self._asks_for_writers = can_tell_writers(os.path.join(self._working, "part"))
        os.unlink(os.path.join(self._working, "part"))

    def scan(self) -> dict[str, Inputs]:
        """All requests by name, the earliest change first."""
        with os.scandir(self.requests) as entries:
            files = [e.name for e in entries if e.name.endswith(REQUEST) and not is_temporary(e.name)]
        seen = {name: self.look(name) for name in (file.removesuffix(REQUEST) for file in files)}
        return dict(sorted(((n, i) for n, i in seen.items() if i.request), key=lambda item: (item[1].request, item[0])))

    def look(self, name: str) -> Inputs:
        return Inputs(_stamp(self._path(name + REQUEST)), _stamp(self._path(name + HISTORY)))

    def is_being_written(self, name: str) -> bool:
        files = [self._path(name + suffix) for suffix in (REQUEST, HISTORY)]
        return self._asks_for_writers and any(is_being_written(file) for file in files if _is_file(file))

    def read(self, name: str) -> tuple[bytes, bytes]:
        """A request and its history (b"" without one); raises BadRequest for what is no file, or too large.

        Raises FileNotFoundError for a request that has been removed.
        """
        history = self._read(name + HISTORY) if os.path.lexists(self._path(name + HISTORY)) else b""
        return self._read(name + REQUEST), history

    def store(self, name: str, inputs: Inputs, answer: bytes) -> str:
        """Step 1; returns the JOB that ``conclude`` goes on with."""
        job = f"{_spell(inputs.request)}_{_spell(inputs.history)}_{secrets.token_hex(4)}"
        os.mkdir(os.path.join(self._working, job))
        try:
            self._write(os.path.join(job, "part"), answer)
            os.rename(self._inside(job, "part"), self._inside(job, name + BACK))
        except OSError:
            self._remove(job)
            raise
        return job

    def conclude(self, job: str) -> bool:
        """Go on from wherever ``job`` is; True if the answer is given, False if its request was taken back."""
        asked, files = _inputs(job), os.listdir(self._inside(job))
        name = next((file.removesuffix(BACK) for file in files if file.endswith(BACK)), None)
        if name is None:
            self._remove(job)
            return _name_of(files) is not None
        if name + REQUEST not in files and not self._take(job, name, asked):
            given = False
        elif given := self._moved(job, name) == asked and not os.path.lexists(self._path(name + REQUEST)):
            os.replace(self._inside(job, name + BACK), self._path(name + BACK))
        if not given:
            self._give_back(job, name, asked)
        self._remove(job)
        return given

    def jobs(self) -> dict[str, str | None]:
        """What was left in .working, by JOB: the name of its request, if there is anything left of it."""
        with os.scandir(self._working) as entries:
            found = [e.name for e in entries if e.is_dir(follow_symlinks=False) and _inputs(e.name)]
        return {job: _name_of(os.listdir(self._inside(job))) for job in found}

    def refuse(self, name: str, sentence: str) -> None:
        """Write NAME.error; the request stays."""
        self._write("part", sentence.encode() + b"\n")
        os.replace(os.path.join(self._working, "part"), self._path(name + ERROR))

    def refused_at(self, name: str) -> int | None:
        """When NAME.error was written, in nanoseconds; None if there is none."""
        stamp = _stamp(self._path(name + ERROR))
        return stamp and stamp.changed

    def forgive(self, name: str) -> None:
        """Remove NAME.error, if there is one."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(name + ERROR))

    def flag_is_up(self, name: str) -> bool:
        return _is_file(self._flag(name))

    def lower_flag(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._flag(name))

    def write_status(self, text: str) -> None:
        """flags/status.back, and only then its flag is removed: who waits for either one finds the answer."""
        self._write("part", text.encode(errors="replace"))
        os.replace(os.path.join(self._working, "part"), os.path.join(self._flags, "status.back"))
        self.lower_flag("status")

    def _take(self, job: str, name: str, asked: Inputs) -> bool:
        """Steps 2 and 3; False if something else is asked by now."""
        moved, there = self._moved(job, name), self.look(name)
        if moved.history is None:
            if there != asked:
                return False
            if asked.history:
                os.rename(self._path(name + HISTORY), self._inside(job, name + HISTORY))
        elif (there, moved.history) != (Inputs(asked.request, None), asked.history):
            return False
        os.rename(self._path(name + REQUEST), self._inside(job, name + REQUEST))
        return True

    def _give_back(self, job: str, name: str, asked: Inputs) -> None:
        """What the client wrote while we moved its files is not JOB's, nor is a request that got another history."""
        moved = self._moved(job, name)
        if moved.history and moved.history != asked.history:
            self._move_back(job, name + HISTORY)
        if moved.request and moved != asked:
            self._move_back(job, name + REQUEST)

    def _move_back(self, job: str, file: str) -> None:
        if not os.path.lexists(self._path(file)):
            os.rename(self._inside(job, file), self._path(file))

    def _moved(self, job: str, name: str) -> Inputs:
        return Inputs(_stamp(self._inside(job, name + REQUEST)), _stamp(self._inside(job, name + HISTORY)))

    def _remove(self, job: str) -> None:
        # the answer first: a request without one is not answered again
        for file in sorted(os.listdir(self._inside(job))):
            os.unlink(self._inside(job, file))
        os.rmdir(self._inside(job))

    def _read(self, file: str) -> bytes:
        path = self._path(file)
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise BadRequest(f"{file} 不是普通文件（链接和文件夹不读）。",
                             f"{file} is not an ordinary file; links and folders are not read.")  # fmt: skip
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(path, flags), "rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise BadRequest(f"{file} 太大：最多允许 {MAX_BYTES // 2**20} MiB。",
                             f"{file} is too large: at most {MAX_BYTES // 2**20} MiB are allowed.")  # fmt: skip
        return data

    def _write(self, file: str, data: bytes) -> None:
        with open(os.path.join(self._working, file), "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())

    def _path(self, file: str) -> str:
        return os.path.join(self.requests, file)

    def _flag(self, name: str) -> str:
        return os.path.join(self._flags, name + ".flag")

    def _inside(self, job: str, *file: str) -> str:
        return os.path.join(self._working, job, *file)


@contextlib.contextmanager
def open_folder(root: Path) -> Iterator[SpoolFolder]:
    """Make the folder ready and keep others off it; raises StartupError where that cannot be done.

    A quit.flag that is already there was meant for a program that is gone.
    """
    try:
        for folder in (root / "flags", root / "requests" / ".working"):
            folder.mkdir(parents=True, exist_ok=True)
        file = open(root / "requests" / ".working" / "lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise _unusable(root, error) from None
    with file:
        if not lock(file):
            raise StartupError(f"另一个程序正在处理文件夹 {root}：请先关掉它，或换一个文件夹。",
                               f"Another program is answering the requests in {root}: stop it, or choose another "
                               "folder.")  # fmt: skip
        try:
            spool = SpoolFolder(root)
            spool.lower_flag("quit")
        except OSError as error:
            raise _unusable(root, error) from None
        yield spool


def _unusable(root: Path, error: OSError) -> StartupError:
    return StartupError(f"不能使用文件夹 {root}（{error.strerror}）：请检查路径和权限，或换一个文件夹。",
                        f"The folder {root} cannot be used ({error.strerror}): check the path and its permissions, or "
                        "choose another one.")  # fmt: skip


def _name_of(files: list[str]) -> str | None:
    """The name of the request that a job's files belong to."""
    found = [file.rpartition(".")[0] for file in files if file.endswith((BACK, REQUEST, HISTORY))]
    return found[0] if found else None


def _is_file(path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False


def _stamp(path: str) -> Stamp | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return Stamp(found.st_mtime_ns, found.st_size)


def _spell(stamp: Stamp | None) -> str:
    return f"{stamp.changed}.{stamp.size}" if stamp else "none"


def _inputs(job: str) -> Inputs | None:
    """The stamps that a JOB's name holds; None if this is no job of ours."""
    try:
        request, history, _ = job.split("_")
        stamps = [None if word == "none" else Stamp(*map(int, word.split("."))) for word in (request, history)]
    except (ValueError, TypeError):
        return None
    return Inputs(*stamps)

"""The files of a spool: what may be seen in them at any moment, and what a killed program leaves behind.

In requests/ a client writes NAME.request and, before it or within the settle time, NAME.history. Both stay there while
the answer is made, so a program that is killed then has lost nothing. An answer that is ready goes through these
steps, each of which is there or not:

    1. .working/JOB/NAME.back is written (as "part", flushed to the disk, renamed). JOB tells the files that were
       answered from other versions of them.
    2. If those files are still the same, NAME.request is moved to JOB/request. From here on it is answered.
    3. NAME.history is moved to JOB/history, if there is one.
    4. NAME.back is moved to requests/, in place of an older one. From here on the answer is given.
    5. .working/JOB is removed.

What is in JOB says how far it came, whenever it was left:

    nothing or "part"          before 1 or in 5: remove JOB
    back                       after 1: go on if the files in requests/ are JOB's
    back, request              after 2: go on if the request is JOB's, no other one came, and no other history
    back, request, history     after 3: go on if the history is JOB's, and no other request came
    request and/or history     after 4: remove JOB

Where it does not go on, something else was asked before the answer was given: what was moved and is not JOB's (the
client replaced it between our look and the move), or belongs to such a file, is moved back unless there is a newer
one, and JOB is removed. A history that came alone after 3 is left for the question that will follow it.

So ``conclude`` is both the second half of answering and the whole of recovery. A client that replaces or removes its
request before it was moved has thereby taken it back. One that replaces the request alone finds the history as it was:
a history is only moved when its request is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from server.errors import BadRequest, StartupError
from server.file_lock import try_lock
from server.spool.names import is_temporary
from server.spool.stamps import Inputs, is_job, mark, marks, stamp_of
from server.spool.writers import can_tell_writers, is_being_written

REQUEST, HISTORY, BACK, ERROR = ".request", ".history", ".back", ".error"
MAX_BYTES = 8 * 2**20  # of a file that is read, as of an HTTP body


class SpoolFolder:
    """The files of a folder that ``open_folder`` has prepared.

    Every method raises OSError where the system refuses; nothing is lost then.
    """

    def __init__(self, root: Path):
        self._root = root
        self.requests = os.path.join(root, "requests")
        self._flags = os.path.join(root, "flags")
        self._working = os.path.join(self.requests, ".working")
        self._lock: IO[bytes] | None = None
        self.left: dict[str, str | None] = {}  # by JOB, when the folder was claimed: the name of its request, if known

    def claim(self) -> None:
        """Make what is missing in the folder and keep others off it; raises StartupError if another program has it."""
        self.close()
        for folder in (self._flags, self._working):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
        with contextlib.ExitStack() as unless_all_goes_well:
            file = unless_all_goes_well.enter_context(open(self._inside("lock"), "ab"))
            if not try_lock(file):
                raise StartupError(f"另一个程序正在处理文件夹 {self._root}：请先关掉它，或换一个文件夹。",
                                   f"Another program is answering the requests in {self._root}: stop it, or choose "
                                   "another folder.")  # fmt: skip
            self._write("part", b"")  # shows that files can be written here, too
            self._asks_for_writers = can_tell_writers(self._inside("part"))
            os.unlink(self._inside("part"))
            self.left = self._jobs()
            unless_all_goes_well.pop_all()
        self._lock = file

    def is_claimed(self) -> bool:
        """False once the folder was removed, whether or not somebody made it again: others could claim that one."""
        if self._lock is None:
            return False
        try:
            ours, there = os.fstat(self._lock.fileno()), os.stat(self._inside("lock"))
        except OSError:
            return False
        return os.name == "nt" or os.path.samestat(ours, there)  # Windows lets nobody remove a file that is open

    def close(self) -> None:
        if self._lock:
            self._lock.close()
        self._lock = None

    def scan(self) -> dict[str, Inputs]:
        """All requests by name, the earliest change first."""
        with os.scandir(self.requests) as entries:
            files = [e.name for e in entries if e.name.endswith(REQUEST) and not is_temporary(e.name)]
        seen = {name: self.look(name) for name in (file.removesuffix(REQUEST) for file in files)}
        there = [(inputs.request.changed, name) for name, inputs in seen.items() if inputs.request]
        return {name: seen[name] for _, name in sorted(there)}

    def look(self, name: str) -> Inputs:
        return Inputs(stamp_of(self._path(name + REQUEST)), stamp_of(self._path(name + HISTORY)))

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
        """Step 1; returns the JOB that ``conclude`` goes on with. Raises BadRequest for a name that is too long."""
        job = marks(inputs) + secrets.token_hex(2)
        try:
            os.mkdir(self._inside(job))
            try:
                self._write(os.path.join(job, "part"), answer)
                os.rename(self._inside(job, "part"), self._inside(job, name + BACK))
            except OSError:
                self._remove(job)
                raise
        except OSError as error:
            # Windows: "the path is not found", and "the file name or extension is too long"
            if error.errno == errno.ENAMETOOLONG or getattr(error, "winerror", None) in (3, 206):
                raise BadRequest("文件夹和文件名合起来太长：请换一个短些的名字。",
                                 "The folder and the file's name are too long together: choose a shorter "
                                 "name.") from None  # fmt: skip
            raise
        return job

    def conclude(self, job: str) -> bool:
        """Go on from wherever ``job`` is; True if the answer is given, False if its request was taken back."""
        files = os.listdir(self._inside(job))
        name = _name_of(files)
        if name is None:
            given = "request" in files
        elif given := self._take(job, name):
            os.replace(self._inside(job, name + BACK), self._path(name + BACK))
        else:
            self._give_back(job, name)
        self._remove(job)
        return given

    def refuse(self, name: str, sentence: str) -> None:
        """Write NAME.error; the request stays."""
        self._write("part", sentence.encode() + b"\n")
        os.replace(self._inside("part"), self._path(name + ERROR))

    def is_refused(self, name: str) -> bool:
        return os.path.lexists(self._path(name + ERROR))

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
        os.replace(self._inside("part"), os.path.join(self._flags, "status.back"))
        self.lower_flag("status")

    def _jobs(self) -> dict[str, str | None]:
        with os.scandir(self._working) as entries:
            found = [e.name for e in entries if e.is_dir(follow_symlinks=False) and is_job(e.name)]
        return {job: _name_of(os.listdir(self._inside(job))) for job in found}

    def _take(self, job: str, name: str) -> bool:
        """Steps 2 and 3, as far as they are not done; False if something else is asked by now."""
        asked_request, asked_history, *_ = job.split("_")
        if not self._moved(job).request:
            if not job.startswith(marks(self.look(name))):
                return False
            os.rename(self._path(name + REQUEST), self._inside(job, "request"))
        moved, there = self._moved(job), self.look(name)
        if there.request or mark(moved.request) != asked_request:
            return False
        if there.history and not moved.history:
            if mark(there.history) != asked_history:
                return False
            os.rename(self._path(name + HISTORY), self._inside(job, "history"))
            moved = self._moved(job)
        return not moved.history or mark(moved.history) == asked_history

    def _give_back(self, job: str, name: str) -> None:
        """What was moved and is not answered. The history first: a request without it is another question."""
        moved = self._moved(job)
        if moved.history and mark(moved.history) != job.split("_")[1]:
            self._move_back(job, "history", name + HISTORY)
        if moved.request:
            self._move_back(job, "request", name + REQUEST)

    def _move_back(self, job: str, moved: str, file: str) -> None:
        if not os.path.lexists(self._path(file)):
            os.rename(self._inside(job, moved), self._path(file))

    def _moved(self, job: str) -> Inputs:
        return Inputs(stamp_of(self._inside(job, "request")), stamp_of(self._inside(job, "history")))

    def _remove(self, job: str) -> None:
        # the answer first: without one, what is left of JOB means nothing
        for file in sorted(os.listdir(self._inside(job)), key=lambda file: not file.endswith(BACK)):
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
        with open(self._inside(file), "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())

    def _path(self, file: str) -> str:
        return os.path.join(self.requests, file)

    def _flag(self, name: str) -> str:
        return os.path.join(self._flags, name + ".flag")

    def _inside(self, *parts: str) -> str:
        return os.path.join(self._working, *parts)


@contextlib.contextmanager
def open_folder(root: Path) -> Iterator[SpoolFolder]:
    """Make the folder ready and keep others off it; raises StartupError where that cannot be done.

    A quit.flag that is already there was meant for a program that is gone.
    """
    with contextlib.closing(SpoolFolder(root)) as spool:
        try:
            os.makedirs(spool.requests, exist_ok=True)
            spool.claim()
            spool.lower_flag("quit")
        except OSError as error:
            raise _unusable(root, error) from None
        yield spool


def _unusable(root: Path, error: OSError) -> StartupError:
    return StartupError(f"不能使用文件夹 {root}（{error.strerror}）：请检查路径和权限，或换一个文件夹。",
                        f"The folder {root} cannot be used ({error.strerror}): check the path and its permissions, or "
                        "choose another one.")  # fmt: skip


def _name_of(files: list[str]) -> str | None:
    """The name of the request that a job's files answer; None without an answer."""
    return next((file.removesuffix(BACK) for file in files if file.endswith(BACK)), None)


def _is_file(path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False

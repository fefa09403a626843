"""Whether the files that are in a folder are the published ones, and which of them were found so before."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.converted import Converted, has_right_sums
from server.download.folder import converted_files
from server.download.plan import is_text
from server.download.progress import Progress, readable
from server.file_lock import PRIVATE

_BLOCK = 4 * 2**20


class State(enum.Enum):
    RIGHT = "right"
    ABSENT = "absent"
    BROKEN = "broken"
    UNKNOWN = "unknown"  # it is there, and nobody says what it should be


# names of files -> bytes and SHA-256, each None where it is not known
Expected = Mapping[str, tuple[int | None, str | None]]


def check_files(
    folder: Path, expected: Expected, stop: threading.Event, *, zh: bool, again: bool = False
) -> dict[str, State]:
    """``check_file`` for all of them, with a bar or lines about it where anything has to be hashed."""
    work = sum(_needs_hashing(folder, name, *what, again=again) for name, what in expected.items())
    if work:
        size = readable(work)
        print(f"核对已有的文件（{size}）……" if zh else f"checking the files that are there ({size}) ...", flush=True)
    with Progress(work, 0, zh=zh) as progress:
        return {
            name: check_file(folder, name, *what, stop, progress.advance, again=again)
            for name, what in expected.items()
        }


def check_file(
    folder: Path,
    name: str,
    size: int | None,
    sha256: str | None,
    stop: threading.Event,
    advance: Callable[[int], None],
    *,
    again: bool = False,
) -> State:
    """Compare a file with what is known of it: its size in bytes, its SHA-256, or None.

    A file that was found right and not touched since is only hashed ``again`` if asked for; ``advance`` is called with
    the bytes as they are hashed. Raises OSError and Stopped.
    """
    path = folder / name
    if not path.is_file():
        return State.ABSENT
    if is_text(name):  # people edit these, and sources have them in different versions
        return State.RIGHT if _is_readable(path) else State.BROKEN
    if size is not None and path.stat().st_size != size:
        return State.BROKEN
    if sha256 is None:
        return State.RIGHT if size is not None else State.UNKNOWN
    record = Record(folder)
    if not again and _is_remembered(record, name, sha256):
        return State.RIGHT
    if hash_file(path, stop, advance).hexdigest() == sha256:
        record.remember(name, sha256)
        return State.RIGHT
    record.forget(name)
    return State.BROKEN


def check_converted(folder: Path, stop: threading.Event) -> dict[str, State]:
    """The files of weights that were made here, by their own sums: they have no published ones. Raises OSError."""

    def advance(count: int) -> None:
        if stop.is_set():
            raise Stopped

    return {
        converted_name(file): State.RIGHT if has_right_sums(file, advance) else State.BROKEN
        for file in converted_files(folder)
    }


def converted_name(file: Converted) -> str:
    """The path within the model's folder."""
    return file.path.relative_to(file.folder).as_posix()


def _needs_hashing(folder: Path, name: str, size: int | None, sha256: str | None, *, again: bool = False) -> int:
    """Bytes that ``check_file`` will hash."""
    path = folder / name
    if sha256 is None or is_text(name) or not path.is_file():
        return 0
    there = path.stat().st_size
    if size not in (None, there) or (not again and _is_remembered(Record(folder), name, sha256)):
        return 0
    return there


def _is_remembered(record: Record, name: str, sha256: str) -> bool:
    return record.published(name) == sha256 and record.is_unchanged(name)


def _is_readable(path: Path) -> bool:
    content = path.read_bytes()
    if path.suffix != ".json":
        return bool(content.strip())
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


class Record:
    """SHA-256 that the files in ``folder`` were found to have, as they should, and when they were last looked at."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / PRIVATE / "verified.json"

    def published(self, name: str) -> str | None:
        """What the file should be; None if it was neither downloaded nor checked here."""
        return self._entry(name).get("sha256")

    def is_unchanged(self, name: str) -> bool:
        """Whether the file has the size and the time of change that it had when it was found right."""
        entry = self._entry(name)
        try:
            return [entry.get("size"), entry.get("mtime_ns")] == _stamp((self._folder / name).stat())
        except OSError:
            return False

    def remember(self, name: str, sha256: str) -> None:
        """The file was just found right."""
        size, mtime_ns = _stamp((self._folder / name).stat())
        self._save(name, {"size": size, "mtime_ns": mtime_ns, "sha256": sha256})

    def forget(self, name: str) -> None:
        """The file was found wrong, though nothing may show that it was changed."""
        if sha256 := self.published(name):
            self._save(name, {"sha256": sha256})

    def _save(self, name: str, entry: Mapping[str, Any]) -> None:
        draft = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # where nothing can be written, everything is only hashed again next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({**self._load(), name: entry}, indent=1), encoding="utf-8")
            os.replace(draft, self._path)

    def _entry(self, name: str) -> Mapping[str, Any]:
        entry = self._load().get(name)
        return entry if isinstance(entry, dict) else {}

    def _load(self) -> Mapping[str, Any]:
        try:
            entries = json.loads(self._path.read_bytes())
        except (OSError, ValueError):  # none yet, or damaged: then nothing is known
            return {}
        return entries if isinstance(entries, dict) else {}


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]


class Stopped(Exception):
    """The user pressed Ctrl+C; where it is noticed, everything is in a state that can be gone on from."""


def hash_file(path: Path, stop: threading.Event, advance: Callable[[int], None]) -> hashlib._Hash:
    """SHA-256 of what is in the file, as an object that can take more; calls ``advance`` with the bytes of each step.

    Raises OSError, and Stopped when ``stop`` is set.
    """
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if stop.is_set():
                raise Stopped
            sha.update(block)
            advance(len(block))
    return sha

"""Whether the files that are in a folder are the published ones."""

from __future__ import annotations

import enum
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from server.converted import Converted, has_right_sums
from server.download.folder import converted_files, is_pointer
from server.download.plan import is_text
from server.download.progress import Progress, readable
from server.download.record import Record, Stopped, hash_file


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
    if is_pointer(path):
        return State.BROKEN
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
    if sha256 is None or is_text(name) or not path.is_file() or is_pointer(path):
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

"""Which files of a model folder were found to be right, so that gigabytes are not hashed at every start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.file_lock import PRIVATE

_BLOCK = 4 * 2**20


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

"""A spool whose clock stands still: tests say how much time passes, and play the client."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

from server.api.question_files import read_question
from server.spool import loop
from server.spool.folder import open_folder
from tests.functional.spool_driver import EchoEngine, echo

ANSWER = echo  # what EchoEngine makes of a question and its history


class Clock:
    """In place of the module ``time``."""

    def __init__(self):
        self.now = 1000.0
        self.busy = 0.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.busy

    perf_counter = thread_time


class Desk:
    """A folder, a client's hands on it, and the program beside it."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.requests, self.flags = root, root / "requests", root / "flags"
        self.clock = Clock()
        self.records: list[dict] = []
        self._times = itertools.count(1_700_000_000)
        self._open = contextlib.ExitStack()
        monkeypatch.setattr(loop, "time", self.clock)

    def start(self, engine: EchoEngine | None = None, *, at_once: int = 4, language: str = "en") -> loop.Spool:
        self.stop()
        self.engine = engine or EchoEngine(capacity=at_once)
        folder = self._open.enter_context(open_folder(self.root))
        self.spool = loop.Spool(
            folder,
            self.engine,
            read_question,
            at_once=at_once,
            language=language,
            record=lambda **entry: self.records.append(entry),
        )
        return self.spool

    def stop(self) -> None:
        """As if the program had been killed: the system frees its lock."""
        self._open.close()

    def wait(self, seconds: float = 2.0) -> bool:
        """Let time pass; False once the program would have ended."""
        for _ in range(round(seconds / 0.1)):
            self.clock.now += 0.1
            if not self.spool.turn():
                return False
        return True

    def ask(self, name: str, query: str | bytes, history: str | bytes | None = None) -> None:
        if history is not None:
            self.write(name + ".history", history)
        self.write(name + ".request", query)

    def write(self, file: str, content: str | bytes) -> None:
        path = self.requests / file
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.touch(path)

    def touch(self, path: Path) -> None:
        """Every change has a time of its own, however coarse the file system's clock is."""
        when = next(self._times)
        os.utime(path, (when, when))

    def raise_flag(self, name: str) -> None:
        (self.flags / f"{name}.flag").touch()

    def read(self, file: str) -> str | None:
        path = self.requests / file
        return path.read_bytes().decode() if path.exists() else None

    def collect(self, name: str) -> str | None:
        """The answer, which is taken away."""
        answer = self.read(name + ".back")
        if answer is not None:
            (self.requests / f"{name}.back").unlink()
        return answer

    def files(self) -> list[str]:
        return sorted(path.name for path in self.requests.iterdir() if path.name != ".working")

    def working(self) -> list[str]:
        return sorted(path.name for path in (self.requests / ".working").iterdir())
